package envoy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"mantlet/internal/bind"
	"mantlet/internal/rundir"
	"mantlet/render"
)

// TestFailedEpoch: whatever keeps an epoch from being live, the one that serves goes on with its connections, and the next
// start has the same number.
func TestFailedEpoch(t *testing.T) {
	s := newStage(t)
	hung := s.hung()
	taken, err := net.Listen("tcp", "127.0.0.1:15096")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	secret, fifo := rundir.SecretFile(render.MeshCASecret), filepath.Join(s.RuntimeDirectory, "test-fifo")
	if err := errors.Join(syscall.Mkfifo(fifo, 0o600), os.Chmod(fifo, 0o644)); err != nil {
		t.Fatal(err)
	}
	serving := s.start()
	for name, c := range map[string]struct {
		script    string // in the place of Envoy, except when it validates
		state     render.State
		interfere func(cancel func()) // while it starts
		reason    string              // of Start
		says      string              // in the log
	}{
		"waits for a name": {state: hung, reason: "it is not live after 2s: context deadline exceeded: Envoy is PRE_INITIALIZING"},
		"waits for a file": {
			script: "sed s/" + secret + `/test-fifo/g "$2" >$DIRECTORY/test-other.json; shift 2; set -- --config-path $DIRECTORY/test-other.json "$@"`,
			state:  s.state, reason: "it is not live after 2s",
		},
		"is given up": {state: hung, reason: "context canceled", interfere: func(cancel func()) {
			s.lost(serving)
			cancel()
		}},
		"is killed": {state: hung, reason: "signal: killed", interfere: func(func()) {
			s.lost(serving)
			if err := syscall.Kill(s.child(serving.Epoch+1), syscall.SIGKILL); err != nil {
				t.Error(err)
			}
		}},
		"can't bind": {
			script: `sed s/15098/15096/g "$2" >$DIRECTORY/test-other.json; shift 2; set -- --config-path $DIRECTORY/test-other.json "$@"`,
			state:  s.state, reason: "cannot bind '127.0.0.1:15096'",
		},
		"is refused": {
			script: fmt.Sprintf(`printf '\001' | dd of=/dev/shm/envoy_shared_memory_%d bs=1 seek=%d conv=notrunc status=none`, serving.base.id*10, flagsOffset),
			state:  s.state, reason: "exit status 1", says: "previous envoy process is still initializing",
		},
	} {
		t.Run(name, func(t *testing.T) {
			s.t = t
			old := s.connect()
			s.since()
			path := s.Path
			s.liveLimit = limit
			if strings.HasPrefix(name, "waits") {
				s.liveLimit = 2 * time.Second
			}
			if c.script != "" {
				script(t, s.Runner, `if [ "$1" = --config-path ]; then `+c.script+"; fi\n"+`exec "$ENVOY" "$@"`)
			}
			if c.interfere == nil {
				c.interfere = func(func()) {}
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			s.interfere(ctx, c.state, func() { c.interfere(cancel) }, c.reason)
			s.Path = path
			s.liveLimit = 0
			if !strings.Contains(s.since(), c.says) {
				t.Errorf("Envoy does not say %q", c.says)
			}
			if s.serving() != serving {
				t.Errorf("epochs %v run: the one after %d failed", s.epochs(), serving.Epoch)
			}
			if flags := flags(t, serving.base); flags&flagsInitializing != 0 {
				t.Errorf("the flag is still set: %x", flags)
			}
			old.talk()
			s.connect()

			next := s.start()
			if next.Epoch != serving.Epoch+1 {
				t.Errorf("epoch %d after %d", next.Epoch, serving.Epoch)
			}
			s.run(serving.Epoch, next.Epoch)
			old.talk()
			serving = next
		})
	}
}

// TestRefusedEpoch: what can be known beforehand does not cost the one that serves its admin interface.
func TestRefusedEpoch(t *testing.T) {
	s := newStage(t)
	serving := s.start()
	taken, err := net.Listen("tcp", "127.0.0.1:15096")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	bad := s.state
	bad.Bootstrap = proto.CloneOf(bad.Bootstrap)
	clusters := &bad.Bootstrap.StaticResources.Clusters
	*clusters = append(*clusters, (*clusters)[0])
	busy, _ := state(t, s.Runner, "EDG_EGRESS_PROXY_CONFIG=busy#127.0.0.1:15096#192.0.2.1:1")
	over, cancel := context.WithCancel(t.Context())
	cancel()
	old := s.connect()
	s.refuses(t.Context(), bad, "duplicate cluster")
	s.refuses(t.Context(), busy, fmt.Sprintf("127.0.0.1:15096 is held by pid %d (", os.Getpid()))
	s.refuses(over, s.state, "context canceled")
	s.serves(serving)
	s.run(0)
	old.talk()
	if strings.Contains(s.log.String(), "shutting down admin") {
		t.Error("an epoch was started")
	}
}

// TestServingEpochDies: the one that drains goes on draining, and the next start has the number of the dead.
func TestServingEpochDies(t *testing.T) {
	s := newStage(t)
	draining := s.start()
	old := s.connect()
	for range 2 {
		serving := s.start()
		lost := s.connect()
		kill(serving)
		lost.awaitCut()
		if conn, err := net.Dial("tcp", service); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%v, %v: the one that drains should not listen", conn, err)
		}
		s.run(draining.Epoch)
		old.talk()
		began := time.Now()
		again := s.start()
		t.Logf("back after %v", time.Since(began))
		if again.Epoch != serving.Epoch {
			t.Errorf("epoch %d after %d died", again.Epoch, serving.Epoch)
		}
		old.talk()
		draining, old = again, s.connect()
	}
}

