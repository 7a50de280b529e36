package envoy

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"mantlet/internal/peers"
	"mantlet/internal/status"
	"mantlet/schema"
)

// Secrets supplies Envoy with the certificates of the TLS directory. Its exported fields are set before the first call. Update and Renew
// are not safe for concurrent use with each other; everything else is.
//
// Envoy tries a set before it is published, see Process.try. Where no Envoy runs, a set is published for the Envoy that starts next.
// Nobody may be let in until that one has tried it.
type Secrets struct {
	Files            schema.TLSFiles
	RuntimeDirectory string // Envoy's
	KeptFile         string // stores the last accepted set for the next mantlet; nothing is stored if empty
	Runner           *Runner
	Log              *slog.Logger

	mu       sync.Mutex
	accepted *Certificates    // Envoy accepted and was given it; replaced, never modified
	verdict  verdict          // the last one on accepted
	version  string           // of the publication that Envoy should have; empty while it changes
	pending  *Certificates    // published for the next Envoy to try
	suspect  *Certificates    // an Envoy did not start with it, so a placeholder is published for the next one
	lastSeen seenCertificates // what Envoy reported last
	trust    peers.Trust      // given to Envoy last

	// Only Update and Renew use the rest.
	verdictAt    time.Time     // when Envoy gave the verdict
	failedStarts uint64        // how many starts of Envoy had failed when pending was published
	rejected     *rejectedSet  // the last set that Envoy rejected
	fatal        *Certificates // an Envoy ended once while it tried it
	withdrawnFor *Certificates // can't be tried; the mesh CAs that it lacks are withdrawn already
	previous     *Certificates // accepted before the current one
	confirmedBy  *Process      // reported that it has what is published
	revoked      bool          // a mesh CA was withdrawn, and Update has not returned that yet
	stored       *Certificates // in KeptFile; nil for nothing
	loaded       bool          // KeptFile was read
	unstored     *Certificates // could not be stored
	unusable     *Certificates // was in KeptFile, and can't be used
}

// rejectedSet is a set that Envoy rejected, and why. It is not tried again at once.
type rejectedSet struct {
	certificates *Certificates
	why          error
	at           time.Time
}

const (
	// tryLimit bounds how long Envoy may take to read certificates and to finish a handshake with itself. It takes 10 ms as a rule.
	tryLimit = 3 * time.Second
	// retryRejected is the time until Envoy tries rejected certificates again: the clock may have been corrected since.
	retryRejected = time.Minute
)

// Update implements reconcile.Secrets.
func (s *Secrets) Update(ctx context.Context) (revoked bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, tryLimit)
	defer cancel()
	now := time.Now()
	s.load()
	s.renewVerdict(ctx, now)
	read, err := readCertificates(s.Files)
	if err == nil {
		err = s.adopt(ctx, read, now)
	}
	switch {
	case err == nil:
	case s.lastAccepted() == nil:
		s.restore(ctx, now)
	case s.withdrawnFor == nil: // an Envoy that was started since gets the accepted set
		err = errors.Join(err, s.confirm(ctx, s.Runner.serving()))
	}
	if s.confirmedBy == nil && s.withdrawnFor == nil {
		return false, err
	}
	revoked, s.revoked = s.revoked, false
	return revoked, err
}

// adopt has Envoy try a set and publishes it, unless Envoy has it already.
func (s *Secrets) adopt(ctx context.Context, c *Certificates, now time.Time) error {
	good, serving := s.lastAccepted(), s.Runner.serving()
	if !c.Equal(s.withdrawnFor) {
		s.withdrawnFor = nil
	}
	switch {
	case c.Equal(good): // the usual case: comparing bytes spares verifying signatures
		s.rejected = nil
		if !good.Equal(s.stored) { // it could not be stored before
			s.store(good)
		}
		return s.confirm(ctx, serving)
	case s.rejected != nil && c.Equal(s.rejected.certificates) && now.Sub(s.rejected.at) < retryRejected:
		return s.rejected.why
	case c.Equal(s.pending):
		c = s.pending
	default:
		if err := c.check(now); err != nil {
			return err
		}
	}
	if serving != nil {
		return s.tryAndPublish(ctx, c, serving, now)
	}
	switch {
	case good != nil:
		s.withdrawAnchors(c, now)
	case c == s.pending && s.Runner.failed.Load() > s.failedStarts:
		return s.offerPlaceholder(c)
	case c != s.pending && !c.Equal(s.suspect):
		return s.offer(c, now)
	}
	return nil // the next Envoy starts with what is published, and then tries this set
}

