package reconcile

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// watchdog knows what each goroutine that must go on is doing, and how long that may take. A goroutine that waits for
// something to do does nothing, and so can't hang.
type watchdog struct {
	mu    sync.Mutex
	doing map[string]step
}

// step is what a goroutine does.
type step struct {
	what  string
	began time.Time
	limit time.Duration
}

// The goroutines that must go on.
const (
	loop         = "loop"         // takes steps from what is in force to what is wanted
	starter      = "start"        // of an Envoy, for the loop
	guard        = "guard"        // of the rules
	surveyor     = "surveyor"     // of other tables
	legacy       = "legacy"       // looks at iptables-legacy
	configurer   = "configurer"   // reads the configuration
	certificates = "certificates" // reads and publishes them
)

// What steps may take. Each is much more than the step takes on a busy machine, and names what can hold it up.
const (
	turnLimit        = 5 * time.Second  // nothing but mantlet's own work
	kernelLimit      = 10 * time.Second // one transaction of 65,536 ports at most
	surveyLimit      = time.Minute      // some million rules of other software
	configLimit      = 2 * time.Minute  // the largest file that is let in, with nothing but errors, on a tenth of a processor
	certificateLimit = time.Minute      // files.Limit for each file, then what Envoy takes to read them
	startLimit       = 30 * time.Second // a step of a start that tells no limit of its own
	stopLimit        = 15 * time.Second // three Envoys, of which each gets 3 s to end by itself
)

// begin notes that a goroutine begins a step. The one before it is done.
func (w *watchdog) begin(who, what string, limit time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.doing == nil {
		w.doing = map[string]step{}
	}
	w.doing[who] = step{what, time.Now(), limit}
}

// idle notes that a goroutine waits for something to do, or has ended.
func (w *watchdog) idle(who string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.doing, who)
}

// overdue returns an error that names a step which takes longer than it may; nil where none does.
func (w *watchdog) overdue() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for who, s := range w.doing {
		if took := time.Since(s.began); took > s.limit {
			return fmt.Errorf("mantlet's %s hangs: %s has taken %s so far, and takes %s at most", who, s.what, took.Round(time.Second), s.limit)
		}
	}
	return nil
}

// resumeGrace is how long a goroutine has to finish an overdue step before it counts as hanging: where the whole process was
// stopped, as a frozen container is, every step is overdue at first.
const resumeGrace = time.Second

// Dead returns why mantlet should be killed and started again, or nil: only where a goroutine of it hangs. All else it mends
// by itself, or a new one could not either.
func (d *Daemon) Dead(ctx context.Context) error {
	var stopping bool
	d.locked(func() { stopping = d.stopping })
	if stopping || d.watchdog.overdue() == nil {
		return nil
	}
	sleep(ctx, resumeGrace)
	return d.watchdog.overdue()
}

// Progress notes that a start of Envoy, which the Proxy was asked for, begins a step that takes no longer than a limit.
func (d *Daemon) Progress(what string, limit time.Duration) { d.watchdog.begin(starter, what, limit) }
