// Package reconcile brings the kernel's rules and Envoy to the desired state and keeps them there.
package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"mantlet/internal/bind"
	"mantlet/internal/status"
	"mantlet/render"
	"mantlet/schema"
)

// Daemon is one run of mantlet. Its exported fields are set before Run.
type Daemon struct {
	Version     string
	Environment *schema.Environment
	Place       render.Place
	Kernel      Kernel
	Found       render.Ruleset // the rules that were in the kernel before deny-all
	Secrets     Secrets
	Proxy       Proxy
	Legacy      Legacy         // nil: iptables-legacy is not looked at
	Names       Names          // nil: names are not looked up, and have no addresses
	HasIPv6     func() bool    // tells whether Envoy can listen on ::1; nil: as Place says
	Limits      render.Limits  // of mantlet and its Envoys
	Processes   bind.Processes // that listened when mantlet still could see who does
	// Follow returns refusals as they come, until ctx ends; an error where too many follow already.
	Follow func(ctx context.Context) (<-chan status.Followed, error)
	Log    *slog.Logger
	// LogLost returns how many lines of the log were dropped, and for how long whoever reads it has taken none; 0 while they
	// do. Where it is nil, none are.
	LogLost func() (lines uint64, unread time.Duration)

	watchdog watchdog
	notes    notes

	mu          sync.Mutex // guards shared
	shared                 // embedded, since nearly everything is about these
	loop        loopState
	guarding    guardState
	configuring configState
	certifying  certifyState
}

// notes are channels that tell a goroutine that there is something to do.
type notes struct {
	changed  chan struct{} // for the loop: another configuration, other certificates, or another place
	started  chan struct{} // for the reader of the certificates: an Envoy was started, or could not be
	toStore  chan struct{} // for the keeper: another override file is to be kept
	enforced chan struct{} // for who looks at iptables-legacy: rules were put in force
}

// shared is what several goroutines have. Whoever alone writes a field reads it without the mutex.
type shared struct {
	// Written by the loop.
	want      *desired // the last good configuration; nil until an override file that is named could be read
	have      *desired // what is in force, with the rules as they are in the kernel; nil at first
	serving   serving
	handover  bool // to another Envoy: meanwhile the one that serves does not answer
	starts    int  // how many were begun
	stopping  bool
	accepted  uint64 // how many configurations were
	envoys    status.Envoys
	endings   endings // connections that changes ended
	unapplied error   // why what is wanted is not in force; nil where it is

	// Written by the reader of the configuration and its keeper.
	offered   *desired // a good configuration that the loop has not taken yet
	unstored  []byte   // the override file that is to be kept
	reloaded  status.Reload
	badConfig error // nil where the configuration is good

	// Written by the reader of the certificates. The first three change at once.
	supplied        bool  // an Envoy that is started finds certificates
	certified       bool  // Envoy has accepted certificates
	revoked         bool  // a mesh CA was taken away, and the rules do not end its connections yet; the loop takes it back
	badCertificates error // nil where the certificates are good
	expiring        error // nil where none expires soon

	// Written by the guard.
	repairs   []status.Repair // the last ones
	repaired  int             // how many there were
	conflicts []string        // what undermines the rules from other tables

	// Written by who looks at iptables-legacy.
	legacyRules []string // but those that drop all
	legacyErr   error    // why they could not be read
	liftErr     error    // why one that drops all could not be removed

	// Written by several.
	since     time.Time // it runs
	lastError *status.Failure
	applies   applies
	statusErr error              // why the status address is not served
	gateErr   error              // why the gate's socket is not served
	outcomes  map[string]outcome // of probes of the workload, by name
}

// serving is the Envoy that serves.
type serving struct {
	process Process   // nil where none does
	digest  string    // of the state that it was started with
	drained time.Time // until then the connections of the epoch before it have their drain time
}