// offerPlaceholder publishes a placeholder for the next Envoy, because an Envoy failed to start with a set. The next one starts with the
// placeholder and tries the set then: whatever ended the Envoy before it does not end this one. Nobody is let in until Envoy has accepted
// certificates.
func (s *Secrets) offerPlaceholder(c *Certificates) error {
	none, err := placeholder(time.Now())
	if err != nil {
		return err
	}
	if err := s.writeAll(none, time.Now()); err != nil {
		return err
	}
	s.locked(func() { s.pending, s.suspect = nil, c })
	return nil
}

// withdrawAnchors removes the mesh CAs that a set lacks, where the set can't be tried now: a revocation does not wait for Envoy. The mesh
// CAs that are left, and the previous certificate, were accepted before.
func (s *Secrets) withdrawAnchors(c *Certificates, now time.Time) {
	good := s.lastAccepted()
	if good == nil || c.verifyErr != nil || c.trustsAllOf(good) || c.Equal(s.withdrawnFor) {
		return
	}
	left := *good
	left.anchors = slices.DeleteFunc(slices.Clone(good.anchors), func(anchor *x509.Certificate) bool { return !c.trusts(anchor) })
	if len(left.anchors) == 0 {
		left.anchors = c.anchors
	}
	s.confirmedBy = nil
	s.locked(func() { s.version = "" })
	if err := left.publish(now, true).write(s.RuntimeDirectory); err != nil {
		s.Log.Error("a mesh CA could not be taken away", "error", err)
		return
	}
	s.withdrawnFor, s.revoked = c, true
	s.locked(func() { s.trust = left.trust() })
	s.Log.Info("a mesh CA was taken away, before Envoy could try the certificates that came instead")
}

// offer publishes a set for the next Envoy to try.
func (s *Secrets) offer(c *Certificates, now time.Time) error {
	s.failedStarts = s.Runner.failed.Load()
	if err := s.writeAll(c, now); err != nil {
		return err
	}
	s.locked(func() { s.pending, s.suspect = c, nil })
	return nil
}

// writeAll writes all secrets that an Envoy reads when it starts.
func (s *Secrets) writeAll(c *Certificates, now time.Time) error {
	pub := c.publish(now, true)
	pub.add(c.trialPublication(now, bothLeaves).secrets...)
	s.confirmedBy = nil
	if err := pub.write(s.RuntimeDirectory); err != nil {
		return err
	}
	s.locked(func() { s.version = pub.version })
	return nil
}

// tryAndPublish has an Envoy try a set, and publishes the set if Envoy accepts it.
func (s *Secrets) tryAndPublish(ctx context.Context, c *Certificates, p *Process, now time.Time) error {
	v, err := s.try(ctx, c, p)
	if err == nil && v.err() != nil {
		err = rejectedError{v.err()}
	}
	if err != nil {
		return s.reject(c, p, err, now)
	}
	if s.previous = s.lastAccepted(); s.previous == nil {
		s.previous = s.stored
	}
	s.store(c)
	if c == s.pending {
		s.confirmedBy = p
	} else if err := s.publish(ctx, c, p); err != nil {
		return err
	}
	s.rejected, s.withdrawnFor, s.verdictAt = nil, nil, now
	s.revoked = s.revoked || s.previous != nil && !c.trustsAllOf(s.previous)
	s.locked(func() { s.accepted, s.verdict, s.pending, s.suspect, s.trust = c, v, nil, nil, c.trust() })
	s.Runner.refused.own.Store(c)
	s.logPublished(c)
	return nil
}