// TestDrainingEpochDies: the one that serves tells it to end when its time is over, and aborts where it finds nobody.
func TestDrainingEpochDies(t *testing.T) {
	for name, replaced := range map[string]bool{"replaced": true, "nobody there": false} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t)
			s.settings.DrainTime, s.settings.ParentShutdownTime = time.Second, 2*time.Second
			s.settings.LogLevel = "info"
			s.state.Bootstrap.StatsFlushInterval = durationpb.New(100 * time.Millisecond) // each time Envoy would ask a parent for its own
			draining := s.start()
			lost := s.connect()
			serving := s.start()
			old := s.connect()
			kill(draining)
			lost.awaitCut()
			until(t, "its place is taken", func() bool { return checkListening(s.parentSocket(draining)) == nil })
			if !replaced {
				if err := os.Remove(s.parentSocket(draining)); err != nil {
					t.Fatal(err)
				}
			}
			until(t, "it is told to end", func() bool { return strings.Contains(s.log.String(), "shutting down parent after drain") })
			if !replaced {
				<-serving.exited
				if err := serving.Err(); !strings.Contains(err.Error(), "signal: aborted") || !strings.Contains(err.Error(), "sendmsg() failed") {
					t.Errorf("%v; want what it said before its backtrace", err)
				}
				return
			}
			s.serves(serving)
			old.talk()
			s.run(1)
			s.start()
			old.talk()
			s.run(1, 2)
		})
	}
}

// TestStartingEpochLosesParent: an Envoy that takes over from a dead one would wait for its answers for ever.
func TestStartingEpochLosesParent(t *testing.T) {
	s := newStage(t)
	hung := s.hung()
	serving := s.start()
	s.interfere(t.Context(), hung, func() {
		s.lost(serving)
		kill(serving)
	}, "it lost its parent: Envoy epoch 0 exited: signal: killed")
	s.run()
	if again := s.start(); again.Epoch != 0 {
		t.Errorf("epoch %d after none", again.Epoch)
	}
}

