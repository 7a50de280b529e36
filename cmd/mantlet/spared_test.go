package main

import (
	"fmt"
	"net"
	"net/netip"
	"testing"

	"mantlet/internal/lab"
)

// TestOthersLiveOn: a name is taken off a list; its connections end, and those of the others at the same port go on, also such that
// say nothing.
func TestOthersLiveOn(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	const both = "ingress: [{port: 9092, allow: [cart, orders]}]"
	m := p.override(both)
	p.start()
	p.serve(p.Host, lab.Service{Address: fmt.Sprintf(":%d", silentPort)})
	connect := func(name string) (all []net.Conn) {
		for _, addr := range p.Addrs() {
			conn, err := p.handshake(netip.AddrPortFrom(addr, silentPort), p.issue(name).ClientConfig("pod"))
			p.must(err)
			p.must(echo(conn))
			all = append(all, conn)
		}
		return all
	}
	cart, orders := connect("cart"), connect("orders")
	m.write("ingress: [{port: 9092, allow: [cart]}]")
	for _, conn := range orders {
		if err := cut(conn); err != nil {
			t.Errorf("orders, which is not on the list any more: %v", err)
		}
	}
	for _, conn := range cart {
		if err := echo(conn); err != nil {
			t.Errorf("cart, which is on the list still: %v", err)
		}
	}
}
