package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"mantlet/internal/lab"
	"mantlet/internal/status"
)

// plainPort is where others listen in plaintext.
const plainPort = 5432

// refusedAtOnce is how long being refused may take: less than until the first SYN is repeated, with time for a busy machine.
const refusedAtOnce = 900 * time.Millisecond

// spoken returns what mantlet says of a destination.
func (p *pod) spoken(to netip.AddrPort, protocol string) (o status.Outbound) {
	p.t.Helper()
	for _, line := range p.status().Outbound {
		if line.Destination == to.String() && line.Protocol == protocol {
			return line
		}
	}
	return o
}

// tell sends a datagram from the pod and returns what is answered, or the error that ICMP told.
func (p *pod) tell(to netip.AddrPort) error {
	p.t.Helper()
	ctx, cancel := p.context()
	defer cancel()
	conn, err := p.Dial(ctx, "udp", to.String())
	p.must(err)
	defer func() { _ = conn.Close() }()
	if err := echo(conn); !errors.Is(err, syscall.EPERM) { // which the system call itself says of what rules drop
		return err
	}
	_, err = conn.Read(make([]byte, 1))
	return err
}

// dialOut connects from the pod; nobody may wait for a retransmission.
func (p *pod) dialOut(to netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(context.Background(), refusedAtOnce)
	defer cancel()
	conn, err := p.Dial(ctx, "tcp", to.String())
	if err == nil {
		_ = conn.Close()
	}
	return err
}

// plain serves TCP and UDP in plaintext on a host.
func (p *pod) plain(on *lab.Host, port uint16) {
	p.t.Helper()
	address := fmt.Sprintf(":%d", port)
	p.serve(on, lab.Service{Address: address})
	p.serve(on, lab.Service{Address: address, Network: "udp"})
}

// TestOutboundIsObserved: mode observe lets all out and tells of it; not of what Envoy sends, nor of what answers.
func TestOutboundIsObserved(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, "MANTLET_OUTBOUND=observe", "EDG_EGRESS_PROXY_CONFIG=billing#127.137.0.1:8081#billing.mesh:8080")
	billing := p.host("billing")
	p.zone(map[string][]netip.Addr{"billing.mesh": {billing.IPv4}})
	p.endpoint(billing, p.issue("billing"))
	p.plain(p.outside, plainPort)
	p.plain(billing, plainPort)
	p.start()
	p.must(echo(p.reach("127.137.0.1:8081")))
	p.must(p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), p.client.ClientConfig("pod")))
	for _, addr := range p.outside.Addrs() {
		to := netip.AddrPortFrom(addr, plainPort)
		for range 3 {
			p.must(echo(p.dial(p.Host, to)))
		}
		p.must(p.tell(to))
		if o := p.spoken(to, "tcp"); o.Count != 3 || o.Verdict != status.OutboundAllowed || o.Listed || o.LastSeen.Before(o.FirstSeen) || time.Since(o.FirstSeen) > limit {
			t.Errorf("mantlet says of TCP %+v", o)
		}
		if o := p.spoken(to, "udp"); o.Count != 1 || o.Fate() != status.OutboundObserved {
			t.Errorf("mantlet says of UDP %+v", o)
		}
		p.await("the log has a line", func() bool {
			return strings.Contains(p.log.String(), to.String()+" is spoken to in the clear: ")
		})
	}
	known := netip.AddrPortFrom(billing.IPv4, plainPort)
	p.must(echo(p.dial(p.Host, known)))
	if o := p.spoken(known, "tcp"); o.Name != "billing.mesh" || o.Suggestion != fmt.Sprintf("{listen: '127.137.0.1:%d', upstream: 'billing.mesh:%d', serverNames: [billing.mesh]}", plainPort, plainPort) {
		t.Errorf("mantlet says of who has a name %+v", o)
	}
	if n := len(p.status().Outbound); n != 5 {
		t.Errorf("there are %d destinations: %+v", n, p.status().Outbound)
	}
	_, said, _ := p.mantlet("status")
	if !strings.Contains(said, "observed") || !strings.Contains(said, "billing.mesh:5432") {
		t.Errorf("mantlet status says\n%s", said)
	}
	p.same()
}

