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

// Secrets keeps Envoy supplied with the certificates of the TLS directory. Its exported fields are set before the first
// call. Update and Renew are not called at the same time; all else may be at any time.
//
// Envoy tries a generation before it is published, see Process.try. Where no Envoy runs, the first generation is published for
// the one that starts next: until that one has tried it, nobody may be let in.
type Secrets struct {
	Files            schema.TLSFiles
	RuntimeDirectory string // Envoy's
	KeptFile         string // keeps the last good generation for a mantlet after this one; none does if empty
	Runner           *Runner
	Log              *slog.Logger

	mu      sync.Mutex
	good    *Certificates // that Envoy accepted and was given; never changed again, another one takes its place
	verdict verdict       // on good, as it was last
	version string        // of the publication that Envoy is to have; empty while that changes
	untried *Certificates // that was published for the next Envoy to try
	doubted *Certificates // that an Envoy did not start with, so that a placeholder is published for the next one
	had     described     // what Envoy said last that it has
	trust   peers.Trust   // that Envoy was given last

	// The rest is Update's and Renew's alone.
	judged  time.Time     // when the verdict was
	failed  uint64        // how many starts of Envoy had failed when untried was published
	refused *refusedSet   // the last one that Envoy did not accept
	fatal   *Certificates // that Envoy ended over, once
	cut     *Certificates // that can't be tried, and whose lack of a mesh CA is in force already
	last    *Certificates // that was good before the one that is now
	holder  *Process      // that said that it has what is published
	revoked bool          // a mesh CA is gone, and Update has not told it yet
	kept    *Certificates // as the file has them; nil where it has none
	loaded  bool          // whether the file was looked at
	unkept  *Certificates // that there was no room for
	useless *Certificates // that was kept, and can't be used
}

// refusedSet is a generation that Envoy did not accept, and why. It is not tried again at once.
type refusedSet struct {
	certificates *Certificates
	why          error
	at           time.Time
}

const (
	// tryLimit bounds how long Envoy may take to read certificates and to shake hands with itself: 10 ms as a rule.
	tryLimit = 3 * time.Second
	// tryAgain is when Envoy tries certificates again that it refused: the clock may have been set since.
	tryAgain = time.Minute
)

// Update implements reconcile.Secrets.
func (s *Secrets) Update(ctx context.Context) (revoked bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, tryLimit)
	defer cancel()
	now := time.Now()
	s.load()
	s.review(ctx, now)
	read, err := readCertificates(s.Files)
	if err == nil {
		err = s.take(ctx, read, now)
	}
	switch {
	case err == nil:
	case s.isGood() == nil:
		s.restore(ctx, now)
	case s.cut == nil: // an Envoy that was started since is to have the last good ones
		err = errors.Join(err, s.confirm(ctx, s.Runner.serving()))
	}
	if s.holder == nil && s.cut == nil {
		return false, err
	}
	revoked, s.revoked = s.revoked, false
	return revoked, err
}

// take has a generation tried and published, where it is another one than Envoy has.
func (s *Secrets) take(ctx context.Context, c *Certificates, now time.Time) error {
	good, serving := s.isGood(), s.Runner.serving()
	if !c.Equal(s.cut) {
		s.cut = nil
	}
	switch {
	case c.Equal(good): // as a rule: a look at the bytes spares the signatures
		s.refused = nil
		if !good.Equal(s.kept) { // there was no room
			s.keep(good)
		}
		return s.confirm(ctx, serving)
	case s.refused != nil && c.Equal(s.refused.certificates) && now.Sub(s.refused.at) < tryAgain:
		return s.refused.why
	case c.Equal(s.untried):
		c = s.untried
	default:
		if err := c.check(now); err != nil {
			return err
		}
	}
	if serving != nil {
		return s.accept(ctx, c, serving, now)
	}
	switch {
	case good != nil:
		s.restrict(c, now)
	case c == s.untried && s.Runner.failed.Load() > s.failed:
		return s.holdBack(c)
	case c != s.untried && !c.Equal(s.doubted):
		return s.offer(c, now)
	}
	return nil // the next Envoy starts with what is published, and tries this one then
}

// holdBack publishes a placeholder for the Envoy that starts next, which is to try a generation that one did not start with: whatever
// ended that one, this one is not to end over it. Nobody is let in before Envoy has accepted certificates.
func (s *Secrets) holdBack(c *Certificates) error {
	none, err := placeholder(time.Now())
	if err != nil {
		return err
	}
	if err := s.present(none, time.Now()); err != nil {
		return err
	}
	s.locked(func() { s.untried, s.doubted = nil, c })
	return nil
}

