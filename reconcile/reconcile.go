// Package reconcile brings the kernel's rules and Envoy to the desired state and keeps them there.
package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"reflect"
	"slices"
	"sync"
	"syscall"
	"time"

	"mantlet/internal/bind"
	"mantlet/internal/peers"
	"mantlet/internal/sockdiag"
	"mantlet/internal/status"
	"mantlet/render"
	"mantlet/schema"
)

// Kernel is the table inet mantlet.
type Kernel interface {
	// Replace makes the table hold the ruleset and nothing else, in one transaction. Where it fails, the rules are as they
	// were. It is idempotent.
	Replace(render.Ruleset) error
	// Check returns nil if the table holds what Replace put there last, and otherwise an error that says what differs.
	Check() error
	// Mend puts back what Replace put there last where the table holds something else, and returns what differed.
	Mend() (found []string, err error)
	// Refused returns how many packets the rules ended since the start, by the names of render.Refusals.
	Refused() (map[string]uint64, error)
	// Inbound returns the connections from outside that are open, and how full conntrack's table is.
	Inbound() (open []status.Inbound, entries, most int, err error)
	// Clients returns the connections from outside that are open, with their marks, by the socket that the client dialled.
	Clients() (map[sockdiag.Socket]render.Mark, error)
	// Move gives connections from outside other marks, and returns those that have theirs now: the others ended meanwhile.
	Move(marks map[sockdiag.Socket]render.Mark) (moved []sockdiag.Socket, err error)
	// End ends open connections at once, and tells both of their ends by resets: of those from outside, and of those of the workload to
	// addresses on loopback, the ones that judge has a reason to end. It gets the socket that was dialled, and the connection's mark,
	// MarkNone where it is not from outside. End returns what it ended, and why.
	End(judge func(sockdiag.Socket, render.Mark) status.EndReason) (ended map[sockdiag.Socket]status.EndReason, err error)
	// Undermining returns what there is in other tables that would undermine the rules, a line each. Nothing of it is touched.
	Undermining() ([]string, error)
	// Watch sends a note when another process changed rules in the kernel, until ctx ends: its name where it changed the
	// table, else "". It may miss changes. The channel is closed once all that it takes has ended.
	Watch(ctx context.Context) <-chan string
}

// Secrets are the certificates that Envoy has.
type Secrets interface {
	// Update gives Envoy the generation that is in the TLS directory, if Envoy accepts it, and reports whether it lacks a mesh
	// CA that the one before had. Where the generation is not good the error says why, and Envoy keeps what it has. It returns
	// once Envoy has it. Where no Envoy runs, the generation is offered to the one that starts next: Update is to be called
	// again then. It is idempotent.
	Update(ctx context.Context) (revoked bool, err error)
	// Renew gives Envoy what it has once more, which ends all TLS session tickets, and returns once Envoy has it. Where it has
	// nothing, it does nothing.
	Renew(ctx context.Context) error
	// Offered reports whether an Envoy that is started finds certificates, tried or not.
	Offered() bool
	// Expires returns when what Envoy accepted expires; the zero time where it accepted nothing yet.
	Expires() time.Time
	// Valid returns why peers do not accept, at a time, what Envoy has; nil where they do, or where it has nothing.
	Valid(now time.Time) error
	// Held returns an error if Envoy says that it does not have what it was given.
	Held(ctx context.Context) error
	// Trust returns the mesh CAs that Envoy was given last, and the intermediates that are known.
	Trust() peers.Trust
	// Good returns what Envoy accepted last, without LeftSeconds.
	Good() []status.Certificate
	// Certificates returns what Envoy says that it has, or said last, without LeftSeconds. It may be called at any time.
	Certificates(ctx context.Context) []status.Certificate
	// Warnings returns what is not as it should be with what Envoy has, although Envoy accepts it.
	Warnings() []string
}

// Process is an Envoy that is live, or was.
type Process interface {
	// Check returns nil if it is live with the state that it was started with.
	Check(context.Context) error
	// Exited is closed once it has ended. From then on Err says how.
	Exited() <-chan struct{}
	Err() error
}

