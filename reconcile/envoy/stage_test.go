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
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

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
