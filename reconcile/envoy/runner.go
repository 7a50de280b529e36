package envoy

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"mantlet/internal/bind"
	"mantlet/internal/cgroup"
	"mantlet/internal/peers"
	"mantlet/internal/rundir"
	"mantlet/internal/sandbox"
	"mantlet/internal/status"
	"mantlet/render"
	"mantlet/schema"
)

// Runner starts Envoys: the first as epoch 0, and each later one as a hot restart of the one that serves. Its exported
// fields are set before the first Start. Start is not safe for concurrent use.
type Runner struct {
	Path             string               // the binary; found on PATH where it has no slash
	UID              int                  // of Envoys
	Needs            []sandbox.Capability // of mantlet's container
	Processes        bind.Processes       // that listened when mantlet still could see who does
	RuntimeDirectory string               // theirs and mantlet's: holds sockets, SDS files and bootstraps
	Log              *slog.Logger
	Limits           render.Limits  // of mantlet and all Envoys
	Memory           *cgroup.Memory // that they have; nil where the kernel does not tell
	// Upstream describes the upstream of the egress entry that listens at an address. It may be nil.
	Upstream func(listen string) status.Upstream
	// Progress is told each step that Start begins, and how long it takes at most. It may be nil.
	Progress func(what string, limit time.Duration)

	spawner  spawner
	standIns sync.WaitGroup
	bases    []*base // that Envoys were given

	refused refusals
	peers   peers.Table

	liveLimit time.Duration // defaultLiveLimit where it is 0
	failed    atomic.Uint64 // Envoys that were executed and did not get live

	mu      sync.Mutex
	ended   map[string]uint64 // statistics of those that are not among running any more
	running []*Process        // by epoch: those that drain, and at last the one that serves; some may have ended
}

// defaultLiveLimit bounds initialisation. It takes 45-100 ms as a rule, longer on a busy machine, and for ever where it hangs.
const defaultLiveLimit = 20 * time.Second

// partLimit is added for each filter chain and cluster: four times what one takes of a processor.
const partLimit = 6 * time.Millisecond

// Start executes Envoy for a state and waits until Envoy says that it is live with that state. Where another Envoy serves, the new one
// takes over from it without a connection being refused, and the old one drains and ends by itself.
//
// Where the new Envoy does not get live in time, it is killed, and the one that served goes on. That one may have lost its admin
// interface, which only another Start brings back, with any state that works.
func (r *Runner) Start(ctx context.Context, state render.State, settings schema.Envoy) (*Process, error) {
	p, err := r.startNext(ctx, state, settings)
	if err != nil {
		return nil, err
	}
	r.Log.Info("Envoy is live", "epoch", p.Epoch, "pid", p.PID(), "digest", p.Digest)
	return p, nil
}

func (r *Runner) startNext(ctx context.Context, state render.State, settings schema.Envoy) (*Process, error) {
	if err := r.spawner.do(func() error { return nil }); err != nil { // before there is a file that only this thread may remove
		return nil, err
	}
	if err := r.spawner.do(r.peers.Open); err != nil {
		r.Log.Warn("it is not known who is connected: a change that forbids one client ends the connections of all", "error", err)
	}
	parent := r.serving()
	// A parent that drains has lost the Envoy that took over from it. Nobody listens then, and a failure can't make that worse.
	if parent != nil && !parent.drains {
		r.progress("having Envoy validate the bootstrap", r.limit(state))
		if err := r.preflight(ctx, state, parent.parts); err != nil {
			return nil, err
		}
		r.progress("counting connections", askLimit)
		r.refreshStats(ctx) // later it has no admin interface
	}
	if err := r.tryBinds(state.Bootstrap); err != nil {
		return nil, err
	}
	r.progress("executing Envoy", executeLimit)
	var abandoned []*Process
	if parent != nil {
		if err := r.hotRestartError(parent); err != nil {
			abandoned, parent = r.Running(), nil
			r.Log.Warn("a plain restart of Envoy, which cuts connections: a hot one is not possible", "error", err)
		}
	}
	p, err := r.startEpoch(ctx, state, settings, parent)
	if err != nil {
		return nil, err
	}
	for _, old := range slices.Backward(abandoned) {
		r.progress("ending an Envoy that nothing can follow", termLimit)
		old.Stop()
	}
	r.addRunning(p, parent, settings.ParentShutdownTime)
	if parent != nil {
		r.standIns.Go(func() { r.standInForParent(parent, p) })
		r.progress("waiting until the Envoy before it takes no more connections", r.limit(state))
		r.awaitDrain(parent, r.limit(state))
	}
	return p, nil
}