// Proxy runs Envoys.
type Proxy interface {
	// Start executes Envoy for a state and returns it once it is live with that. It takes over from the one that serves;
	// where that fails, whatever served goes on, but may not answer any more. It calls Daemon.Progress at each step.
	Start(context.Context, render.State, schema.Envoy) (Process, error)
	// Connections returns how many connections would be cut if all that Start made were stopped now.
	Connections(context.Context) (int, error)
	// Epochs returns the Envoys that run. It may be called at any time.
	Epochs(context.Context) []status.Epoch
	// Traffic returns how many connections there were since the start. It may be called at any time.
	Traffic(context.Context) status.Traffic
	// Statistics returns those of the Envoy that serves, in Prometheus' text format and by Envoy's names. It may be called at any time.
	Statistics(context.Context) ([]byte, error)
	// Joined returns an error that names the listeners which another process has joined; nil where there is none. It may be called at
	// any time but that of a Start.
	Joined() error
	// Stop ends all that Start made, and returns when they are gone.
	Stop()
	// Peers returns who is connected, by the socket that was dialled, where that is known: at ports with a list of clients, and through
	// egress entries with server names.
	Peers() (map[sockdiag.Socket]peers.Connection, error)
	// Refusals returns the connections that came to nothing last, the newest last, and how many there were since the start.
	Refusals() ([]status.Refusal, []status.RefusalCount)
}

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

	mu       sync.Mutex
	want     *desired  // the last good configuration; nil until an override file that is named could be read
	have     *desired  // what is in force, with the rules as they are in the kernel; nil at first
	supplied bool      // an Envoy that is started finds certificates
	expires  time.Time // those that Envoy accepted; zero where it has accepted none
	process  Process   // the one that serves; nil where none does
	serves   string    // the digest of the state that it was started with
	handover bool      // to another Envoy: meanwhile the one that serves does not answer
	stopping bool

	watchdog watchdog

	// What the reader of the configuration has alone.
	parsed     *parsed
	configured bool  // there was a good configuration
	notKept    error // why the last good override file could not be kept
	// What it hands over: a good configuration to the loop, with a note on news, and the file to be kept, with a note on keeps.
	offered *desired
	unkept  []byte
	keeps   chan struct{}

	// What the reader of the certificates has alone.
	given  []status.Certificate // that Envoy has
	unread bool                 // an Envoy was starting, so that none could try them

	news     chan struct{} // for the loop: another configuration, or other certificates
	started  chan struct{} // for the reader of the certificates: an Envoy was started, or could not be
	enforced chan struct{} // for who looks at iptables-legacy: rules were put in force
	starts   int           // how many were begun
	revoked  bool          // a mesh CA was taken away, and the rules do not end its connections yet

	// What the loop has alone.
	raises    raises
	cuts      []time.Time // of the last hot restarts that cut what the one before last drained
	spent     bool        // the generations of a port are used up
	pause     backoff     // of starts that fail, and of Envoys that die
	notBefore time.Time   // the next start
	drained   time.Time   // until then the connections of the epoch before have their drain time

	repairs   []status.Repair // the last ones
	repaired  int             // how many there were
	foreign   []string        // what undermines the rules from other tables
	unmended  error           // why the rules could not be looked at or put back; guard alone has it
	repairLog *valve          // of what mend says; guard alone has it
	joined    error           // listeners that another process had joined when guard last looked; guard alone has it
	invalid   error           // why peers do not accept what Envoy has, when guard last looked; guard alone has it

	legacyRules  []string // of iptables-legacy, but those that drop all
	unreadLegacy error    // why they could not be read
	unlifted     error    // why one that drops all could not be removed

	reloaded status.Reload      // what came of reading the configuration
	outcomes map[string]outcome // of probes of the workload, by name

	// Why the daemon is not where it should be, each nil where it is not the reason.
	badConfig, badCertificates, expiring, down error

	// What Status tells beside that.
	since     time.Time // it runs
	accepted  uint64    // how many configurations were
	lastError *status.Failure
	unserved  error // why the status address is not served
	ungated   error // why the gate's socket is not served
	applies   applies
	envoys    status.Envoys
	endings   endings // connections that changes ended
}

