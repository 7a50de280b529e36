package reconcile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"mantlet/internal/peers"
	"mantlet/internal/sockdiag"
	"mantlet/internal/status"
	"mantlet/render"
	"mantlet/schema"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is all that a Daemon meets, faked. What the Daemon does goes into one list.
type world struct {
	*Daemon
	end    context.CancelFunc
	reload chan struct{}

	mu          sync.Mutex
	log         bytes.Buffer
	did         []string
	startErr    error
	startTake   time.Duration
	rulesErr    error
	hang        map[string]chan struct{} // what "rules", "mend", "start" and "update" wait for, whatever context they have
	found       error                    // what is not as it should be with the rules in the kernel
	secretErr   error
	undermining []string
	spoken      []status.Spoken
	expiry      time.Time
	untried     bool // certificates that no Envoy has tried yet
	revoked     bool // a mesh CA was taken away; told once
	latest      *process
	open        func(context.Context) (int, error) // how many connections are

	changes chan string // of rules in the kernel
}

// process is a fake Envoy.
type process struct {
	exited chan struct{}
	check  func(context.Context) error
}

func (p *process) Check(ctx context.Context) error { return p.check(ctx) }
func (p *process) Exited() <-chan struct{}         { return p.exited }
func (p *process) Err() error                      { return errors.New("signal: killed") }

func (w *world) note(did string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.did = append(w.did, did)
}

// Write takes the log.
func (w *world) Write(text []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.Write(text)
}

func (w *world) logged() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.String()
}

// done returns what was done since the last call.
func (w *world) done() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	did := w.did
	w.did = nil
	return did
}

// set changes how the world behaves.
func (w *world) set(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
}

// wait waits for what holds up what is done.
func (w *world) wait(did string) {
	w.mu.Lock()
	hang := w.hang[did]
	w.mu.Unlock()
	if hang != nil {
		<-hang
	}
}

func (w *world) Exchange(r render.Ruleset) error { return w.Replace(r) }

func (w *world) Replace(render.Ruleset) error {
	w.note("rules")
	w.wait("rules")
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rulesErr
}

func (w *world) Check() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.found
}

func (w *world) Repair() ([]string, error) {
	w.mu.Lock()
	found, err := w.found, w.rulesErr
	if found != nil {
		w.did = append(w.did, "mend")
	}
	w.mu.Unlock()
	w.wait("mend")
	if found == nil {
		return nil, err
	}
	return []string{found.Error()}, err
}

func (w *world) EndOutbound(func(netip.AddrPort) bool) (map[netip.AddrPort]int, error) {
	w.note("end outbound")
	return nil, nil
}

func (w *world) Spoken() ([]status.Spoken, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.spoken, nil
}

func (w *world) Conflicts() ([]string, error) {
	w.wait("survey")
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.undermining, nil
}

