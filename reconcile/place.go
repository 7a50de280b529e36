package reconcile

import (
	"mantlet/render"
)

// currentPlace returns the place as it is now. IPv6 may be switched on or off at any time; the loop is notified then.
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

// renderForPlace renders the wanted state and the one in force again if the place has changed: Envoy does not start if it is to listen at
// an address that does not exist. The rules do not depend on the place.
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
