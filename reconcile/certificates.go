package reconcile

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"sync"
	"syscall"
	"time"

	"mantlet/internal/status"
)

// ticketLife bounds how long a client can resume a TLS session after its certificate expired: publishing the certificates again ends all
// tickets. It costs each client one full handshake an hour.
const ticketLife = time.Hour

// certify reads and publishes certificates until ctx ends: whenever they may have changed, an Envoy was started, or there is a note on
// reread.
func (d *Daemon) certify(ctx context.Context, reread <-chan struct{}) {
	changed := make(chan struct{}, 1)
	var watching sync.WaitGroup
	defer watching.Wait()
	for _, directory := range d.Environment.Process.TLS.Directories() {
		watching.Go(func() { watch(ctx, directory, changed, d.Log) })
	}
	tickets := time.NewTicker(ticketLife)
	defer tickets.Stop()
	defer d.watchdog.idle(certificates)
	for {
		d.watchdog.begin(certificates, "publishing certificates", certificateLimit)
		d.readCertificates(ctx)
		d.watchdog.idle(certificates)
		var retry <-chan time.Time
		if d.badCertificates != nil || d.certifying.untried {
			retry = time.After(retryInputs)
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-reread:
		case <-retry:
		case <-d.notes.started:
		case <-tickets.C:
			d.watchdog.begin(certificates, "renewing session tickets", certificateLimit)
			if err := d.Secrets.Renew(ctx); err != nil {
				d.Log.Error("session tickets live on", "error", err)
			}
		}
	}
}

// readCertificates publishes the certificates if they changed. Bad ones are reported, and the last good ones stay.
func (d *Daemon) readCertificates(ctx context.Context) {
	began := time.Now()
	before := d.starting()
	had := d.Secrets.Good()
	revoked, err := d.Secrets.Update(ctx)
	d.certifying.untried = errors.Is(err, status.ErrUntried) && (before.now || d.starting() != before)
	has := d.Secrets.Good()
	if !reflect.DeepEqual(has, had) {
		d.countApplied(status.ApplyCertificates, time.Since(began), nil)
	}
	if err != nil && !d.certifying.untried {
		what := "the certificates were rejected; the last good ones stay in use"
		if len(has) == 0 {
			what = status.WaitingForCertificates
		}
		event := "certificates rejected"
		if isDiskFull(err) {
			event, what = "certificates not published", status.RuntimeDirectoryNotWritable
		}
		if d.setProblem(&d.badCertificates, event, what, err) {
			d.noteFailure(status.CheckCertificates, err)
			d.countApplied(status.ApplyCertificates, time.Since(began), err)
		}
	}
	var isNew bool
	d.locked(func() {
		supplied, certified := d.Secrets.Offered(), len(has) > 0
		isNew = revoked || supplied != d.supplied || certified != d.certified
		d.supplied, d.certified, d.revoked = supplied, certified, d.revoked || revoked
	})
	if isNew {
		notify(d.notes.changed)
	}
	if err == nil {
		d.clearProblem(&d.badCertificates, "certificates accepted again")
	}
	d.warnOfExpiry(has, time.Now())
}

// starting is whether an Envoy is being started, and how many starts there were.
type starting struct {
	now   bool
	count int
}

func (d *Daemon) starting() (s starting) {
	d.locked(func() { s = starting{d.handover, d.starts} })
	return s
}

// isDiskFull reports whether an error is that a file system can not be written to: it is full, or read-only. Reading returns none of
// these errors.
func isDiskFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EROFS)
}

// warnOfExpiry warns of certificates that expire soon: they should be replaced before the last fifth of their life. One that this
// workload's chain needs comes before one that only peers may need.
func (d *Daemon) warnOfExpiry(has []status.Certificate, now time.Time) {
	var needed, other error
	for _, c := range has {
		verb := "expires"
		if now.After(c.NotAfter) {
			verb = "expired"
		}
		text := fmt.Sprintf("%s (%s) %s at %s", c.Role, c.Subject, verb, c.NotAfter.Format(time.RFC3339))
		switch {
		case now.Before(c.NotAfter.Add(-c.NotAfter.Sub(c.NotBefore) / 5)):
		case c.Needed && needed == nil:
			needed = fmt.Errorf("%s, and there is no new one", text)
		case !c.Needed && c.Role != status.RoleMeshCA && other == nil: // a bundle may hold CAs that are not used any more
			other = fmt.Errorf("%s; the certificate is valid without it: if no peer needs it, take it out", text)
		}
	}
	err := needed
	if err == nil {
		err = other
	}
	if err == nil {
		d.locked(func() { d.expiring = nil })
		return
	}
	if d.setProblem(&d.expiring, "certificates expire soon", "the certificates should be replaced", err) {
		d.noteFailure(status.CheckCertificates, d.expiring)
	}
}