func (w *world) Watch(ctx context.Context) <-chan string {
	notes := make(chan string)
	go func() {
		defer close(notes)
		for {
			select {
			case who := <-w.changes:
				select {
				case notes <- who:
				case <-ctx.Done():
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return notes
}

func (w *world) Update(context.Context) (revoked bool, err error) {
	w.wait("update")
	w.mu.Lock()
	defer w.mu.Unlock()
	revoked, w.revoked = w.revoked, false
	return revoked, w.secretErr
}

func (w *world) Renew(context.Context) error {
	w.note("renew")
	return nil
}

func (w *world) Offered() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.untried || !w.expiry.IsZero()
}

func (w *world) Held(context.Context) error { return nil }

func (w *world) Warnings() []string { return nil }

func (w *world) expires() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.expiry
}

func (w *world) Connections(ctx context.Context) (int, error) { return w.open(ctx) }

func (w *world) Valid(now time.Time) error {
	if expiry := w.expires(); !expiry.IsZero() && now.After(expiry) {
		return fmt.Errorf("certificate 1 expired at %s", expiry)
	}
	return nil
}

func (w *world) Certificates(context.Context) []status.Certificate { return w.Good() }

func (w *world) Good() []status.Certificate {
	expiry := w.expires()
	if expiry.IsZero() {
		return nil
	}
	return []status.Certificate{
		{Role: status.RoleLeaf, Subject: "CN=pod", NotBefore: expiry.Add(-5 * time.Hour), NotAfter: expiry, Needed: true},
		{Role: status.RoleMeshCA, NotAfter: time.Now()},
	}
}

func (w *world) Epochs(context.Context) []status.Epoch { return nil }

func (w *world) Traffic(context.Context) status.Traffic { return status.Traffic{} }

func (w *world) Statistics(context.Context) ([]byte, error) { return nil, nil }

func (w *world) Clients() (map[sockdiag.Socket]render.Mark, error) { return nil, nil }

func (w *world) Move(map[sockdiag.Socket]render.Mark) ([]sockdiag.Socket, error) { return nil, nil }

func (w *world) Peers() (map[sockdiag.Socket]peers.Connection, error) { return nil, nil }

func (w *world) Trust() peers.Trust { return peers.Trust{} }

func (w *world) End(func(sockdiag.Socket, render.Mark) status.EndReason) (map[sockdiag.Socket]status.EndReason, error) {
	return nil, nil
}

func (w *world) Inbound() ([]status.Inbound, int, int, error) { return nil, 0, 0, nil }

func (w *world) Refused() (map[string]uint64, error) { return nil, nil }

func (w *world) Joined() error { return nil }

func (w *world) Stop() { w.note("stop Envoy") }

func (w *world) Refusals() ([]status.Refusal, []status.RefusalCount) { return nil, nil }

func (w *world) Start(ctx context.Context, _ render.State, _ schema.Envoy) (Process, error) {
	w.note("start Envoy")
	w.wait("start")
	w.mu.Lock()
	take, err := w.startTake, w.startErr
	w.mu.Unlock()
	select {
	case <-time.After(take):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	w.latest = &process{
		exited: make(chan struct{}),
		check:  func(context.Context) error { return nil },
	}
	return w.latest, nil
}

// newWorld is one in which all goes well. Call it within a bubble of synctest. Nothing is in the TLS directory: a watched
// directory would keep the bubble's clock from advancing.
func newWorld(t *testing.T) *world {
	t.Helper()
	env, err := schema.ParseEnvironment([]string{"MANTLET_TLS_DIRECTORY=" + filepath.Join(t.TempDir(), "missing")})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{
		expiry:  time.Now().Add(24 * time.Hour),
		changes: make(chan string),
		open:    func(context.Context) (int, error) { return 0, nil },
	}
	w.Daemon = &Daemon{
		Environment: env,
		Kernel:      w,
		Secrets:     w,
		Proxy:       w,
		Log:         slog.New(slog.NewTextHandler(w, nil)),
	}
	return w
}

// run runs the daemon until the test ends.
func (w *world) run(t *testing.T) (abort chan struct{}) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w.end = cancel
	abort = make(chan struct{})
	w.reload = make(chan struct{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		w.Run(ctx, w.reload, abort)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	synctest.Wait()
	return abort
}

func (w *world) unready(t *testing.T) string {
	t.Helper()
	var reasons []string
	for _, err := range w.Unready(t.Context()) {
		if !slices.ContainsFunc(status.Reasons(), func(begins string) bool { return strings.HasPrefix(err.Text, begins) }) {
			t.Errorf("a reason that is not among Reasons: %s", err.Text)
		}
		reasons = append(reasons, err.Error())
	}
	return strings.Join(reasons, "; ")
}

func expect(t *testing.T, w *world, want ...string) {
	t.Helper()
	synctest.Wait()
	if got := w.done(); !slices.Equal(got, want) {
		t.Errorf("at %s the daemon did %q, want %q", time.Now().Format("15:04:05.000"), got, want)
	}
}

func ready(t *testing.T, w *world, want string) {
	t.Helper()
	if got := w.unready(t); got != want && (want == "" || !strings.Contains(got, want)) {
		t.Errorf("unready: %q, want %q", got, want)
	}
}

// TestBringUp: Envoy comes before the rules that send connections to it, and nothing comes before certificates.
func TestBringUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		expiry := w.expiry
		w.expiry, w.secretErr = time.Time{}, errors.New("no key")
		ready(t, w, "mantlet is starting")
		w.run(t)
		time.Sleep(time.Second)
		expect(t, w)
		ready(t, w, "waiting for certificates; nothing comes in until then: no key")
		w.set(func() { w.secretErr, w.expiry, w.startTake = nil, expiry, time.Second })
		time.Sleep(time.Second)
		expect(t, w, "start Envoy")
		ready(t, w, "mantlet is starting")
		time.Sleep(time.Second)
		expect(t, w, "rules")
		ready(t, w, "")
		time.Sleep(time.Minute)
		expect(t, w)
	})
}

// TestRetries: what fails is tried again, ever slower, and what is there already is not made again.
func TestRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.startErr = errors.New("no room")
		w.run(t)
		expect(t, w, "start Envoy")
		time.Sleep(time.Millisecond)
		expect(t, w, "start Envoy") // the first repetition comes at once
		ready(t, w, "no room")
		time.Sleep(time.Minute)
		synctest.Wait()
		// Pauses double from 100 ms to 10 s, each between a half of that and the whole: from 6+6 to 7+10.
		if n := len(w.done()); n < 12 || n > 17 {
			t.Errorf("%d starts within a minute", n)
		}
		w.set(func() { w.startErr, w.rulesErr = nil, errors.New("no memory") })
		time.Sleep(maxPause)
		synctest.Wait()
		if did := w.done(); len(did) < 2 || did[0] != "start Envoy" || slices.Contains(did[1:], "start Envoy") {
			t.Errorf("the daemon did %q", did)
		}
		ready(t, w, "no memory")
		w.set(func() { w.rulesErr = nil })
		time.Sleep(maxPause)
		expect(t, w, "rules")
		ready(t, w, "")
	})
}

// TestEnvoyEnds: it is started again at once, and the rules are not touched. If it ends again and again, ever slower.
func TestEnvoyEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.run(t)
		expect(t, w, "start Envoy", "rules")
		w.set(func() { w.startTake = 100 * time.Millisecond })
		close(w.latest.exited)
		expect(t, w, "start Envoy")
		ready(t, w, "Envoy is down: signal: killed")
		time.Sleep(100 * time.Millisecond)
		expect(t, w)
		ready(t, w, "")
		close(w.latest.exited)
		expect(t, w)
		time.Sleep(firstPause)
		expect(t, w, "start Envoy")
		time.Sleep(healthy*maxPause + time.Second)
		expect(t, w)
		close(w.latest.exited)
		expect(t, w, "start Envoy")
		time.Sleep(time.Second)
	})
}

// stillborn starts an Envoy that has ended by the time that anyone looks at it, then good ones.
type stillborn struct {
	*world
	started bool
}

func (s *stillborn) Start(ctx context.Context, state render.State, settings schema.Envoy) (Process, error) {
	p, err := s.world.Start(ctx, state, settings)
	if !s.started {
		s.started = true
		close(s.latest.exited)
	}
	return p, err
}

// TestEnvoyEndsUnseen: that an Envoy ended before anyone looked at it makes no difference.
func TestEnvoyEndsUnseen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.Proxy = &stillborn{world: w}
		w.run(t)
		expect(t, w, "start Envoy", "rules", "start Envoy")
		ready(t, w, "")
	})
}

func TestEnvoyDoesNotAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.run(t)
		w.latest.check = func(ctx context.Context) error {
			<-ctx.Done()
			return fmt.Errorf("asking Envoy: %w", ctx.Err())
		}
		began := time.Now()
		ready(t, w, "asking Envoy: context deadline exceeded")
		if took := time.Since(began); took != checkLimit {
			t.Errorf("it took %v to say so", took)
		}
	})
}

// TestBadCertificates: they are reported once, as is their end, and don't make what works unready.
func TestBadCertificates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.expiry = time.Now().Add(10 * time.Minute)
		w.run(t)
		w.set(func() { w.secretErr = errors.New("another's key") })
		time.Sleep(time.Minute)
		ready(t, w, "")
		if n := strings.Count(w.logged(), "another's key"); n != 1 {
			t.Errorf("reported %d times", n)
		}
		w.set(func() { w.secretErr = nil })
		time.Sleep(time.Minute)
		if n := strings.Count(w.logged(), `"certificates accepted again"`); n != 1 {
			t.Errorf("their end is reported %d times", n)
		}
		w.set(func() { w.secretErr = errors.New("another's key") })
		time.Sleep(10 * time.Minute)
		ready(t, w, "certificate 1 expired at ")
		if n := strings.Count(w.logged(), "certificate 1 expired at "); n != 1 || !strings.Contains(w.logged(), `level=ERROR msg="mantlet is not ready"`) {
			t.Errorf("that they expired is reported %d times", n)
		}
		w.set(func() { w.expiry = time.Now().Add(24 * time.Hour) })
		time.Sleep(time.Minute)
		ready(t, w, "")
		if n := strings.Count(w.logged(), "peers accept the certificates again"); n != 1 {
			t.Errorf("that peers accept them again is reported %d times", n)
		}
		if n := strings.Count(w.logged(), "another's key"); n != 2 {
			t.Errorf("reported %d times", n)
		}
		expect(t, w, "start Envoy", "rules")
	})
}

// TestOffered: an Envoy is started with certificates that none has tried, and nothing comes in before it has accepted some.
func TestOffered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		good := w.expiry
		w.expiry, w.untried, w.secretErr = time.Time{}, true, errors.New("Envoy does not accept the certificates")
		w.run(t)
		if did := w.done(); !slices.Equal(did, []string{"start Envoy"}) {
			t.Errorf("did %q", did)
		}
		ready(t, w, "waiting for certificates; nothing comes in until then: Envoy does not accept the certificates")
		w.set(func() { w.expiry, w.secretErr = good, nil })
		time.Sleep(poll)
		synctest.Wait()
		if did := w.done(); !slices.Equal(did, []string{"rules"}) {
			t.Errorf("did %q", did)
		}
		ready(t, w, "")
	})
}

// TestForesight: certificates that will expire are told of while there is time, once, and until there are others.
func TestForesight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.expiry = time.Now().Add(2 * time.Hour)
		w.run(t)
		time.Sleep(time.Hour - pollMissing)
		if notes := w.Notes(); len(notes) > 0 {
			t.Errorf("it is too early for %v", notes)
		}
		time.Sleep(time.Minute)
		ready(t, w, "")
		if notes := fmt.Sprint(w.Notes()); !strings.Contains(notes, "leaf (CN=pod) expires at ") {
			t.Errorf("an hour before the end of five: %s", notes)
		}
		if n := strings.Count(w.logged(), "should be replaced"); n != 1 {
			t.Errorf("reported %d times", n)
		}
		w.set(func() { w.expiry = time.Now().Add(2 * time.Hour) })
		time.Sleep(time.Minute)
		if notes := w.Notes(); len(notes) > 0 {
			t.Errorf("replaced, and there is %v", notes)
		}
	})
}

// TestForesightOfPaths: what this workload's own path ends with comes before what others may need, and hides behind nothing.
func TestForesightOfPaths(t *testing.T) {
	now := time.Now()
	certificate := func(role, subject string, left time.Duration, needed bool) status.Certificate {
		return status.Certificate{Role: role, Subject: subject, NotBefore: now.Add(-100 * time.Hour), NotAfter: now.Add(left), Needed: needed}
	}
	const good = 100 * time.Hour
	leaf := certificate(status.RoleLeaf, "CN=pod", good, true)
	cross := certificate(status.RoleIntermediate, "CN=cross", -time.Hour, false)
	for name, c := range map[string]struct {
		given []status.Certificate
		says  string
	}{
		"nothing expires":                   {[]status.Certificate{leaf, certificate(status.RoleMeshCA, "CN=mesh", good, true)}, ""},
		"a mesh CA of before":               {[]status.Certificate{leaf, certificate(status.RoleMeshCA, "CN=old", -time.Hour, false), certificate(status.RoleMeshCA, "CN=mesh", good, true)}, ""},
		"the mesh CA of the path":           {[]status.Certificate{leaf, certificate(status.RoleMeshCA, "CN=mesh", time.Hour, true)}, "mesh CA (CN=mesh) expires at "},
		"an intermediate of no path":        {[]status.Certificate{leaf, cross}, "intermediate (CN=cross) expired at "},
		"it hides no other's end":           {[]status.Certificate{leaf, cross, certificate(status.RoleIntermediate, "CN=inter", time.Hour, true)}, "intermediate (CN=inter) expires at "},
		"an intermediate of no path, later": {[]status.Certificate{leaf, certificate(status.RoleIntermediate, "CN=cross", time.Hour, false)}, "CN=cross) expires at "},
	} {
		w := newWorld(t)
		w.warnOfExpiry(c.given, now)
		if said := fmt.Sprint(w.expiring); c.says == "" && w.expiring != nil || !strings.Contains(said, c.says) {
			t.Errorf("%s: %s; want %q", name, said, c.says)
		}
	}
}