// TestOutboundIsRefused: mode drop lets out what is allowed, and tells the workload of the rest at once.
func TestOutboundIsRefused(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, "EDG_EGRESS_PROXY_CONFIG=billing#127.137.0.1:8081#billing.mesh:8080")
	billing, resolver := p.host("billing"), p.host("resolver")
	zone, err := resolver.Nameserver(resolver.IPv4.String())
	p.must(err)
	t.Cleanup(func() { _ = zone.Close() })
	zone.SetAddrs(map[string][]netip.Addr{"billing.mesh": {billing.IPv4}})
	p.must(p.ResolvConf("nameserver " + resolver.IPv4.String() + "\n"))
	p.endpoint(billing, p.issue("billing"))
	p.plain(p.outside, plainPort)
	p.plain(p.outside, plainPort+1)
	const mode = "outbound: {mode: drop, allow: [%s]}"
	allowed := fmt.Sprintf("'%s:%d', '[%s]:%d'", p.outside.IPv4, plainPort, p.outside.IPv6, plainPort)
	m := p.override(fmt.Sprintf(mode, allowed))
	p.start()

	check := func() {
		t.Helper()
		for _, addr := range p.outside.Addrs() {
			to, not := netip.AddrPortFrom(addr, plainPort), netip.AddrPortFrom(addr, plainPort+1)
			p.must(echo(p.dial(p.Host, to)))
			p.must(p.tell(to))
			if err := p.dialOut(not); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("TCP to %s: %v, want that it is refused", not, err)
			}
			if err := p.tell(not); !errors.Is(err, syscall.EHOSTUNREACH) && !errors.Is(err, syscall.EACCES) {
				t.Errorf("UDP to %s: %v, want an ICMP error", not, err)
			}
		}
		p.await("egress entries work", func() bool { return echo(p.dial(p.Host, netip.MustParseAddrPort("127.137.0.1:8081"))) == nil }) // its name is asked for by mantlet
		for _, addr := range p.Addrs() {
			p.must(p.exchange(netip.AddrPortFrom(addr, mtlsPort), p.client.ClientConfig("pod")))
		}
	}
	check()
	for _, addr := range p.outside.Addrs() {
		for _, protocol := range []string{"tcp", "udp"} {
			if o := p.spoken(netip.AddrPortFrom(addr, plainPort), protocol); o.Verdict != status.OutboundAllowed || !o.Listed || o.Count != 1 {
				t.Errorf("mantlet says of what is allowed by %s %+v", protocol, o)
			}
			if o := p.spoken(netip.AddrPortFrom(addr, plainPort+1), protocol); o.Verdict != status.OutboundRefused || o.Listed || o.Count == 0 {
				t.Errorf("mantlet says of what is refused by %s %+v", protocol, o)
			}
		}
	}
	asks := func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		conn, err := p.Dial(ctx, "udp", netip.AddrPortFrom(resolver.IPv4, 53).String())
		p.must(err)
		defer func() { _ = conn.Close() }()
		return ask(conn)
	}
	if err := asks(); err == nil {
		t.Error("the workload may ask a name server that is not allowed")
	}
	m.write(fmt.Sprintf(mode, "dns, "+allowed)) // no hot restart
	p.await("the workload may ask the name server", func() bool { return asks() == nil })
	p.same()
	other := p.host("other resolver")
	second, err := other.Nameserver(other.IPv4.String())
	p.must(err)
	t.Cleanup(func() { _ = second.Close() })
	second.SetAddrs(map[string][]netip.Addr{"billing.mesh": {billing.IPv4}})
	p.must(p.ResolvConf("nameserver " + other.IPv4.String() + "\n"))
	p.await("resolv.conf is followed", func() bool { return asks() != nil })

	m.write(fmt.Sprintf(mode, "dns, "+allowed) + "\nenvoy: {logLevel: info}") // a hot restart
	p.await("the hot restart is done", func() bool { return p.status().Envoys.Started == 2 })
	p.ready()
	check()
}

