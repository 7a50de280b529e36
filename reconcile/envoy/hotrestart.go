package envoy

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"
)

// epochs is how many epochs of a base ID can run at a time: Envoy has that many names for their sockets.
const epochs = 3

// newProcess returns the epoch after the parent; without a parent, epoch 0 of a base ID that no running Envoy has.
func (r *Runner) newProcess(parent *Process) (*Process, error) {
	if parent != nil {
		return &Process{Epoch: parent.Epoch + 1, base: parent.base}, nil
	}
	b, err := newBase(r.Running())
	if err != nil {
		return nil, err
	}
	r.bases = append(slices.DeleteFunc(r.bases, func(old *base) bool { return old.id == b.id }), b)
	return &Process{base: b}, nil
}

// hotRestartError returns why no epoch can follow a process, as far as that is known beforehand.
func (r *Runner) hotRestartError(parent *Process) error {
	_, err := os.Stat(parent.base.path())
	return errors.Join(parent.base.blocked, err, r.spawner.do(func() error { return checkListening(r.parentSocket(parent)) }))
}

// checkListening returns nil if a process listens at a socket. It sends nothing.
func checkListening(socket string) error {
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("reaching the Envoy that serves: %w", err)
	}
	return conn.Close()
}

// parentSocket returns where a process listens for the messages of its child.
func (r *Runner) parentSocket(p *Process) string {
	return r.directory().ParentSocket(int(p.base.id)*10 + p.Epoch%epochs)
}

// childSocket returns where a process's child listens for its answers.
func (r *Runner) childSocket(parent *Process) string {
	return r.directory().ChildSocket(int(parent.base.id)*10 + (parent.Epoch+1)%epochs)
}

// standInForParent listens in place of a parent that ends before its child has told it to end: the child aborts if nobody listens. The
// child sends one message and waits for no answer. A parent that ends when it is told to is replaced all the same; nothing is sent then.
func (r *Runner) standInForParent(parent, child *Process) {
	<-parent.exited
	sink, err := r.listenAsParent(parent, child)
	if err != nil {
		r.Log.Error("the socket of an Envoy that ended can't be taken over", "error", err)
	}
	if sink == nil {
		return
	}
	<-child.exited
	_ = sink.Close()
}

// listenAsParent opens the parent's socket. If the child does not serve any more, it has told the parent already, and the socket's name
// may be a later epoch's.
func (r *Runner) listenAsParent(parent, child *Process) (sink *net.UnixConn, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.running[len(r.running)-1] != child {
		return nil, nil
	}
	err = r.spawner.do(func() error {
		sink, err = listenAt(r.parentSocket(parent))
		return err
	})
	return sink, err
}

// listenAt replaces a socket in one step: Envoy aborts at once if it finds no socket.
func listenAt(path string) (*net.UnixConn, error) {
	sink, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path + "_", Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	return sink, os.Rename(path+"_", path)
}

// answerLimit is much more than the milliseconds in which a busy Envoy answers.
const answerLimit = 2 * time.Second

// drainAnswers listens in place of a child that died until its parent has answered all that the child asked. Otherwise the next child
// would get these answers, and take one listener's socket for another's; and a parent that finds nobody listening aborts after ten
// seconds. The error says why no child can follow any more.
func (r *Runner) drainAnswers(parent *Process) error {
	var sink *net.UnixConn
	err := r.spawner.do(func() (err error) {
		if sink, err = listenAt(r.childSocket(parent)); err != nil {
			return fmt.Errorf("taking the place of an Envoy that failed: %w", err)
		}
		if err = ask(sink, r.parentSocket(parent)); err != nil {
			return fmt.Errorf("the Envoy that serves does not answer: %w", err)
		}
		return nil
	})
	switch {
	case sink == nil:
	case err != nil:
		r.standIns.Go(func() { <-parent.exited; _ = sink.Close() })
	default:
		_ = sink.Close()
	}
	return err
}

// drainPoll is how often a parent is asked whether it still listens. Each answer takes its main thread about 0.5 ms.
const drainPoll = 5 * time.Millisecond

// awaitDrain returns once a parent accepts no more connections. It would accept them by the previous state, while the rules are already
// those of the next. Envoy is told to stop accepting and does not confirm it, so it is asked; a parent that goes on accepting is killed.
func (r *Runner) awaitDrain(parent *Process, limit time.Duration) {
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	for {
		left, err := r.stillListening(parent)
		if err == nil && left == 0 {
			return
		}
		select {
		case <-parent.exited:
			return
		case <-deadline.C:
			r.Log.Warn("ending an Envoy that still accepts connections after another one took over", "epoch", parent.Epoch, "listeners", left, "error", err)
			parent.Kill()
			<-parent.exited
			return
		case <-tick.C:
		}
	}
}