// TestAllEpochsDie: where none is left it begins anew, whatever is in the places of sockets and memory.
func TestAllEpochsDie(t *testing.T) {
	s := newStage(t)
	draining, serving := s.start(), s.start()
	draining.Kill()
	serving.Kill()
	<-draining.exited
	<-serving.exited
	s.run()
	again := s.start()
	if again.Epoch != 0 {
		t.Errorf("epoch %d after none", again.Epoch)
	}
	s.run(0)

	kill(again)
	place := s.parentSocket(again)
	// What an Envoy before left behind is its user's.
	if err := s.spawner.do(func() error {
		return errors.Join(os.WriteFile(again.base.path(), []byte("of no use"), 0o600), os.Remove(place), os.WriteFile(place, nil, 0o400))
	}); err != nil {
		t.Fatal(err)
	}
	again = s.start()
	kill(again)
	var foreign net.Conn
	if err := s.spawner.do(func() error {
		err := os.Remove(place)
		if err == nil {
			foreign, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: place, Net: "unixgram"})
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	s.start()
	s.start()
	s.run(0, 1)
}

// TestConnections: they are counted in each epoch, also where one can't be asked any more.
func TestConnections(t *testing.T) {
	s := newStage(t)
	counted := func(want int) {
		t.Helper()
		var got int
		until(t, fmt.Sprintf("%d connections are open", want), func() (is bool) {
			var err error
			got, err = s.Connections(t.Context())
			return err == nil && got == want
		})
	}
	s.start() // each leaves one open
	counted(1)
	old := s.connect()
	counted(2)
	hung := s.hung()
	s.liveLimit = 2 * time.Second
	s.refuses(t.Context(), hung, "it is not live after 2s")
	counted(2) // in its child's place, from here on
	_ = s.connect().Close()
	other := s.connect()
	counted(3)
	s.liveLimit = 0
	s.start()
	counted(4)
	third := s.connect()
	counted(5)
	for i, c := range []connection{other, third, old} {
		_ = c.Close()
		counted(4 - i)
	}
	s.Stop()
	counted(0)
}

// TestParentHangs: a parent that never answers can't be relieved; it is replaced, once that is known.
func TestParentHangs(t *testing.T) {
	s := newStage(t)
	serving := s.start()
	old := s.connect()
	resume := hang(t, serving)
	s.liveLimit = 2 * time.Second
	s.refuses(t.Context(), s.state, "it is not live after 2s")
	old.talk() // by a thread of its own, which goes on
	if s.serving() != serving {
		t.Errorf("epochs %v run", s.epochs())
	}
	s.liveLimit = 0
	plain := s.start()
	old.awaitCut()
	if plain.Epoch != 0 || plain.base == serving.base {
		t.Errorf("epoch %d of base %d after %d of %d", plain.Epoch, plain.base.id, serving.Epoch, serving.base.id)
	}
	if said := s.since(); !strings.Contains(said, "a plain restart of Envoy") || !strings.Contains(said, "does not answer") {
		t.Error("the log does not say why there was a plain restart")
	}
	s.run(0)
	left, err := filepath.Glob(filepath.Join(s.RuntimeDirectory, fmt.Sprintf("epoch_*_%d?", serving.base.id)))
	if _, gone := os.Stat(serving.base.path()); err != nil || len(left) > 0 || !errors.Is(gone, os.ErrNotExist) {
		t.Errorf("of the base before this one are left %v and shared memory: %v, %v", left, gone, err)
	}
	resume()

	// One that hung for a while would give the next the answers that were due to the one before it.
	serving = s.start()
	old = s.connect()
	resume = hang(t, serving)
	s.liveLimit = 2 * time.Second
	s.refuses(t.Context(), s.state, "it is not live after 2s")
	resume()
	s.liveLimit = 0
	s.start()
	old.awaitCut()
	s.run(0)
}

// listeningSockets returns how many of a process's sockets listen.
func listeningSockets(pid int) (n int, err error) {
	all, err := bind.Listeners()
	if err != nil {
		return 0, err
	}
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, file := range files {
		if target, err := os.Readlink(file); err == nil && slices.ContainsFunc(all, func(l bind.Listener) bool { return target == "socket:["+l.Inode+"]" }) {
			n++
		}
	}
	return n, err
}

// TestParentGoesOn: one that was relieved and does not stop accepting would let in what the next state forbids. It is ended.
func TestParentGoesOn(t *testing.T) {
	s := newStage(t)
	serving := s.start()
	count, err := listeningSockets(serving.PID())
	if err != nil || count == 0 {
		t.Fatalf("%d, %v: it listens", count, err)
	}
	ingress := count - s.settings.Concurrency // the other state has another egress entry
	old := s.connect()
	s.liveLimit = 5 * time.Second
	hung, answer := s.hungUntil()
	started := make(chan *Process)
	go func() {
		p, err := s.Start(t.Context(), hung, s.settings)
		if err != nil {
			t.Error(err)
		}
		started <- p
	}()
	s.lost(serving)
	next := s.child(serving.Epoch + 1)
	until(t, "it has all sockets", func() bool {
		count, err := listeningSockets(next)
		_, last := os.Lstat(render.TrialSocket(s.RuntimeDirectory, serving.Epoch+1)) // its listeners but the last are there
		return err == nil && last == nil && count >= ingress && !asks(t, next)
	})
	hang(t, serving)
	answer()
	p := <-started
	if p == nil {
		t.FailNow()
	}
	if serving.alive() {
		t.Error("it runs on")
	}
	old.awaitCut()
	if said := s.since(); !strings.Contains(said, "still accepts connections") {
		t.Error("the log does not say so")
	}
	s.run(1)
}

// TestAnswersToTheDead: what a parent answers to a child that was killed does not reach the next one, which would take the
// socket of one listener for that of another.
func TestAnswersToTheDead(t *testing.T) {
	s := newStage(t)
	serving := s.start()
	for range 3 {
		old := s.connect()
		resume := hang(t, serving)
		s.interfere(t.Context(), s.state, func() {
			pid := s.child(serving.Epoch + 1)
			until(t, "it waits for an answer", func() bool { return asks(t, pid) })
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Error(err)
			}
			until(t, "it is dead", func() bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) })
			resume()
		}, "signal: killed")
		next := s.start()
		if next.Epoch != serving.Epoch+1 {
			t.Errorf("epoch %d after %d", next.Epoch, serving.Epoch)
		}
		old.talk()
		serving = next
	}
}

