package main

import (
	"crypto/tls"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"mantlet/internal/lab"
)

// TestAllow tries each client at each port that has a list of clients, and at one that has none.
func TestAllow(t *testing.T) {
	t.Parallel()
	const spiffe = "spiffe://mesh/ns/shop/sa/cart"
	const (
		mixed    = 9091
		dns      = 9092
		wildcard = 9093
		range1   = 9100
		range2   = 9101
		beside   = 9102
		long1    = 20000 // of a range that is matched by an expression
		long2    = 20099
		past     = 20100
	)
	p := newPod(t, `MANTLET_CONFIG_INLINE=
ingress:
  - {port: 9091, allow: [frontend, `+spiffe+`]}
  - {port: 9092, allow: [cart.shop.svc]}
  - {port: 9093, allow: ["*.shop.svc"]}
  - {port: 9100-9101, allow: [frontend]}
  - {port: 20000-20099, allow: [frontend]}
`)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	ports := []uint16{mtlsPort, mixed, dns, wildcard, range1, range2, beside, long1, long2, past}
	workloads := map[uint16]*lab.Workload{}
	p.besiege()
	p.run()
	for _, port := range ports {
		workloads[port] = p.protect(port)
	}
	p.ready()

	open := []uint16{mtlsPort, beside, past}
	for name, c := range map[string]struct {
		leaf  lab.Leaf
		letIn []uint16 // beside those that are open
	}{
		"the name":                          {lab.Leaf{DNSNames: []string{"frontend"}}, []uint16{mixed, range1, range2, long1, long2}},
		"the name among others":             {lab.Leaf{DNSNames: []string{"a", "frontend", "b"}, URIs: []string{"spiffe://x"}}, []uint16{mixed, range1, range2, long1, long2}},
		"the URI":                           {lab.Leaf{DNSNames: []string{"a"}, URIs: []string{spiffe}}, []uint16{mixed}},
		"another name":                      {lab.Leaf{DNSNames: []string{"cart"}}, nil},
		"longer names":                      {lab.Leaf{DNSNames: []string{"frontend2", "xfrontend", "frontend.evil", "a.frontend", "frontend "}}, nil},
		"longer URIs":                       {lab.Leaf{URIs: []string{spiffe + "2", spiffe + "/a", "x" + spiffe}}, nil},
		"no SAN":                            {lab.Leaf{CommonName: "frontend"}, nil},
		"the name as a URI, and vice versa": {lab.Leaf{DNSNames: []string{spiffe}, URIs: []string{"frontend"}}, nil},
		"a dotted name":                     {lab.Leaf{DNSNames: []string{"cart.shop.svc"}}, []uint16{dns}},
		"a name that a regular expression without quotes would match": {lab.Leaf{DNSNames: []string{"cartxshop.svc"}}, nil},
		"a wildcard that covers the name":                             {lab.Leaf{DNSNames: []string{"*.shop.svc"}}, []uint16{wildcard}},
		"the wildcard of all":                                         {lab.Leaf{DNSNames: []string{"*"}}, nil},
	} {
		identity, err := p.mesh.Issue(c.leaf)
		p.must(err)
		letIn := append(c.letIn, open...)
		for _, addr := range p.Addrs() {
			for version, number := range versions {
				for _, port := range ports {
					if port >= range1 && !strings.HasSuffix(name, " name") { // two clients tell it all
						continue
					}
					before := len(workloads[port].Connections())
					err := p.exchange(netip.AddrPortFrom(addr, port), only(number, identity.ClientConfig("pod")))
					want := slices.Contains(letIn, port)
					if got := err == nil; got != want {
						t.Errorf("%s: at %d of %s with %s: let in is %t, want %t: %v", name, port, addr, version, got, want, err)
					}
					if got := len(workloads[port].Connections()) > before; got != want {
						t.Errorf("%s: at %d of %s with %s: the workload has a connection is %t", name, port, addr, version, got)
					}
				}
			}
		}
	}
	strangers := p.strangers()
	foreign, err := lab.NewAuthority("mesh")
	p.must(err)
	namesake, err := foreign.Issue(lab.Leaf{DNSNames: []string{"frontend"}})
	p.must(err)
	strangers["the name, from a foreign CA"] = namesake.Certificate()
	for _, addr := range p.Addrs() {
		for _, version := range versions {
			p.refusesStrangers(t, netip.AddrPortFrom(addr, mixed), version, strangers, workloads[mixed])
		}
	}
}