// TestRevocation: what was let in by a mesh CA that is gone ends although no Envoy can be started.
func TestRevocation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.run(t)
		expect(t, w, "start Envoy", "rules")
		w.set(func() { w.startErr = errors.New("no room") })
		close(w.latest.exited)
		time.Sleep(time.Minute)
		synctest.Wait()
		w.done()
		w.set(func() { w.revoked = true })
		time.Sleep(pollMissing)
		synctest.Wait()
		if did := w.done(); !slices.Contains(did, "rules") {
			t.Errorf("the daemon did %q", did)
		}
		if g := w.have.generations.Default; g != 1 {
			t.Errorf("generation %d is in force", g)
		}
		w.set(func() { w.startErr = nil })
		time.Sleep(maxPause)
		expect(t, w, "start Envoy")
		ready(t, w, "")
	})
}

// TestGenerationsRunOut: mesh CAs that are taken away again and again use up the generations. What the next one could let in again, which
// Envoy has still open, ends with Envoy.
func TestGenerationsRunOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.run(t)
		expect(t, w, "start Envoy", "rules")
		for revocation := range maxRaisesOfPort {
			if did := w.done(); len(did) > 0 {
				t.Fatalf("before revocation %d, the daemon did %q", revocation+1, did)
			}
			w.set(func() { w.revoked = true })
			time.Sleep(pollMissing)
			synctest.Wait()
			if did := w.done(); len(did) == 0 || did[0] != "rules" || slices.Contains(did, "stop Envoy") != (revocation+1 == maxRaisesOfPort) {
				t.Fatalf("upon revocation %d, the daemon did %q", revocation+1, did)
			}
		}
		close(w.latest.exited)
		expect(t, w, "start Envoy")
		ready(t, w, "")
	})
}

// TestRepair: rules that somebody changed are put back, and nothing is done where they are as they should be.
func TestRepair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.run(t)
		expect(t, w, "start Envoy", "rules")
		w.changes <- "mantlet"
		expect(t, w)
		w.set(func() { w.found = errors.New("a rule is missing") })
		ready(t, w, "a rule is missing")
		w.changes <- "nft"
		expect(t, w, "mend")
		if log := w.logged(); !strings.Contains(log, "by=nft") || !strings.Contains(log, "a rule is missing") {
			t.Errorf("the log:\n%s", log)
		}
		time.Sleep(resync)
		expect(t, w, "mend") // also without an event
		last, count := w.Repairs()
		if count != 2 || len(last) != 2 || last[0].By != "nft" || last[1].By != "" || !slices.Equal(last[1].Found, []string{"a rule is missing"}) {
			t.Errorf("repairs: %d, %+v", count, last)
		}
		w.set(func() { w.rulesErr = errors.New("no memory") })
		time.Sleep(resync)
		expect(t, w, "mend") // in vain
		if last, count := w.Repairs(); count != 2 || last[2].Error != "no memory" {
			t.Errorf("repairs: %d, %+v", count, last)
		}
		w.set(func() { w.found, w.rulesErr = nil, nil })
		time.Sleep(resync)
		expect(t, w)
		ready(t, w, "")
	})
}

// TestForeignRules: what undermines the rules is warned of once, and noted while it is there.
func TestForeignRules(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.undermining = []string{"a redirect"}
		w.run(t)
		noted := func() (texts []string) {
			for _, note := range w.Notes() {
				texts = append(texts, note.Text)
			}
			return texts
		}
		for _, foreign := range [][]string{{"a redirect"}, {"a notrack", "a redirect"}, nil, {"a redirect"}} {
			w.set(func() { w.undermining = foreign })
			time.Sleep(2 * resync)
			synctest.Wait()
			if got := noted(); !slices.Equal(got, foreign) {
				t.Errorf("of %q is noted %q", foreign, got)
			}
		}
		ready(t, w, "")
		for line, want := range map[string]int{`found="a redirect"`: 2, `found="a notrack"`: 1, "undermine mantlet's any more": 1} {
			if n := strings.Count(w.logged(), line); n != want {
				t.Errorf("said %d times, want %d: %s", n, want, line)
			}
		}
	})
}

// TestChangesDoNotFlood: however fast another process changes rules, its own or mantlet's, the log grows slowly and says what it left
// out, and nothing that is gone is kept.
func TestChangesDoNotFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.run(t)
		time.Sleep(resync)
		synctest.Wait()
		const most = changesAtOnce + 100/10 + 1
		for i := range 100 {
			var foreign []string
			for j := range 100 {
				foreign = append(foreign, fmt.Sprintf("rule %d of table %d", j, i))
			}
			w.set(func() { w.undermining = foreign })
			time.Sleep(resync)
		}
		synctest.Wait()
		if n := strings.Count(w.logged(), "undermine mantlet's; they are left alone"); n < changesAtOnce || n > most {
			t.Errorf("%d lines of other tables", n)
		}
		if n := len(w.Notes()); n > maxFound+1 {
			t.Errorf("%d notes", n)
		}
		w.set(func() { w.found = errors.New("a rule") })
		for range 1000 {
			w.changes <- "nft"
		}
		synctest.Wait()
		w.set(func() { w.found = nil })
		if n := strings.Count(w.logged(), "are put back"); n < changesAtOnce || n > most {
			t.Errorf("%d lines of repairs", n)
		}
		time.Sleep(changesEvery)
		w.set(func() { w.found = errors.New("a rule") })
		w.changes <- "nft"
		synctest.Wait()
		w.set(func() { w.found = nil })
		if !strings.Contains(w.logged(), "left_out_before=9") {
			t.Error("what was left out is not told")
		}
		if last, count := w.Repairs(); len(last) != keptRepairs || count < 1001 {
			t.Errorf("%d repairs of %d are kept", len(last), count)
		}
	})
}