// desired is a desired state and what it was rendered from.
type desired struct {
	mesh        schema.Mesh
	place       render.Place
	state       render.State
	generations render.Generations

	closed *closing // ports are closed until another state comes

	number               uint64 // of the accepted configuration
	source, sourceDigest string // the override file, if one was read
}

// ticketLife bounds how long a client can resume a TLS session after its certificate expired: publishing anew ends all
// tickets. An hour costs each client one full handshake an hour.
const ticketLife = time.Hour

// retryInputs is how soon certificates that could not be taken are looked at again, and a file is kept that could not be: a
// full disk gives no event when it has room.
const retryInputs = time.Second

// Run brings the desired state about and keeps it until ctx ends; then it lets connections end, for at most the drain
// time or until abort is closed, and stops Envoy. The rules stay whatever happens. A note on reload makes it read its inputs.
//
// Reading the inputs, publishing certificates and looking after the rules go on beside the loop, each in a goroutine of its
// own: none of them waits for an Envoy that starts, nor for a file that hangs.
func (d *Daemon) Run(ctx context.Context, reload, abort <-chan struct{}) {
	d.news, d.started, d.keeps, d.enforced = make(chan struct{}, 1), make(chan struct{}, 1), make(chan struct{}, 1), make(chan struct{}, 1)
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
	running.Go(func() { d.tellShed(beside) })
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
		case <-d.news:
		case <-d.exited():
			d.ended()
		case <-again:
		}
	}
}

// converge takes what steps it takes from what is in force to what is wanted, and returns how long to wait until it is to
// be called again, if at all.
func (d *Daemon) converge(ctx context.Context) time.Duration {
	d.watchdog.begin(loop, "its turn", turnLimit)
	d.take()
	if err := d.move(); err != nil {
		d.Log.Error("the state can't be rendered for this place", "error", err)
	}
	var supplied bool
	d.locked(func() { supplied = d.supplied })
	if ctx.Err() != nil || d.want == nil || !supplied {
		return 0
	}
	d.revoke()
	d.renew()
	want, err := d.next()
	if err == nil {
		if wait := d.hold(time.Now(), want); wait > 0 {
			if err := d.close(want); err != nil {
				d.Log.Error("what a change forbids goes on until it is in force", "error", err)
				wait = min(wait, retryInputs)
			}
			return wait
		}
		err = d.apply(ctx, want)
		d.renew()
	}
	if err == nil && want != d.want {
		return atOnce
	}
	if err == nil {
		d.locked(func() { d.down = nil })
		return 0
	}
	if ctx.Err() != nil {
		return 0
	}
	if d.have != nil {
		err = errors.Join(err, d.fallBack(ctx))
	}
	again := same(err, d.down)
	d.locked(func() { d.down = err })
	d.failed(placeOf(err), err)
	now := time.Now()
	wait := max(d.pause.next(now), atOnce)
	d.notBefore = now.Add(wait)
	level := slog.LevelError
	if again {
		level = slog.LevelDebug // the log has it
	}
	d.Log.Log(ctx, level, "the desired state is not in force", "error", err, "retry_in", wait.String(), "last_good_goes_on", d.have != nil)
	return wait
}

// atOnce lets other inputs have their turn.
const atOnce = time.Millisecond

// next returns the state to go to: the one that is wanted, or one between. Envoy changes before the rules, so that for a
// moment ports have the mode of before and the TLS of after: where a port comes to ask for certificates, and an older TLS is
// let in, there it would let in whom neither state does. So such a change keeps the TLS of before at first.
func (d *Daemon) next() (*desired, error) {
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
	var accepted bool
	d.locked(func() { accepted = !d.expires.IsZero() })
	if !accepted { // nobody is let in before Envoy has accepted certificates
		return nil
	}
	return d.enforce(want)
}

