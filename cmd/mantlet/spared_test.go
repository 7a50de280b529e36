package main

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"mantlet/internal/lab"
	"mantlet/internal/status"
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
	const after = "ingress: [{port: 9092, allow: [cart]}]"
	const want = "9092: mtls for [cart, orders] -> mtls for [cart]; hot restart; ends 2 open connections\n"
	p.await("it is known who is connected", func() bool { return p.against(after) == want })
	m.write(after)
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
	p.await("status tells whose they were", func() bool {
		last := p.status().Endings
		return len(last) == 1 && last[0].Count == 2 && slices.Equal(last[0].SANs, []string{"orders"}) && last[0].Code == status.EndNotAllowed
	})
	if _, said, _ := p.mantlet("status"); !strings.Contains(said, "orders") || !strings.Contains(said, "LAST ENDED BY A CHANGE") {
		t.Errorf("mantlet status says\n%s", said)
	}
}