// restrict takes the mesh CAs away that a generation lacks which can't be tried now: a revocation waits for no Envoy. What is
// left of the mesh CAs was accepted before, and stays with the certificate of before.
func (s *Secrets) restrict(c *Certificates, now time.Time) {
	good := s.isGood()
	if good == nil || c.doubt != nil || c.trustsAllOf(good) || c.Equal(s.cut) {
		return
	}
	left := *good
	left.anchors = slices.DeleteFunc(slices.Clone(good.anchors), func(anchor *x509.Certificate) bool { return !c.trusts(anchor) })
	if len(left.anchors) == 0 {
		left.anchors = c.anchors
	}
	s.holder = nil
	s.locked(func() { s.version = "" })
	if err := left.publish(now, true).write(s.RuntimeDirectory); err != nil {
		s.Log.Error("a mesh CA could not be taken away", "error", err)
		return
	}
	s.cut, s.revoked = c, true
	s.locked(func() { s.trust = left.trust() })
	s.Log.Info("a mesh CA was taken away, before Envoy could try the certificates that came instead")
}

// offer publishes a generation for the Envoy that starts next to try.
func (s *Secrets) offer(c *Certificates, now time.Time) error {
	s.failed = s.Runner.failed.Load()
	if err := s.present(c, now); err != nil {
		return err
	}
	s.locked(func() { s.untried, s.doubted = c, nil })
	return nil
}

// present writes all that an Envoy reads at its start.
func (s *Secrets) present(c *Certificates, now time.Time) error {
	pub := c.publish(now, true)
	pub.add(c.onTrial(now, bothLeaves).secrets...)
	s.holder = nil
	if err := pub.write(s.RuntimeDirectory); err != nil {
		return err
	}
	s.locked(func() { s.version = pub.version })
	return nil
}

// accept has an Envoy try a generation, and publishes it if that accepts it.
func (s *Secrets) accept(ctx context.Context, c *Certificates, p *Process, now time.Time) error {
	v, err := s.try(ctx, c, p)
	if err == nil && v.err() != nil {
		err = rejected{v.err()}
	}
	if err != nil {
		return s.refuse(c, p, err, now)
	}
	if s.last = s.isGood(); s.last == nil {
		s.last = s.kept
	}
	s.keep(c)
	if c == s.untried {
		s.holder = p
	} else if err := s.publish(ctx, c, p); err != nil {
		return err
	}
	s.refused, s.cut, s.judged = nil, nil, now
	s.revoked = s.revoked || s.last != nil && !c.trustsAllOf(s.last)
	s.locked(func() { s.good, s.verdict, s.untried, s.doubted, s.trust = c, v, nil, nil, c.trust() })
	s.Runner.refused.own.Store(c)
	s.announce(c)
	return nil
}

// try returns what an Envoy says of a generation. One that started with it has read it already.
func (s *Secrets) try(ctx context.Context, c *Certificates, p *Process) (verdict, error) {
	if c == s.untried {
		has, err := p.admin.secrets(ctx, append(trialNames(), meshNames()...))
		if err != nil {
			return verdict{}, err
		}
		if has.allAt(s.version) {
			if refusal, err := p.shakeHands(ctx); refusal == nil {
				return verdict{}, err
			}
		}
	}
	v, err := p.try(ctx, c, s.RuntimeDirectory)
	if c == s.untried && err == nil && v.err() == nil { // it may have read it late
		err = s.publish(ctx, c, p)
	}
	return v, err
}

// refuse takes note of why a generation can't be published, and puts the last good one in the trial's place, or a placeholder: an
// Envoy that starts is not to meet what ended the one before it.
func (s *Secrets) refuse(c *Certificates, p *Process, why error, now time.Time) error {
	instead, err := s.isGood(), error(nil)
	if instead == nil && c.Equal(s.doubted) {
		instead, err = placeholder(now)
	}
	if err == nil && instead != nil {
		err = s.reset(instead, p, now)
	}
	if err != nil {
		return errors.Join(why, err)
	}
	_, isRejected := errors.AsType[rejected](why)
	if !isRejected && !p.alive() {
		isRejected = c.Equal(s.fatal) // once is chance
		s.fatal = c
	}
	if !isRejected {
		s.restrict(c, now)
		return fmt.Errorf("%w: %w", status.ErrUntried, why)
	}
	s.cut = nil
	why = c.because(why)
	s.refused = &refusedSet{c, why, now}
	return why
}

// reset puts a generation in the trial's place, and lets Envoy read it before the next one comes.
func (s *Secrets) reset(c *Certificates, p *Process, now time.Time) error {
	ctx, cancel := context.WithTimeout(context.Background(), tryLimit)
	defer cancel()
	before, err := p.admin.secrets(ctx, trialNames())
	pub := c.onTrial(now, bothLeaves)
	if err := pub.write(s.RuntimeDirectory); err != nil {
		return err
	}
	if err == nil {
		_, _ = p.await(ctx, pub, before) // one that does not read it now is told of by the next trial
	}
	return nil
}