// try returns Envoy's verdict on a set. An Envoy that started with the set has read it already.
func (s *Secrets) try(ctx context.Context, c *Certificates, p *Process) (verdict, error) {
	if c == s.pending {
		has, err := p.admin.secrets(ctx, append(trialNames(), meshNames()...))
		if err != nil {
			return verdict{}, err
		}
		if has.allAt(s.version) {
			if refusal, err := p.handshake(ctx); refusal == nil {
				return verdict{}, err
			}
		}
	}
	v, err := p.try(ctx, c, s.RuntimeDirectory)
	if c == s.pending && err == nil && v.err() == nil { // it may have read the set only now
		err = s.publish(ctx, c, p)
	}
	return v, err
}

// reject notes why a set can't be published. It replaces the set in the trial by the accepted one, or by a placeholder: if the set ended
// an Envoy, the next one must not start with it.
func (s *Secrets) reject(c *Certificates, p *Process, why error, now time.Time) error {
	instead, err := s.lastAccepted(), error(nil)
	if instead == nil && c.Equal(s.suspect) {
		instead, err = placeholder(now)
	}
	if err == nil && instead != nil {
		err = s.resetTrial(instead, p, now)
	}
	if err != nil {
		return errors.Join(why, err)
	}
	_, isRejected := errors.AsType[rejectedError](why)
	if !isRejected && !p.alive() {
		isRejected = c.Equal(s.fatal) // the first time may be a coincidence
		s.fatal = c
	}
	if !isRejected {
		s.withdrawAnchors(c, now)
		return fmt.Errorf("%w: %w", status.ErrUntried, why)
	}
	s.withdrawnFor = nil
	why = c.explainRejection(why)
	s.rejected = &rejectedSet{c, why, now}
	return why
}

// resetTrial puts a set into the trial, and waits until Envoy has read it.
func (s *Secrets) resetTrial(c *Certificates, p *Process, now time.Time) error {
	ctx, cancel := context.WithTimeout(context.Background(), tryLimit)
	defer cancel()
	before, err := p.admin.secrets(ctx, trialNames())
	pub := c.trialPublication(now, bothLeaves)
	if err := pub.write(s.RuntimeDirectory); err != nil {
		return err
	}
	if err == nil {
		_, _ = p.awaitRead(ctx, pub, before) // if Envoy does not read it now, the next trial fails
	}
	return nil
}

// publish gives a set to the Envoy that serves, or to the next one where none does.
func (s *Secrets) publish(ctx context.Context, c *Certificates, p *Process) (err error) {
	s.confirmedBy = nil
	version := s.version
	s.locked(func() { s.version = "" })
	if p == nil {
		pub := c.publish(time.Now(), true)
		err, version = pub.write(s.RuntimeDirectory), pub.version
	} else {
		sure := version != ""
		version, err = p.deliver(ctx, s.RuntimeDirectory, func(now time.Time, anew bool) publication { return c.publish(now, anew || !sure) })
	}
	if err == nil {
		s.confirmedBy = p
		s.locked(func() { s.version, s.trust = version, c.trust() })
	}
	return err
}

// confirm asks an Envoy whether it has what is published, and delivers that if not. The Envoy may have started with the publication
// before, and would trust the CAs of that.
func (s *Secrets) confirm(ctx context.Context, p *Process) error {
	if p == nil || p == s.confirmedBy {
		return nil
	}
	good := s.lastAccepted()
	if s.version != "" {
		has, err := p.admin.secrets(ctx, meshNames())
		if err != nil {
			return err
		}
		if has.allAt(s.version) {
			s.confirmedBy = p
			return nil
		}
	}
	err := s.publish(ctx, good, p)
	s.revoked = s.revoked || err == nil && s.previous != nil && !good.trustsAllOf(s.previous)
	return err
}

