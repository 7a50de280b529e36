package reconcile

import (
	"fmt"
	"net/netip"
	"time"

	"mantlet/internal/status"
	"mantlet/schema"
)

// follow has the names of the wanted state, and of the one in force, resolved.
func (d *Daemon) follow() {
	if d.Names == nil {
		return
	}
	var all []schema.Upstream
	for _, state := range []*desired{d.want, d.have} {
		if state == nil {
			continue
		}
		for _, e := range state.mesh.Egress {
			all = append(all, e.Upstream)
		}
	}
	d.Names.Follow(all)
}

// refresh resolves all names now.
func (d *Daemon) refresh() {
	if d.Names != nil {
		d.Names.Refresh()
	}
}

// upstreams describes the upstreams of the state in force, or of the wanted one if none is in force.
func (d *Daemon) upstreams() []status.Upstream {
	var state *desired
	d.locked(func() {
		if state = d.have; state == nil {
			state = d.want
		}
	})
	all := []status.Upstream{}
	if state == nil {
		return all
	}
	for _, e := range state.mesh.Egress {
		all = append(all, d.upstream(e))
	}
	return all
}

func (d *Daemon) upstream(e schema.Egress) status.Upstream {
	u := status.Upstream{Listen: e.Listen.String(), Upstream: e.Upstream.String()}
	if addr, isAddress := e.Upstream.Addr(); isAddress {
		u.Addresses = []netip.Addr{addr}
	} else if d.Names != nil {
		u.Resolved = d.Names.Resolved(e.Upstream.Host)
	}
	if u.Addresses == nil {
		u.Addresses = []netip.Addr{}
	}
	return u
}

// Upstream describes the upstream of the egress entry that listens at an address; the zero value if none does.
func (d *Daemon) Upstream(listen string) status.Upstream {
	addr, err := netip.ParseAddrPort(listen)
	if err != nil {
		return status.Upstream{}
	}
	var states []*desired
	d.locked(func() { states = []*desired{d.have, d.want} })
	for _, state := range states {
		if state == nil {
			continue
		}
		for _, e := range state.mesh.Egress {
			if e.Listen == addr {
				return d.upstream(e)
			}
		}
	}
	return status.Upstream{}
}

// maxUnresolved is how many entries are listed among the problems. The status has all.
const maxUnresolved = 5

// unresolved returns the egress entries whose upstream has no address, or none that is confirmed. Before the first lookup that is no
// problem.
func (d *Daemon) unresolved(now time.Time) []error {
	var all []error
	for _, u := range d.upstreams() {
		switch {
		case u.Asked.IsZero():
		case len(u.Addresses) == 0:
			all = append(all, fmt.Errorf("egress %s: %s has no address: %s", u.Listen, u.Upstream, u.Answer))
		case u.StaleSince != nil:
			all = append(all, fmt.Errorf("egress %s: the addresses of %s were confirmed last %s ago: %s",
				u.Listen, u.Upstream, now.Sub(*u.StaleSince).Round(time.Second), u.Answer))
		}
	}
	if more := len(all) - maxUnresolved; more > 0 {
		all = append(all[:maxUnresolved], fmt.Errorf("and %d more egress entries whose upstream has no address, or none that is confirmed", more))
	}
	return all
}
