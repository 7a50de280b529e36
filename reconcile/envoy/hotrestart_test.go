package envoy

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
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
	"mantlet/internal/sandbox"
	"mantlet/render"
	"mantlet/schema"
)

// service is where the stage's egress entry listens.
const service = "127.0.0.1:15098"

// stage is a Runner and what goes through its Envoys: connections to service end at an echo server of the mesh.
type stage struct {
	*Runner
	t        testing.TB
	log      *journal
	read     int // of the log
	state    render.State
	settings schema.Envoy
}

// newStage makes a stage. At its end the Envoys are stopped, and nothing of them may be left.
func newStage(t testing.TB) *stage {
	before := descriptors(t)
	t.Cleanup(func() {
		until(t, "all descriptors are closed", func() bool { return descriptors(t) <= before })
	})
	r, log := runner(t)
	s := &stage{Runner: r, t: t, log: log}
	identity := identity(t, r)
	upstream, err := tls.Listen("tcp", "127.0.0.1:0", identity.ServerConfig())
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := upstream.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			})
		}
	})
	t.Cleanup(func() {
		_ = upstream.Close()
		serving.Wait()
	})
	t.Cleanup(func() {
		r.Stop()
		nothingRuns(t)
	})
	s.state, s.settings = state(t, r, "EDG_EGRESS_PROXY_CONFIG=echo#"+service+"#"+upstream.Addr().String())
	return s
}

// descriptors returns how many files are open.
func descriptors(t testing.TB) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}

// start starts the next Envoy, which must serve then.
func (s *stage) start() *Process {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), limit)
	defer cancel()
	p, err := s.Start(ctx, s.state, s.settings)
	if err != nil {
		s.t.Fatal(err)
	}
	s.serves(p)
	if n := len(s.Running()); n > 3 {
		s.t.Errorf("%d Envoys run", n)
	}
	return p
}

// refuses fails the test if a start with the state succeeds, or fails for another reason.
func (s *stage) refuses(ctx context.Context, state render.State, reason string) {
	s.t.Helper()
	s.interfere(ctx, state, func() {}, reason)
}

// interfere does something while a start goes on that must fail for a reason.
func (s *stage) interfere(ctx context.Context, state render.State, do func(), reason string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(ctx, limit)
	failed := make(chan error, 1)
	go func() {
		defer cancel()
		p, err := s.Start(ctx, state, s.settings)
		if err == nil {
			err = fmt.Errorf("epoch %d started", p.Epoch)
		}
		failed <- err
	}()
	defer func() { <-ctx.Done() }()
	do()
	if err := <-failed; !strings.Contains(err.Error(), reason) {
		s.t.Errorf("%v; want %q", err, reason)
	}
}

// serves fails the test if the process is not the one that serves.
func (s *stage) serves(p *Process) {
	s.t.Helper()
	if err := p.Check(s.t.Context()); err != nil {
		s.t.Error(err)
	}
	if s.serving() != p {
		s.t.Errorf("epochs %v run, and %d is not the one that serves", s.epochs(), p.Epoch)
	}
	s.connect().talk()
}

// since returns what was logged since it was called last.
func (s *stage) since() string {
	text := s.log.String()
	defer func() { s.read = len(text) }()
	return text[s.read:]
}

// epochs returns which run.
func (s *stage) epochs() (all []int) {
	for _, p := range s.Running() {
		all = append(all, p.Epoch)
	}
	return all
}

// run waits until these epochs run and no others.
func (s *stage) run(epochs ...int) {
	s.t.Helper()
	until(s.t, fmt.Sprintf("epochs %v run", epochs), func() bool { return slices.Equal(s.epochs(), epochs) })
}

// connection goes through an Envoy.
type connection struct {
	net.Conn
	t testing.TB
}

func (s *stage) connect() connection {
	s.t.Helper()
	conn, err := net.Dial("tcp", service)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = conn.Close() })
	c := connection{conn, s.t}
	c.talk()
	return c
}

// talk fails the test if what is sent does not come back.
func (c connection) talk() {
	c.t.Helper()
	if err := talk(c); err != nil {
		c.t.Errorf("a connection that should be open: %v", err)
	}
}

func talk(conn net.Conn) error {
	const text = "echo"
	if err := conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, text); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, make([]byte, len(text)))
	return err
}

