// Package envoy runs Envoy: its epochs, its certificates, and what it says of itself.
package envoy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"mantlet/render"
	"mantlet/schema"
)

// Runner starts Envoys. Its fields are set before the first Start.
type Runner struct {
	Path             string // the binary; found on PATH where it has no slash
	RuntimeDirectory string // private: holds sockets, SDS files and bootstraps
	Log              *slog.Logger

	spawner spawner
}

// Process is an Envoy that runs, or ran.
type Process struct {
	Epoch     int
	Bootstrap *bootstrapv3.Bootstrap // what it was started with
	Digest    string                 // of the state that it was started with

	cmd    *exec.Cmd
	admin  admin
	logs   *logs
	exited chan struct{}
	err    error // valid once exited is closed
}

// liveLimit bounds initialisation: 45-100 ms as a rule; a busy machine takes longer, a hung start for ever.
const liveLimit = 20 * time.Second

// Start executes Envoy for a state and waits until it says by itself that it is live with that state. Where it is not,
// by the end of a time limit, the process is killed; SIGTERM would make a later epoch end its parent too.
func (r *Runner) Start(ctx context.Context, state render.State, settings schema.Envoy) (*Process, error) {
	const epoch = 0
	p, err := r.execute(state, settings, epoch)
	if err != nil {
		return nil, fmt.Errorf("starting Envoy: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, liveLimit)
	defer cancel()
	if err := p.waitLive(ctx); err != nil {
		p.Kill()
		<-p.exited
		return nil, fmt.Errorf("starting Envoy: %w", err)
	}
	r.Log.Info("Envoy is live", "epoch", epoch, "pid", p.cmd.Process.Pid, "digest", state.Digest)
	return p, nil
}

func (r *Runner) execute(state render.State, settings schema.Envoy, epoch int) (*Process, error) {
	bootstrap := proto.CloneOf(state.Bootstrap)
	bootstrap.Admin = render.Admin(r.RuntimeDirectory, epoch)
	text, err := render.JSON(bootstrap)
	if err != nil {
		return nil, err
	}
	config := filepath.Join(r.RuntimeDirectory, fmt.Sprintf("bootstrap-%d.json", epoch))
	if err := renameio.WriteFile(config, text, 0o600); err != nil {
		return nil, fmt.Errorf("writing the bootstrap: %w", err)
	}
	// An Envoy that has not ended yet could answer there for the new one.
	socket := render.AdminSocket(r.RuntimeDirectory, epoch)
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("removing the admin socket of an Envoy before this one: %w", err)
	}
	base, err := baseID()
	if err != nil {
		return nil, err
	}
	p := &Process{
		Epoch:     epoch,
		Bootstrap: bootstrap,
		Digest:    state.Digest,
		admin:     newAdmin(socket),
		logs:      &logs{to: r.Log.With("epoch", epoch)},
		exited:    make(chan struct{}),
	}
	p.cmd = exec.Command(r.Path, arguments(config, filepath.Join(r.RuntimeDirectory, "hot-restart"), base, epoch, settings)...)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid: true, // a terminal's Ctrl-C is for mantlet, which ends Envoy when it is time
		// Until Envoy asks for SIGTERM itself: an Envoy without mantlet would serve what nobody watches.
		Pdeathsig: syscall.SIGKILL,
	}
	if err := r.start(p); err != nil {
		return nil, err
	}
	return p, nil
}

func (r *Runner) start(p *Process) error {
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		return fmt.Errorf("opening Envoy's standard error: %w", err)
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("opening Envoy's standard output: %w", err)
	}
	if err := r.spawner.do(p.cmd.Start); err != nil {
		return fmt.Errorf("executing %q: %w", r.Path, err)
	}
	go func() {
		read := make(chan struct{})
		go func() { defer close(read); p.logs.access(stdout) }()
		p.logs.messages(stderr)
		<-read
		p.err = p.cmd.Wait()
		close(p.exited)
	}()
	return nil
}

// arguments returns Envoy's command line. The sockets of the hot restart are files of the runtime directory: abstract
// ones could be spoken to by every container of the pod.
func arguments(config, socket string, base uint32, epoch int, settings schema.Envoy) []string {
	seconds := func(d time.Duration) string { return strconv.Itoa(int(d / time.Second)) }
	return []string{
		"--config-path", config,
		"--base-id", strconv.FormatUint(uint64(base), 10),
		"--restart-epoch", strconv.Itoa(epoch),
		"--socket-path", socket,
		"--socket-mode", "600",
		"--skip-hot-restart-parent-stats", // a child that polls a dead parent for them aborts
		"--concurrency", strconv.Itoa(settings.Concurrency),
		"--drain-time-s", seconds(settings.DrainTime),
		"--parent-shutdown-time-s", seconds(settings.ParentShutdownTime),
		"--log-level", string(settings.LogLevel),
		"--log-format", logFormat,
		"--log-format-escaped",
		"--file-flush-interval-msec", "100", // the access log's; 10 s by default
	}
}

