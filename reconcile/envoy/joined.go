package envoy

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"mantlet/internal/bind"
)

// Joined returns an error that names the listeners which another process has joined; nil where there is none. The kernel lets processes
// of Envoy's user join them (SO_REUSEPORT), and gives them a share of the listener's connections. Joined must be called on a thread in
// the pod's network namespace, and not while an Envoy starts.
//
// The kernel does not tell which process a socket belongs to, so sockets are counted: Envoy has one for each listener and worker, and a
// hot restart hands them over.
func (r *Runner) Joined() error {
	names, most := map[netip.AddrPort]string{}, 0
	for _, p := range r.Running() {
		most = max(most, p.workers, 1)
		for _, l := range p.listeners {
			for _, at := range l.addresses {
				names[at] = l.name
			}
		}
	}
	listeners, err := bind.Listeners()
	if err != nil {
		return fmt.Errorf("looking for processes that joined Envoy's listeners: %w", err)
	}
	sockets := map[netip.AddrPort]int{}
	for _, l := range listeners {
		sockets[l.Address]++
	}
	joined := map[netip.AddrPort]int{}
	for at := range names {
		more := max(0, sockets[at]-most)
		for _, any := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
			if all := netip.AddrPortFrom(any, at.Port()); names[all] == "" {
				more += sockets[all]
			}
		}
		if more > 0 {
			joined[at] = more
		}
	}
	var errs []error
	for _, at := range slices.SortedFunc(maps.Keys(joined), netip.AddrPort.Compare) {
		errs = append(errs, fmt.Errorf("listener %s at %s has %d sockets that are not Envoy's: a process of user %d gets a part of its connections",
			names[at], at, joined[at], r.UID))
	}
	return errors.Join(errs...)
}