// awaitCut returns when the connection is cut.
func (c connection) awaitCut() {
	c.t.Helper()
	if err := c.SetDeadline(time.Now().Add(limit)); err != nil {
		c.t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		c.t.Errorf("a connection that should be cut: %v", err)
	}
}

// kill ends a process as the kernel does when there is no memory left.
func kill(p *Process) {
	p.Kill()
	<-p.exited
}

// hung returns a state whose Envoy is never live: it waits for the addresses of an upstream, and nobody tells them.
func (s *stage) hung() render.State {
	state, _ := s.hungUntil()
	return state
}

// hungUntil returns a state whose Envoy is not live before it is told, by answer, that its upstream has no address.
func (s *stage) hungUntil() (hung render.State, answer func()) {
	s.t.Helper()
	hung, _ = state(s.t, s.Runner, "EDG_EGRESS_PROXY_CONFIG=hung#127.0.0.1:15097#hung.test:1")
	for _, c := range hung.Bootstrap.StaticResources.Clusters {
		if c.EdsClusterConfig != nil {
			c.EdsClusterConfig.EdsConfig.InitialFetchTimeout = durationpb.New(0) // for ever
		}
	}
	endpoints := serveEndpoints(s.t, s.Runner)
	return hung, func() {
		if err := endpoints.Set(schema.Upstream{Host: "hung.test", Port: 1}, nil); err != nil {
			s.t.Error(err)
		}
	}
}

// lost waits until an Envoy has given up its admin interface to the one that takes over.
func (s *stage) lost(p *Process) {
	s.t.Helper()
	until(s.t, "the next epoch shuts the admin interface", func() bool { return p.Check(s.t.Context()) != nil })
}

// child returns the process id of an epoch, once it is there.
func (s *stage) child(epoch int) (pid int) {
	s.t.Helper()
	until(s.t, fmt.Sprintf("there is an epoch %d", epoch), func() bool {
		files, err := filepath.Glob("/proc/[0-9]*/cmdline")
		if err != nil {
			s.t.Fatal(err)
		}
		i := slices.IndexFunc(files, func(file string) bool {
			line, err := os.ReadFile(file)
			return err == nil && strings.Contains(string(line), fmt.Sprintf("--restart-epoch\x00%d\x00", epoch))
		})
		if i < 0 {
			return false
		}
		_, err = fmt.Sscanf(files[i], "/proc/%d/", &pid)
		return err == nil
	})
	return pid
}

// flags returns the word of flags in the shared memory, where bit 0 says that an epoch initialises.
func flags(t testing.TB, b *base) uint64 {
	t.Helper()
	memory, err := os.ReadFile(b.path())
	if err != nil {
		t.Fatal(err)
	}
	return binary.NativeEndian.Uint64(memory[flagsOffset:])
}

// edit changes a word of a file.
func edit(path string, offset int64, word uint64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(binary.NativeEndian.AppendUint64(nil, word), offset)
	return errors.Join(err, f.Close())
}

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
			script: "sed s/" + secret + `/test-fifo/ "$2" >$DIRECTORY/test-other.json; shift 2; set -- --config-path $DIRECTORY/test-other.json "$@"`,
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
			script: `sed s/15098/15096/ "$2" >$DIRECTORY/test-other.json; shift 2; set -- --config-path $DIRECTORY/test-other.json "$@"`,
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