// startEpoch executes an Envoy that takes over from a parent, if there is one, and returns it once it is live.
func (r *Runner) startEpoch(ctx context.Context, state render.State, settings schema.Envoy, parent *Process) (*Process, error) {
	if parent != nil {
		parent.parentStats.setChildStarting(true)
		defer parent.parentStats.setChildStarting(false)
	}
	p, err := r.execute(state, settings, parent)
	if err != nil {
		return nil, err
	}
	r.progress("waiting until Envoy is live", r.limit(state))
	ctx, cancel := context.WithTimeout(ctx, r.limit(state))
	defer cancel()
	if err := p.waitLive(ctx, parent); err != nil {
		r.failed.Add(1)
		r.progress("ending an Envoy that does not start", answerLimit)
		p.Kill() // on SIGTERM it would end its parent, which serves
		<-p.exited
		if parent != nil && parent.alive() {
			parent.base.blocked = errors.Join(r.spawner.do(parent.base.clearInitializing), r.drainAnswers(parent))
		}
		return nil, err
	}
	return p, nil
}

// limit returns the bound of initialisation with a state.
func (r *Runner) limit(state render.State) time.Duration {
	resources, parts := state.Bootstrap.StaticResources, 0
	for _, l := range resources.Listeners {
		parts += len(l.FilterChains)
	}
	return cmp.Or(r.liveLimit, defaultLiveLimit) + time.Duration(parts+len(resources.Clusters))*partLimit
}

// grace is what a step may take beyond its limit on a busy machine.
const grace = 5 * time.Second

func (r *Runner) progress(what string, limit time.Duration) {
	if r.Progress != nil {
		r.Progress(what, limit+grace)
	}
}

// addRunning makes a process the one that serves, and its parent one that drains, for a given time at most. It removes the files of
// processes that have ended.
func (r *Runner) addRunning(p, parent *Process, most time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p.since = time.Now()
	if parent != nil && !parent.drains {
		parent.drains, parent.since, parent.most = true, p.since, most
	}
	r.running = append(slices.DeleteFunc(r.running, func(old *Process) bool {
		if !old.alive() {
			r.ended = addCounters(r.ended, old.counted)
		}
		if !old.alive() && old.Epoch != p.Epoch {
			_ = r.remove(r.directory().OfEpoch(old.Epoch)...)
		}
		return !old.alive()
	}), p)
	r.removeUnusedBases()
}

// removeUnusedBases removes the shared memory and sockets of base IDs that no process has any more. What can't be removed now is tried
// again.
func (r *Runner) removeUnusedBases() {
	r.bases = slices.DeleteFunc(r.bases, func(b *base) bool {
		used := slices.ContainsFunc(r.running, func(p *Process) bool { return p.base == b && p.alive() })
		return !used && errors.Join(r.spawner.do(b.remove), r.remove(r.directory().OfBase(b.id)...)) == nil
	})
}

// Running returns the processes that have not ended, the one that serves last.
func (r *Runner) Running() []*Process {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(r.running), func(p *Process) bool { return !p.alive() })
}

// Epochs describes the processes that have not ended, the one that serves last.
func (r *Runner) Epochs(ctx context.Context) []status.Epoch {
	r.mu.Lock()
	running := slices.Clone(r.running)
	var all []status.Epoch
	for _, p := range running {
		e := status.Epoch{Epoch: p.Epoch, PID: p.PID(), Serving: !p.drains, Since: p.since, Digest: p.Digest}
		if p.drains {
			e.LeftSeconds = max(0, time.Until(p.since.Add(p.most))).Round(time.Millisecond).Seconds()
		}
		all = append(all, e)
	}
	r.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	var asked sync.WaitGroup
	for i, p := range running {
		asked.Go(func() {
			if open, err := r.connections(ctx, p); err == nil {
				all[i].Connections = &open
			}
		})
	}
	asked.Wait()
	for i := len(running) - 1; i >= 0; i-- {
		if !running[i].alive() {
			all = slices.Delete(all, i, i+1)
		}
	}
	return all
}

// serving returns the newest process that has not ended; nil where there is none.
func (r *Runner) serving() *Process {
	if running := r.Running(); len(running) > 0 {
		return running[len(running)-1]
	}
	return nil
}

// Stop ends all processes, the newest first: the others lose nothing by its end.
func (r *Runner) Stop() {
	for _, p := range slices.Backward(r.Running()) {
		p.Stop()
	}
}

// Close ends the Runner and removes the files of its Envoys. No Process may be running.
func (r *Runner) Close() error {
	r.standIns.Wait()
	errs := []error{r.peers.Close()}
	for _, b := range r.bases {
		errs = append(errs, r.spawner.do(b.remove))
	}
	r.spawner.stop(errors.New("the Runner is closed"))
	return errors.Join(append(errs, r.removeLeftovers(), r.remove(r.directory().Secrets()...))...)
}

// removeLeftovers removes the files that Envoys leave in the runtime directory, and a mantlet that was killed while it wrote one. No
// Envoy may be running.
func (r *Runner) removeLeftovers() error {
	return r.remove(r.directory().Leftovers()...)
}

// directory has the layout of the runtime directory.
func (r *Runner) directory() rundir.Envoy { return rundir.Envoy(r.RuntimeDirectory) }

// remove removes the files that patterns match.
func (r *Runner) remove(patterns ...string) error {
	var errs []error
	for _, pattern := range patterns {
		files, err := filepath.Glob(pattern)
		errs = append(errs, err)
		for _, f := range files {
			if err := os.Remove(f); !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}
