package envoy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"mantlet/internal/lab"
	"mantlet/internal/rundir"
	"mantlet/render"
)

func TestStart(t *testing.T) {
	r, log := runner(t)
	identity := identity(t, r)
	p := started(t, r)
	if err := p.Check(t.Context()); err != nil {
		t.Error(err)
	}
	if group, err := unix.Getpgid(p.PID()); err != nil || group != p.PID() {
		t.Errorf("Envoy is in process group %d, want its own: %v", group, err)
	}
	sockets := 0
	for pattern, mode := range map[string]os.FileMode{"admin-*.sock": 0o666, "epoch_*": 0o600} {
		files, err := filepath.Glob(filepath.Join(r.RuntimeDirectory, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			info, err := os.Stat(f)
			if err != nil {
				t.Fatal(err)
			}
			if info.Mode() != os.ModeSocket|mode {
				t.Errorf("%s has mode %v", f, info.Mode())
			}
			sockets++
		}
	}
	if sockets < 3 { // of parent and child, and of the admin interface
		t.Errorf("%d sockets in the runtime directory", sockets)
	}
	if abstract, err := os.ReadFile("/proc/net/unix"); err != nil || strings.Contains(string(abstract), "@envoy") {
		t.Errorf("Envoy has an abstract socket (%v):\n%s", err, abstract)
	}

	open, err := r.Connections(t.Context())
	if err != nil || open != 0 {
		t.Errorf("%d connections, %v", open, err)
	}
	conn, err := tls.Dial("tcp", "127.0.0.1:15007", identity.ClientConfig("pod"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if !conn.ConnectionState().PeerCertificates[0].Equal(identity.Leaf) {
		t.Error("Envoy shows another certificate")
	}

	p.Kill()
	<-p.Exited()
	if err := p.Err(); err == nil || err.Error() != "Envoy epoch 0 exited: signal: killed" { // and memory has nothing to do with it
		t.Errorf("Envoy was killed, and the error is %v", err)
	}
	if err := syscall.Kill(p.PID(), 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("Envoy was not reaped: %v", err)
	}
	if err := p.Check(t.Context()); err == nil {
		t.Error("an Envoy that ended is fine")
	}
	again := started(t, r)
	if again.PID() == p.PID() {
		t.Error("it is the same Envoy")
	}
	if !strings.Contains(log.String(), "Envoy is live") {
		t.Errorf("the log:\n%s", log)
	}
}

// script makes a program that takes the place of Envoy.
func script(t testing.TB, r *Runner, text string) {
	t.Helper()
	envoy, directory := r.Path, t.TempDir()
	lab.Open(directory)
	r.Path = filepath.Join(directory, "envoy")
	text = "#!/bin/sh\nENVOY=" + envoy + "\nDIRECTORY=" + r.RuntimeDirectory + "\n" + text
	if err := os.WriteFile(r.Path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
}

// TestStartFails: what is not live with the state that was asked for does not pass for it.
func TestStartFails(t *testing.T) {
	for name, c := range map[string]struct {
		script, says string
		environ      []string
	}{
		"ends":             {"exit 3", "exit status 3", nil},
		"ends well":        {"exit 0", "exit status 0", nil},
		"says why it ends": {"echo 'critical|main|no room' >&2; exit 1", "no room", nil},
		"is not Envoy":     {"exec sleep 86399", "it is not live after 2s", nil},
		"is deaf":          {"trap '' TERM INT; while :; do sleep 1; done", "it is not live after 2s", nil},
		"runs another state": {
			`sed s/mantlet.digest/other.digest/ "$2" >"$DIRECTORY/test-other.json"
			shift 2
			exec "$ENVOY" --config-path "$DIRECTORY/test-other.json" "$@"`,
			`Envoy runs "", not "`, nil,
		},
		"can't bind": {
			`exec "$ENVOY" "$@"`, fmt.Sprintf("127.0.0.1:15099 is held by pid %d (", os.Getpid()),
			[]string{"EDG_EGRESS_PROXY_CONFIG=x#127.0.0.1:15099#192.0.2.1:1"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			r, _ := runner(t)
			identity(t, r)
			script(t, r, c.script)
			taken, err := net.Listen("tcp", "127.0.0.1:15099")
			if err != nil {
				t.Fatal(err)
			}
			defer taken.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			state, settings := state(t, r, c.environ...)
			if p, err := r.Start(ctx, state, settings); err == nil {
				p.Stop()
				t.Fatal("it started")
			} else if !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v; want %q", err, c.says)
			}
			nothingRuns(t)
		})
	}
}

// nothingRuns waits until PID 1 and this process are all that is left in the lab.
func nothingRuns(t testing.TB) {
	t.Helper()
	until(t, "no process is left", func() bool {
		children, err := filepath.Glob("/proc/[0-9]*")
		return err == nil && len(children) == 2
	})
}

// TestAbortedStart: a start that is given up is killed. SIGTERM would make a later epoch end its parent.
func TestAbortedStart(t *testing.T) {
	r, _ := runner(t)
	script(t, r, `trap 'touch "$DIRECTORY/test-terminated"; exit' TERM
		touch "$DIRECTORY/test-started"
		while :; do sleep 0.01; done`)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	state, settings := state(t, r)
	ended := make(chan error)
	go func() {
		_, err := r.Start(ctx, state, settings)
		ended <- err
	}()
	exists := func(name string) bool {
		_, err := os.Stat(filepath.Join(r.RuntimeDirectory, name))
		return err == nil
	}
	until(t, "it was started", func() bool { return exists("test-started") })
	cancel()
	if err := <-ended; err == nil {
		t.Error("it started")
	}
	if exists("test-terminated") {
		t.Error("it was sent SIGTERM")
	}
	nothingRuns(t)
}

// TestStopForces: what does not end by SIGTERM is killed.
func TestStopForces(t *testing.T) {
	r, _ := runner(t)
	identity(t, r)
	p := started(t, r)
	if err := syscall.Kill(p.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	p.Stop()
	if err := p.Err(); err == nil || !strings.Contains(err.Error(), "signal: killed") {
		t.Errorf("it ended with %v", err)
	}
}

// TestFormerAdmin: an Envoy of before, about to end, must not answer for one that is not live.
func TestFormerAdmin(t *testing.T) {
	r, _ := runner(t)
	state, settings := state(t, r)
	listener, err := net.Listen("unix", rundir.Envoy(r.RuntimeDirectory).AdminSocket(0))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		switch q.URL.Path {
		case "/ready":
			_, _ = io.WriteString(w, "LIVE\n")
		case "/listeners":
			_, _ = io.WriteString(w, `{"listener_statuses": [{"name": "ingress-mtls"}, {"name": "ingress-tls"}]}`)
		default:
			_, _ = fmt.Fprintf(w, `{"state": "LIVE", "node": {"metadata": {%q: %q}}}`, render.DigestKey, state.Digest)
		}
	})}
	var done sync.WaitGroup
	done.Go(func() { _ = server.Serve(listener) })
	t.Cleanup(func() { _ = server.Close(); done.Wait() })
	former := &Process{
		Digest: state.Digest, admin: newAdmin(rundir.Envoy(r.RuntimeDirectory).AdminSocket(0)),
	}
	if err := former.checkLive(t.Context()); err != nil {
		t.Fatalf("the impostor is not good enough: %v", err)
	}
	script(t, r, "exec sleep 86399")
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if p, err := r.Start(ctx, state, settings); err == nil {
		p.Stop()
		t.Error("what answered at the former socket passed for the new Envoy")
	}
}

// TestThreadsEnd: the kernel takes the end of the thread that forked a process for the end of its parent, which Envoy has
// itself told of. Go ends threads as it likes.
func TestThreadsEnd(t *testing.T) {
	r, _ := runner(t)
	identity(t, r)
	var p *Process
	onThread(func() { p = started(t, r) })
	threadsEnd()
	if err := p.Check(t.Context()); err != nil {
		t.Error(err)
	}

	// Once, luck would do.
	start := map[string]func(*exec.Cmd) error{
		"by the spawner": func(cmd *exec.Cmd) error { return r.spawner.do(cmd.Start) },
		"by any thread": func(cmd *exec.Cmd) (err error) {
			onThread(func() { err = cmd.Start() })
			return err
		},
	}
	ended := map[string]int{}
	for range 10 {
		for by, start := range start {
			cmd := exec.Command("sleep", "86399")
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
			if err := start(cmd); err != nil {
				t.Fatal(err)
			}
			threadsEnd()
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			if err := cmd.Wait(); err.Error() == "signal: terminated" {
				ended[by]++
			}
		}
	}
	if ended["by the spawner"] > 0 || ended["by any thread"] == 0 {
		t.Errorf("of ten processes were ended: %v", ended)
	}
}

// threadsEnd ends many threads.
func threadsEnd() {
	for range 10 {
		var wait sync.WaitGroup
		for range 50 {
			wait.Go(func() { onThread(runtime.Gosched) })
		}
		wait.Wait()
	}
	runtime.GC()
}

// onThread calls fn on a thread that ends then.
func onThread(fn func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		fn()
	}()
	<-done
}