// baseID tells apart the shared memory of Envoys whose /dev/shm is one: it is made from the number of the network
// namespace, of which there is one mantlet each. Envoy multiplies it by ten within 32 bits.
func baseID() (uint32, error) {
	var stat unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &stat); err != nil {
		return 0, fmt.Errorf("looking up the network namespace: %w", err)
	}
	return uint32(stat.Ino % (1 << 28)), nil
}

// pollInterval is how often an Envoy that starts is asked whether it is live: a small part of the 45 ms that it takes.
const pollInterval = 3 * time.Millisecond

func (p *Process) waitLive(ctx context.Context) error {
	began := time.Now()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	var last error
	for {
		err := p.Check(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil || last == nil { // what it said last tells more than that it was asked once too often
			last = err
		}
		select {
		case <-p.exited:
			return p.Err()
		case <-ctx.Done():
			return fmt.Errorf("it is not live after %s: %w", time.Since(began).Round(time.Second), last)
		case <-tick.C:
		}
	}
}

// Check returns nil if the process says that it is live with the state that it was started with, and has all listeners.
func (p *Process) Check(ctx context.Context) error {
	info, err := p.admin.info(ctx)
	if err != nil {
		return err
	}
	switch {
	case info.State != "LIVE":
		return fmt.Errorf("Envoy is %s, not LIVE", info.State)
	case info.Epoch != p.Epoch:
		return fmt.Errorf("Envoy answers as epoch %d, not %d", info.Epoch, p.Epoch)
	case info.Digest != p.Digest:
		return fmt.Errorf("Envoy runs %q, not %q", info.Digest, p.Digest)
	}
	listeners, err := p.admin.listeners(ctx)
	if err != nil {
		return err
	}
	for _, l := range p.Bootstrap.StaticResources.Listeners {
		if !listeners[l.Name] {
			return fmt.Errorf("Envoy lacks listener %s", l.Name)
		}
	}
	return nil
}

// Connections returns how many connections are open to the workload and to upstreams.
func (p *Process) Connections(ctx context.Context) (int, error) { return p.admin.connections(ctx) }

// Exited is closed once the process has ended and is reaped.
func (p *Process) Exited() <-chan struct{} { return p.exited }

// Err says how the process ended, with the last error that it logged. Exited must be closed.
func (p *Process) Err() error {
	err := p.err
	if err == nil {
		err = errors.New("exit status 0")
	}
	if said := p.logs.lastError(); said != "" {
		return fmt.Errorf("it ended: %w: %s", err, said)
	}
	return fmt.Errorf("it ended: %w", err)
}

// PID returns the process's id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Kill ends the process at once. It does not wait.
func (p *Process) Kill() { p.signal(syscall.SIGKILL) }

// signal goes to the process group: Path may be a script whose child Envoy is. The only error is that it has ended.
func (p *Process) signal(s syscall.Signal) { _ = syscall.Kill(-p.PID(), s) }

// termLimit is what Envoy gets to end by itself after SIGTERM; it closes connections and leaves in some 10 ms.
const termLimit = 3 * time.Second

// Stop ends the process, if need be by force, and returns when it is gone.
func (p *Process) Stop() {
	p.signal(syscall.SIGTERM)
	timer := time.AfterFunc(termLimit, p.Kill)
	defer timer.Stop()
	<-p.exited
}

// Close ends the Runner and removes what its Envoys left behind. No Process may be running.
func (r *Runner) Close() error {
	r.spawner.close()
	var errs []error
	for _, pattern := range []string{"hot-restart_*", "admin-*.sock", "bootstrap-*.json"} {
		files, err := filepath.Glob(filepath.Join(r.RuntimeDirectory, pattern))
		errs = append(errs, err)
		for _, f := range files {
			errs = append(errs, os.Remove(f))
		}
	}
	base, err := baseID()
	if err == nil {
		err = os.Remove(fmt.Sprintf("/dev/shm/envoy_shared_memory_%d", base*10))
	}
	if !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// spawner starts processes from one OS thread that lives as long as they do. Envoy asks the kernel for SIGTERM at its
// parent's death, and the kernel takes the end of the thread that forked it for that; Go ends threads as it likes.
type spawner struct {
	calls chan func()
}

func (s *spawner) do(start func() error) error {
	if s.calls == nil {
		s.calls = make(chan func())
		go func() {
			runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
			for call := range s.calls {
				call()
			}
		}()
	}
	done := make(chan error)
	s.calls <- func() { done <- start() }
	return <-done
}

func (s *spawner) close() {
	if s.calls != nil {
		close(s.calls)
		s.calls = nil
	}
}

var _ io.Closer = (*Runner)(nil)
