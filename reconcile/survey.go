package reconcile

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// watchOtherTables checks other tables from time to time, until ctx ends. It takes a tenth of a processor at most.
func (d *Daemon) watchOtherTables(ctx context.Context) {
	log := newLogLimit()
	for pause := resync; ; {
		if sleep(ctx, pause); ctx.Err() != nil {
			return
		}
		began := time.Now()
		d.checkOtherTables(log)
		d.watchdog.idle(surveyor)
		pause = max(resync, 10*time.Since(began))
	}
}

// checkOtherTables logs rules of other tables that begin to undermine these, and that none does any more. It leaves them alone: they
// belong to others.
func (d *Daemon) checkOtherTables(log *logLimit) {
	d.watchdog.begin(surveyor, "looking at other tables", surveyLimit)
	found, err := d.Kernel.Conflicts()
	if err != nil {
		return // repair can't read the rules either, and logs that
	}
	if d.Environment.Process.IngressOff != "" {
		found = nil // there is nothing that they could undermine
	}
	if more := len(found) - maxFound; more > 0 {
		found = append(slices.Clone(found[:maxFound]), fmt.Sprintf("%d more rules of other tables undermine mantlet's", more))
	}
	for _, line := range found {
		if slices.Contains(d.conflicts, line) {
			continue
		}
		if leftOut, ok := log.admit(); ok {
			d.Log.Warn("rules of another table undermine mantlet's; they are left alone", "found", line, "left_out_before", leftOut)
		}
	}
	if len(d.conflicts) > 0 && len(found) == 0 {
		if leftOut, ok := log.admit(); ok {
			d.Log.Info("no rules of other tables undermine mantlet's any more", "left_out_before", leftOut)
		}
	}
	d.locked(func() { d.conflicts = found })
}