// TestTickets obtains TLS session tickets where a client is let in, and shows them where it is not: what a ticket stands for
// is what its own port demanded.
func TestTickets(t *testing.T) {
	t.Parallel()
	const listed = 9091
	p := newPod(t, web, "MANTLET_CONFIG_INLINE=ingress: [{port: 9091, allow: [frontend]}]")
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.besiege()
	p.run()
	p.protect(tlsPort)
	p.protect(mtlsPort)
	p.protect(listed)
	p.ready()
	frontend := p.issue("frontend")

	for _, c := range []struct {
		what     string
		config   *tls.Config
		from, to uint16
		letIn    bool
	}{
		{"a client that is on no list", p.client.ClientConfig("pod"), mtlsPort, listed, false},
		{"a client without a certificate", p.anonymous(), tlsPort, mtlsPort, false},
		{"a client without a certificate", p.anonymous(), tlsPort, listed, false},
		{"a client that is on the list", frontend.ClientConfig("pod"), mtlsPort, listed, true},
		{"a client that is on the list", frontend.ClientConfig("pod"), listed, mtlsPort, true},
	} {
		for _, addr := range p.Addrs() {
			for version, number := range versions {
				t.Run(fmt.Sprintf("%s/%d to %d/%s/%s", c.what, c.from, c.to, version, addr), func(t *testing.T) {
					config := only(number, c.config)
					config.ClientSessionCache = tls.NewLRUClientSessionCache(8)
					if err := p.exchange(netip.AddrPortFrom(addr, c.from), config); err != nil {
						t.Fatal(err)
					}
					// The same port takes the ticket: it is one, and it is shown.
					if conn, err := p.handshake(netip.AddrPortFrom(addr, c.from), config); err != nil || !conn.ConnectionState().DidResume {
						t.Fatalf("no session is resumed: %v", err)
					} else if err := echo(conn); err != nil {
						t.Fatal(err)
					}
					if err := p.exchange(netip.AddrPortFrom(addr, c.to), config); (err == nil) != c.letIn {
						t.Errorf("let in is %t, want %t: %v", err == nil, c.letIn, err)
					}
				})
			}
		}
	}
}

// TestServerNames tries endpoints that the mesh CA vouches for: those whose names are not asked for are other workloads, and
// must not get a byte.
func TestServerNames(t *testing.T) {
	t.Parallel()
	const spiffe = "spiffe://mesh/ns/shop/sa/billing"
	cases := []struct {
		endpoint string
		leaf     lab.Leaf
		accepted bool
	}{
		{"the first name", lab.Leaf{DNSNames: []string{"billing.shop.svc"}}, true},
		{"the second name", lab.Leaf{DNSNames: []string{"a", "billing-svc"}}, true},
		{"the URI", lab.Leaf{URIs: []string{spiffe}}, true},
		{"a wildcard that covers the name", lab.Leaf{DNSNames: []string{"*.shop.svc"}}, true},
		{"a wildcard of something else", lab.Leaf{DNSNames: []string{"*.pay.svc", "*.svc", "*.billing.shop.svc"}}, false},
		{"another workload", lab.Leaf{DNSNames: []string{"cart", "cart.shop.svc"}, URIs: []string{"spiffe://mesh/ns/shop/sa/cart"}}, false},
		{"longer names", lab.Leaf{DNSNames: []string{"billing-svc2", "billing-svc.evil", "a.billing-svc"}, URIs: []string{spiffe + "2"}}, false},
		{"the URI as a name, and vice versa", lab.Leaf{DNSNames: []string{spiffe}, URIs: []string{"billing-svc"}}, false},
		{"no SAN", lab.Leaf{CommonName: "billing-svc"}, false},
	}
	p := newPod(t)
	peers := p.host("peers")
	p.zone(map[string][]netip.Addr{"absolute-svc": peers.Addrs()})
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	var inline strings.Builder
	inline.WriteString("MANTLET_CONFIG_INLINE=egress:\n  - {listen: \"127.137.0.1:80\", upstream: \"absolute-svc.:8080\"}\n")
	type try struct {
		what     string
		listen   netip.AddrPort
		endpoint *lab.Workload
		accepted bool
	}
	var tries []try
	for i, c := range cases {
		identity, err := p.mesh.Issue(c.leaf)
		p.must(err)
		for version, number := range versions {
			port := uint16(10_000 + 2*i + int(number%2))
			endpoint := p.serve(peers, lab.Service{Address: fmt.Sprintf(":%d", port), TLS: only(number, identity.ServerConfig())})
			for _, addr := range peers.Addrs() {
				at := listen(fmt.Sprintf("127.137.1.%d:80", 1+len(tries)))
				tries = append(tries, try{c.endpoint + " at " + addr.String() + " with " + version, at, endpoint, c.accepted})
				fmt.Fprintf(&inline, "  - {listen: %q, upstream: %q, serverNames: [billing.shop.svc, billing-svc, %q]}\n",
					at, netip.AddrPortFrom(addr, port), spiffe)
			}
		}
	}
	p.sidecar.Env = append(p.sidecar.Env, inline.String())
	absolute := p.endpoint(peers, p.issue("absolute-svc"))
	p.besiege()
	p.run()
	p.protect(mtlsPort)
	p.ready()

	for _, try := range tries {
		before := len(try.endpoint.Connections())
		conn := p.dial(p.Host, try.listen)
		if err := echo(conn); (err == nil) != try.accepted {
			t.Errorf("%s: accepted is %t: %v", try.what, err == nil, err)
		}
		all := try.endpoint.Connections()[before:]
		if len(all) == 0 {
			t.Errorf("%s: it was not tried", try.what)
		}
		for _, c := range all {
			switch {
			case try.accepted && (c.TLS == nil || c.TLS.ServerName != "billing.shop.svc"):
				t.Errorf("%s: the SNI is not the first name: %+v", try.what, c.TLS)
			case !try.accepted && (c.TLS != nil || c.Received > 0):
				t.Errorf("%s: it got %d bytes: %+v", try.what, c.Received, c)
			}
		}
	}
	// crypto/tls refuses an SNI that ends in a dot, as RFC 6066 wants it.
	p.await("a name with a final dot works", func() bool { return echo(p.dial(p.Host, listen("127.137.0.1:80"))) == nil })
	if all := absolute.Connections(); all[len(all)-1].TLS.ServerName != "absolute-svc" {
		t.Errorf("the SNI of absolute-svc. is %+v", all[len(all)-1].TLS)
	}
}