// TestRepairWhileOtherTablesAreRead: other software may have so many rules that they take long to read.
func TestRepairWhileOtherTablesAreRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		survey := make(chan struct{})
		w.hang = map[string]chan struct{}{"survey": survey}
		w.run(t)
		time.Sleep(2 * resync)
		synctest.Wait()
		_, before := w.Repairs()
		w.set(func() { w.found = errors.New("the table is not there") })
		w.changes <- "nft"
		synctest.Wait()
		w.set(func() { w.found = nil })
		if _, count := w.Repairs(); count == before {
			t.Error("nothing was put back")
		}
		close(survey)
	})
}

// TestFlips: a file that tightens again and again makes few Envoys and few generations. What it forbids is never let in: the rules
// close the ports, and they are served once it ends.
func TestFlips(t *testing.T) {
	const calm = "ingress: [{port: 9000, mode: tls}"
	for name, c := range map[string]struct {
		flips  []string
		envoys int
	}{
		"modes, back and forth":          {[]string{"{port: 8080, mode: tls}", "{port: 8080}"}, 1},
		"clients, back and forth":        {[]string{"{port: 8080, allow: [a]}", "{port: 8080, allow: [a, b]}"}, 8},
		"clients, both of them stricter": {[]string{"{port: 8080, allow: [a]}", "{port: 8080, allow: [b]}"}, 8},
		"modes of two ports, in turn":    {[]string{"{port: 8080, mode: tls}, {port: 8081}", "{port: 8080}, {port: 8081, mode: tls}"}, 1},
		"TLS minimum":                    {[]string{"]\ntls: {minVersion: '1.3'}\nprobes: [", "]\ntls: {minVersion: '1.2'}\nprobes: ["}, 8},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				directory := t.TempDir()
				file := filepath.Join(directory, "override.yaml")
				env, err := schema.ParseEnvironment([]string{"MANTLET_CONFIG=" + file, "MANTLET_RUNTIME_DIRECTORY=" + directory})
				if err != nil {
					t.Fatal(err)
				}
				w := newWorld(t)
				w.Environment, w.Place, w.supplied, w.certified = env, render.Place{RuntimeDirectory: directory}, true, true
				envoys, pause := 0, time.Duration(0)
				step := func(text string) {
					if err := os.WriteFile(file, []byte(calm+", "+text+"]"), 0o600); err != nil {
						t.Fatal(err)
					}
					w.readConfig()
					for pause = w.converge(t.Context()); pause == immediately; pause = w.converge(t.Context()) {
					}
					for _, did := range w.done() {
						if did == "start Envoy" {
							envoys++
						}
					}
					for _, forbidden := range tightened(w.have.enforced(), w.want.mesh) {
						if !w.have.isClosed(forbidden) {
							t.Fatalf("what is forbidden at %v is let in", forbidden)
						}
					}
					if w.have.closed != nil && !strings.Contains(w.have.rules().Text(), " : drop") {
						t.Fatal("no port is closed")
					}
				}
				for i := range 200 {
					step(c.flips[i%2])
					time.Sleep(150 * time.Millisecond)
				}
				if envoys > c.envoys || strings.Contains(w.logged(), "generations are used up") {
					t.Errorf("%d Envoys in 30 s, want %d at most:\n%s", envoys, c.envoys, w.logged())
				}
				for pause > 0 {
					time.Sleep(pause)
					step(c.flips[1])
				}
				if w.have.closed != nil || w.have.number != w.want.number || w.serving.digest != w.want.state.Digest {
					t.Errorf("what is wanted is not served in the end: %+v", w.have.closed)
				}
			})
		})
	}
}

// TestRepairWhileEnvoyStarts: nothing that takes long keeps the rules from being put back, deny-all among them.
func TestRepairWhileEnvoyStarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.startTake = time.Minute
		w.run(t)
		expect(t, w, "start Envoy")
		w.set(func() { w.found = errors.New("the table is not there") })
		w.changes <- "nft"
		expect(t, w, "mend")
		w.set(func() { w.found = nil })
	})
}

func TestStop(t *testing.T) {
	wedged := func(ctx context.Context) (int, error) {
		<-ctx.Done()
		return 0, ctx.Err()
	}
	for name, c := range map[string]struct {
		open  func(context.Context) (int, error) // instead of one connection that does not end
		abort time.Duration                      // after which a second signal comes
		took  time.Duration
	}{
		"no connection":              {func(context.Context) (int, error) { return 0, nil }, 0, 0},
		"they can't be counted":      {func(context.Context) (int, error) { return 0, errors.New("no admin interface") }, 0, 10 * time.Second},
		"the drain time is over":     {nil, 0, 10 * time.Second},
		"second signal":              {nil, 3 * time.Second, 3 * time.Second},
		"wedged, drain time is over": {wedged, 0, 10 * time.Second},
		"wedged, second signal":      {wedged, 3 * time.Second, 3 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				abort := w.run(t)
				expect(t, w, "start Envoy", "rules")
				w.open = func(context.Context) (int, error) { return 1, nil }
				if c.open != nil {
					w.open = c.open
				}
				began := time.Now()
				if c.abort > 0 {
					time.AfterFunc(c.abort, func() { close(abort) })
				}
				w.end()
				synctest.Wait()
				ready(t, w, "mantlet is stopping")
				for len(w.done()) == 0 {
					time.Sleep(drainPoll)
					synctest.Wait()
				}
				if took := time.Since(began); took < c.took || took > c.took+2*drainPoll {
					t.Errorf("Envoy was stopped after %v, want %v", took, c.took)
				}
			})
		})
	}
}

