package main

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"mantlet/internal/lab"
)

// mostOfConnection is what the line that tells of a connection may add to the connection's CPU time, in percent.
const mostOfConnection = 3

// silentEnvoy is a script that starts an Envoy which writes no line when a connection is made. The rest of its configuration is as mantlet
// wrote it.
const silentEnvoy = `#!/bin/sh
n=$#
while [ $n -gt 0 ]; do
	argument=$1
	shift
	if [ "$argument" = --config-path ] && [ "${1%.json}" != "$1" ]; then # what is validated is not JSON
		set -- "$@" --config-yaml "$(sed -E 's/("flush_access_log_on_connected": *)true/\1false/' "$1")"
		shift
		n=$((n-1))
	else
		set -- "$@" "$argument"
	fi
	n=$((n-1))
done
exec "$0-proper" "$@"
`

// BenchmarkConnectedLine measures what it costs that Envoy writes a line when a connection is made, and that mantlet reads it: the CPU time
// for each connection of Envoy and of mantlet, in two pods that differ in nothing else. Connections resume a TLS session: they are the
// cheapest, and the line's share is the largest. Each client goes to the pods by turns, so that a busy machine slows both. The share is the
// median of those of the rounds.
func BenchmarkConnectedLine(b *testing.B) {
	const rounds, clients, visits = 40, 4, 40
	quiet, told := newPod(b, web), newPod(b, web)
	path := filepath.Join(b.TempDir(), "envoy")
	quiet.install(os.Getenv("MANTLET_ENVOY_PATH"), path+"-proper")
	quiet.must(os.WriteFile(path, []byte(silentEnvoy), 0o755))
	quiet.sidecar.Env = append(quiet.sidecar.Env, "MANTLET_ENVOY_PATH="+path)
	inward := map[*pod]*tls.Config{}
	for _, p := range []*pod{quiet, told} {
		p.inMemory()
		billing := p.host("billing")
		p.serve(billing, lab.Service{Address: ":8443", TLS: p.issue("billing").ServerConfig()})
		p.override(fmt.Sprintf("ingress: [{port: %d, allow: [client]}]\negress: [{listen: '127.137.0.1:8081', upstream: '%s', serverNames: [billing]}]",
			mtlsPort, netip.AddrPortFrom(billing.IPv4, 8443)))
		p.must(p.identity.Write(p.sidecar.TLSDirectory))
		p.run()
		p.protect(mtlsPort)
		p.ready()
		inward[p] = p.client.ClientConfig("pod")
		inward[p].ClientSessionCache = tls.NewLRUClientSessionCache(clients)
	}
	ways := map[string]func(p *pod) error{
		"ingress": func(p *pod) error {
			return p.briefly(p.outside, netip.AddrPortFrom(p.IPv4, mtlsPort).String(), func(raw net.Conn) net.Conn { return tls.Client(raw, inward[p]) })
		},
		"egress": func(p *pod) error {
			return p.briefly(p.Host, "127.137.0.1:8081", func(raw net.Conn) net.Conn { return raw })
		},
	}
	for b.Loop() {
		for name, visit := range ways {
			var without, envoys, mantlets, shares []float64
			for range rounds {
				before := [2]cost{quiet.cost(), told.cost()}
				var visiting sync.WaitGroup
				for range clients {
					visiting.Go(func() {
						for range visits {
							quiet.check(visit(quiet))
							told.check(visit(told))
						}
					})
				}
				visiting.Wait()
				told.idle(200 * time.Millisecond) // the log is flushed after half of it
				q, t := quiet.cost().since(before[0], clients*visits), told.cost().since(before[1], clients*visits)
				without, envoys, mantlets = append(without, q.envoy+q.mantlet), append(envoys, t.envoy-q.envoy), append(mantlets, t.mantlet-q.mantlet)
				shares = append(shares, 100*(t.envoy+t.mantlet-q.envoy-q.mantlet)/(q.envoy+q.mantlet))
			}
			b.ReportMetric(median(without), name+"-us")
			b.ReportMetric(median(envoys), name+"-line-envoy-us")
			b.ReportMetric(median(mantlets), name+"-line-mantlet-us")
			b.ReportMetric(median(shares), name+"-line-%")
			if share := median(shares); share > mostOfConnection {
				b.Errorf("%s: the line adds %.1f %% to the %.0f µs of a connection, %.0f µs of Envoy's and %.0f µs of mantlet's; %v %% at most",
					name, share, median(without), median(envoys), median(mantlets), mostOfConnection)
			}
		}
	}
	b.ReportMetric(0, "ns/op")
}

// briefly makes a connection that says something, hears it, and ends.
func (p *pod) briefly(from *lab.Host, to string, wrap func(net.Conn) net.Conn) error {
	ctx, cancel := p.context()
	defer cancel()
	raw, err := from.Dial(ctx, "tcp", to)
	if err != nil {
		return err
	}
	conn := wrap(raw)
	defer conn.Close()
	return echo(conn)
}

// cost is CPU time in µs.
type cost struct{ envoy, mantlet float64 }

// cost returns what Envoy and mantlet have taken until now.
func (p *pod) cost() cost { return cost{p.ran(p.envoy()), p.ran(p.sidecar.PID())} }

// since returns what was taken since then, for each of n.
func (c cost) since(before cost, n float64) cost {
	return cost{(c.envoy - before.envoy) / n, (c.mantlet - before.mantlet) / n}
}

// ran returns the CPU time of a process's threads until now, in µs. Those that have ended do not count.
func (p *pod) ran(pid int) (us float64) {
	p.t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	p.must(err)
	for _, thread := range threads {
		text, err := os.ReadFile(thread)
		if os.IsNotExist(err) {
			continue
		}
		p.must(err)
		ns, err := strconv.ParseFloat(strings.Fields(string(text))[0], 64)
		p.must(err)
		us += ns / 1000
	}
	return us
}
