package reconcile

import (
	"context"
	"time"

	"mantlet/internal/gate"
)

// serveGate serves the gate's socket, if one is configured, until ctx ends. If it can't, the status says why, and it is tried again.
func (d *Daemon) serveGate(ctx context.Context) {
	path := d.Environment.Process.GateSocket
	for ; path != "" && ctx.Err() == nil; sleep(ctx, gateRetry) {
		listener, err := gate.Listen(path)
		if err == nil {
			d.locked(func() { d.gateErr = nil })
			err = gate.Serve(ctx, listener, func(ctx context.Context) bool { return len(d.Unready(ctx)) == 0 })
		}
		if err == nil {
			return
		}
		if !sameError(err, d.gateErr) {
			d.Log.Warn("the gate's socket is not served: gated workloads do not start", "error", err)
		}
		d.locked(func() { d.gateErr = err })
	}
}

// gateRetry is how soon a failed attempt to serve the gate's socket is repeated.
const gateRetry = time.Second
