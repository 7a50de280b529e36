package envoy

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// epochs is how many can run at a time: Envoy has that many names for their sockets.
const epochs = 3

// newProcess returns what shall be the epoch after the parent's, or without a parent epoch 0 of a base that no running Envoy has.
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

// hotRestartError returns why no epoch can follow a process, if it is known beforehand.
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

// socket is the prefix of the hot restart's sockets. They are files of the runtime directory: abstract ones could be
// spoken to by every container of the pod.
func (r *Runner) socket() string { return filepath.Join(r.RuntimeDirectory, "epoch") }

// parentSocket is where a process listens for what its successor asks and tells.
func (r *Runner) parentSocket(p *Process) string {
	return fmt.Sprintf("%s_parent_%d", r.socket(), int(p.base.id)*10+p.Epoch%epochs)
}

// childSocket is where the successor of a process gets its answers.
func (r *Runner) childSocket(parent *Process) string {
	return fmt.Sprintf("%s_child_%d", r.socket(), int(parent.base.id)*10+(parent.Epoch+1)%epochs)
}

// standInForParent takes the place of a parent that ends before its child told it to: a child that finds nobody to tell aborts.
// One message comes, and needs no answer. A parent that ends in its time is replaced all the same; nobody calls then.
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

// listenAsParent listens where the parent did. Where the child does not serve any more it has told the parent already, and
// the place may be a later epoch's.
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

// listenAt takes a socket's place, so that it is never missing: an Envoy that finds none there aborts at once.
func listenAt(path string) (*net.UnixConn, error) {
	sink, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path + "_", Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	return sink, os.Rename(path+"_", path)
}

// answerLimit is much more than the milliseconds in which a busy Envoy answers.
const answerLimit = 2 * time.Second

// drainAnswers takes the place of a child that died until its parent has answered all that the child asked. Otherwise the next
// child would get these answers, and take the socket of one listener for that of another; and a parent that finds nobody
// there aborts after ten seconds. The error says why no child can follow any more.
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

// drainPoll is how often a process that was relieved is asked whether it still listens: each answer takes its main thread some 0.5 ms.
const drainPoll = 5 * time.Millisecond

// awaitDrain returns once a parent that was relieved accepts no more connections: it would let them in by the state of
// before, while the rules are those of the next. It is told to stop and does not say that it has; one that goes on is ended.
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
			r.Log.Warn("ending an Envoy that was relieved and goes on accepting connections", "epoch", parent.Epoch, "listeners", left, "error", err)
			parent.Kill()
			<-parent.exited
			return
		case <-tick.C:
		}
	}
}
