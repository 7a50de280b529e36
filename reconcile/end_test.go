package reconcile

import (
	"net/netip"
	"slices"
	"testing"

	"mantlet/internal/peers"
	"mantlet/internal/sockdiag"
	"mantlet/internal/status"
	"mantlet/render"
	"mantlet/schema"
)

// TestOrderOfEnding: a connection's two sockets end one after the other, and of the others those alone that were open before the change, at
// ports at which all end, and that no connection has which goes on.
func TestOrderOfEnding(t *testing.T) {
	socket := func(local, remote string) sockdiag.Socket {
		return sockdiag.Socket{Local: netip.MustParseAddrPort(local), Remote: netip.MustParseAddrPort(remote)}
	}
	var (
		forbidden = socket("192.0.2.1:8080", "192.0.2.7:1001")
		unknown   = socket("192.0.2.1:8080", "192.0.2.7:1002")
		stays     = socket("192.0.2.1:8080", "192.0.2.7:1003")
		its       = socket("192.0.2.1:2001", "192.0.2.1:8080")
		others    = socket("192.0.2.1:2002", "192.0.2.1:8080")
		staying   = socket("192.0.2.1:2003", "192.0.2.1:8080")
		later     = socket("192.0.2.1:2004", "192.0.2.1:8080")
		again     = socket("192.0.2.1:2005", "192.0.2.1:8080")
		elsewhere = socket("192.0.2.1:2006", "192.0.2.1:9090")
	)
	c := &change{
		from:  &desired{},
		to:    &desired{generations: render.Generations{Ports: []render.PortsGeneration{{Ports: schema.Ports{First: 8080, Last: 8080}, Generation: 1}}}},
		known: map[sockdiag.Socket]peers.Connection{forbidden: {Upstream: sockdiag.Exact{Socket: its}}, stays: {Upstream: sockdiag.Exact{Socket: staying}}},
		legs:  map[sockdiag.Socket]sockdiag.Cookie{its: 1, others: 2, staying: 3, again: 5, elsewhere: 6},
	}
	open := map[sockdiag.Socket]sockdiag.Details{}
	for s, cookie := range c.legs {
		open[s] = sockdiag.Details{Cookie: cookie}
	}
	open[later], open[again] = sockdiag.Details{Cookie: 4}, sockdiag.Details{Cookie: 7}
	order := c.order(map[sockdiag.Socket]status.EndReason{forbidden: status.EndNotAllowed, unknown: status.EndNotAllowed}, open)
	if i := slices.Index(order, forbidden); i < 0 || i+1 >= len(order) || order[i+1] != its {
		t.Errorf("the two sockets of a connection are not ended one after the other: %v", order)
	}
	for what, s := range map[string]sockdiag.Socket{"of a client that is not known": unknown, "of Envoy's": others} {
		if !slices.Contains(order, s) {
			t.Errorf("one %s is not ended: %v", what, order)
		}
	}
	for what, s := range map[string]sockdiag.Socket{
		"of a connection that goes on": staying, "that was made later": later, "with the addresses of an earlier one": again, "at another port": elsewhere,
	} {
		if slices.Contains(order, s) {
			t.Errorf("one %s is ended: %v", what, order)
		}
	}
}