// ask asks a name server for a name.
func ask(conn net.Conn) error {
	message := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 1, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName("billing.mesh."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
	query, err := message.Pack()
	if err != nil {
		return err
	}
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	if _, err := conn.Write(query); err != nil {
		return err
	}
	_, err = conn.Read(make([]byte, 1500))
	return err
}

// TestOutboundTightens: a change to mode drop ends at once what is open and not allowed any more, and both ends are told.
func TestOutboundTightens(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	p.plain(p.outside, plainPort)
	silent, err := p.outside.Listen("tcp", ":5433")
	p.must(err)
	t.Cleanup(func() { _ = silent.Close() })
	m := p.override("{}")
	p.start()
	var open, stay []net.Conn
	for _, addr := range p.outside.Addrs() {
		open = append(open, p.dial(p.Host, netip.AddrPortFrom(addr, 5433)))
		peer, err := silent.Accept()
		p.must(err)
		t.Cleanup(func() { _ = peer.Close() })
		open = append(open, peer)
		stays := p.dial(p.Host, netip.AddrPortFrom(addr, plainPort))
		p.must(echo(stays))
		stay = append(stay, stays)
	}
	inbound, err := p.handshake(netip.AddrPortFrom(p.IPv4, mtlsPort), p.client.ClientConfig("pod"))
	p.must(err)
	p.must(echo(inbound))
	next := fmt.Sprintf("outbound: {mode: drop, allow: ['0.0.0.0/0:%d', '[::]/0:%d']}", plainPort, plainPort)
	if said := p.against(next); !strings.Contains(said, "outbound.mode: accept -> drop; no restart; ends 2 open connections\n") {
		t.Errorf("mantlet diff --against says\n%s", said)
	}
	m.write(next)
	for i, conn := range open {
		if err := cut(conn); err != nil {
			t.Errorf("end %d of a forbidden connection: %v", i, err)
		}
	}
	for _, conn := range append(stay, inbound) {
		p.must(echo(conn))
	}
	p.await("status tells of them", func() bool {
		s := p.status()
		i := slices.IndexFunc(s.Ended, func(e status.Ended) bool { return e.Direction == "outbound" })
		return i >= 0 && s.Ended[i].Count == 2 && len(s.Endings) == 2
	})

	// Neither a mantlet that is killed, nor an Envoy, nor a new start lets anything out.
	not := netip.AddrPortFrom(p.outside.IPv4, 5433)
	stop, done := make(chan struct{}), make(chan int)
	go func() {
		leaks := 0
		for {
			select {
			case <-stop:
				done <- leaks
				return
			default:
				if p.dialOut(not) == nil {
					leaks++
				}
			}
		}
	}()
	p.must(syscall.Kill(p.envoy(), syscall.SIGKILL))
	p.await("Envoy is back", func() bool { return p.status().Envoys.Recovered == 1 })
	p.must(p.sidecar.Signal(syscall.SIGKILL))
	_ = p.sidecar.Wait()
	p.must(p.dialOut(netip.AddrPortFrom(p.outside.IPv4, plainPort)))
	p.run()
	p.ready()
	p.must(echo(p.dial(p.Host, netip.AddrPortFrom(p.outside.IPv4, plainPort))))
	close(stop)
	if leaks := <-done; leaks > 0 {
		t.Errorf("%d connections left that are forbidden", leaks)
	}
}

// TestOutboundScan: a workload that scans a network fills neither the kernel nor mantlet, and learns nothing more than before.
func TestOutboundScan(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, "MANTLET_OUTBOUND=drop")
	p.plain(p.outside, plainPort)
	p.start()
	p.must(p.Do(func() error {
		for port := range uint16(3000) {
			conn, err := net.Dial("udp", netip.AddrPortFrom(p.outside.IPv4, port+1).String())
			if err != nil {
				return err
			}
			_, _ = conn.Write([]byte("hello"))
			_ = conn.Close()
		}
		return nil
	}))
	to := netip.AddrPortFrom(p.outside.IPv4, plainPort)
	if err := p.dialOut(to); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("with a full account TCP is not refused: %v", err)
	}
	p.must(p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), p.client.ClientConfig("pod")))
	if n := len(p.status().Outbound); n == 0 || n > 1024 {
		t.Errorf("there are %d destinations", n)
	}
	if lines := p.log.count("may not be spoken to in the clear"); lines > 40 {
		t.Errorf("the log has %d lines of them", lines)
	}
}

// TestOutboundWithClientAddresses: where the workload answers to the addresses of clients, its answers are not taken for what it sends to them.
func TestOutboundWithClientAddresses(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	p.override("sourceAddress: client\noutbound: {mode: drop}\n")
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	workloads := p.speaking()
	p.ready()
	for i, addr := range p.Addrs() {
		for _, port := range []uint16{mtlsPort, tlsPort} {
			p.must(p.converse(netip.AddrPortFrom(addr, port)))
			if got := lastPeer(workloads[port]); got.Addr() != p.outside.Addrs()[i] {
				t.Errorf("at port %d the workload sees %s", port, got)
			}
		}
		not := netip.AddrPortFrom(p.outside.Addrs()[i], plainPort)
		if err := p.dialOut(not); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("TCP to %s: %v, want that it is refused", not, err)
		}
	}
	if all := p.status().Outbound; len(all) != 2 {
		t.Errorf("accounted are %+v", all)
	}
	p.same()
}
