package main

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkSourceAddress measures what it costs that the workload sees its clients' addresses: the CPU time of Envoy, of the workload and
// of the client together, for a new connection and for a GiB that is echoed. Pods of both kinds take turns, so that a busy machine slows
// both.
func BenchmarkSourceAddress(b *testing.B) {
	const (
		connections = 200
		size        = 64 << 20
		rounds      = 10
	)
	kinds := []string{"pod", "client"}
	pods := map[string]*pod{}
	for _, kind := range kinds {
		p := newPod(b, web, "MANTLET_SOURCE_ADDRESS="+kind)
		p.inMemory()
		p.must(p.identity.Write(p.sidecar.TLSDirectory))
		p.run()
		p.protect(mtlsPort)
		p.ready()
		pods[kind] = p
	}
	dialling, bulk := map[string][]float64{}, map[string][]float64{}
	for b.Loop() {
		for range rounds {
			for _, kind := range kinds {
				p := pods[kind]
				to := netip.AddrPortFrom(p.IPv4, mtlsPort)
				dialling[kind] = append(dialling[kind], p.cpu(func() {
					for range connections {
						p.must(p.visit(to))
					}
				}).Seconds()/connections)
				bulk[kind] = append(bulk[kind], p.cpu(func() { p.echoed(to, size) }).Seconds()*(1<<30)/size)
			}
		}
	}
	b.ReportMetric(0, "ns/op")
	for _, kind := range kinds {
		b.ReportMetric(median(dialling[kind])*1e6, kind+"-us/connection")
		b.ReportMetric(median(bulk[kind]), kind+"-s/GiB")
	}
}

// echoed sends as much through the mesh and reads it back.
func (p *pod) echoed(to netip.AddrPort, size int) {
	p.t.Helper()
	conn, err := p.handshake(to, p.client.ClientConfig("pod"))
	p.must(err)
	defer conn.Close()
	p.must(conn.SetDeadline(time.Now().Add(limit)))
	sent := make(chan error, 1)
	go func() {
		_, err := io.CopyN(conn, strings.NewReader(strings.Repeat("x", size)), int64(size))
		sent <- err
	}()
	_, err = io.CopyN(io.Discard, conn, int64(size))
	p.must(err)
	p.must(<-sent)
}

// cpu returns how much CPU time Envoy and this process take while something is done.
func (p *pod) cpu(do func()) time.Duration {
	p.t.Helper()
	before := p.used()
	do()
	return p.used() - before
}

// used is the CPU time of this process and of all threads of Envoy until now.
func (p *pod) used() time.Duration {
	p.t.Helper()
	var own unix.Rusage
	p.must(unix.Getrusage(unix.RUSAGE_SELF, &own))
	all := time.Duration(own.Utime.Nano() + own.Stime.Nano())
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", p.envoy()))
	p.must(err)
	for _, thread := range threads {
		text, err := os.ReadFile(thread)
		p.must(err)
		ran, err := strconv.ParseInt(strings.Fields(string(text))[0], 10, 64)
		p.must(err)
		all += time.Duration(ran)
	}
	return all
}
