package reconcile

import (
	"slices"
	"time"

	"mantlet/internal/status"
)

const (
	// keptRepairs is how many of the last repairs are kept.
	keptRepairs = 20
	// maxFound is how many lines of differences or conflicts are kept: a map can have 65,536 elements.
	maxFound = 20
)

// Repairs returns the last repairs, the newest last, and how many there were in all.
func (d *Daemon) Repairs() (last []status.Repair, count int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.repairs), d.repaired
}

// repair puts the rules back if somebody changed them. who is the name of the process, if it is known.
func (d *Daemon) repair(who string) {
	d.watchdog.begin(guard, "looking at the rules", kernelLimit)
	found, err := d.Kernel.Repair()
	if len(found) == 0 {
		if err != nil && !sameError(err, d.guarding.repairErr) {
			d.Log.Error("the rules can't be looked at", "error", err)
		}
		d.guarding.repairErr = err
		return
	}
	r := status.Repair{Time: time.Now(), By: who, Found: found}
	if len(found) > maxFound {
		r.Found = found[:maxFound]
	}
	switch {
	case err != nil && sameError(err, d.guarding.repairErr):
		return // the log has it already
	case err != nil:
		r.Error = err.Error()
	}
	if leftOut, ok := d.guarding.log.admit(); ok {
		about := []any{"by", who, "found", r.Found, "differences", len(found), "left_out_before", leftOut}
		if err == nil {
			d.Log.Warn("rules were changed from outside and are put back", about...)
		} else {
			d.Log.Error("rules were changed from outside and could not be put back", append(about, "error", err)...)
		}
	}
	d.guarding.repairErr = err
	d.noteRepair(r)
}

// noteRepair takes note of a repair.
func (d *Daemon) noteRepair(r status.Repair) {
	d.locked(func() {
		d.repairs = append(d.repairs, r)
		d.repairs = d.repairs[max(0, len(d.repairs)-keptRepairs):]
		if r.Error == "" {
			d.repaired++
		}
	})
}