// loopState is what the loop alone has.
type loopState struct {
	advances  advances
	drainCuts []time.Time // of the last hot restarts that cut what the one before last drained
	exhausted bool        // the generations of a port are used up
	backoff   backoff     // of starts that fail, and of Envoys that die
	notBefore time.Time   // the next start
}

// guardState is what the guard alone has.
type guardState struct {
	log       *logLimit // of repairs
	repairErr error     // why the rules could not be looked at or put back
	joined    error     // listeners that another process had joined when it last looked
	invalid   error     // why peers did not accept what Envoy has when it last looked
}

// configState is what the reader of the configuration has alone, and its keeper notKept.
type configState struct {
	parsed     *parsed
	configured bool  // there was a good configuration
	storeErr   error // why the last good override file could not be kept
}

// certifyState is what the reader of the certificates has alone.
type certifyState struct {
	untried bool // an Envoy was starting, so that none could try the certificates
}

// desired is a desired state and what it was rendered from.
type desired struct {
	mesh        schema.Mesh
	place       render.Place
	state       render.State // its Ruleset is that of a mesh without a past; rules has the one in force
	generations render.Generations

	closed *portClosure // ports are closed until another state comes
	moving bool         // the rules admit the next generation of each port, too, while connections are moved to it

	number               uint64 // of the accepted configuration
	source, sourceDigest string // the override file, if one was read
}

// same reports whether two configurations do the same.
func (s *desired) same(other *desired) bool {
	return s.state.Digest == other.state.Digest && s.state.Ruleset.Text() == other.state.Ruleset.Text() && slices.Equal(s.mesh.Probes, other.mesh.Probes)
}

// retryInputs is how soon certificates that could not be taken are looked at again, and a file is kept that could not be: a
// full disk gives no event when it has room.
const retryInputs = time.Second

// Run brings the desired state about and keeps it until ctx ends; then it lets connections end, for at most the drain
// time or until abort is closed, and stops Envoy. The rules stay whatever happens. A note on reload makes it read its inputs.
//
// Reading the inputs, publishing certificates and looking after the rules go on beside the loop, each in a goroutine of its
// own: none of them waits for an Envoy that starts, nor for a file that hangs.
func (d *Daemon) Run(ctx context.Context, reload, abort <-chan struct{}) {
	d.notes = notes{changed: make(chan struct{}, 1), started: make(chan struct{}, 1), toStore: make(chan struct{}, 1), enforced: make(chan struct{}, 1)}
	d.locked(func() { d.since = time.Now() })
	beside, stop := context.WithCancel(context.WithoutCancel(ctx))
	reread := make(chan struct{}, 1)
	var running sync.WaitGroup
	running.Go(func() { d.guard(beside) })
	running.Go(func() { d.configure(beside, reload, reread) })
	running.Go(func() { d.certify(beside, reread) })
	if d.Legacy != nil {
		running.Go(func() { d.followLegacy(beside) })
	}
	running.Go(func() { d.logOverLimit(beside) })
	defer running.Wait()
	defer stop()
	defer d.watchdog.idle(loop)
	for {
		var again <-chan time.Time
		if wait := d.converge(ctx); wait > 0 {
			again = time.After(wait)
		}
		d.watchdog.idle(loop)
		select {
		case <-ctx.Done():
			d.stop(abort)
			return
		case <-d.notes.changed:
		case <-d.exited():
			d.envoyEnded()
		case <-again:
		}
	}
}