func (s *Secrets) logPublished(c *Certificates) {
	leaf := c.chain[0]
	s.Log.Info("certificates published", "subject", leaf.Subject.String(), "sans", sans(leaf), "expires", c.expires())
	if v := s.verdict; v.client != nil || v.server != nil {
		s.Log.Warn("peers accept the certificate at one end only", "client", v.client == nil, "server", v.server == nil,
			"reason", errors.Join(v.client, v.server), "extended_key_usage", usageNames(leaf),
			"remedy", "issue it with serverAuth and clientAuth, unless connections go one way only")
	}
	for _, warning := range c.warnings() {
		s.Log.Warn("the certificates are accepted with a warning", "warning", warning)
	}
	if names := c.expiredAnchors(time.Now()); len(names) > 0 {
		s.Log.Warn("mesh CAs have expired; take them out", "names", names)
	}
	if s.revoked {
		s.Log.Info("a mesh CA was taken away: connections that were let in before end")
	}
}

// renewVerdict has the accepted set tried again if one of its certificates became valid or expired since the verdict: from then on Envoy
// may find another chain than crypto/x509.
func (s *Secrets) renewVerdict(ctx context.Context, now time.Time) {
	good, p := s.lastAccepted(), s.Runner.serving()
	if good == nil || p == nil || p != s.confirmedBy || !good.validityChanges(s.verdictAt, now) {
		return
	}
	v, err := p.try(ctx, good, s.RuntimeDirectory)
	if why, ok := errors.AsType[rejectedError](err); ok {
		v, err = verdict{why, why}, nil
	}
	if err == nil {
		s.verdictAt = now
		s.locked(func() { s.verdict = v })
	}
}

// Renew implements reconcile.Secrets.
func (s *Secrets) Renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, tryLimit)
	defer cancel()
	good := s.lastAccepted()
	if good == nil {
		return nil
	}
	return s.publish(ctx, good, s.Runner.serving())
}

// Offered implements reconcile.Secrets.
func (s *Secrets) Offered() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.accepted != nil || s.pending != nil || s.suspect != nil
}

// Valid implements reconcile.Secrets.
func (s *Secrets) Valid(now time.Time) error {
	s.mu.Lock()
	good, verdict := s.accepted, s.verdict
	s.mu.Unlock()
	if good == nil {
		return nil
	}
	if err := good.valid(now); err != nil {
		return err
	}
	return verdict.err()
}

// Held implements reconcile.Secrets.
func (s *Secrets) Held(ctx context.Context) error {
	state := func() (*Process, string) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.accepted == nil {
			return nil, ""
		}
		return s.Runner.serving(), s.version
	}
	p, version := state()
	if p == nil || version == "" {
		return nil
	}
	has, err := p.admin.secrets(ctx, meshNames())
	if err != nil || has.allAt(version) {
		return nil
	}
	if q, now := state(); q != p || now != version { // something changed meanwhile
		return nil
	}
	return errors.New("Envoy has not taken the certificates that are published")
}

// seenCertificates are the certificates that Envoy reported, as text and parsed.
type seenCertificates struct {
	text secretTexts
	all  []status.Certificate
}

// Certificates implements reconcile.Secrets.
func (s *Secrets) Certificates(ctx context.Context) []status.Certificate {
	s.mu.Lock()
	had := s.lastSeen
	s.mu.Unlock()
	p := s.Runner.serving()
	if p == nil {
		return had.all
	}
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	text, err := p.admin.secretTexts(ctx)
	if err != nil || text == had.text {
		return had.all
	}
	has, err := text.parse()
	if err != nil {
		return had.all
	}
	now := seenCertificates{text, has.describe(nil)}
	s.locked(func() { s.lastSeen = now })
	return now.all
}

// Good implements reconcile.Secrets.
func (s *Secrets) Good() []status.Certificate {
	if good := s.lastAccepted(); good != nil {
		return envoyCertificates{good.chain, good.anchors}.describe(good.longestChain())
	}
	return nil
}

// Trust returns the mesh CAs that Envoy was given last, and the intermediates of this workload's own chain.
func (s *Secrets) Trust() peers.Trust {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.trust
}

func (c *Certificates) trust() peers.Trust {
	return peers.Trust{Anchors: c.anchors, Intermediates: c.chain[1:]}
}

// Warnings implements reconcile.Secrets.
func (s *Secrets) Warnings() []string {
	if good := s.lastAccepted(); good != nil {
		return good.warnings()
	}
	return nil
}

func (s *Secrets) lastAccepted() *Certificates {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.accepted
}

func (s *Secrets) locked(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}
