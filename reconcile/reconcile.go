// Package reconcile brings the kernel's rules and Envoy to the desired state and keeps them there.
package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"mantlet/reconcile/envoy"
	"mantlet/render"
	"mantlet/schema"
)

// Kernel is the table inet mantlet.
type Kernel interface {
	// Replace makes the table hold the ruleset and nothing else, in one transaction. Where it fails, the rules are as they
	// were. It is idempotent.
	Replace(render.Ruleset) error
	// Check returns nil if the table holds what Replace put there last.
	Check() error
}

// Daemon is one run of mantlet. Its exported fields are set before Run.
type Daemon struct {
	Mesh             schema.Mesh
	State            render.State
	TLSDirectory     string
	RuntimeDirectory string
	Kernel           Kernel
	Envoy            *envoy.Runner
	Log              *slog.Logger

	mu           sync.Mutex
	certificates *envoy.Certificates
	process      *envoy.Process
	inForce      bool // the desired rules are in the kernel
	stopping     bool
	waiting      error // why the daemon is not further, in words
}

// Run brings the desired state about and keeps it until ctx ends; then it lets connections end, for at most the drain
// time or until abort is closed, and stops Envoy. The rules stay whatever happens. The error is nil after an orderly end.
func (d *Daemon) Run(ctx context.Context, abort <-chan struct{}) error {
	watching, stopWatching := context.WithCancel(context.Background())
	defer stopWatching()
	certificates := watch(watching, d.TLSDirectory, d.Log)
	d.note(fmt.Errorf("waiting for certificates in %s", d.TLSDirectory))
	var (
		exited <-chan struct{} // of the running Envoy
		retry  <-chan time.Time
		pause  backoff
	)
	for {
		select {
		case <-ctx.Done():
			return d.stop(abort)
		case <-certificates:
			if !d.readCertificates() || exited != nil || retry != nil {
				continue
			}
		case <-exited:
			delay := pause.next(time.Now())
			d.Log.Error("Envoy ended; new connections wait until it is back", "error", d.process.Err(), "restart_in", delay.String())
			d.note(d.process.Err())
			exited, retry = nil, time.After(delay)
			continue
		case <-retry:
			retry = nil
		}
		if err := d.bringUp(ctx); err != nil {
			if ctx.Err() != nil {
				continue
			}
			delay := pause.next(time.Now())
			d.Log.Error("the desired state is not in force", "error", err, "retry_in", delay.String())
			d.note(err)
			retry = time.After(delay)
		}
		exited = d.exited()
	}
}

// bringUp makes what is missing: first Envoy, then the rules that send connections to it.
func (d *Daemon) bringUp(ctx context.Context) error {
	if d.process == nil || isClosed(d.process.Exited()) {
		state := d.State
		state.Bootstrap = proto.CloneOf(state.Bootstrap)
		render.WaitFor(state.Bootstrap, resolve(ctx, d.Mesh.Egress))
		process, err := d.Envoy.Start(ctx, state, d.Mesh.Envoy)
		if err != nil {
			return err
		}
		d.locked(func() { d.process = process })
	}
	if !d.inForce {
		if err := d.Kernel.Replace(d.State.Ruleset); err != nil {
			return err
		}
		d.Log.Info("rules are in force", "ingress_entries", len(d.Mesh.Ingress), "egress_entries", len(d.Mesh.Egress))
	}
	d.locked(func() { d.inForce, d.waiting = true, nil })
	return nil
}

// readCertificates publishes a new generation of certificates and reports whether there is a good one, new or old. A bad
// one is reported, and the last good one stays.
func (d *Daemon) readCertificates() bool {
	have := d.certificates
	read, err := envoy.LoadCertificates(d.TLSDirectory, time.Now())
	switch {
	case err != nil && have == nil:
		err = fmt.Errorf("waiting for certificates: %w", err)
		if d.waiting == nil || d.waiting.Error() != err.Error() {
			d.Log.Warn(err.Error())
		}
		d.note(err)
	case err != nil:
		d.Log.Warn("certificates can't be used; the last good ones stay", "error", err)
	case read.Equal(have):
	default:
		if err := envoy.Publish(read, d.RuntimeDirectory); err != nil {
			d.Log.Error("certificates could not be published", "error", err)
			break
		}
		d.locked(func() { d.certificates = read })
		d.Log.Info("certificates published", "subject", read.Leaf().Subject.String(), "sans", read.Leaf().DNSNames, "expires", read.Expires())
	}
	return d.certificates != nil
}