// TestStopWhileStarting: an Envoy that is starting is given up.
func TestStopWhileStarting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.startTake = time.Hour
		w.run(t)
		began := time.Now()
		w.end()
		expect(t, w, "start Envoy", "stop Envoy")
		ready(t, w, "mantlet is stopping")
		if took := time.Since(began); took > 0 {
			t.Errorf("it took %v", took)
		}
	})
}

// TestDead: a goroutine that hangs is the one thing that a restart helps against; one that waits or stops is alive. It is noticed
// once the step that hangs has taken longer than it may, and no sooner.
func TestDead(t *testing.T) {
	for what, c := range map[string]struct {
		by    func(*world) // what makes it come to the step
		says  string
		limit time.Duration
	}{
		"rules":  {func(w *world) { w.set(func() { w.revoked = true }) }, "mantlet's loop hangs: putting the rules in force", kernelLimit},
		"start":  {func(w *world) { close(w.latest.exited) }, "mantlet's start hangs: starting Envoy", startLimit},
		"mend":   {func(*world) {}, "mantlet's guard hangs: looking at the rules", kernelLimit},
		"update": {func(*world) {}, "mantlet's certificates hangs: publishing certificates", certificateLimit},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.run(t)
				time.Sleep(3 * certificateLimit)
				if err := w.Dead(t.Context()); err != nil {
					t.Errorf("while all is well: %v", err)
				}
				until := make(chan struct{})
				w.set(func() { w.hang = map[string]chan struct{}{what: until} })
				c.by(w)
				time.Sleep(c.limit - time.Second)
				if err := w.Dead(t.Context()); err != nil {
					t.Errorf("before its time: %v", err)
				}
				time.Sleep(poll)
				if err := w.Dead(t.Context()); err == nil || !strings.Contains(err.Error(), c.says) {
					t.Errorf("it hangs and is alive: %v", err)
				}
				w.set(func() { w.hang = nil })
				close(until)
				synctest.Wait()
				if err := w.Dead(t.Context()); err != nil {
					t.Errorf("after it went on: %v", err)
				}
				w.open = func(context.Context) (int, error) { return 1, nil }
				w.want.mesh.Envoy.DrainTime = time.Hour
				w.end()
				time.Sleep(time.Minute)
				if err := w.Dead(t.Context()); err != nil {
					t.Errorf("while it stops: %v", err)
				}
			})
		})
	}
}

// TestFrozen: a process that was stopped as a whole is alive once it goes on, although all that it did is overdue.
func TestFrozen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.run(t)
		until := make(chan struct{})
		w.set(func() { w.hang = map[string]chan struct{}{"mend": until} })
		time.Sleep(certificateLimit)
		time.AfterFunc(resumeGrace/2, func() { close(until) })
		if err := w.Dead(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// hangAtStart runs the daemon until an Envoy starts for one that ended. It gets live once the channel is closed.
func (w *world) hangAtStart(t *testing.T) (until chan struct{}) {
	t.Helper()
	w.run(t)
	expect(t, w, "start Envoy", "rules")
	until = make(chan struct{})
	w.set(func() { w.hang = map[string]chan struct{}{"start": until} })
	close(w.latest.exited)
	expect(t, w, "start Envoy")
	return until
}

// TestStartHangs: an Envoy that does not get live holds up neither certificates nor what a mesh CA's end means for connections.
func TestStartHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		until := w.hangAtStart(t)
		w.set(func() { w.revoked = true })
		time.Sleep(pollMissing)
		expect(t, w, "rules")
		if g := w.have.generations.Default; g != 1 {
			t.Errorf("generation %d is in force", g)
		}
		// The Envoy that starts may have read the mesh CA that is gone: once it is live, the certificates are looked at again, and
		// what it let in by then ends.
		w.set(func() { w.revoked = true })
		close(until)
		expect(t, w, "rules")
		if g := w.have.generations.Default; g != 2 {
			t.Errorf("generation %d is in force", g)
		}
	})
}

// TestOfferedMeanwhile: a configuration that comes while an Envoy starts for the one before it is taken once that start is over.
func TestOfferedMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		until := w.hangAtStart(t)
		env, err := schema.ParseEnvironment([]string{"EDG_INGRESS_PROXY_CONFIG=web#8080#false"})
		if err != nil {
			t.Fatal(err)
		}
		next, err := w.render(env.Base(), nil)
		if err != nil {
			t.Fatal(err)
		}
		w.locked(func() { w.offered = next })
		notify(w.notes.changed)
		expect(t, w)
		close(until)
		expect(t, w, "rules")
	})
}

