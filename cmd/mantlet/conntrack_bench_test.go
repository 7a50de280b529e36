package main

import (
	"crypto/tls"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// BenchmarkNewConnections measures how many new connections a second conntrack's table has room for. Clients connect, exchange a few
// bytes and close, for much longer than conntrack keeps a closed connection, so that as many entries come as go. Then the table's
// entries, divided by the connections a second, are for how long each connection takes up an entry, in all.
func BenchmarkNewConnections(b *testing.B) {
	const clients, half = 16, 30 * time.Second
	p := newPod(b, web)
	p.inMemory()
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.protect(mtlsPort)
	p.ready()
	to := netip.AddrPortFrom(p.IPv4, mtlsPort)
	tick := time.NewTicker(half)
	defer tick.Stop()
	var perSecond, entries float64
	for b.Loop() {
		var stop atomic.Bool
		var connections atomic.Int64
		var running sync.WaitGroup
		for range clients {
			running.Go(func() {
				for !stop.Load() {
					if err := p.visit(to); err != nil {
						b.Error(err)
						return
					}
					connections.Add(1)
				}
			})
		}
		tick.Reset(half)
		<-tick.C
		before, began := connections.Load(), time.Now()
		<-tick.C
		perSecond = float64(connections.Load()-before) / time.Since(began).Seconds()
		entries = p.conntrack("count")
		stop.Store(true)
		running.Wait()
	}
	held := entries / perSecond
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(perSecond, "connections/s")
	b.ReportMetric(entries, "entries")
	b.ReportMetric(held, "entry-s/connection")
	b.ReportMetric(p.conntrack("max")/held, "bound-connections/s")
}

// visit is a connection from outside through the mesh, from dial to close.
func (p *pod) visit(to netip.AddrPort) error {
	ctx, cancel := p.context()
	defer cancel()
	raw, err := p.outside.Dial(ctx, "tcp", to.String())
	if err != nil {
		return err
	}
	conn := tls.Client(raw, p.client.ClientConfig("pod"))
	defer conn.Close()
	return echo(conn)
}

// conntrack reads a number of conntrack's table in the pod.
func (p *pod) conntrack(what string) (n float64) {
	p.t.Helper()
	p.must(p.Do(func() error {
		text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_" + what)
		if err == nil {
			n, err = strconv.ParseFloat(strings.TrimSpace(string(text)), 64)
		}
		return err
	}))
	return n
}
