package reconcile

import (
	"context"
	"net"
	"net/netip"
	"time"

	"mantlet/internal/status"
	"mantlet/schema"
)

const (
	// maxNames is of how many addresses names are kept, and maxAsked how many wait to be looked up. The others have none.
	maxNames = 1024
	maxAsked = 64
	// nameLimit is how long a look-up may take. Nobody waits for it.
	nameLimit = 5 * time.Second
)

// outboundNames are names of addresses that the pod spoke to.
type outboundNames struct {
	known map[netip.Addr]string // "" for one that was looked up, and has none
	queue chan netip.Addr
}

// set keeps a name. Where there are too many, all are forgotten: those that matter come again.
func (n *outboundNames) set(addr netip.Addr, name string) {
	if len(n.known) >= maxNames {
		clear(n.known)
	}
	n.known[addr] = name
}

// learn takes the names of upstreams, for the addresses that they have now. Those that they had before stay.
func (n *outboundNames) learn(upstreams []status.Upstream) {
	for _, u := range upstreams {
		host, _, err := net.SplitHostPort(u.Upstream)
		if err != nil || !schema.IsHostName(host) {
			continue
		}
		for _, addr := range u.Addresses {
			if n.known[addr] != host {
				n.set(addr, host)
			}
		}
	}
}

// ask has an address looked up, unless too many wait already.
func (n *outboundNames) ask(addr netip.Addr) {
	if _, known := n.known[addr]; known {
		return
	}
	select {
	case n.queue <- addr:
	default:
	}
}

func (n *outboundNames) of(addr netip.Addr) string { return n.known[addr] }

// findNames looks up the names of addresses, one after the other, until ctx ends.
func (d *Daemon) findNames(ctx context.Context) {
	for {
		var addr netip.Addr
		select {
		case <-ctx.Done():
			return
		case addr = <-d.outbound.names.queue:
		}
		within, cancel := context.WithTimeout(ctx, nameLimit)
		name := d.NameOf(within, addr)
		cancel()
		if !schema.IsHostName(name) { // whoever answers may say anything
			name = ""
		}
		d.outbound.mu.Lock()
		if d.outbound.names.known[addr] == "" {
			d.outbound.names.set(addr, name)
		}
		d.outbound.mu.Unlock()
	}
}
