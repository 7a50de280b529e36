package envoy

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"sync/atomic"
	"syscall"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"

	"mantlet/render"
)

// Process is an Envoy that runs, or ran.
type Process struct {
	Epoch     int
	Digest    string     // of the state that it was started with
	listeners []listener // that it was started with
	workers   int        // threads, each of which has a socket for each listener
	parts     parts      // of the state that it was started with

	base    *base
	since   time.Time         // that it serves or, once another one was live after it, drains
	counted map[string]uint64 // statistics, as it told them last
	drains  bool              // another one was live after it
	most    time.Duration     // how long it may drain
	spawner *spawner
	cmd     *exec.Cmd
	admin   admin
	trial   string // the path of the socket that leads into its trial

	parentStats parentStats
	logs        *logs
	killed      atomic.Bool // by Kill
	exited      chan struct{}
	err         error  // valid once exited is closed
	killedBy    string // who killed it, if somebody did; valid once exited is closed
}

// listener is what mantlet needs to know of a listener once its Envoy was started. The bootstrap itself is not kept: of 1,000 entries it
// takes 10 MB.
type listener struct {
	name      string
	addresses []netip.AddrPort // none for a unix socket
}

func listenersOf(b *bootstrapv3.Bootstrap) []listener {
	all := make([]listener, 0, len(b.GetStaticResources().GetListeners()))
	for _, l := range b.GetStaticResources().GetListeners() {
		all = append(all, listener{l.GetName(), render.AddressesOf(l)})
	}
	return all
}

// pollInterval is how often an Envoy that starts is asked whether it is live. It is short compared with a start.
const pollInterval = time.Millisecond

// waitLive returns nil once the process is live. It gives up if the parent that it takes over from ends: an Envoy waits for its parent's
// answers for ever.
func (p *Process) waitLive(ctx context.Context, parent *Process) error {
	began := time.Now()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if parent != nil {
		go func() {
			select {
			case <-parent.exited:
				cancel(fmt.Errorf("it lost its parent: %w", parent.Err()))
			case <-ctx.Done():
			}
		}()
	}
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	var last error
	for asked := false; ; {
		_, err := os.Lstat(p.admin.socket) // an Envoy that starts should not be slowed down by requests
		// The first answer usually says that it is live. Each answer takes Envoy's main thread 4 ms.
		if err == nil && asked {
			err = p.admin.ready(ctx)
		}
		if err == nil {
			if err = p.checkLive(ctx); err == nil {
				return nil
			}
			asked = true
		}
		if ctx.Err() == nil || last == nil { // its last answer says more than an expired context does
			last = err
		}
		select {
		case <-p.exited:
			return p.Err()
		case <-ctx.Done():
			return fmt.Errorf("it is not live after %s: %w: %w", time.Since(began).Round(time.Second), context.Cause(ctx), last)
		case <-tick.C:
		}
	}
}

// checkLive returns nil if the process says that it is live as the epoch and with the state that it was started with. It has all
// listeners then: without one of them it would have ended.
func (p *Process) checkLive(ctx context.Context) error {
	info, err := p.admin.info(ctx)
	if err != nil {
		return err
	}
	switch {
	case info.State != isLive:
		return fmt.Errorf("Envoy is %s, not %s", info.State, isLive)
	case info.Epoch != p.Epoch:
		return fmt.Errorf("Envoy answers as epoch %d, not %d", info.Epoch, p.Epoch)
	case info.Digest != p.Digest:
		return fmt.Errorf("Envoy runs %q, not %q", info.Digest, p.Digest)
	}
	return nil
}

// Check returns nil if the process says that it is ready and has all listeners. It need not identify itself again: each epoch has an
// admin socket of its own.
func (p *Process) Check(ctx context.Context) error {
	if err := p.admin.ready(ctx); err != nil {
		return err
	}
	listeners, err := p.admin.listeners(ctx)
	if err != nil {
		return err
	}
	for _, l := range p.listeners {
		if !listeners[l.name] {
			return fmt.Errorf("Envoy lacks listener %s", l.name)
		}
	}
	return nil
}

// alive reports whether the process has not ended yet.
func (p *Process) alive() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// Exited is closed once the process has ended and is reaped.
func (p *Process) Exited() <-chan struct{} { return p.exited }

// Err says how the process ended, with the last error that it logged. It must not be called before Exited is closed.
func (p *Process) Err() error {
	err := p.err
	switch {
	case err == nil:
		err = errors.New("exit status 0")
	case !p.killed.Load() && exitSignal(err) == syscall.SIGKILL:
		err = fmt.Errorf("%w, %s", err, p.killedBy)
	}
	if said := p.logs.lastError(); said != "" {
		err = fmt.Errorf("%w: %s", err, said)
	}
	return fmt.Errorf("Envoy epoch %d exited: %w", p.Epoch, err)
}

// exitSignal returns the signal that ended a process; 0 for none.
func exitSignal(err error) syscall.Signal {
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok {
		return 0
	}
	status, ok := exit.Sys().(syscall.WaitStatus)
	if !ok || !status.Signaled() {
		return 0
	}
	return status.Signal()
}

// PID returns the process's id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Kill ends the process by SIGKILL. It does not wait.
func (p *Process) Kill() {
	p.killed.Store(true)
	p.signal(syscall.SIGKILL)
}

// signal sends a signal to the process group: Path may be a script whose child is Envoy. It does nothing once the process has ended.
func (p *Process) signal(s syscall.Signal) {
	if p.alive() { // otherwise another process may have its ID by now
		_ = p.spawner.do(func() error { return syscall.Kill(-p.PID(), s) })
	}
}

// termLimit is how long Envoy gets to end after SIGTERM. It closes its connections and ends within about 10 ms.
const termLimit = 3 * time.Second

// Stop ends the process, by SIGKILL if need be, and returns once it has ended.
func (p *Process) Stop() {
	p.signal(syscall.SIGTERM)
	timer := time.AfterFunc(termLimit, p.Kill)
	defer timer.Stop()
	<-p.exited
}
