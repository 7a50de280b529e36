package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
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
	Found       render.Ruleset // the rules that the kernel had before deny-all replaced them
	// PolicyRoutes may be nil: then there are none, and no state may need them.
	PolicyRoutes PolicyRoutes
	Secrets      Secrets
	Proxy        Proxy
	Legacy       Legacy                                   // nil: iptables-legacy is ignored
	Names        Names                                    // nil: names are not resolved, and have no addresses
	HasIPv6      func() bool                              // reports whether Envoy can listen on ::1; nil: as Place says
	Limits       render.Limits                            // of mantlet and its Envoys
	Processes    bind.Processes                           // those that listened before mantlet gave up the privilege to see them
	NameOf       func(context.Context, netip.Addr) string // finds a name of an address, "" for none; nil: nobody does
	Resolvers    func() render.Resolvers                  // returns the name servers of resolv.conf; nil: as Place says
	// Follow returns refusals as they come, until ctx ends; an error where too many follow already.
	Follow func(ctx context.Context) (<-chan status.Followed, error)
	Log    *slog.Logger
	// Rest is called in a goroutine of its own once the loop has done nothing for restAfter: what its work took can be given back to the
	// kernel. nil: nothing is.
	Rest func()
	// LogLost returns how many lines of the log were dropped, and for how long its reader has read nothing; 0 while it reads. nil: no lines
	// are dropped.
	LogLost func() (lines uint64, unread time.Duration)

	watchdog watchdog
	notes    notes
	routing  routing

	mu          sync.Mutex // guards shared
	shared                 // embedded, since nearly everything is about these
	loop        loopState
	guarding    guardState
	configuring configState
	certifying  certifyState
	outbound    outboundAccount
}

// notes are channels by which one goroutine tells another that there is something to do.
type notes struct {
	changed  chan struct{} // to the loop: the configuration, the certificates or the place changed
	started  chan struct{} // to certify: an Envoy was started, or failed to start
	toStore  chan struct{} // to storeFiles: there is another override file to store
	enforced chan struct{} // to followLegacy: rules were put in force
}

// shared is what several goroutines use. A goroutine that is the only writer of a field reads it without the mutex.
type shared struct {
	// Written by the loop.
	want      *desired // the last good configuration; nil before there is one
	have      *desired // what is in force; nil before anything is
	serving   serving
	handover  bool // an Envoy takes over: meanwhile the one that serves has no admin interface
	starts    int  // of Envoys, failed ones among them
	stopping  bool
	accepted  uint64 // number of configurations
	envoys    status.Envoys
	endings   endings       // of connections, by changes
	waits     *status.Waits // what the wanted state waits for; nil for nothing
	unapplied error         // why the wanted state is not in force; nil if it is

	// Written by configure and storeFiles.
	offered   *desired // a good configuration that the loop has not taken yet
	unstored  []byte   // the override file that is still to be stored
	reloaded  status.Reload
	badConfig error // nil where the configuration is good

	// Written by certify. The first three change together.
	supplied        bool  // an Envoy that starts finds certificates
	certified       bool  // Envoy has accepted certificates
	revoked         bool  // a mesh CA was removed, and the rules do not end its connections yet; the loop clears it
	badCertificates error // nil where the certificates are good
	expiring        error // nil where none expires soon

	// Written by guard.
	repairs   []status.Repair // the last ones, the newest last
	repaired  int             // their number since the start
	conflicts []string        // rules of other tables that undermine these

	// Written by followLegacy.
	legacyRules []string // all but those that drop everything
	legacyErr   error    // why they could not be read
	liftErr     error    // why a rule that drops everything could not be removed

	// Written by several.
	since     time.Time // the start of Run
	lastError *status.Failure
	applies   applies
	statusErr error              // why the status address is not served
	gateErr   error              // why the gate's socket is not served
	outcomes  map[string]outcome // of probes of the workload, by name
}

// serving is the Envoy that serves.
type serving struct {
	process Process   // nil if none serves
	digest  string    // of the state that it was started with
	drained time.Time // the end of the drain time of the epoch before it
}

// loopState is used only by the loop.
type loopState struct {
	advances  advances
	drainCuts []time.Time // times of hot restarts that ended an epoch which was still draining
	exhausted bool        // a port has no generation left, see advances.add
	backoff   backoff     // after starts that failed and Envoys that ended
	notBefore time.Time   // no Envoy starts before
}

// guardState is used only by guard.
type guardState struct {
	log       *logLimit // of repairs
	repairErr error     // why the rules could not be read or repaired
	joined    error     // listeners that another process had joined at the last look
	invalid   error     // why peers did not accept the certificates at the last look
}

// configState is used only by configure, and storeErr only by storeFiles.
type configState struct {
	parsed     *parsed
	configured bool  // there was a good configuration
	storeErr   error // why the last good override file could not be stored
}

// certifyState is used only by certify.
type certifyState struct {
	untried bool // the certificates could not be tried, since an Envoy was starting
}

// desired is a desired state and what it was rendered from.
type desired struct {
	mesh        schema.Mesh
	place       render.Place
	state       render.State // its Ruleset has no generations; see rules for the one in force
	generations render.Generations

	closed *portClosure // ports that are closed until another state is in force; nil for none
	moving bool         // the rules also admit the next generation of each port, while connections are moved to it

	number               uint64 // of the configuration, from 1
	source, sourceDigest string // the override file, if one was read
}