// TestStatusCounts: what the daemon does is counted, by kind and result, and the last thing that failed is kept.
func TestStatusCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.startErr = errors.New("no room")
		w.run(t)
		time.Sleep(time.Millisecond)
		synctest.Wait()
		began := time.Now()
		s := w.Status(t.Context())
		if s.Ready || s.Envoys != (status.Envoys{Failed: 2}) || s.LastError == nil || s.LastError.Place != status.CheckEnvoy || !strings.Contains(s.LastError.Text, "no room") ||
			!s.LastError.Time.Equal(began) || !slices.Contains(s.Problems, "envoy: starting Envoy: no room") || s.Applied != nil || s.Desired.Generation != 1 {
			t.Errorf("with an Envoy that does not start: %+v", s)
		}
		w.set(func() { w.startErr, w.startTake = nil, time.Second })
		time.Sleep(maxPause)
		synctest.Wait()
		w.set(func() { w.found = errors.New("a rule is missing") })
		w.changes <- "iptables"
		synctest.Wait()
		w.set(func() { w.found = nil })
		close(w.latest.exited)
		time.Sleep(time.Minute)
		synctest.Wait()
		s = w.Status(t.Context())
		if !s.Ready || len(s.Problems) > 0 || s.Envoys != (status.Envoys{Started: 2, Failed: s.Envoys.Failed, Ended: 1, Recovered: 1}) || s.Applied.Generation != 1 || s.Repaired != 1 || s.Repairs[0].By != "iptables" || !slices.Equal(s.Repairs[0].Found, []string{"a rule is missing"}) {
			t.Errorf("after it was mended: %+v", s)
		}
		for _, a := range s.Applies {
			switch {
			case a.Kind == status.ApplyStart && (a.Succeeded != 2 || a.Failed != s.Envoys.Failed || a.Seconds != 2):
				t.Errorf("starts: %+v", a)
			case a.Kind == status.ApplyRules && (a.Succeeded != 1 || a.Failed != 0 || a.Within[0] != 1):
				t.Errorf("rules: %+v", a)
			case a.Kind == status.ApplyHotRestart && a.Succeeded+a.Failed > 0:
				t.Errorf("hot restarts: %+v", a)
			}
		}
	})
}

// TestFlood: however often strangers ask, mantlet and Envoy are asked a few times a second. Over the unix socket it is tried
// each time.
func TestFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.run(t)
		var tried atomic.Int64
		w.latest.check = func(context.Context) error {
			tried.Add(1)
			time.Sleep(time.Millisecond)
			return nil
		}
		server := status.Server{Source: w}
		ask := func(local net.Addr, times int) int {
			before := tried.Load()
			var all sync.WaitGroup
			for i := range times {
				all.Go(func() {
					time.Sleep(time.Duration(i) * 10 * time.Millisecond)
					request := httptest.NewRequest(http.MethodGet, "/readyz", nil)
					request = request.WithContext(context.WithValue(t.Context(), http.LocalAddrContextKey, local))
					recorder := httptest.NewRecorder()
					server.Handler().ServeHTTP(recorder, request)
					if recorder.Code != http.StatusOK {
						t.Errorf("%d: %s", recorder.Code, recorder.Body)
					}
				})
			}
			all.Wait()
			return int(tried.Load() - before)
		}
		if n := ask(&net.TCPAddr{}, 100); n != 5 { // in a second
			t.Errorf("strangers made it try %d times", n)
		}
		if n := ask(&net.UnixAddr{}, 100); n != 100 {
			t.Errorf("over the socket it tried %d times", n)
		}
	})
}

func TestBackoff(t *testing.T) {
	var b backoff
	now := time.Now()
	for i, most := range []time.Duration{
		0, firstPause, 2 * firstPause, 4 * firstPause, 8 * firstPause, 16 * firstPause, 32 * firstPause, 64 * firstPause, maxPause, maxPause,
	} {
		got := b.next(now)
		if got < most/2 || got > most {
			t.Errorf("pause %d is %v, want from %v to %v", i, got, most/2, most)
		}
		now = now.Add(got)
	}
	if got := b.next(now.Add(healthy*maxPause + 1)); got != 0 {
		t.Errorf("after it went well the pause is %v", got)
	}
}

