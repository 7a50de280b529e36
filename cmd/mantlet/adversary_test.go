package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mantlet/lab"
)

// TestUnfinishedHandshake: whoever never finishes a handshake is cut, and the workload does not hear of it.
func TestUnfinishedHandshake(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	encrypted, mutual := p.protect(tlsPort), p.protect(mtlsPort)
	p.ready()
	began := time.Now()
	var conns []net.Conn
	for _, addr := range p.Addrs() {
		for _, port := range []uint16{tlsPort, mtlsPort} {
			for _, says := range []string{"", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"} { // the head of a ClientHello
				conn := p.dial(p.outside, netip.AddrPortFrom(addr, port))
				_, err := io.WriteString(conn, says)
				p.must(err)
				conns = append(conns, conn)
			}
		}
	}
	for _, conn := range conns {
		if err := cutUntil(conn, began.Add(15*time.Second)); err != nil {
			t.Errorf("%s: %v", conn.RemoteAddr(), err)
		}
	}
	if got := len(encrypted.Connections()) + len(mutual.Connections()); got > 0 {
		t.Errorf("the workload got %d connections", got)
	}
}

// TestConnectToOwnListener: whatever a process of the pod sends to Envoy's own ports starts no storm of connections that
// Envoy makes to itself.
func TestConnectToOwnListener(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.protect(mtlsPort)
	p.ready()
	for _, address := range []string{"127.0.0.1:15006", "[::1]:15006", "127.0.0.1:15007", "[::1]:15007"} {
		to := netip.MustParseAddrPort(address)
		before := p.accepted()
		silent, plain := p.dial(p.Host, to), p.dial(p.Host, to)
		_, err := io.WriteString(plain, "GET / HTTP/1.0\r\n\r\n")
		p.must(err)
		p.check(cut(plain))
		const levels = 3
		err = p.nest(p.dial(p.Host, to), levels)
		t.Logf("%d levels of TLS, each to Envoy itself, ended with: %v", levels, err)
		const others = 20 // a storm made 1,024 within a second
		for range others {
			p.must(p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), p.client.ClientConfig("pod")))
		}
		p.must(silent.Close())
		// Each level of TLS that was set up is a connection, and so is the one that waits for the next.
		if got, most := p.accepted()-before-others, 3+levels+1; got > most {
			t.Errorf("three connections to %s became %d, want at most %d", address, got, most)
		}
	}
	p.besiege()
	p.besieged()
	p.ready()
}

// accepted returns how many connections Envoy accepted up to now at the ports that the kernel hands it connections at.
func (p *pod) accepted() (sum int) {
	p.t.Helper()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(p.sidecar.RuntimeDirectory, "envoy", "admin-0.sock"))
		},
	}}
	response, err := client.Get("http://envoy/stats?filter=^listener.ingress-m?tls.downstream_cx_total$")
	p.must(err)
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	p.must(err)
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	if len(lines) != 2 {
		p.t.Fatalf("statistics of the two listeners: %q", lines)
	}
	for _, line := range lines {
		var name string
		var n int
		_, err := fmt.Sscanf(line, "%s %d", &name, &n)
		p.must(err)
		sum += n
	}
	return sum
}

// nest makes TLS in TLS in TLS …, for as long as the peer goes along.
func (p *pod) nest(conn net.Conn, levels int) error {
	for range levels {
		inner := tls.Client(conn, p.client.ClientConfig("pod"))
		if err := inner.SetDeadline(time.Now().Add(time.Second)); err != nil {
			return err
		}
		if err := inner.Handshake(); err != nil {
			return err
		}
		conn = inner
	}
	return echo(conn)
}

// TestConnectionsBeforeTheRules: what was open in plaintext before mantlet came is over, whoever speaks.
func TestConnectionsBeforeTheRules(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	listener, err := p.Listen("tcp", ":9090")
	p.must(err)
	var pairs [][2]net.Conn
	for range 2 { // one of whom will speak first each
		for _, addr := range p.Addrs() {
			client := p.dial(p.outside, netip.AddrPortFrom(addr, mtlsPort))
			server, err := listener.Accept()
			p.must(err)
			t.Cleanup(func() { _ = server.Close() })
			_, err = io.WriteString(client, "before")
			p.must(err)
			_, err = io.ReadFull(server, make([]byte, len("before")))
			p.must(err)
			pairs = append(pairs, [2]net.Conn{client, server})
		}
	}
	p.must(listener.Close())
	p.run()
	p.protect(tlsPort)
	p.protect(mtlsPort)
	for i, pair := range pairs {
		speaker, hearer := pair[0], pair[1]
		if i >= 2 {
			speaker, hearer = hearer, speaker
		}
		_, err := io.WriteString(speaker, "after") // into the deny-all rules, and again and again by TCP
		p.must(err)
		if n, err := briefly(hearer); n > 0 {
			t.Errorf("pair %d: %d bytes came through, %v", i, n, err)
		}
	}
	p.besiege()
	p.ready()
	for i, pair := range pairs {
		for _, end := range pair {
			if n, err := briefly(end); n > 0 {
				t.Errorf("pair %d: %d bytes came through, %v", i, n, err)
			}
		}
		// The peer hears of it by a reset, once it speaks.
		_, _ = io.WriteString(pair[0], "again")
		if err := cut(pair[0]); err != nil {
			t.Errorf("pair %d: %v", i, err)
		}
	}
}

// briefly reads what is there, or will be in a moment.
func briefly(conn net.Conn) (int, error) {
	if err := conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		return 0, err
	}
	return conn.Read(make([]byte, 64))
}

// TestSYNCookies: with cookies always on the kernel makes connections of packets that it never let in.
func TestSYNCookies(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	p.must(p.Sysctl("net.ipv4.tcp_syncookies", "2"))
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.besiege()
	p.run()
	p.protect(tlsPort)
	mutual := p.protect(mtlsPort)
	p.besieged()
	p.ready()
	for range 3 {
		p.besieged()
		for _, addr := range p.Addrs() {
			p.must(p.exchange(netip.AddrPortFrom(addr, mtlsPort), p.client.ClientConfig("pod")))
			p.must(p.exchange(netip.AddrPortFrom(addr, tlsPort), p.anonymous()))
		}
	}
	if got := len(mutual.Connections()); got != 6 {
		t.Errorf("the workload got %d connections, want mine", got)
	}
}

func TestOtherProtocols(t *testing.T) {
	t.Parallel()
	p := start(t, web)
	datagrams := map[uint16]*lab.Workload{}
	for _, port := range []uint16{passthroughPort, 5353} {
		datagrams[port] = p.serve(p.Host, lab.Service{Network: "udp", Address: fmt.Sprintf(":%d", port)})
	}
	for _, addr := range p.Addrs() {
		for port := range datagrams {
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			conn, err := p.outside.Dial(ctx, "udp", netip.AddrPortFrom(addr, port).String())
			cancel()
			p.must(err)
			defer conn.Close()
			_, err = io.WriteString(conn, "hello")
			p.must(err)
			if port == passthroughPort {
				p.must(echo(conn))
			} else if n, _ := briefly(conn); n > 0 {
				t.Errorf("a datagram to %s:%d was answered", addr, port)
			}
		}
	}
	if got := datagrams[5353].Connections(); len(got) > 0 {
		t.Errorf("datagrams came through: %+v", got)
	}
}
