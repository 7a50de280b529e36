// Package envoy runs Envoy: its epochs, its certificates, and what it says of itself.
package envoy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/google/renameio/v2"
	"google.golang.org/protobuf/proto"

	"mantlet/render"
	"mantlet/schema"
)

// Runner starts Envoys: the first as epoch 0, and each later one as a hot restart of the one that serves. Its exported
// fields are set before the first Start. Start is not safe for concurrent use.
type Runner struct {
	Path             string // the binary; found on PATH where it has no slash
	RuntimeDirectory string // private: holds sockets, SDS files and bootstraps
	Log              *slog.Logger

	spawner spawner
	base    base

	mu      sync.Mutex
	running []*Process // by epoch: those that drain, and at last the one that serves
}

// liveLimit bounds initialisation: 45-100 ms as a rule; a busy machine takes longer, a hung start for ever.
const liveLimit = 20 * time.Second

// Start executes Envoy for a state and waits until it says by itself that it is live with that state. Where another Envoy
// serves, it takes over from it without a connection being refused, and the other one drains and ends by itself.
//
// Where the new one does not get live in time, it is killed, and whatever served goes on; but it may have lost its admin
// interface, which only another Start brings back, with any state that works.
func (r *Runner) Start(ctx context.Context, state render.State, settings schema.Envoy) (*Process, error) {
	p, err := r.restart(ctx, state, settings)
	if err != nil {
		return nil, fmt.Errorf("starting Envoy: %w", err)
	}
	r.Log.Info("Envoy is live", "epoch", p.Epoch, "pid", p.PID(), "digest", p.Digest)
	return p, nil
}

func (r *Runner) restart(ctx context.Context, state render.State, settings schema.Envoy) (*Process, error) {
	serving := r.serving()
	if serving != nil {
		if err := r.preflight(ctx, state, serving); err != nil {
			return nil, err
		}
	}
	var abandoned []*Process
	if serving != nil && r.base.spoilt {
		abandoned, serving = r.Running(), nil
		r.Log.Warn("Envoy's shared memory is of no use: a plain restart, which cuts connections")
	}
	epoch := 0
	if serving != nil {
		epoch = serving.Epoch + 1
	} else if err := r.base.next(); err != nil {
		return nil, err
	}
	p, err := r.execute(state, settings, epoch)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, liveLimit)
	defer cancel()
	if err := p.waitLive(ctx); err != nil {
		p.Kill() // SIGTERM would make it end its parent, which serves
		<-p.exited
		if serving != nil {
			r.base.unstick(r.Log)
		}
		return nil, err
	}
	for _, old := range abandoned {
		old.Stop()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running = append(slices.DeleteFunc(r.running, func(p *Process) bool { return !p.alive() }), p)
	return p, nil
}

// Running returns the processes that have not ended, the one that serves last.
func (r *Runner) Running() []*Process {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(r.running), func(p *Process) bool { return !p.alive() })
}

// caReads returns how often the Envoy that serves has read the mesh CA; 0 where none does.
func (r *Runner) caReads(ctx context.Context) int {
	p := r.serving()
	if p == nil {
		return 0
	}
	n, err := p.admin.caReads(ctx)
	if err != nil {
		return 0
	}
	return n
}

// serving returns the newest process.
func (r *Runner) serving() *Process {
	if running := r.Running(); len(running) > 0 {
		return running[len(running)-1]
	}
	return nil
}

// preflight tries what a new epoch could fail at: once it runs, a failure costs the old one its admin interface.
func (r *Runner) preflight(ctx context.Context, state render.State, serving *Process) error {
	config, err := r.write("preflight.json", state)
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(config) }()
	ctx, cancel := context.WithTimeout(ctx, liveLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, r.Path, "--mode", "validate", "--config-path", config, "--log-level", "error")
	if said, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("Envoy does not accept the bootstrap: %w: %s", err, said)
	}
	return tryBinds(state, serving)
}