// TestLastGood: a mantlet that starts beside a bad override file goes on with the last good one, unless the environment
// is another.
func TestLastGood(t *testing.T) {
	directory := t.TempDir()
	file := filepath.Join(directory, "override.yaml")
	daemon := func(environ ...string) *Daemon {
		env, err := schema.ParseEnvironment(append(environ, "MANTLET_CONFIG="+file, "MANTLET_RUNTIME_DIRECTORY="+directory))
		if err != nil {
			t.Fatal(err)
		}
		return &Daemon{Environment: env, Place: render.Place{RuntimeDirectory: directory}, Log: slog.New(slog.DiscardHandler)}
	}
	read := func(d *Daemon) {
		d.readConfig()
		d.takeOffered()
		d.store()
	}
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("ingress: [{port: 8080, mode: tls}]")
	first := daemon()
	read(first)
	if first.want == nil || first.badConfig != nil {
		t.Fatalf("a good file is not taken: %v", first.badConfig)
	}
	before := first.want.sourceDigest
	parsed := first.configuring.parsed
	if read(first); first.configuring.parsed != parsed {
		t.Error("the same bytes are parsed again")
	}
	write("ingress: [{port: 8080, mode: tls}] # the same")
	read(first)
	if first.want.sourceDigest == before || first.want.number != 1 {
		t.Error("a file that means the same is not told to be the source, or for another configuration")
	}
	write("ingress: [{port: 8080, mode: tsl}]")
	read(first)
	if first.badConfig == nil || first.want.mesh.Ingress[0].Mode != schema.ModeTLS {
		t.Errorf("after a bad file: %v, %v", first.badConfig, first.want.mesh.Ingress)
	}
	second := daemon()
	read(second)
	if second.want == nil || second.want.state.Digest != first.want.state.Digest || second.badConfig == nil {
		t.Errorf("beside a bad file the last good one is not taken, or the bad one is not told: %v", second.badConfig)
	}
	other := daemon("MANTLET_TLS_MIN_VERSION=1.3")
	read(other)
	if other.want != nil {
		t.Error("a file that was merged with another environment is taken")
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	third := daemon()
	read(third)
	if third.want == nil || third.want.mesh.Ingress[0].Mode != schema.ModeTLS {
		t.Error("beside a missing file the last good one is not taken")
	}
}

// TestLinkIsNotTold: neither log nor status quote what a link out of the volume of the override file leads to.
func TestLinkIsNotTold(t *testing.T) {
	directory := t.TempDir()
	volume, secret := filepath.Join(directory, "volume"), filepath.Join(directory, "secret")
	err := errors.Join(os.Mkdir(volume, 0o700), os.WriteFile(secret, []byte("password: hunter2"), 0o600), os.Symlink(secret, filepath.Join(volume, "file")))
	if err != nil {
		t.Fatal(err)
	}
	env, err := schema.ParseEnvironment([]string{"MANTLET_CONFIG=" + filepath.Join(volume, "file"), "MANTLET_RUNTIME_DIRECTORY=" + directory})
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	d := &Daemon{Environment: env, Place: render.Place{RuntimeDirectory: directory}, Log: slog.New(slog.NewJSONHandler(&log, nil))}
	d.readConfig()
	for _, said := range []string{log.String(), fmt.Sprint(d.badConfig)} {
		if !strings.Contains(said, "withheld") || strings.Contains(said, "hunter2") || strings.Contains(said, "password") {
			t.Errorf("it says %s", said)
		}
	}
}

// TestNext: Envoy changes before the rules, but for a port that comes to ask for certificates while an older TLS is let in.
func TestNext(t *testing.T) {
	directory := t.TempDir()
	file := filepath.Join(directory, "override.yaml")
	env, err := schema.ParseEnvironment([]string{"MANTLET_CONFIG=" + file, "MANTLET_RUNTIME_DIRECTORY=" + directory})
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t)
	w.Environment, w.Place, w.supplied, w.certified = env, render.Place{RuntimeDirectory: directory}, true, true
	for _, step := range []struct {
		text string
		does []string
	}{
		{"ingress: [{port: 8080, mode: tls}]\ntls: {minVersion: '1.3'}", []string{"start Envoy", "rules"}},
		{"ingress: [{port: 8080, mode: mtls}]\ntls: {minVersion: '1.2'}", []string{"rules", "start Envoy"}},
		{"ingress: [{port: 8080, mode: tls}]\ntls: {minVersion: '1.3'}", []string{"start Envoy", "rules"}},
		{"ingress: [{port: 8080, mode: mtls, allow: [client]}]", []string{"start Envoy", "rules", "start Envoy"}},
		{"ingress: [{port: 8080, mode: tls}]", []string{"start Envoy", "rules"}},
		{"ingress: [{port: 8080, mode: mtls}]", []string{"rules"}},
	} {
		if err := os.WriteFile(file, []byte(step.text), 0o600); err != nil {
			t.Fatal(err)
		}
		w.readConfig()
		for w.converge(t.Context()) > 0 {
			w.serving.drained = time.Time{}
		}
		if w.have.state.Digest != w.want.state.Digest || w.have.number != w.want.number || w.serving.digest != w.want.state.Digest {
			t.Errorf("%s: what is in force is not what is wanted", step.text)
		}
		if did := w.done(); !slices.Equal(did, step.does) {
			t.Errorf("%s: it did %q, want %q", step.text, did, step.does)
		}
	}
}

// TestWaits: while a change waits, the status says for what and until when, and the log says so once.
func TestWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		directory := t.TempDir()
		file := filepath.Join(directory, "override.yaml")
		env, err := schema.ParseEnvironment([]string{"MANTLET_CONFIG=" + file, "MANTLET_RUNTIME_DIRECTORY=" + directory})
		if err != nil {
			t.Fatal(err)
		}
		w := newWorld(t)
		w.Environment, w.Place, w.supplied, w.certified = env, render.Place{RuntimeDirectory: directory}, true, true
		step := func(text string) time.Duration {
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			w.readConfig()
			return w.converge(t.Context())
		}
		check := func(when, code string, wait time.Duration) {
			t.Helper()
			said := w.Status(t.Context()).Waits
			switch {
			case code == "" && said != nil:
				t.Errorf("%s: it waits for %+v", when, said)
			case code != "" && (said == nil || said.Code != code || said.Reason == "" || wait != 0 && !said.Until.Equal(time.Now().Add(wait))):
				t.Errorf("%s: it waits for %+v, want %s for %s", when, said, code, wait)
			}
		}
		const drain = 10 * time.Second
		const settings = "envoy: {drainTime: 10s, parentShutdownTime: 15s, concurrency: %d}"
		step(fmt.Sprintf(settings, 1))
		step(fmt.Sprintf(settings, 2))
		check("a hot restart that cuts nothing", "", 0)
		time.Sleep(time.Second)
		for concurrency := range 3 {
			if wait := step(fmt.Sprintf(settings, 3+concurrency)); wait != drain-time.Second {
				t.Errorf("it waits %s", wait)
			}
			check("the next one", status.WaitDrain, drain-time.Second)
		}
		if n := strings.Count(w.logged(), "a change waits"); n != 1 {
			t.Errorf("the log says %d times that a change waits:\n%s", n, w.logged())
		}
		step(fmt.Sprintf(settings, 2))
		check("what was in force is wanted again", "", 0)
		step(fmt.Sprintf(settings, 3))
		time.Sleep(drain)
		w.set(func() { w.startErr = errors.New("no memory") })
		w.converge(t.Context())
		w.converge(t.Context())
		check("an Envoy that does not start", status.WaitBackoff, 0)
		w.set(func() { w.startErr = nil })
		time.Sleep(maxPause)
		w.converge(t.Context())
		check("it starts", "", 0)
		for i := range 30 {
			step(fmt.Sprintf(settings, 3) + []string{"\ningress: [{port: 8080, mode: tls}]", "\ningress: [{port: 8080}]"}[i%2])
			if wait := w.Status(t.Context()).Waits; wait != nil && wait.Code == status.WaitTooOften {
				return
			}
		}
		t.Error("changes that forbid something come too often, and none waits")
	})
}