// stop lets the workload's connections end, then ends Envoy.
func (d *Daemon) stop(abort <-chan struct{}) error {
	d.locked(func() { d.stopping = true })
	if p := d.process; p != nil && !isClosed(p.Exited()) {
		d.drain(p, abort)
		p.Stop()
	}
	d.Log.Info("mantlet ends; the rules stay and nothing comes in")
	return nil
}

// drainPoll is how often the open connections are counted while they end.
const drainPoll = 100 * time.Millisecond

func (d *Daemon) drain(p *envoy.Process, abort <-chan struct{}) {
	limit := d.Mesh.Envoy.DrainTime
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	for logged := false; ; {
		open, err := p.Connections(ctx)
		if err != nil || open == 0 {
			return
		}
		if !logged {
			d.Log.Info("waiting for connections to end", "open", open, "limit", limit.String())
			logged = true
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			d.Log.Warn("cutting connections that did not end", "open", open)
			return
		case <-abort:
			d.Log.Warn("second signal: cutting connections", "open", open)
			return
		case <-p.Exited():
			return
		}
	}
}

// Unready returns the reasons why the sidecar is not ready; none if it is. Everything is tried, nothing remembered.
func (d *Daemon) Unready(ctx context.Context) []error {
	d.mu.Lock()
	certificates, process, inForce, stopping, waiting := d.certificates, d.process, d.inForce, d.stopping, d.waiting
	d.mu.Unlock()
	var reasons []error
	add := func(err error) {
		if err != nil {
			reasons = append(reasons, err)
		}
	}
	if stopping {
		add(errors.New("mantlet is stopping"))
	}
	add(waiting)
	if certificates != nil && time.Now().After(certificates.Expires()) {
		add(fmt.Errorf("the certificates expired at %s", certificates.Expires().Format(time.RFC3339)))
	}
	if process != nil && waiting == nil {
		add(process.Check(ctx, d.State.Digest))
	}
	if inForce {
		add(d.Kernel.Check())
	}
	return reasons
}

func (d *Daemon) note(waiting error) { d.locked(func() { d.waiting = waiting }) }

func (d *Daemon) locked(change func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change()
}

// exited returns the channel that tells the end of the running Envoy, or nil where none runs.
func (d *Daemon) exited() <-chan struct{} {
	if d.process == nil || isClosed(d.process.Exited()) {
		return nil
	}
	return d.process.Exited()
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// resolveLimit bounds what a dead resolver can hold up.
const resolveLimit = time.Second

// resolve returns which hosts among the upstreams have an address now.
func resolve(ctx context.Context, entries []schema.Egress) map[string]bool {
	ctx, cancel := context.WithTimeout(ctx, resolveLimit)
	defer cancel()
	var (
		resolved = map[string]bool{}
		mu       sync.Mutex
		wait     sync.WaitGroup
	)
	for _, e := range entries {
		if _, isAddress := e.Upstream.Addr(); isAddress {
			continue
		}
		wait.Go(func() {
			if _, err := net.DefaultResolver.LookupHost(ctx, e.Upstream.Host); err == nil {
				mu.Lock()
				defer mu.Unlock()
				resolved[e.Upstream.Host] = true
			}
		})
	}
	wait.Wait()
	return resolved
}

// backoff spaces out starts that fail one after another. The first comes at once: an Envoy that was killed is back
// within a client's first retransmission.
type backoff struct {
	pause time.Duration
	last  time.Time
}

const (
	firstPause = 100 * time.Millisecond
	maxPause   = 10 * time.Second
	// healthy is how long it must go well for the next failure to count as the first.
	healthy = time.Minute
)

// next returns how long to wait, with jitter, after a failure at now.
func (b *backoff) next(now time.Time) time.Duration {
	if now.Sub(b.last) > healthy {
		b.pause = 0
	}
	b.last = now
	pause := b.pause
	b.pause = min(max(2*b.pause, firstPause), maxPause)
	if pause == 0 {
		return 0
	}
	return pause/2 + rand.N(pause/2)
}