// asks reports whether a process waits for a datagram.
func asks(t testing.TB, pid int) bool {
	t.Helper()
	call, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", pid))
	if errors.Is(err, os.ErrNotExist) {
		return false
	}
	if err != nil {
		t.Fatal(err)
	}
	return strings.HasPrefix(string(call), strconv.Itoa(unix.SYS_RECVMSG)+" ")
}

// hang stops an Envoy's main thread alone, as a deadlock would, until resume is called or the test ends.
func hang(t testing.TB, p *Process) (resume func()) {
	t.Helper()
	stopped, resumed, ended := make(chan error), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // the tracer; its end would let the tracee go
		err := unix.PtraceSeize(p.PID())
		if err == nil {
			err = unix.PtraceInterrupt(p.PID())
		}
		if err == nil {
			_, err = unix.Wait4(p.PID(), nil, unix.WALL|unix.WUNTRACED, nil)
		}
		stopped <- err
		<-resumed
		_ = unix.PtraceDetach(p.PID()) // it may have been killed
	}()
	resume = sync.OnceFunc(func() { close(resumed); <-ended })
	t.Cleanup(resume)
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
	return resume
}

// TestThirdEpoch: it ends the first, whose connections are cut, and no other.
func TestThirdEpoch(t *testing.T) {
	s := newStage(t)
	first := s.start()
	cut := s.connect()
	second := s.start()
	old := s.connect()
	cut.talk()
	s.run(0, 1)
	third := s.start()
	cut.awaitCut()
	<-first.exited
	if err := first.Err(); !strings.Contains(err.Error(), "exit status 0") {
		t.Error(err)
	}
	s.run(1, 2)
	old.talk()

	// One that can't end makes room all the same.
	if err := syscall.Kill(second.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	fourth := s.start()
	s.run(1, 2, 3)
	fifth := s.start()
	s.run(3, 4)
	s.Stop()
	if err := second.Err(); !strings.Contains(err.Error(), "signal: killed") {
		t.Error(err)
	}
	for _, p := range []*Process{third, fourth, fifth} {
		// The message and the signal to end may come both, and the second ends Envoy while it ends.
		if err := p.Err().Error(); !strings.Contains(err, "exit status 0") && !strings.Contains(err, "signal: terminated") {
			t.Errorf("epoch %d: %v", p.Epoch, err)
		}
	}
}

// TestParentShutdown: connections of an old epoch live until then, and no longer.
func TestParentShutdown(t *testing.T) {
	s := newStage(t)
	s.settings.DrainTime, s.settings.ParentShutdownTime = time.Second, 2*time.Second
	first := s.start()
	old := s.connect()
	began := time.Now()
	s.start()
	old.awaitCut()
	if took := time.Since(began); took < s.settings.ParentShutdownTime {
		t.Errorf("a connection was cut after %v", took)
	}
	<-first.exited
	if err := first.Err(); !strings.Contains(err.Error(), "exit status 0") {
		t.Error(err)
	}
	s.run(1)
}

// TestPlainRestart takes the place of a hot one where that is not possible, as Start finds out beforehand or by failing once.
func TestPlainRestart(t *testing.T) {
	s := newStage(t)
	s.start()
	for name, c := range map[string]struct {
		spoil func(p *Process) error
		fails bool
	}{
		"no memory":       {func(p *Process) error { return os.Remove(p.base.path()) }, false},
		"another version": {func(p *Process) error { return edit(p.base.path(), versionOffset, 12) }, true},
		"another size":    {func(p *Process) error { return edit(p.base.path(), 0, 112) }, true},
		"no socket":       {func(p *Process) error { return os.Remove(s.parentSocket(p)) }, false},
		"a file in the socket's place": {func(p *Process) error {
			return s.spawner.do(func() error { // a file of its own an Envoy can remove
				return errors.Join(os.Remove(s.parentSocket(p)), os.WriteFile(s.parentSocket(p), nil, 0o600))
			})
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			s.t = t
			serving := s.start() // beside one that drains
			old := s.connect()
			if err := c.spoil(serving); err != nil {
				t.Fatal(err)
			}
			if c.fails {
				s.refuses(t.Context(), s.state, fmt.Sprintf("Envoy epoch %d exited", serving.Epoch+1))
				s.serves(serving)
			}
			old.talk()
			if strings.Contains(s.since(), "a plain restart of Envoy") {
				t.Error("a plain restart came early")
			}
			load := s.load(2)
			plain := s.start()
			old.awaitCut()
			load.settle()
			done, failures := load.end()
			t.Logf("of %d connections %d failed", done, len(failures))
			for _, err := range failures {
				if errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("nobody listened for a while: %v", err)
				}
			}
			if plain.Epoch != 0 || plain.base.id == serving.base.id {
				t.Errorf("epoch %d of base %d after %d of %d", plain.Epoch, plain.base.id, serving.Epoch, serving.base.id)
			}
			if !strings.Contains(s.since(), "a plain restart of Envoy") {
				t.Error("the log does not say so")
			}
			s.run(0)
			if err := serving.Err(); !strings.Contains(err.Error(), "exit status 0") {
				t.Error(err)
			}
		})
	}
}

// TestManyRestarts: not one new connection fails, and those of an epoch live until the one after the next.
func TestManyRestarts(t *testing.T) {
	s := newStage(t)
	s.start()
	load := s.load(1)
	conns := []connection{s.connect()}
	const restarts = 30
	for i := range restarts {
		if p := s.start(); p.Epoch != i+1 {
			t.Errorf("epoch %d is the restart %d", p.Epoch, i+1)
		}
		conns[i].talk()
		if i > 0 {
			conns[i-1].awaitCut()
		}
		conns = append(conns, s.connect())
		load.settle()
	}
	done, failures := load.end()
	t.Logf("%d connections over %d restarts", done, restarts)
	if len(failures) > 0 {
		t.Errorf("of %d connections %d failed, as %v", done, len(failures), failures[0])
	}
	for _, pattern := range []string{"admin-*", "bootstrap-*"} {
		files, err := filepath.Glob(filepath.Join(s.RuntimeDirectory, pattern))
		if err != nil || len(files) > 3 {
			t.Errorf("%v, %v: they pile up", files, err)
		}
	}
}
