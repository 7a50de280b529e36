package reconcile

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"mantlet/render"
	"mantlet/schema"
)

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