// enforce puts a state's rules in force, in generations that end what it does not let in any more.
func (d *Daemon) enforce(want *desired) (err error) {
	var revoked bool
	d.locked(func() { revoked, d.revoked = d.revoked, false })
	defer func() {
		d.locked(func() { d.revoked = d.revoked || revoked && err != nil })
	}()
	next, mesh := *want, want.enforced()
	if d.have != nil {
		next.generations = advance(d.have.generations, d.have.enforced(), mesh, revoked)
	} else if before, generations, ok := loosest(d.Found, mesh); ok {
		next.generations = advance(generations, before, mesh, revoked)
	}
	next.state.Ruleset = render.Rules(mesh, next.generations).Closed(want.closedPorts())
	change := d.tighten(&next, revoked)
	if d.have == nil || next.state.Ruleset.Text() != d.have.state.Ruleset.Text() {
		spared := d.spare(change)
		if err := d.replace(next.state.Ruleset); err != nil {
			d.spent = d.spent || spared > 0 // the next attempt may forbid what has a mark of the future already
			return err
		}
		d.Log.Info("rules are in force", "ingress_entries", len(want.mesh.Ingress), "egress_entries", len(want.mesh.Egress))
	}
	d.end(change)
	d.spent = d.spent || d.have != nil && d.raises.add(time.Now(), d.have.generations, next.generations)
	d.locked(func() { d.have = &next })
	d.follow()
	notify(d.enforced)
	return nil
}

// revoke ends the connections by a mesh CA that was taken away. It waits for no Envoy.
func (d *Daemon) revoke() {
	var revoked bool
	d.locked(func() { revoked = d.revoked })
	if !revoked || d.have == nil {
		return
	}
	if err := d.enforce(d.have); err != nil {
		d.Log.Error("connections by a mesh CA that was taken away live on", "error", err)
	}
}

// renew ends all connections where the generations of a port are used up: the next one could bring back what it ended.
func (d *Daemon) renew() {
	if !d.spent {
		return
	}
	d.spent = false
	d.Log.Warn("the rules can't tell what is forbidden from what is not any more, as after too many changes of one port: Envoy is started anew")
	d.watchdog.begin(loop, "stopping Envoy", stopLimit)
	d.Proxy.Stop()
	d.watchdog.begin(loop, "its turn", turnLimit)
}

func (d *Daemon) replace(rules render.Ruleset) error {
	began := time.Now()
	d.watchdog.begin(loop, "putting the rules in force", kernelLimit)
	err := d.Kernel.Replace(rules)
	d.watchdog.begin(loop, "its turn", turnLimit)
	d.applied(status.ApplyRules, time.Since(began), err)
	if err != nil {
		return located{status.CheckRules, about(status.RulesNotInForce, err)}
	}
	return nil
}

// fallBack makes the last good state serve where an attempt at another one left nothing that does, or that answers.
func (d *Daemon) fallBack(ctx context.Context) error {
	if d.process != nil && d.isServing(d.have) {
		ctx, cancel := context.WithTimeout(ctx, checkLimit)
		defer cancel()
		if d.process.Check(ctx) == nil {
			return nil
		}
	}
	if err := d.start(ctx, d.have); err != nil {
		return fmt.Errorf("going back to the last good state: %w", err)
	}
	return nil
}

// isServing reports whether an Envoy runs with the state.
func (d *Daemon) isServing(state *desired) bool {
	return d.process != nil && d.serves == state.state.Digest
}

// start makes a state serve. While it is under way, connections by a mesh CA that is taken away end all the same.
func (d *Daemon) start(ctx context.Context, want *desired) error {
	kind, began := status.ApplyStart, time.Now()
	if d.process != nil {
		kind = status.ApplyHotRestart
		if began.Before(d.drained) {
			d.cuts = append(d.cuts, began)
			d.cuts = d.cuts[max(0, len(d.cuts)-cutsAtOnce):]
		}
	}
	d.locked(func() {
		d.handover = true
		d.starts++
	})
	process, err := d.await(ctx, want)
	d.locked(func() { d.handover = false })
	notify(d.started)
	if ctx.Err() == nil {
		d.applied(kind, time.Since(began), err)
		d.locked(func() { d.envoys.Add(err == nil, d.have != nil && (d.process == nil || want == d.have)) })
	}
	if err != nil {
		return about(status.EnvoyNotStarted, Explain(err, want.mesh))
	}
	if d.process != nil {
		d.drained = time.Now().Add(want.mesh.Envoy.DrainTime)
	}
	d.locked(func() { d.process, d.serves = process, want.state.Digest })
	return nil
}

