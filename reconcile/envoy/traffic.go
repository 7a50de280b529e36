package envoy

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"mantlet/internal/status"
	"mantlet/schema"
)

// The statistics that make up the traffic: handshakes with clients, connections of the workload, how often one of them failed
// at an address of the upstream, and how often one came to nothing, since all attempts failed or there was no address.
const (
	handshakes        = "listener.ingress-%s.ssl.handshake"
	egressConnections = "tcp.%s.downstream_cx_total"
	connectFailures   = "cluster.%s.upstream_cx_connect_fail"
	attemptsExceeded  = "cluster.%s.upstream_cx_connect_attempts_exceeded"
	noHealthyHost     = "cluster.%s.upstream_cx_none_healthy"
	statistics        = `^(listener\.ingress-m?tls\.ssl\.handshake|listener\.(ingress|egress)-.*\.downstream_(global_cx_overflow|cx_overflow|cx_overload_reject)|` +
		`tcp\.egress-.*\.downstream_cx_total|` +
		`cluster\.egress-.*\.upstream_cx_(connect_fail|connect_attempts_exceeded|none_healthy))$`
)

// refreshStats asks the process that serves for its statistics. Those that drain accept no new connections.
func (r *Runner) refreshStats(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	p := r.serving()
	if p == nil {
		return
	}
	if counted, err := p.admin.stats(ctx, statistics); err == nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		p.counted = counted
	}
}

// Traffic returns how many connections there were since the start. What a crashed Envoy counted after it was last asked is missing.
func (r *Runner) Traffic(ctx context.Context) status.Traffic {
	r.refreshStats(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	all := addCounters(nil, r.ended)
	for _, p := range r.running {
		all = addCounters(all, p.counted)
	}
	t := status.Traffic{Ingress: []status.Handshakes{}, Egress: []status.Dialled{}, Shed: countOverLimit(all)}
	for _, mode := range []schema.Mode{schema.ModeMTLS, schema.ModeTLS} {
		t.Ingress = append(t.Ingress, status.Handshakes{Mode: mode, Total: all[fmt.Sprintf(handshakes, mode)]})
	}
	if len(r.running) == 0 {
		return t
	}
	for _, l := range r.running[len(r.running)-1].listeners {
		if listen, ok := strings.CutPrefix(l.name, "egress-"); ok {
			name := strings.ReplaceAll(l.name, ":", "_") // as Envoy names it among its statistics
			t.Egress = append(t.Egress, status.Dialled{
				Listen: listen, Total: all[fmt.Sprintf(egressConnections, name)],
				Failed:         all[fmt.Sprintf(attemptsExceeded, name)] + all[fmt.Sprintf(noHealthyHost, name)],
				FailedAttempts: all[fmt.Sprintf(connectFailures, name)],
			})
		}
	}
	return t
}

// overLimit are the directions of connections that were closed since too many were open, and the statistics that count them: over the
// limit of all listeners, over that of one, and for lack of memory.
var overLimit = map[string]*regexp.Regexp{
	"ingress": regexp.MustCompile(`^listener\.ingress-.*\.downstream_(global_cx_overflow|cx_overload_reject)$`),
	egress:    regexp.MustCompile(`^listener\.egress-.*\.downstream_(cx_overflow|cx_overload_reject)$`),
}

// countOverLimit returns how many connections were closed at once because too many were open, by direction.
func countOverLimit(all map[string]uint64) map[string]uint64 {
	counts := map[string]uint64{}
	for direction, names := range overLimit {
		counts[direction] = 0
		for name, n := range all {
			if names.MatchString(name) {
				counts[direction] += n
			}
		}
	}
	return counts
}

// Statistics returns what the Envoy that serves says of itself at /stats/prometheus.
func (r *Runner) Statistics(ctx context.Context) ([]byte, error) {
	serving := r.serving()
	if serving == nil {
		return nil, errors.New("no Envoy runs")
	}
	return serving.admin.statistics(ctx)
}

// addCounters adds counters to others of the same names.
func addCounters(to, more map[string]uint64) map[string]uint64 {
	if to == nil {
		to = map[string]uint64{}
	}
	for name, n := range more {
		to[name] += n
	}
	return to
}

// Connections returns how many connections would be cut if all processes were stopped now.
func (r *Runner) Connections(ctx context.Context) (int, error) {
	sum := 0
	var errs []error
	for _, p := range r.Running() {
		open, err := r.connections(ctx, p)
		if err != nil && p.alive() {
			errs = append(errs, fmt.Errorf("counting connections of epoch %d: %w", p.Epoch, err))
		}
		sum += open
	}
	return sum, errors.Join(errs...)
}

// connections returns how many connections go through a process. One that another took over from, or whose child failed to start, has no
// admin interface any more, and is asked in its child's place.
func (r *Runner) connections(ctx context.Context, p *Process) (int, error) {
	if open, err := p.admin.connections(ctx); err == nil {
		return open, nil
	}
	return r.connectionsOfParent(p)
}

// askLimit bounds how long a status waits for an Envoy that hangs.
const askLimit = time.Second