// BenchmarkHotRestart takes turns between a hot restart and bare Envoy: validation, then from exec to LIVE.
func BenchmarkHotRestart(b *testing.B) {
	const mostRatio = 1.5
	s := newStage(b)
	s.start()
	admin := filepath.Join(s.RuntimeDirectory, "test-admin.sock")
	bootstrap := proto.CloneOf(s.state.Bootstrap)
	bootstrap.Admin.Address.GetPipe().Path = admin
	config := filepath.Join(s.RuntimeDirectory, "test-bootstrap.json")
	if err := s.write(config, bootstrap); err != nil {
		b.Fatal(err)
	}
	var ours, bare []time.Duration
	for b.Loop() {
		for range 20 {
			began := time.Now()
			if _, err := s.Start(b.Context(), s.state, s.settings); err != nil {
				b.Fatal(err)
			}
			ours = append(ours, time.Since(began))

			began = time.Now()
			if text, err := exec.Command(s.Path, "--mode", "validate", "--config-path", config).CombinedOutput(); err != nil {
				b.Fatalf("%v: %s", err, text)
			}
			envoy := exec.Command(s.Path, "--config-path", config, "--disable-hot-restart",
				"--concurrency", strconv.Itoa(s.settings.Concurrency), "--log-level", "warning")
			// As the same user: another one can't listen beside the Envoys that serve.
			if err := s.spawner.do(func() error {
				capabilities, err := sandbox.AmbientCapabilities(ports(bootstrap))
				envoy.SysProcAttr = &syscall.SysProcAttr{AmbientCaps: capabilities}
				return errors.Join(err, envoy.Start())
			}); err != nil {
				b.Fatal(err)
			}
			until(b, "Envoy is live", func() bool {
				info, err := newAdmin(admin).info(b.Context())
				return err == nil && info.State == "LIVE"
			})
			bare = append(bare, time.Since(began))
			_ = s.spawner.do(envoy.Process.Kill)
			_ = envoy.Wait()
			if err := os.Remove(admin); err != nil {
				b.Fatal(err)
			}
		}
	}
	median := func(all []time.Duration) float64 { return float64(slices.Sorted(slices.Values(all))[len(all)/2]) }
	ratio := median(ours) / median(bare)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(median(ours)/float64(time.Millisecond), "restart-ms")
	b.ReportMetric(median(bare)/float64(time.Millisecond), "bare-ms")
	b.ReportMetric(ratio, "restart/bare")
	if ratio > mostRatio {
		b.Errorf("a hot restart takes %.2f times what bare Envoy does; %.1f at most", ratio, mostRatio)
	}
}

// BenchmarkHotRestartsUnderLoad restarts a thousand times, one after the other.
func BenchmarkHotRestartsUnderLoad(b *testing.B) {
	s := newStage(b)
	s.start()
	load := s.load(4)
	var took []time.Duration
	for b.Loop() {
		for range 1000 {
			began := time.Now()
			if _, err := s.Start(b.Context(), s.state, s.settings); err != nil {
				b.Fatal(err)
			}
			took = append(took, time.Since(began))
			load.settle()
		}
	}
	done, failures := load.end()
	slices.Sort(took)
	b.ReportMetric(0, "ns/op")
	for _, p := range []int{50, 90, 99} {
		b.ReportMetric(float64(took[len(took)*p/100])/float64(time.Millisecond), fmt.Sprintf("restart-p%d-ms", p))
	}
	b.ReportMetric(float64(len(took)), "restarts")
	b.ReportMetric(float64(done), "connections")
	b.ReportMetric(float64(len(failures)), "failed")
	if len(failures) > 0 {
		b.Errorf("of %d connections %d failed, as %v", done, len(failures), failures[0])
	}
}

// load is clients that connect without pause.
type load struct {
	t       testing.TB
	stop    chan struct{}
	once    sync.Once
	clients sync.WaitGroup

	mu       sync.Mutex
	begun    []int // by client
	done     int
	failures []error
}

func (s *stage) load(clients int) *load {
	l := &load{t: s.t, stop: make(chan struct{}), begun: make([]int, clients)}
	s.t.Cleanup(func() { l.end() })
	for i := range clients {
		l.clients.Go(func() {
			for {
				select {
				case <-l.stop:
					return
				default:
				}
				l.mu.Lock()
				l.begun[i]++
				l.mu.Unlock()
				err := s.exchange()
				l.mu.Lock()
				l.done++
				if err != nil {
					l.failures = append(l.failures, err)
				}
				l.mu.Unlock()
			}
		})
	}
	return l
}

// exchange is one connection.
func (s *stage) exchange() error {
	conn, err := net.Dial("tcp", service)
	if err != nil {
		return err
	}
	defer conn.Close()
	return talk(conn)
}

// settle returns when all connections that are open are done.
func (l *load) settle() {
	l.t.Helper()
	l.mu.Lock()
	begun := slices.Clone(l.begun)
	l.mu.Unlock()
	until(l.t, "the connections are done", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		for i := range begun {
			if l.begun[i] == begun[i] {
				return false
			}
		}
		return true
	})
}

// end returns how many connections there were, and the failures among them.
func (l *load) end() (int, []error) {
	l.once.Do(func() { close(l.stop) })
	l.clients.Wait()
	return l.done, l.failures
}