// await starts an Envoy, and revokes while it starts.
func (d *Daemon) await(ctx context.Context, want *desired) (process Process, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer d.watchdog.idle(starter)
		d.watchdog.begin(starter, "starting Envoy", startLimit)
		process, err = d.Proxy.Start(ctx, want.state, want.mesh.Envoy)
	}()
	news := false
	for {
		d.watchdog.idle(loop)
		select {
		case <-done:
			d.watchdog.begin(loop, "its turn", turnLimit)
			if news {
				notify(d.news) // there may be another configuration, too
			}
			return process, err
		case <-d.news:
			news = true
			d.watchdog.begin(loop, "its turn", turnLimit)
			d.revoke()
		}
	}
}

// ended takes note that the Envoy which served has ended.
func (d *Daemon) ended() {
	err, delay := d.process.Err(), d.pause.next(time.Now())
	d.Log.Error("Envoy ended; new connections wait until it is back", "error", err, "restart_in", delay.String())
	d.notBefore = time.Now().Add(delay)
	err = about(status.EnvoyDown, err)
	d.locked(func() {
		d.process, d.down = nil, err
		d.envoys.Ended++
	})
	d.failed(status.CheckEnvoy, err)
}

// certify reads and publishes certificates, again whenever they may have changed or there is a note on reread, until ctx ends.
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
		if d.badCertificates != nil || d.unread {
			retry = time.After(retryInputs)
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-reread:
		case <-retry:
		case <-d.started:
		case <-tickets.C:
			d.watchdog.begin(certificates, "renewing session tickets", certificateLimit)
			if err := d.Secrets.Renew(ctx); err != nil {
				d.Log.Error("session tickets live on", "error", err)
			}
		}
	}
}

// readCertificates passes on a new generation of certificates. A bad one is reported, and the last good one stays.
func (d *Daemon) readCertificates(ctx context.Context) {
	began := time.Now()
	before := d.starting()
	revoked, err := d.Secrets.Update(ctx)
	d.unread = errors.Is(err, status.ErrUntried) && (before.now || d.starting() != before)
	expires := d.Secrets.Expires()
	if given := d.Secrets.Good(); !reflect.DeepEqual(given, d.given) {
		d.given = given
		d.applied(status.ApplyCertificates, time.Since(began), nil)
	}
	if err != nil && !d.unread {
		what := "the certificates were rejected; the last good ones stay in use"
		if expires.IsZero() {
			what = status.WaitingForCertificates
		}
		event := "certificates rejected"
		if unwritable(err) {
			event, what = "certificates not published", status.RuntimeDirectoryNotWritable
		}
		if d.complain(&d.badCertificates, event, what, err) {
			d.failed(status.CheckCertificates, err)
			d.applied(status.ApplyCertificates, time.Since(began), err)
		}
	}
	var isNew bool
	d.locked(func() {
		supplied := d.Secrets.Offered()
		isNew = revoked || !expires.Equal(d.expires) || supplied != d.supplied
		d.supplied, d.expires, d.revoked = supplied, expires, d.revoked || revoked
	})
	if isNew {
		notify(d.news)
	}
	if err == nil {
		d.settle(&d.badCertificates, "certificates accepted again")
	}
	d.foresee(time.Now())
}

// starting is whether an Envoy starts, and how many starts there were.
type starting struct {
	now   bool
	count int
}

func (d *Daemon) starting() (s starting) {
	d.locked(func() { s = starting{d.handover, d.starts} })
	return s
}

// unwritable reports whether an error is that a file system takes no more. Reading gives none of these.
func unwritable(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EROFS)
}

