package reconcile

import (
	"context"
	"fmt"
	"time"

	"mantlet/internal/status"
	"mantlet/render"
)

// fallBack makes the last good state serve if a failed attempt at another one left no Envoy that serves it and answers.
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

// isServing reports whether an Envoy serves a state.
func (d *Daemon) isServing(state *desired) bool {
	return d.serving.process != nil && d.serving.digest == state.state.Digest
}

// start makes an Envoy serve a state. Meanwhile, connections of a mesh CA that is removed are ended all the same.
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

// startAndRevoke starts an Envoy, and calls revoke while it starts.
func (d *Daemon) startAndRevoke(ctx context.Context, want *desired) (process Process, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer d.watchdog.idle(starter)
		d.watchdog.begin(starter, "starting Envoy", startLimit)
		var state render.State
		if state, err = want.rendered(); err == nil {
			process, err = d.Proxy.Start(ctx, state, want.mesh.Envoy)
		}
	}()
	changed := false
	for {
		d.watchdog.idle(loop)
		select {
		case <-done:
			d.watchdog.begin(loop, "its turn", turnLimit)
			if changed {
				notify(d.notes.changed) // the configuration may have changed as well
			}
			return process, err
		case <-d.notes.changed:
			changed = true
			d.watchdog.begin(loop, "its turn", turnLimit)
			d.revoke()
		}
	}
}

// envoyEnded notes that the Envoy that served has ended.
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

// exited returns a channel that is closed when the Envoy that serves ends; nil if none serves.
func (d *Daemon) exited() <-chan struct{} {
	if d.serving.process == nil {
		return nil
	}
	return d.serving.process.Exited()
}
