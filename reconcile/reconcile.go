// Package reconcile brings the kernel's rules and Envoy to the desired state and keeps them there.
package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

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

// Secrets are the certificates that Envoy has.
type Secrets interface {
	// Update gives Envoy the generation that is in the TLS directory. Where that is not good the error says why, and Envoy
	// keeps what it has. It is idempotent.
	Update() error
	// Renew gives Envoy what it has once more, which ends all TLS session tickets. Where it has nothing, it does nothing.
	Renew() error
	// Expires returns when what Envoy has expires; the zero time where it has nothing.
	Expires() time.Time
}

// Process is an Envoy that is live, or was.
type Process interface {
	// Check returns nil if it is live with the state that it was started with.
	Check(context.Context) error
	// Connections returns how many connections would be cut if it were stopped now.
	Connections(context.Context) (int, error)
	// Exited is closed once it has ended. From then on Err says how.
	Exited() <-chan struct{}
	Err() error
	// Stop ends it and returns when it is gone.
	Stop()
}

// Daemon is one run of mantlet. Its exported fields are set before Run.
type Daemon struct {
	Environment *schema.Environment
	Place       render.Place
	Kernel      Kernel
	Secrets     Secrets
	// Start executes Envoy for a state and returns it once it is live with that.
	Start func(context.Context, render.State, schema.Envoy) (Process, error)
	Log   *slog.Logger

	mu       sync.Mutex
	desired  *desired  // nil until an override file that is named could be read
	expires  time.Time // what Envoy has of certificates; zero where it has none
	process  Process   // nil where none runs
	inForce  bool      // the desired rules are in the kernel
	stopping bool

	// Why the daemon is not further, each nil where it is not the reason.
	badConfig, badCertificates, down error
}

// desired is the desired state and what it was rendered from.
type desired struct {
	mesh  schema.Mesh
	state render.State
}

// ticketLife bounds how long a client can resume a TLS session after its certificate expired: publishing anew ends all
// tickets. An hour costs each client one full handshake an hour.
const ticketLife = time.Hour

// Run brings the desired state about and keeps it until ctx ends; then it lets connections end, for at most the drain
// time or until abort is closed, and stops Envoy. The rules stay whatever happens. The error is nil after an orderly end.
func (d *Daemon) Run(ctx context.Context, abort <-chan struct{}) error {
	watching, stopWatching := context.WithCancel(context.Background())
	defer stopWatching()
	certificates := watch(watching, d.Environment.Process.TLSDirectory, d.Log)
	config := d.watchConfig(watching)
	tickets := time.NewTicker(ticketLife)
	defer tickets.Stop()
	var (
		retry <-chan time.Time
		pause backoff
	)
	for {
		select {
		case <-ctx.Done():
			return d.stop(abort)
		case <-config:
			d.readConfig()
		case <-certificates:
			d.readCertificates()
		case <-tickets.C:
			if err := d.Secrets.Renew(); err != nil {
				d.Log.Error("session tickets live on", "error", err)
			}
		case <-d.exited():
			err, delay := d.process.Err(), pause.next(time.Now())
			d.Log.Error("Envoy ended; new connections wait until it is back", "error", err, "restart_in", delay.String())
			d.locked(func() { d.process, d.down = nil, fmt.Errorf("Envoy is down: %w", err) })
			retry = time.After(delay)
		case <-retry:
			retry = nil
		}
		if d.desired == nil || d.expires.IsZero() || d.process != nil && d.inForce || retry != nil {
			continue
		}
		if err := d.bringUp(ctx); err != nil && ctx.Err() == nil {
			delay := pause.next(time.Now())
			d.Log.Error("the desired state is not in force", "error", err, "retry_in", delay.String())
			d.locked(func() { d.down = err })
			retry = time.After(delay)
		}
	}
}

// bringUp makes what is missing: first Envoy, then the rules that send connections to it.
func (d *Daemon) bringUp(ctx context.Context) error {
	if d.process == nil {
		state := d.desired.state
		state.Bootstrap = proto.CloneOf(state.Bootstrap)
		render.WaitFor(state.Bootstrap, resolve(ctx, d.desired.mesh.Egress))
		process, err := d.Start(ctx, state, d.desired.mesh.Envoy)
		if err != nil {
			return err
		}
		d.locked(func() { d.process = process })
	}
	if !d.inForce {
		if err := d.Kernel.Replace(d.desired.state.Ruleset); err != nil {
			return err
		}
		mesh := d.desired.mesh
		d.Log.Info("rules are in force", "ingress_entries", len(mesh.Ingress), "egress_entries", len(mesh.Egress))
	}
	d.locked(func() { d.inForce, d.down = true, nil })
	return nil
}

// watchConfig watches the directory of the override file. Without a file, one note starts everything.
func (d *Daemon) watchConfig(ctx context.Context) <-chan struct{} {
	if process := d.Environment.Process; process.ConfigFile != "" && process.Overrides != schema.OverridesNone {
		return watch(ctx, filepath.Dir(process.ConfigFile), d.Log)
	}
	once := make(chan struct{}, 1)
	notify(once)
	return once
}