// foresee warns while there is time left to mend it: what expires should have been replaced by the last fifth of its life. What is
// on the path of this workload comes before what only peers may need.
func (d *Daemon) foresee(now time.Time) {
	var needed, other error
	for _, c := range d.given {
		verb := "expires"
		if now.After(c.NotAfter) {
			verb = "expired"
		}
		text := fmt.Sprintf("%s (%s) %s at %s", c.Role, c.Subject, verb, c.NotAfter.Format(time.RFC3339))
		switch {
		case now.Before(c.NotAfter.Add(-c.NotAfter.Sub(c.NotBefore) / 5)):
		case c.Needed && needed == nil:
			needed = fmt.Errorf("%s, and there is no new one", text)
		case !c.Needed && c.Role != status.RoleMeshCA && other == nil: // a bundle may hold a CA of before
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
	if d.complain(&d.expiring, "certificates expire soon", "the certificates should be replaced", err) {
		d.failed(status.CheckCertificates, d.expiring)
	}
}

// complain notes a reason why the daemon is not where it should be, and reports whether it is new. A new one is logged as the
// event. What the reason means stands before its error.
func (d *Daemon) complain(reason *error, event, what string, err error) bool {
	err = fmt.Errorf("%s: %w", what, err)
	isNew := !same(err, *reason)
	if isNew {
		d.Log.Warn(event, "reason", err) //nolint:sloglint // the caller's constant
	}
	d.locked(func() { *reason = err })
	return isNew
}

// settle drops a complaint. It logs the event where there was one: else the log's last word would be the complaint.
func (d *Daemon) settle(reason *error, event string) {
	if *reason != nil {
		d.Log.Info(event) //nolint:sloglint // the caller's constant
	}
	d.locked(func() { *reason = nil })
}

func same(err, other error) bool { return err != nil && other != nil && err.Error() == other.Error() }

// stop lets the workload's connections end, then ends Envoy.
func (d *Daemon) stop(abort <-chan struct{}) {
	d.locked(func() { d.stopping = true })
	if d.want != nil {
		d.drain(d.want.mesh.Envoy.DrainTime, abort)
	}
	d.Proxy.Stop()
	d.Log.Info("mantlet ends; the rules stay and nothing more comes in through Envoy")
}

// drainPoll is how often the open connections are counted while they end.
const drainPoll = 100 * time.Millisecond

// drain returns once no connection is open, in whichever Envoy. Where they can't be counted, they get all their time.
func (d *Daemon) drain(limit time.Duration, abort <-chan struct{}) {
	ctx, cut := context.WithCancelCause(context.Background())
	var waiting sync.WaitGroup
	defer waiting.Wait()
	defer cut(nil)
	waiting.Go(func() { // an Envoy that does not answer holds up neither
		select {
		case <-time.After(limit):
			cut(errors.New("the drain time is over"))
		case <-abort:
			cut(errors.New("second signal"))
		case <-ctx.Done():
		}
	})
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	for logged := false; ; {
		open, err := d.Proxy.Connections(ctx)
		if ctx.Err() != nil {
			d.Log.Warn("cutting connections that did not end", "reason", context.Cause(ctx))
			return
		}
		if err == nil && open == 0 {
			return
		}
		if !logged {
			d.Log.Info("waiting for connections to end", "open", open, "limit", limit.String(), "uncounted", err)
			logged = true
		}
		select {
		case <-tick.C:
		case <-d.news:
			d.revoke()
		case <-ctx.Done():
		}
	}
}

func (d *Daemon) locked(change func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change()
}

// exited returns the channel that tells the end of the running Envoy, or nil where none runs.
func (d *Daemon) exited() <-chan struct{} {
	if d.process == nil {
		return nil
	}
	return d.process.Exited()
}

// backoff spaces out starts that fail one after another. The first comes at once: an Envoy that was killed is back
// within a client's first retransmission.
type backoff struct {
	pause time.Duration
	last  time.Time
}

const (
	firstPause = 100 * time.Millisecond
	maxPause   = 10 * time.Second
	// healthy is how many times the last pause it must go well for the next failure to count as the first: so the pauses
	// take a tenth of the time at most, and an Envoy that is killed each minute is back at once each time.
	healthy = 10
)

// next returns how long to wait, with jitter, after a failure at now.
func (b *backoff) next(now time.Time) time.Duration {
	if now.Sub(b.last) > healthy*b.pause {
		b.pause = 0
	}
	b.last = now
	pause := b.pause
	b.pause = min(max(2*b.pause, firstPause), maxPause)
	if pause == 0 {
		return 0
	}
	return pause/2 + rand.N(pause/2)
}