// tryBinds binds, for a moment, to the addresses of listeners that the serving Envoy does not have.
func tryBinds(state render.State, serving *Process) error {
	had := map[string]bool{}
	for _, l := range serving.Bootstrap.StaticResources.Listeners {
		had[l.Name] = true
	}
	for _, l := range state.Bootstrap.StaticResources.Listeners {
		if had[l.Name] {
			continue
		}
		address := l.GetAddress().GetSocketAddress()
		listener, err := net.Listen("tcp", net.JoinHostPort(address.Address, strconv.Itoa(int(address.GetPortValue()))))
		if err != nil {
			return fmt.Errorf("listener %s: %w", l.Name, err)
		}
		if err := listener.Close(); err != nil {
			return fmt.Errorf("listener %s: %w", l.Name, err)
		}
	}
	return nil
}

// write puts a bootstrap into the runtime directory and returns its path.
func (r *Runner) write(name string, state render.State) (string, error) {
	text, err := render.JSON(state.Bootstrap)
	if err != nil {
		return "", err
	}
	path := filepath.Join(r.RuntimeDirectory, name)
	if err := renameio.WriteFile(path, text, 0o600); err != nil {
		return "", fmt.Errorf("writing the bootstrap: %w", err)
	}
	return path, nil
}

func (r *Runner) execute(state render.State, settings schema.Envoy, epoch int) (*Process, error) {
	state.Bootstrap = proto.CloneOf(state.Bootstrap)
	state.Bootstrap.Admin = render.Admin(r.RuntimeDirectory, epoch)
	config, err := r.write(fmt.Sprintf("bootstrap-%d.json", epoch), state)
	if err != nil {
		return nil, err
	}
	// An Envoy that has not ended yet could answer there for the new one.
	socket := render.AdminSocket(r.RuntimeDirectory, epoch)
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("removing the admin socket of an Envoy before this one: %w", err)
	}
	p := &Process{
		Epoch:     epoch,
		Bootstrap: state.Bootstrap,
		Digest:    state.Digest,
		admin:     newAdmin(socket),
		logs:      &logs{to: r.Log.With("epoch", epoch)},
		exited:    make(chan struct{}),
	}
	p.cmd = exec.Command(r.Path, arguments(config, r.socket(), r.base.id, epoch, settings)...)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid: true, // a terminal's Ctrl-C is for mantlet, which ends Envoy when it is time
		// Until Envoy asks for SIGTERM itself: an Envoy without mantlet would serve what nobody watches.
		Pdeathsig: syscall.SIGKILL,
	}
	return p, r.start(p)
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
		r.orphaned(p)
	}()
	return nil
}

// socket is the prefix of the hot restart's sockets. They are files of the runtime directory: abstract ones could be
// spoken to by every container of the pod.
func (r *Runner) socket() string { return filepath.Join(r.RuntimeDirectory, "hot-restart") }

// orphaned takes the place of a parent that ended before its child told it to: a child that finds nobody to tell aborts.
// One message comes, and needs no answer. A parent that ended in its time is replaced all the same; nobody calls then.
func (r *Runner) orphaned(parent *Process) {
	child := r.serving()
	if child == nil || child.Epoch != parent.Epoch+1 {
		return
	}
	const epochs = 3 // that Envoy has names for
	path := fmt.Sprintf("%s_parent_%d", r.socket(), int(r.base.id)*10+parent.Epoch%epochs)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		r.Log.Error("the socket of an Envoy that ended can't be taken over", "error", err)
		return
	}
	sink, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		r.Log.Error("the socket of an Envoy that ended can't be taken over", "error", err)
		return
	}
	<-child.exited
	_ = sink.Close()
}

// arguments returns Envoy's command line.
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

// Stop ends all processes, the newest first: its end is no loss to the others.
func (r *Runner) Stop() {
	for _, p := range slices.Backward(r.Running()) {
		p.Stop()
	}
}

// Close ends the Runner and removes what its Envoys left behind. No Process may be running.
func (r *Runner) Close() error {
	r.spawner.close()
	errs := []error{r.base.remove()}
	for _, pattern := range []string{"hot-restart_*", "admin-*.sock", "bootstrap-*.json"} {
		files, err := filepath.Glob(filepath.Join(r.RuntimeDirectory, pattern))
		errs = append(errs, err)
		for _, f := range files {
			errs = append(errs, os.Remove(f))
		}
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
