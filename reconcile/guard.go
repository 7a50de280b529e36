package reconcile

import (
	"context"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"mantlet/internal/status"
)

const (
	// resync is how often the rules are checked although there was no event. If nothing changed, that costs one request to the kernel.
	resync = time.Second
	// changesAtOnce and changesEvery limit log lines about changes by other processes: some change rules all the time.
	changesAtOnce = 30
	changesEvery  = 10 * time.Second
)

// logLimit lets some lines of the log through and counts the others.
type logLimit struct {
	limiter *rate.Limiter
	leftOut int
}

func newLogLimit() *logLimit {
	return &logLimit{limiter: rate.NewLimiter(rate.Every(changesEvery), changesAtOnce)}
}

// admit reports whether a line may be logged and, if so, how many were left out since the last one.
func (v *logLimit) admit() (leftOut int, ok bool) {
	if !v.limiter.AllowN(time.Now(), 1) {
		v.leftOut++
		return 0, false
	}
	leftOut, v.leftOut = v.leftOut, 0
	return leftOut, true
}

// guard keeps the rules as they were put last, until ctx ends. It waits for nothing else: a start of Envoy may take long, and deny-all is
// to be kept meanwhile, too.
func (d *Daemon) guard(ctx context.Context) {
	changes := d.Kernel.Watch(ctx)
	defer func() {
		for range changes { // Watch closes it
		}
	}()
	d.guarding.log = newLogLimit()
	var surveying sync.WaitGroup // in parallel: other software may have many rules
	surveying.Go(func() { d.watchOtherTables(ctx) })
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
			d.repair(who)
		case <-look.C:
			d.repair("")
			d.watchValidity(time.Now())
			d.watchListeners()
			d.currentPlace()
		}
	}
}

// watchValidity logs once that peers do not accept the certificates any more, and once that they do again. No input changes when a
// certificate expires.
func (d *Daemon) watchValidity(now time.Time) {
	err := d.Secrets.Valid(now)
	switch {
	case err != nil && d.guarding.invalid == nil:
		err = withReason(status.CertificatesNotValid, err)
		d.Log.Error("mantlet is not ready", "reason", err)
		d.noteFailure(status.CheckCertificates, err)
	case err == nil && d.guarding.invalid != nil:
		d.Log.Info("peers accept the certificates again")
	}
	d.guarding.invalid = err
}

// watchListeners logs once that another process joined Envoy's listeners, and once that it left them.
func (d *Daemon) watchListeners() {
	d.watchdog.begin(guard, "looking at Envoy's listeners", kernelLimit)
	joined, known := d.joinedListeners()
	switch {
	case !known || joined == nil && d.guarding.joined == nil || sameError(joined, d.guarding.joined):
		return
	case joined != nil:
		err := withReason(status.EnvoyListenerJoined, joined)
		d.Log.Error("mantlet is not ready", "reason", err)
		d.noteFailure(status.CheckEnvoy, err)
	default:
		d.Log.Info("no other process listens where Envoy does any more")
	}
	d.guarding.joined = joined
}

// joinedListeners returns which listeners another process has joined. known is false while an Envoy starts: it may have more threads than
// the one before.
func (d *Daemon) joinedListeners() (joined error, known bool) {
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
