package reconcile

import (
	"context"
	"fmt"
	"time"

	"mantlet/internal/status"
)

// fallBack makes the last good state serve where an attempt at another one left nothing that does, or that answers.
func (d *Daemon) fallBack(ctx context.Context) error {
	if d.serving.process != nil && d.isServing(d.have) {
		ctx, cancel := context.WithTimeout(ctx, checkLimit)
		defer cancel()
		if d.serving.process.Check(ctx) == nil {
			return nil
		}
	}
	if err := d.start(ctx, d.have); err != nil {
		return fmt.Errorf("going back to the last good state: %w", err)
	}
	return nil
}

// isServing reports whether an Envoy runs with the state.
func (d *Daemon) isServing(state *desired) bool {
	return d.serving.process != nil && d.serving.digest == state.state.Digest
}

// start makes a state serve. While it is under way, connections by a mesh CA that is taken away end all the same.
func (d *Daemon) start(ctx context.Context, want *desired) error {
	kind, began := status.ApplyStart, time.Now()
	if d.serving.process != nil {
		kind = status.ApplyHotRestart
		if began.Before(d.serving.drained) {
			d.loop.drainCuts = append(d.loop.drainCuts, began)
			d.loop.drainCuts = d.loop.drainCuts[max(0, len(d.loop.drainCuts)-drainCutsAtOnce):]
		}
	}
	d.locked(func() {
		d.handover = true
		d.starts++
	})
	process, err := d.startAndRevoke(ctx, want)
	d.locked(func() { d.handover = false })
	notify(d.notes.started)
	if ctx.Err() == nil {
		d.countApplied(kind, time.Since(began), err)
		d.locked(func() { d.envoys.Add(err == nil, d.have != nil && (d.serving.process == nil || want == d.have)) })
	}
	if err != nil {
		return withReason(status.EnvoyNotStarted, Explain(err, want.mesh))
	}
	if d.serving.process != nil {
		d.serving.drained = time.Now().Add(want.mesh.Envoy.DrainTime)
	}
	d.locked(func() { d.serving.process, d.serving.digest = process, want.state.Digest })
	return nil
}

// startAndRevoke starts an Envoy, and revokes while it starts.
func (d *Daemon) startAndRevoke(ctx context.Context, want *desired) (process Process, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer d.watchdog.idle(starter)
		d.watchdog.begin(starter, "starting Envoy", startLimit)
		process, err = d.Proxy.Start(ctx, want.state, want.mesh.Envoy)
	}()
	news := false
	for {
		d.watchdog.idle(loop)
		select {
		case <-done:
			d.watchdog.begin(loop, "its turn", turnLimit)
			if news {
				notify(d.notes.changed) // there may be another configuration, too
			}
			return process, err
		case <-d.notes.changed:
			news = true
			d.watchdog.begin(loop, "its turn", turnLimit)
			d.revoke()
		}
	}
}

// envoyEnded takes note that the Envoy which served has ended.
func (d *Daemon) envoyEnded() {
	err, delay := d.serving.process.Err(), d.loop.backoff.next(time.Now())
	d.Log.Error("Envoy ended; new connections wait until it is back", "error", err, "restart_in", delay.String())
	d.loop.notBefore = time.Now().Add(delay)
	err = withReason(status.EnvoyDown, err)
	d.locked(func() {
		d.serving.process, d.unapplied = nil, err
		d.envoys.Ended++
	})
	d.noteFailure(status.CheckEnvoy, err)
}

// exited returns the channel that tells the end of the running Envoy, or nil where none runs.
func (d *Daemon) exited() <-chan struct{} {
	if d.serving.process == nil {
		return nil
	}
	return d.serving.process.Exited()
}
