package reconcile

import (
	"mantlet/render"
)

// currentPlace returns the place as it is now. IPv6 may be switched on or off at any time, and resolv.conf may name other servers; the
// loop is notified then.
func (d *Daemon) currentPlace() render.Place {
	var now render.Place
	if d.HasIPv6 != nil {
		now.NoIPv6 = !d.HasIPv6()
	}
	if d.Resolvers != nil {
		now.Resolvers = d.Resolvers()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	before := d.Place
	if d.HasIPv6 != nil && now.NoIPv6 != before.NoIPv6 {
		d.Place.NoIPv6 = now.NoIPv6
		d.Log.Info("IPv6 was switched on or off: Envoy listens on its loopback address, or not", "ipv6", !now.NoIPv6)
	}
	if d.Resolvers != nil {
		d.Place.Resolvers = now.Resolvers
	}
	if d.Place != before {
		notify(d.notes.changed)
	}
	return d.Place
}

// renderForPlace renders the wanted state and the one in force again if the place has changed: Envoy does not start if it is to listen at
// an address that does not exist. The name
// servers stay those of the rules in force until the rules are replaced.
func (d *Daemon) renderForPlace() error {
	place := d.currentPlace()
	for _, state := range []**desired{&d.want, &d.have} {
		before := *state
		if before == nil {
			continue
		}
		place := place
		if state == &d.have {
			place.Resolvers = before.place.Resolvers // as the rules in the kernel have them
		}
		if before.place == place {
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
