package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mantlet/internal/lab"
)

// What is asked of a change that takes one name off the list of a port with many open connections.
const (
	mostEnding = time.Second           // from the change of the file until the last forbidden connection is told
	mostPause  = 50 * time.Millisecond // that a connection sees which goes on
)

// conntrackForgets is when conntrack knows no more of a connection that was reset (nf_conntrack_tcp_timeout_close). Until then a client that
// happens to take the port of one that was ended is refused.
const conntrackForgets = 11 * time.Second

// BenchmarkEndings takes one of two names off the list of a port at which each has half of 10,000 open connections, or of as many as the limit
// of open files has room for. Meanwhile some of the
// other's go on to speak: the longest of their round trips is the pause. What the same connections see without a change is told beside it.
func BenchmarkEndings(b *testing.B) {
	const speakers = 32
	var files unix.Rlimit
	check(b, unix.Getrlimit(unix.RLIMIT_NOFILE, &files))
	each := min(5_000, (int(files.Max)-1000)*3/16) // three quarters of Envoy's are for ingress, and a connection takes two
	p := newPod(b, web)
	p.inMemory()
	m := p.override("ingress: [{port: 9092, allow: [cart, orders]}]")
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.ready()
	p.serve(p.Host, lab.Service{Address: fmt.Sprintf(":%d", silentPort)})
	var told, pauses, quiet []time.Duration
	for b.Loop() {
		stay, end := p.many(each, "cart"), p.many(each, "orders")
		quiet = append(quiet, p.longestRoundTrip(stay[:speakers], func() { p.idle(time.Second) }))
		var last atomic.Int64
		var ended sync.WaitGroup
		for _, conn := range end {
			ended.Go(func() {
				_, err := conn.NetConn().Read(make([]byte, 1))
				if err == nil || errors.Is(err, io.EOF) {
					b.Errorf("a forbidden connection is told: %v", err)
				}
				last.Store(max(last.Load(), time.Now().UnixNano()))
			})
		}
		began := time.Now()
		pauses = append(pauses, p.longestRoundTrip(stay[:speakers], func() {
			m.write("ingress: [{port: 9092, allow: [cart]}]")
			ended.Wait()
			told = append(told, time.Unix(0, last.Load()).Sub(began))
		}))
		for _, conn := range stay {
			p.must(echo(conn))
		}
		for _, conn := range slices.Concat(stay, end) {
			_ = conn.Close()
		}
		m.write("ingress: [{port: 9092, allow: [cart, orders]}]")
		p.await("both are let in again", func() bool {
			return p.exchange(netip.AddrPortFrom(p.IPv4, silentPort), p.issue("orders").ClientConfig("pod")) == nil
		})
		p.idle(conntrackForgets)
	}
	percentiles(b, "told", told)
	b.ReportMetric(float64(2*each), "connections")
	b.ReportMetric(float64(slices.Max(pauses).Microseconds())/1000, "pause-ms")
	b.ReportMetric(float64(slices.Max(quiet).Microseconds())/1000, "quiet-ms")
	if median(told) > mostEnding || median(pauses) > mostPause {
		b.Errorf("the last of %d connections is told after %v, %v at most; others pause for %v, %v at most",
			each, median(told), mostEnding, median(pauses), mostPause)
	}
}

// many makes connections of one client. All but the first resume its TLS session.
func (p *pod) many(count int, name string) []*tls.Conn {
	p.t.Helper()
	config := p.issue(name).ClientConfig("pod")
	config.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	var all []*tls.Conn
	for i := range count {
		conn, err := p.handshake(netip.AddrPortFrom(p.Addrs()[i%2], silentPort), config)
		p.must(err)
		p.must(echo(conn))
		p.must(conn.SetDeadline(time.Time{}))
		all = append(all, conn)
	}
	return all
}

// longestRoundTrip has connections speak while something goes on.
func (p *pod) longestRoundTrip(conns []*tls.Conn, while func()) time.Duration {
	var stop atomic.Bool
	var longest atomic.Int64
	var speaking sync.WaitGroup
	for _, conn := range conns {
		speaking.Go(func() {
			tick := time.NewTicker(5 * time.Millisecond)
			defer tick.Stop()
			for !stop.Load() {
				began := time.Now()
				if err := echo(conn); err != nil {
					p.check(err)
					return
				}
				for took, most := time.Since(began), longest.Load(); int64(took) > most && !longest.CompareAndSwap(most, int64(took)); most = longest.Load() {
				}
				<-tick.C
			}
		})
	}
	while()
	stop.Store(true)
	speaking.Wait()
	return time.Duration(longest.Load())
}

// idle waits, so that something is measured over a time.
func (p *pod) idle(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	<-timer.C
}