// TestRefusedSocketOption: Envoy sends nothing over a socket that the kernel does not give the priority that the rules know it by.
// It connects, and closes at once.
func TestRefusedSocketOption(t *testing.T) {
	for name, option := range map[string]int64{"set": unix.SO_PRIORITY, "refused": 9999} {
		t.Run(name, func(t *testing.T) {
			endpoint, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = endpoint.Close() }()
			heard := make(chan int, 1)
			go func() {
				conn, err := endpoint.Accept()
				if err != nil {
					heard <- 0
					return
				}
				n, _ := conn.Read(make([]byte, 1))
				_ = conn.Close()
				heard <- n
			}()
			r, _ := runner(t)
			identity(t, r)
			const listener = "127.0.0.1:15095"
			state, settings := state(t, r, "EDG_EGRESS_PROXY_CONFIG=x#"+listener+"#"+endpoint.Addr().String())
			clusters := state.Bootstrap.GetStaticResources().GetClusters()
			bind := proto.CloneOf(clusters[0].UpstreamBindConfig) // of the leg to the workload
			bind.SocketOptions[0].Name = option
			clusters[1].UpstreamBindConfig = bind
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			p, err := r.Start(ctx, state, settings)
			if err != nil {
				t.Fatal(err)
			}
			defer p.Stop()
			conn, err := net.Dial("tcp", listener)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			_ = conn.SetDeadline(time.Now().Add(limit))
			if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the connection was not ended: %v", err)
			}
			_ = endpoint.Close()
			if got := <-heard; (got > 0) != (name == "set") {
				t.Errorf("the endpoint heard %d bytes", got)
			}
		})
	}
}
