package reconcile

import (
	"context"
	"errors"
	"sync"
	"time"
)

// stop lets the open connections end, and then ends Envoy.
func (d *Daemon) stop(abort <-chan struct{}) {
	d.locked(func() { d.stopping = true })
	if d.want != nil {
		d.drain(d.want.mesh.Envoy.DrainTime, abort)
	}
	d.Proxy.Stop()
	d.Log.Info("mantlet ends; the rules stay and nothing more comes in through Envoy")
}

// drainPoll is how often the open connections are counted while they end.
const drainPoll = 100 * time.Millisecond

// drain returns once no Envoy has an open connection, after a limit at the latest. If they can't be counted, it waits for all of the
// limit.
func (d *Daemon) drain(limit time.Duration, abort <-chan struct{}) {
	ctx, cut := context.WithCancelCause(context.Background())
	var waiting sync.WaitGroup
	defer waiting.Wait()
	defer cut(nil)
	waiting.Go(func() { // also while an Envoy does not answer
		select {
		case <-time.After(limit):
			cut(errors.New("the drain time is over"))
		case <-abort:
			cut(errors.New("second signal"))
		case <-ctx.Done():
		}
	})
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	for logged := false; ; {
		open, err := d.Proxy.Connections(ctx)
		if ctx.Err() != nil {
			d.Log.Warn("cutting connections that did not end", "reason", context.Cause(ctx))
			return
		}
		if err == nil && open == 0 {
			return
		}
		if !logged {
			d.Log.Info("waiting for connections to end", "open", open, "limit", limit.String(), "uncounted", err)
			logged = true
		}
		select {
		case <-tick.C:
		case <-d.notes.changed:
			d.revoke()
		case <-ctx.Done():
		}
	}
}
