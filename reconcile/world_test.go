package reconcile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
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
	replaced    int                      // how often rules were put in force as if no connection were open
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

func (p *process) Exited() <-chan struct{} { return p.exited }

func (p *process) Err() error { return errors.New("signal: killed") }

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

func (w *world) Replace(r render.Ruleset) error {
	w.set(func() { w.replaced++ })
	return w.Exchange(r)
}

func (w *world) Exchange(render.Ruleset) error {
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

func (w *world) Outbound(func(netip.AddrPort) bool) (int, error) { return 0, nil }

func (w *world) EndOutbound(func(netip.AddrPort) bool, bool) (map[netip.AddrPort]int, error) {
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

func (w *world) Open() (map[sockdiag.Socket]render.Mark, map[sockdiag.Socket]sockdiag.Cookie, error) {
	return nil, nil, nil
}

func (w *world) Move(map[sockdiag.Socket]render.Mark) ([]sockdiag.Socket, error) { return nil, nil }

func (w *world) Peers() (map[sockdiag.Socket]peers.Connection, error) { return nil, nil }

func (w *world) Trust() peers.Trust { return peers.Trust{} }

func (w *world) End(func(sockdiag.Socket, render.Mark) status.EndReason,
	func(map[sockdiag.Socket]status.EndReason, map[sockdiag.Socket]sockdiag.Details) []sockdiag.Socket,
) (map[sockdiag.Socket]status.EndReason, error) {
	return map[sockdiag.Socket]status.EndReason{}, nil
}

func (w *world) EndKnown([]sockdiag.Exact) ([]sockdiag.Socket, error) { return nil, nil }

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

// configured returns a world that is configured by an override file, with what writes one and reads it.
func configured(t *testing.T) (w *world, write func(text string)) {
	t.Helper()
	directory := t.TempDir()
	file := filepath.Join(directory, "override.yaml")
	env, err := schema.ParseEnvironment([]string{"MANTLET_CONFIG=" + file, "MANTLET_RUNTIME_DIRECTORY=" + directory})
	if err != nil {
		t.Fatal(err)
	}
	w = newWorld(t)
	w.Environment, w.Place, w.supplied, w.certified = env, render.Place{RuntimeDirectory: directory}, true, true
	return w, func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		w.readConfig()
	}
}
