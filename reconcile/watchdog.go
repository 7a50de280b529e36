package reconcile

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// watchdog knows what each essential goroutine is doing, and how long that may take. A goroutine that waits for work does nothing, and
// can't hang.
type watchdog struct {
	mu    sync.Mutex
	doing map[string]step
}

// step is what a goroutine is doing.
type step struct {
	what  string
	began time.Time
	limit time.Duration
}

// The essential goroutines.
const (
	loop         = "loop"         // takes steps from what is in force to what is wanted
	starter      = "start"        // of an Envoy, for the loop
	guard        = "guard"        // of the rules
	routeGuard   = "route guard"  // of the policy routes
	surveyor     = "surveyor"     // of other tables
	legacy       = "legacy"       // looks at iptables-legacy
	configurer   = "configurer"   // reads the configuration
	certificates = "certificates" // reads and publishes them
)

// Limits of steps. Each is much more than the step takes on a busy machine. The comments say what takes long.
const (
	turnLimit        = 5 * time.Second  // nothing but mantlet's own work
	kernelLimit      = 10 * time.Second // one transaction of 65,536 ports at most
	surveyLimit      = time.Minute      // some million rules of other software
	configLimit      = 2 * time.Minute  // the largest file that is let in, with nothing but errors, on a tenth of a processor
	certificateLimit = time.Minute      // files.Limit for each file, then what Envoy takes to read them
	startLimit       = 30 * time.Second // a step of a start that has no limit of its own
	stopLimit        = 15 * time.Second // three Envoys, of which each gets 3 s to end by itself
)

// begin notes that a goroutine begins a step, and has finished the one before.
func (w *watchdog) begin(who, what string, limit time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.doing == nil {
		w.doing = map[string]step{}
	}
	w.doing[who] = step{what, time.Now(), limit}
}

// idle notes that a goroutine waits for work, or has ended.
func (w *watchdog) idle(who string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.doing, who)
}

// overdue returns an error that names a step which exceeds its limit; nil if none does.
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

// resumeGrace is how long an overdue step gets before its goroutine counts as hanging: when a frozen container resumes, every step is
// overdue.
const resumeGrace = time.Second

// Dead returns why mantlet should be killed and started again, or nil. The only reason is a goroutine that hangs: mantlet recovers from
// everything else by itself, or a new one would not either.
func (d *Daemon) Dead(ctx context.Context) error {
	var stopping bool
	d.locked(func() { stopping = d.stopping })
	if stopping || d.watchdog.overdue() == nil {
		return nil
	}
	sleep(ctx, resumeGrace)
	return d.watchdog.overdue()
}

// Progress notes that a start of Envoy, which the Proxy was asked for, begins a step with a limit.
func (d *Daemon) Progress(what string, limit time.Duration) { d.watchdog.begin(starter, what, limit) }