// same reports whether two configurations have the same effect.
func (s *desired) same(other *desired) bool {
	return s.state.Digest == other.state.Digest && s.state.Ruleset.Text() == other.state.Ruleset.Text() && slices.Equal(s.mesh.Probes, other.mesh.Probes)
}

// rendered returns the state with its bootstrap, which is not kept once an Envoy has it.
func (s *desired) rendered() (render.State, error) {
	if s.state.Bootstrap != nil {
		return s.state, nil
	}
	return render.Render(s.mesh, s.place)
}

// retryInputs is how soon a failed attempt at certificates, or at storing a file, is repeated. A full disk gives no event when it has
// room again.
const retryInputs = time.Second

// restAfter is longer than what follows a change at once: ending connections, say.
const restAfter = 2 * time.Second

// Run brings the desired state about and keeps it until ctx ends. Then it lets connections end, for at most the drain time or until abort
// is closed, and stops Envoy. The rules stay in any case. A note on reload makes it read its inputs again.
//
// Reading the configuration, publishing certificates and guarding the rules go on beside the loop, each in a goroutine of its own. None
// of them waits for an Envoy that starts, nor for a file system that hangs.
func (d *Daemon) Run(ctx context.Context, reload, abort <-chan struct{}) {
	d.notes = notes{changed: make(chan struct{}, 1), started: make(chan struct{}, 1), toStore: make(chan struct{}, 1), enforced: make(chan struct{}, 1)}
	d.locked(func() { d.since = time.Now() })
	beside, stop := context.WithCancel(context.WithoutCancel(ctx))
	reread := make(chan struct{}, 1)
	var running sync.WaitGroup
	running.Go(func() { d.guard(beside) })
	if d.PolicyRoutes != nil {
		running.Go(func() { d.guardRoutes(beside) })
	}
	running.Go(func() { d.configure(beside, reload, reread) })
	running.Go(func() { d.certify(beside, reread) })
	running.Go(func() { d.followOutbound(beside) })
	if d.Legacy != nil {
		running.Go(func() { d.followLegacy(beside) })
	}
	running.Go(func() { d.logOverLimit(beside) })
	defer running.Wait()
	defer stop()
	defer d.watchdog.idle(loop)
	rest := time.AfterFunc(restAfter, func() {
		if d.Rest != nil {
			d.Rest()
		}
	})
	defer rest.Stop()
	for {
		var again <-chan time.Time
		if wait := d.converge(ctx); wait > 0 {
			again = time.After(wait)
		}
		rest.Reset(restAfter)
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

// converge takes one step from what is in force towards what is wanted. It returns how long to wait before the next call; 0 if only a
// change of the inputs, or the end of Envoy, calls for one.
//
// A step that fails leaves what was in force, or goes back to it, and is repeated after the back-off.
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
		now := time.Now()
		waits := d.delay(now, want)
		d.noteWaits(now, waits)
		if waits != nil {
			wait := waits.Until.Sub(now)
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
		d.locked(func() {
			d.unapplied = nil
			d.want.state.Bootstrap = nil // of 10 MB with 1,000 entries; see rendered
			if d.have != nil {
				d.have.state.Bootstrap = nil
			}
		})
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
	if wait > immediately {
		d.noteWaits(now, &status.Waits{Until: d.loop.notBefore, Code: status.WaitBackoff, Reason: waitReason(status.WaitBackoff)})
	}
	level := slog.LevelError
	if again {
		level = slog.LevelDebug // the log has it already
	}
	d.Log.Log(ctx, level, "the desired state is not in force", "error", err, "retry_in", wait.String(), "last_good_goes_on", d.have != nil)
	return wait
}

// immediately is a wait that only lets other inputs be read first.
const immediately = time.Millisecond

// nextState returns the state to go to next: the wanted one, or one in between.
//
// Envoy changes before the rules. For a moment, ports have the old mode and the new TLS minimum. If one port begins to require client
// certificates while the TLS minimum is lowered, that moment would let in clients with an old TLS version and without a certificate,
// which neither the old nor the new state does. Such a change therefore goes through a state with the new modes and the old TLS minimum.
func (d *Daemon) nextState() (*desired, error) {
	if d.have == nil || d.want.mesh.TLS.MinVersion.Compare(d.have.mesh.TLS.MinVersion) >= 0 {
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

// apply puts a state in force: policy routes, which admit nothing, then Envoy, then the rules that send connections to it. So a port never
// admits more than the more permissive of the old and the new state.
func (d *Daemon) apply(ctx context.Context, want *desired) error {
	settled, err := d.route(want)
	if err != nil {
		return err
	}
	defer settled()
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

// setProblem sets a reason why the wanted state is not in force, or may not stay so: what, followed by the error. It logs the event and
// returns true if the reason is new.
func (d *Daemon) setProblem(reason *error, event, what string, err error) bool {
	err = fmt.Errorf("%s: %w", what, err)
	isNew := !sameError(err, *reason)
	if isNew {
		d.Log.Warn(event, "reason", err) //nolint:sloglint // the caller's constant
	}
	d.locked(func() { *reason = err })
	return isNew
}

// clearProblem clears a reason of setProblem. If there was one, it logs the event: the log should not end with the problem.
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
