package main

import (
	"fmt"
	"net"
	"net/netip"
	"testing"

	"mantlet/internal/lab"
)

// silentPort is where a workload listens that says nothing.
const silentPort = 9092

// TestForbiddenConnectionsEndAtOnce: both ends of a connection that a change forbids are told, though neither sends anything.
func TestForbiddenConnectionsEndAtOnce(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	billing := p.host("billing")
	identity := p.issue("billing")
	p.serve(billing, lab.Service{Address: ":8443", TLS: identity.ServerConfig()})
	entry := func(listen string) string {
		return fmt.Sprintf("{listen: '%s', upstream: '%s', serverNames: [billing]}", listen, netip.AddrPortFrom(billing.IPv4, 8443))
	}
	m := p.override("egress: [" + entry("127.137.0.1:8081") + ", " + entry("127.137.0.2:8081") + "]")
	p.start()
	listener, err := p.Listen("tcp", fmt.Sprintf(":%d", silentPort))
	p.must(err)
	t.Cleanup(func() { _ = listener.Close() })
	plain, err := p.Listen("tcp", fmt.Sprintf(":%d", passthroughPort))
	p.must(err)
	t.Cleanup(func() { _ = plain.Close() })
	accept := func(listener net.Listener) net.Conn {
		conn, err := listener.Accept()
		p.must(err)
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}

	type end struct {
		name string
		conn net.Conn
	}
	var forbidden []end
	for _, addr := range p.Addrs() {
		client, err := p.handshake(netip.AddrPortFrom(addr, silentPort), p.client.ClientConfig("pod"))
		p.must(err)
		forbidden = append(forbidden, end{"a client at a port of mode mtls", client}, end{"the workload behind it", accept(listener)})
		passed := p.dial(p.outside, netip.AddrPortFrom(addr, passthroughPort))
		forbidden = append(forbidden, end{"a client at a passthrough port", passed}, end{"the workload there", accept(plain)})
	}
	out := p.dial(p.Host, netip.MustParseAddrPort("127.137.0.1:8081"))
	p.must(echo(out))
	forbidden = append(forbidden, end{"the workload at an egress entry", out})
	stays := p.dial(p.Host, netip.MustParseAddrPort("127.137.0.2:8081"))
	p.must(echo(stays))
	other, err := p.handshake(netip.AddrPortFrom(p.IPv4, mtlsPort), p.client.ClientConfig("pod"))
	p.must(err)
	p.must(echo(other))

	m.write(fmt.Sprintf("egress: [%s]\ningress: [{port: %d, allow: [somebody]}, {port: %d, mode: mtls}]", entry("127.137.0.2:8081"), silentPort, passthroughPort))
	for _, e := range forbidden {
		if err := cut(e.conn); err != nil {
			t.Errorf("%s: %v, want that it is told of the end", e.name, err)
		}
	}
	p.must(echo(stays))
	p.must(echo(other))
	p.await("status tells of them", func() bool {
		status := p.status()
		return len(status.Ended) == 3 && status.Ended[0].Count == 4 && status.Ended[1].Count == 1
	})
}