// converge takes what steps it takes from what is in force to what is wanted, and returns how long to wait until it is to
// be called again, if at all.
func (d *Daemon) converge(ctx context.Context) time.Duration {
	d.watchdog.begin(loop, "its turn", turnLimit)
	d.takeOffered()
	if err := d.renderForPlace(); err != nil {
		d.Log.Error("the state can't be rendered for this place", "error", err)
	}
	var supplied bool
	d.locked(func() { supplied = d.supplied })
	if ctx.Err() != nil || d.want == nil || !supplied {
		return 0
	}
	d.revoke()
	d.restartExhausted()
	want, err := d.nextState()
	if err == nil {
		if wait := d.delay(time.Now(), want); wait > 0 {
			if err := d.closePorts(want); err != nil {
				d.Log.Error("what a change forbids goes on until it is in force", "error", err)
				wait = min(wait, retryInputs)
			}
			return wait
		}
		err = d.apply(ctx, want)
		d.restartExhausted()
	}
	if err == nil && want != d.want {
		return immediately
	}
	if err == nil {
		d.locked(func() { d.unapplied = nil })
		return 0
	}
	if ctx.Err() != nil {
		return 0
	}
	if d.have != nil {
		err = errors.Join(err, d.fallBack(ctx))
	}
	again := sameError(err, d.unapplied)
	d.locked(func() { d.unapplied = err })
	d.noteFailure(checkOf(err), err)
	now := time.Now()
	wait := max(d.loop.backoff.next(now), immediately)
	d.loop.notBefore = now.Add(wait)
	level := slog.LevelError
	if again {
		level = slog.LevelDebug // the log has it
	}
	d.Log.Log(ctx, level, "the desired state is not in force", "error", err, "retry_in", wait.String(), "last_good_goes_on", d.have != nil)
	return wait
}

// immediately lets other inputs have their turn.
const immediately = time.Millisecond

// nextState returns the state to go to: the one that is wanted, or one between. Envoy changes before the rules, so that for a
// moment ports have the mode of before and the TLS of after: where a port comes to ask for certificates, and an older TLS is
// let in, there it would let in whom neither state does. So such a change keeps the TLS of before at first.
func (d *Daemon) nextState() (*desired, error) {
	if d.have == nil || d.want.mesh.TLS.MinVersion >= d.have.mesh.TLS.MinVersion {
		return d.want, nil
	}
	was, is := d.have.mesh.Ingress, d.want.mesh.Ingress
	if !slices.ContainsFunc(schema.Parts(was, is), func(part schema.Ports) bool {
		return schema.PolicyOf(was, part.First).Mode == schema.ModeTLS && schema.PolicyOf(is, part.First).Mode == schema.ModeMTLS
	}) {
		return d.want, nil
	}
	mesh := d.want.mesh
	mesh.TLS = d.have.mesh.TLS
	state, err := render.Render(mesh, d.want.place)
	between := *d.have
	between.mesh, between.state, between.place = mesh, state, d.want.place
	return &between, err
}

// apply puts a state in force: Envoy first, then the rules that send connections to it. So a port is never more open than
// the looser of the old and the new state.
func (d *Daemon) apply(ctx context.Context, want *desired) error {
	if !d.isServing(want) {
		if err := d.start(ctx, want); err != nil {
			return err
		}
	}
	var certified bool
	d.locked(func() { certified = d.certified })
	if !certified { // nobody is let in before Envoy has accepted certificates
		return nil
	}
	return d.enforce(want)
}

// setProblem notes a reason why the daemon is not where it should be, and reports whether it is new. A new one is logged as the
// event. What the reason means stands before its error.
func (d *Daemon) setProblem(reason *error, event, what string, err error) bool {
	err = fmt.Errorf("%s: %w", what, err)
	isNew := !sameError(err, *reason)
	if isNew {
		d.Log.Warn(event, "reason", err) //nolint:sloglint // the caller's constant
	}
	d.locked(func() { *reason = err })
	return isNew
}

// clearProblem drops a complaint. It logs the event where there was one: else the log's last word would be the complaint.
func (d *Daemon) clearProblem(reason *error, event string) {
	if *reason != nil {
		d.Log.Info(event) //nolint:sloglint // the caller's constant
	}
	d.locked(func() { *reason = nil })
}

func sameError(err, other error) bool {
	return err != nil && other != nil && err.Error() == other.Error()
}

func (d *Daemon) locked(change func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change()
}