// publish gives a generation to the Envoy that serves, or to the next one where none does.
func (s *Secrets) publish(ctx context.Context, c *Certificates, p *Process) (err error) {
	s.holder = nil
	version := s.version
	s.locked(func() { s.version = "" })
	if p == nil {
		pub := c.publish(time.Now(), true)
		err, version = pub.write(s.RuntimeDirectory), pub.version
	} else {
		sure := version != ""
		version, err = p.give(ctx, s.RuntimeDirectory, func(now time.Time, anew bool) publication { return c.publish(now, anew || !sure) })
	}
	if err == nil {
		s.holder = p
		s.locked(func() { s.version, s.trust = version, c.trust() })
	}
	return err
}

// confirm asks an Envoy whether it has what is published, and gives that to it if not: it may have started with what was
// published before, and let in whom that trusts.
func (s *Secrets) confirm(ctx context.Context, p *Process) error {
	if p == nil || p == s.holder {
		return nil
	}
	good := s.isGood()
	if s.version != "" {
		has, err := p.admin.secrets(ctx, meshNames())
		if err != nil {
			return err
		}
		if has.allAt(s.version) {
			s.holder = p
			return nil
		}
	}
	err := s.publish(ctx, good, p)
	s.revoked = s.revoked || err == nil && s.last != nil && !good.trustsAllOf(s.last)
	return err
}

func (s *Secrets) announce(c *Certificates) {
	leaf := c.chain[0]
	s.Log.Info("certificates published", "subject", leaf.Subject.String(), "sans", sans(leaf), "expires", c.expires())
	if v := s.verdict; v.client != nil || v.server != nil {
		s.Log.Warn("peers accept the certificate at one end only", "client", v.client == nil, "server", v.server == nil,
			"reason", errors.Join(v.client, v.server), "extended_key_usage", usages(leaf),
			"remedy", "issue it with serverAuth and clientAuth, unless connections go one way only")
	}
	for _, warning := range c.warnings() {
		s.Log.Warn("the certificates are accepted with a warning", "warning", warning)
	}
	if names := c.expired(time.Now()); len(names) > 0 {
		s.Log.Warn("mesh CAs have expired; take them out", "names", names)
	}
	if s.revoked {
		s.Log.Info("a mesh CA was taken away: connections that were let in before end")
	}
}

// review has the good generation tried once more where one of its certificates came to be valid, or ceased to be, since it
// was: Go may see another way then than Envoy.
func (s *Secrets) review(ctx context.Context, now time.Time) {
	good, p := s.isGood(), s.Runner.serving()
	if good == nil || p == nil || p != s.holder || !good.turns(s.judged, now) {
		return
	}
	v, err := p.try(ctx, good, s.RuntimeDirectory)
	if why, ok := errors.AsType[rejected](err); ok {
		v, err = verdict{why, why}, nil
	}
	if err == nil {
		s.judged = now
		s.locked(func() { s.verdict = v })
	}
}

// Renew implements reconcile.Secrets.
func (s *Secrets) Renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, tryLimit)
	defer cancel()
	good := s.isGood()
	if good == nil {
		return nil
	}
	return s.publish(ctx, good, s.Runner.serving())
}

// Offered implements reconcile.Secrets.
func (s *Secrets) Offered() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.good != nil || s.untried != nil || s.doubted != nil
}

// Valid implements reconcile.Secrets.
func (s *Secrets) Valid(now time.Time) error {
	s.mu.Lock()
	good, verdict := s.good, s.verdict
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
		if s.good == nil {
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
	if q, now := state(); q != p || now != version { // it changed meanwhile
		return nil
	}
	return errors.New("Envoy has not taken the certificates that are published")
}

// described is what Envoy said that it has, and what that means.
type described struct {
	text secretTexts
	all  []status.Certificate
}

// Certificates implements reconcile.Secrets.
func (s *Secrets) Certificates(ctx context.Context) []status.Certificate {
	s.mu.Lock()
	had := s.had
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
	now := described{text, has.describe(nil)}
	s.locked(func() { s.had = now })
	return now.all
}

// Good implements reconcile.Secrets.
func (s *Secrets) Good() []status.Certificate {
	if good := s.isGood(); good != nil {
		return held{good.chain, good.anchors}.describe(good.longest())
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
	if good := s.isGood(); good != nil {
		return good.warnings()
	}
	return nil
}

func (s *Secrets) isGood() *Certificates {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.good
}

func (s *Secrets) locked(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}
