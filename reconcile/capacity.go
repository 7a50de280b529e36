package reconcile

import (
	"context"
	"time"

	"mantlet/internal/status"
)

// connectionLimit is the code of connections that were closed because too many were open.
const connectionLimit = "connection_limit"

// capacity returns the connection limits of the Envoy that serves, or of the next one if none does.
func (d *Daemon) capacity() status.Capacity {
	var state *desired
	d.locked(func() {
		if state = d.have; state == nil {
			state = d.want
		}
	})
	if state == nil {
		return status.Capacity{Memory: d.Limits.Memory, Descriptors: d.Limits.Descriptors}
	}
	c := d.Limits.Capacity(state.state.Cost)
	return status.Capacity{Ingress: c.Ingress, By: c.By, Egress: c.Egress, Memory: d.Limits.Memory, Descriptors: d.Limits.Descriptors}
}

// overLimitPoll is how often Envoy is asked for connections over the limit: its access log has no line for them.
const overLimitPoll = 10 * time.Second

// logOverLimit logs connections over the limit, until ctx ends.
func (d *Daemon) logOverLimit(ctx context.Context) {
	tick := time.NewTicker(overLimitPoll)
	defer tick.Stop()
	logged := map[string]uint64{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		capacity := d.capacity()
		for direction, count := range d.Proxy.Traffic(ctx).Shed {
			if count > logged[direction] {
				d.Log.Warn("connections rejected", "code", connectionLimit, "direction", direction, "count", count-logged[direction],
					"reason", "too many are open", "limit_ingress", capacity.Ingress, "limit_by", capacity.By, "limit_egress", capacity.Egress)
			}
			logged[direction] = count
		}
	}
}
