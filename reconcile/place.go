package reconcile

import (
	"mantlet/render"
)

// currentPlace returns what the place is like now. IPv6 may be switched on or off at any time; then the loop is told.
func (d *Daemon) currentPlace() render.Place {
	if d.HasIPv6 == nil {
		return d.Place
	}
	without := !d.HasIPv6()
	d.mu.Lock()
	defer d.mu.Unlock()
	if without != d.Place.NoIPv6 {
		d.Place.NoIPv6 = without
		d.Log.Info("IPv6 was switched on or off: Envoy listens on its loopback address, or not", "ipv6", !without)
		notify(d.notes.changed)
	}
	return d.Place
}

// renderForPlace renders the wanted state, and the one in force, for what the place is like now: an Envoy can't be started where it is to
// listen at an address that is not there. The rules are the same everywhere.
func (d *Daemon) renderForPlace() error {
	place := d.currentPlace()
	for _, state := range []**desired{&d.want, &d.have} {
		before := *state
		if before == nil || before.place == place {
			continue
		}
		rendered, err := render.Render(before.mesh, place)
		if err != nil {
			return err
		}
		after := *before
		after.place, after.state = place, rendered
		d.locked(func() { *state = &after })
	}
	return nil
}