// readConfig takes the first override file that is good, or none where none is named. Until then it says what is wrong.
func (d *Daemon) readConfig() {
	if d.desired != nil {
		return
	}
	config, err := d.Environment.Load()
	if err == nil {
		var state render.State
		if state, err = render.Render(config.Mesh, d.Place); err == nil {
			d.locked(func() { d.desired, d.badConfig = &desired{config.Mesh, state}, nil })
			return
		}
	}
	d.wait(&d.badConfig, "waiting for a good override file", err)
}

// readCertificates passes on a new generation of certificates. A bad one is reported, and the last good one stays.
func (d *Daemon) readCertificates() {
	err, before := d.Secrets.Update(), d.badCertificates
	expires := d.Secrets.Expires()
	if err != nil && expires.IsZero() {
		d.wait(&d.badCertificates, "waiting for certificates", err)
		return
	}
	if err != nil && !same(err, before) {
		d.Log.Warn("certificates can't be used; the last good ones stay", "error", err)
	}
	d.locked(func() { d.expires, d.badCertificates = expires, err })
}

// wait notes a reason why the daemon can't go on, and logs it when that is new.
func (d *Daemon) wait(reason *error, what string, err error) {
	err = fmt.Errorf("%s: %w", what, err)
	if !same(err, *reason) {
		d.Log.Warn("nothing comes in yet", "reason", err)
	}
	d.locked(func() { *reason = err })
}

func same(err, other error) bool { return err != nil && other != nil && err.Error() == other.Error() }

// stop lets the workload's connections end, then ends Envoy.
func (d *Daemon) stop(abort <-chan struct{}) error {
	d.locked(func() { d.stopping = true })
	if p := d.process; p != nil {
		d.drain(p, abort)
		p.Stop()
	}
	d.Log.Info("mantlet ends; the rules stay and nothing comes in")
	return nil
}

// drainPoll is how often the open connections are counted while they end.
const drainPoll = 100 * time.Millisecond

func (d *Daemon) drain(p Process, abort <-chan struct{}) {
	limit := d.desired.mesh.Envoy.DrainTime
	ctx, cut := context.WithCancelCause(context.Background())
	defer cut(nil)
	go func() { // an Envoy that does not answer holds up neither
		select {
		case <-time.After(limit):
			cut(errors.New("the drain time is over"))
		case <-abort:
			cut(errors.New("second signal"))
		case <-ctx.Done():
		}
	}()
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	for logged := false; ; {
		open, err := p.Connections(ctx)
		if ctx.Err() != nil {
			d.Log.Warn("cutting connections that did not end", "reason", context.Cause(ctx))
			return
		}
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
		case <-p.Exited():
			return
		}
	}
}

// checkLimit is when an Envoy that does not answer becomes the reason: less than a probe waits.
const checkLimit = 2 * time.Second

// Unready returns the reasons why the sidecar is not ready; none if it is. Everything is tried, nothing remembered.
func (d *Daemon) Unready(ctx context.Context) []error {
	d.mu.Lock()
	expires, process, inForce := d.expires, d.process, d.inForce
	reasons := []error{d.badConfig, d.down}
	if expires.IsZero() {
		reasons = append(reasons, d.badCertificates)
	}
	if d.stopping {
		reasons = append(reasons, errors.New("mantlet is stopping"))
	}
	d.mu.Unlock()
	if !expires.IsZero() && time.Now().After(expires) {
		reasons = append(reasons, fmt.Errorf("the certificates expired at %s", expires.Format(time.RFC3339)))
	}
	if process != nil {
		ctx, cancel := context.WithTimeout(ctx, checkLimit)
		defer cancel()
		reasons = append(reasons, process.Check(ctx))
	}
	if inForce {
		reasons = append(reasons, d.Kernel.Check())
	}
	reasons = slices.DeleteFunc(reasons, func(err error) bool { return err == nil })
	if len(reasons) == 0 && !inForce {
		reasons = append(reasons, errors.New("mantlet is starting"))
	}
	return reasons
}

func (d *Daemon) locked(change func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change()
}

// exited returns the channel that tells the end of the running Envoy, or nil where none runs.
func (d *Daemon) exited() <-chan struct{} {
	if d.process == nil {
		return nil
	}
	return d.process.Exited()
}

// resolveLimit bounds what a dead resolver can hold up.
const resolveLimit = time.Second

// resolve returns which hosts among the upstreams have an address now.
func resolve(ctx context.Context, entries []schema.Egress) map[string]bool {
	ctx, cancel := context.WithTimeout(ctx, resolveLimit)
	defer cancel()
	hosts := map[string]bool{}
	for _, e := range entries {
		if _, isAddress := e.Upstream.Addr(); !isAddress {
			hosts[e.Upstream.Host] = true
		}
	}
	var (
		resolved = map[string]bool{}
		mu       sync.Mutex
		wait     sync.WaitGroup
	)
	for host := range hosts {
		wait.Go(func() {
			if _, err := net.DefaultResolver.LookupHost(ctx, host); err == nil {
				mu.Lock()
				defer mu.Unlock()
				resolved[host] = true
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
