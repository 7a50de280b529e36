package reconcile

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"mantlet/internal/status"

	"golang.org/x/time/rate"
)

const (
	// resync is how often the rules are looked at although no event came. Where nothing changed it costs one question to the
	// kernel.
	resync = time.Second
	// keptRepairs is how many of the last repairs are kept.
	keptRepairs = 20
	// maxFound is how many lines of what differed, or of what undermines the rules, are kept: a map can have 65,536 elements.
	maxFound = 20
	// changesAtOnce and changesEvery bound what the log tells of other processes' rules: some may change them all the time.
	changesAtOnce = 30
	changesEvery  = 10 * time.Second
)

// valve lets some lines of the log through and counts the others.
type valve struct {
	limiter *rate.Limiter
	leftOut int
}

func newValve() *valve {
	return &valve{limiter: rate.NewLimiter(rate.Every(changesEvery), changesAtOnce)}
}

// admit reports whether a line may be logged and, if so, how many were not since the last one that was.
func (v *valve) admit() (leftOut int, ok bool) {
	if !v.limiter.AllowN(time.Now(), 1) {
		v.leftOut++
		return 0, false
	}
	leftOut, v.leftOut = v.leftOut, 0
	return leftOut, true
}

// Repairs returns the last repairs, the newest last, and how many there were in all.
func (d *Daemon) Repairs() (last []status.Repair, count int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.repairs), d.repaired
}

// guard keeps the rules as they were put last until ctx ends. Nothing holds it up: a start of Envoy may take long, and
// deny-all is to be kept too.
func (d *Daemon) guard(ctx context.Context) {
	changes := d.Kernel.Watch(ctx)
	defer func() {
		for range changes { // it is closed once Watch has ended
		}
	}()
	d.repairLog = newValve()
	var surveying sync.WaitGroup // beside: other software may have many rules
	surveying.Go(func() { d.surveyAll(ctx) })
	defer surveying.Wait()
	look := time.NewTicker(resync)
	defer look.Stop()
	defer d.watchdog.idle(guard)
	for {
		d.watchdog.idle(guard)
		select {
		case <-ctx.Done():
			return
		case who := <-changes:
			d.mend(who)
		case <-look.C:
			d.mend("")
			d.heed(time.Now())
			d.lookAtListeners()
			d.look()
		}
	}
}

// tables is what was said of other tables.
type tables struct {
	log    *valve
	warned map[string]bool // what undermines the rules now
}

// surveyAll looks at other tables from time to time, until ctx ends. It takes a tenth of a processor at most.
func (d *Daemon) surveyAll(ctx context.Context) {
	t := tables{log: newValve(), warned: map[string]bool{}}
	for pause := resync; ; {
		if sleep(ctx, pause); ctx.Err() != nil {
			return
		}
		began := time.Now()
		d.survey(&t)
		d.watchdog.idle(surveyor)
		pause = max(resync, 10*time.Since(began))
	}
}

// survey warns of what undermines the rules from other tables when it comes, and says when nothing does any more. They are their
// owners' business.
func (d *Daemon) survey(t *tables) {
	d.watchdog.begin(surveyor, "looking at other tables", surveyLimit)
	found, err := d.Kernel.Undermining()
	if err != nil {
		return // mend can't look at the rules either, and says so
	}
	if d.Environment.Process.IngressOff != "" {
		found = nil // there is nothing that they could undermine
	}
	if more := len(found) - maxFound; more > 0 {
		found = append(slices.Clone(found[:maxFound]), fmt.Sprintf("%d more rules of other tables undermine mantlet's", more))
	}
	had := len(t.warned) > 0
	maps.DeleteFunc(t.warned, func(line string, _ bool) bool { return !slices.Contains(found, line) })
	for _, line := range found {
		if t.warned[line] {
			continue
		}
		t.warned[line] = true
		if leftOut, ok := t.log.admit(); ok {
			d.Log.Warn("rules of another table undermine mantlet's; they are left alone", "found", line, "left_out_before", leftOut)
		}
	}
	if had && len(found) == 0 {
		if leftOut, ok := t.log.admit(); ok {
			d.Log.Info("no rules of other tables undermine mantlet's any more", "left_out_before", leftOut)
		}
	}
	d.locked(func() { d.foreign = found })
}

// heed says, once each, that peers do not accept the certificates any more, and that they do again: no input changes when a
// certificate expires.
func (d *Daemon) heed(now time.Time) {
	err := d.Secrets.Valid(now)
	switch {
	case err != nil && d.invalid == nil:
		err = about(status.CertificatesNotValid, err)
		d.Log.Error("mantlet is not ready", "reason", err)
		d.failed(status.CheckCertificates, err)
	case err == nil && d.invalid != nil:
		d.Log.Info("peers accept the certificates again")
	}
	d.invalid = err
}

// lookAtListeners says, once each, that another process joined Envoy's listeners, and that it left them.
func (d *Daemon) lookAtListeners() {
	d.watchdog.begin(guard, "looking at Envoy's listeners", kernelLimit)
	joined, known := d.tryListeners()
	switch {
	case !known || joined == nil && d.joined == nil || same(joined, d.joined):
		return
	case joined != nil:
		err := about(status.EnvoyListenerJoined, joined)
		d.Log.Error("mantlet is not ready", "reason", err)
		d.failed(status.CheckEnvoy, err)
	default:
		d.Log.Info("no other process listens where Envoy does any more")
	}
	d.joined = joined
}

// tryListeners returns which listeners another process has joined. While an Envoy starts that is not known: it may have more threads.
func (d *Daemon) tryListeners() (joined error, known bool) {
	starts := func() (n int, now bool) {
		d.locked(func() { n, now = d.starts, d.handover })
		return n, now
	}
	before, starting := starts()
	if starting {
		return nil, false
	}
	joined = d.Proxy.Joined()
	after, starting := starts()
	return joined, !starting && before == after
}

// mend puts the rules back where somebody changed them.
func (d *Daemon) mend(who string) {
	d.watchdog.begin(guard, "looking at the rules", kernelLimit)
	found, err := d.Kernel.Mend()
	if len(found) == 0 {
		if err != nil && !same(err, d.unmended) {
			d.Log.Error("the rules can't be looked at", "error", err)
		}
		d.unmended = err
		return
	}
	r := status.Repair{Time: time.Now(), By: who, Found: found}
	if len(found) > maxFound {
		r.Found = found[:maxFound]
	}
	switch {
	case err != nil && same(err, d.unmended):
		return // it is said already
	case err != nil:
		r.Error = err.Error()
	}
	if leftOut, ok := d.repairLog.admit(); ok {
		about := []any{"by", who, "found", r.Found, "differences", len(found), "left_out_before", leftOut}
		if err == nil {
			d.Log.Warn("rules were changed from outside and are put back", about...)
		} else {
			d.Log.Error("rules were changed from outside and could not be put back", append(about, "error", err)...)
		}
	}
	d.unmended = err
	d.locked(func() {
		d.repairs = append(d.repairs, r)
		d.repairs = d.repairs[max(0, len(d.repairs)-keptRepairs):]
		if err == nil {
			d.repaired++
		}
	})
}
