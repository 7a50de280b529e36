package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

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

// TestBothSidesAreReset: the client and the workload are told by a reset. Envoy itself ends the other side in good order once it finds one
// side reset. Where it is not known which connection to the workload is whose, it comes first with some.
func TestBothSidesAreReset(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	m := p.override(fmt.Sprintf("ingress: [{port: %d, allow: [client, other]}, {port: %d, mode: tls}]", silentPort, plainPort))
	p.start()
	const conns = 20 // of each kind and family
	type pair struct{ client, workload net.Conn }
	pairs := map[string][]pair{}
	const listed, unlisted = "a client of a list", "all of a port"
	for kind, port := range map[string]uint16{listed: silentPort, unlisted: plainPort} {
		listener, err := p.Listen("tcp", fmt.Sprintf(":%d", port))
		p.must(err)
		t.Cleanup(func() { _ = listener.Close() })
		for i := range 2 * conns {
			client, err := p.handshake(netip.AddrPortFrom(p.Addrs()[i%2], port), p.client.ClientConfig("pod"))
			p.must(err)
			workload, err := listener.Accept()
			p.must(err)
			t.Cleanup(func() { _ = workload.Close() })
			pairs[kind] = append(pairs[kind], pair{client, workload})
		}
	}
	narrower := fmt.Sprintf("ingress: [{port: %d, allow: [client]}, {port: %d, mode: tls}]", silentPort, plainPort)
	p.await("it is known who is connected", func() bool {
		said := p.against(narrower)
		return said != "" && !strings.Contains(said, "ends")
	})
	m.write(fmt.Sprintf("ingress: [{port: %d, allow: [somebody]}]", silentPort))
	for kind, all := range pairs {
		resets := 0
		for _, one := range all {
			if how, err := howItEnds(one.client, time.Now().Add(limit)); err != nil || errors.Is(how, io.EOF) {
				t.Errorf("%s: a client's connection ends by %v, %v; want a reset", kind, how, err)
			}
			how, err := howItEnds(one.workload, time.Now().Add(limit))
			p.must(err)
			if errors.Is(how, syscall.ECONNRESET) {
				resets++
			}
		}
		t.Logf("%s: %d of %d workloads are told by a reset", kind, resets, len(all))
		if kind == listed && resets < len(all)/2 {
			t.Errorf("%s: only %d of %d workloads are told by a reset", kind, resets, len(all))
		}
	}
}

// TestReadersAreTold: a client that only reads, of a connection on which the pod's side sends all the time, is told too. The rules refuse what
// the pod sends on a connection that they forbid, by which its own socket would be gone.
func TestReadersAreTold(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	m := p.override(fmt.Sprintf("ingress: [{port: %d, mode: tls}]\noutbound: {mode: accept}", silentPort))
	p.start()
	listeners := map[string]net.Listener{}
	for name, at := range map[string]func() (net.Listener, error){
		"a TLS port":         func() (net.Listener, error) { return p.Listen("tcp", fmt.Sprintf(":%d", silentPort)) },
		"a passthrough port": func() (net.Listener, error) { return p.Listen("tcp", fmt.Sprintf(":%d", passthroughPort)) },
		"outside":            func() (net.Listener, error) { return p.outside.Listen("tcp", fmt.Sprintf(":%d", plainPort)) },
	} {
		listener, err := at()
		p.must(err)
		t.Cleanup(func() { _ = listener.Close() })
		listeners[name] = listener
	}
	var writing sync.WaitGroup
	readers := map[string]net.Conn{}
	for i, addr := range p.Addrs() {
		tlsClient, err := p.handshake(netip.AddrPortFrom(addr, silentPort), p.anonymous())
		p.must(err)
		uploads := p.dial(p.Host, netip.AddrPortFrom(p.outside.Addrs()[i], plainPort))
		reads, err := listeners["outside"].Accept()
		p.must(err)
		t.Cleanup(func() { _ = reads.Close() })
		senders := []net.Conn{uploads}
		dials := map[string]net.Conn{"a TLS port": tlsClient, "a passthrough port": p.dial(p.outside, netip.AddrPortFrom(addr, passthroughPort))}
		for name, client := range dials {
			workload, err := listeners[name].Accept()
			p.must(err)
			senders = append(senders, workload)
			readers[fmt.Sprintf("%s, %s", name, addr)] = client
		}
		readers[fmt.Sprintf("outside, from %s", addr)] = reads
		for _, sender := range senders {
			t.Cleanup(func() { _ = sender.Close() })
			writing.Go(func() {
				for err := error(nil); err == nil; {
					_, err = sender.Write(make([]byte, 4096))
				}
			})
		}
	}
	told := make(chan error, len(readers))
	for name, reader := range readers {
		raw := reader
		if wrapped, ok := raw.(*tls.Conn); ok {
			raw = wrapped.NetConn()
		}
		p.must(raw.(*net.TCPConn).SetKeepAlive(false)) // by which it would find out in the end
		go func() {
			_, err := io.Copy(io.Discard, reader)
			told <- fmt.Errorf("%s: %w", name, err)
		}()
	}
	m.write(fmt.Sprintf("ingress: [{port: %d, mode: mtls}, {port: %d, mode: mtls}]\noutbound: {mode: drop}", silentPort, passthroughPort))
	deadline := time.AfterFunc(limit, func() {
		for _, reader := range readers {
			_ = reader.SetReadDeadline(time.Now())
		}
	})
	defer deadline.Stop()
	for range readers {
		if err := <-told; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%v, want a reset", err)
		}
	}
	writing.Wait()
	p.await("status tells of them", func() bool {
		ended := p.status().Ended
		return len(ended) == 3 && ended[0].Count == 4 && ended[2].Count == 2
	})
}
