package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"mantlet/internal/lab"
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

// TestConnectToOwnListener: no process of the pod reaches Envoy's own ports, where whoever connects gets what is dialled: the same
// port again.
func TestConnectToOwnListener(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.protect(mtlsPort)
	p.ready()
	for _, address := range []string{"127.0.0.1:15006", "[::1]:15006", "127.0.0.1:15007", "[::1]:15007"} {
		if _, err := p.dialIn(netip.MustParseAddrPort(address)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dialling %s: %v", address, err)
		}
	}
	if got := p.refused("own_listener"); got != 4 {
		t.Errorf("%d connections are counted", got)
	}
	p.besiege()
	p.besieged()
	p.ready()
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
