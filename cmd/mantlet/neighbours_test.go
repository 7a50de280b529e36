package main

import (
	"fmt"
	"io"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestNeighboursLiveOn: uploads without pause go on at a port that forbids somebody else, and at the one beside it, of which a change is not.
func TestNeighboursLiveOn(t *testing.T) {
	t.Parallel()
	const ports, uploads = 4, 24
	p := newPod(t, web)
	text := func(strict int) string {
		var all []string
		for i := range ports {
			allow := "[client, other]"
			if i < strict {
				allow = "[client]"
			}
			all = append(all, fmt.Sprintf("{port: %d, allow: %s}", 9100+i, allow))
		}
		return "ingress: [" + strings.Join(all, ", ") + "]"
	}
	m := p.override(text(0))
	last := uint16(9100 + ports - 1)
	for _, port := range []uint16{last - 1, last} {
		listener, err := p.Listen("tcp", fmt.Sprintf(":%d", port))
		p.must(err)
		t.Cleanup(func() { _ = listener.Close() })
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				go func() {
					_, _ = io.Copy(io.Discard, conn)
					_ = conn.Close()
				}()
			}
		}()
	}
	p.start()
	change := func(strict int) {
		before := p.log.count(inForce)
		m.write(text(strict))
		p.await("it is in force", func() bool { return p.log.count(inForce) > before })
	}
	for strict := 1; strict < ports-1; strict++ {
		change(strict)
	}
	p.ready()
	var stop atomic.Bool
	done := make(chan error, uploads)
	for i := range uploads {
		conn, err := p.handshake(netip.AddrPortFrom(p.Addrs()[i%2], last-uint16(i/2%2)), p.client.ClientConfig("pod"))
		p.must(err)
		p.must(conn.SetDeadline(time.Time{}))
		go func() {
			_, err := io.Copy(conn, readerFunc(func(b []byte) (int, error) {
				if stop.Load() {
					return 0, io.EOF
				}
				return min(len(b), 4096), nil
			}))
			done <- err
		}()
	}
	p.await("it is known who is connected", func() bool {
		said := p.against(text(ports - 1))
		return said != "" && !strings.Contains(said, "ends")
	})
	change(ports - 1)
	stop.Store(true)
	for range uploads {
		p.check(<-done)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }
