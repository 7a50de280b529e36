package envoy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// What Envoys say to each other as one relieves the other: a child asks its parent and waits for the answer, over a socket
// each (source/server/hot_restart.proto, hot_restarting_base.cc). An answer has no mark of what it answers.

// listenAt takes a socket's place, so that it is never missing: an Envoy that finds none there aborts at once.
func listenAt(path string) (*net.UnixConn, error) {
	sink, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path + "_", Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	return sink, os.Rename(path+"_", path)
}

// settleLimit is much more than the milliseconds in which a busy Envoy answers.
const settleLimit = 2 * time.Second

// settle takes the place of a child that died until its parent has answered all that the child asked. Otherwise the next
// child would get these answers, and take the socket of one listener for that of another; and a parent that finds nobody
// there aborts after ten seconds. The error says why no child can follow any more.
func (r *Runner) settle(parent *Process) error {
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

// Field numbers of a HotRestartMessage.
const (
	requestField = 1
	replyField   = 2
	statsField   = 3 // of either
)

// ask sends a question that no child asks here, and returns once it is answered: then so is all that was asked before.
func ask(from *net.UnixConn, socket string) error {
	if err := from.SetDeadline(time.Now().Add(settleLimit)); err != nil {
		return err
	}
	request := protowire.AppendBytes(protowire.AppendTag(nil, statsField, protowire.BytesType), nil)
	message := protowire.AppendBytes(protowire.AppendTag(nil, requestField, protowire.BytesType), request)
	message = append(binary.BigEndian.AppendUint64(nil, uint64(len(message))), message...)
	if _, err := from.WriteToUnix(message, &net.UnixAddr{Name: socket, Net: "unixgram"}); err != nil {
		return err
	}
	for {
		message, err := receive(from)
		if err != nil {
			return err
		}
		field, _, n := protowire.ConsumeTag(message)
		reply, m := protowire.ConsumeBytes(message[max(n, 0):])
		answers, _, _ := protowire.ConsumeTag(reply)
		if n > 0 && m >= 0 && field == replyField && answers == statsField {
			return nil
		}
	}
}

// receive reads one message: its length in eight bytes, then itself, in datagrams of 4096 bytes at most.
func receive(from *net.UnixConn) ([]byte, error) {
	var message []byte
	for datagram := make([]byte, 4096); ; {
		n, err := from.Read(datagram)
		if err != nil {
			return nil, err
		}
		message = append(message, datagram[:n]...)
		if len(message) < 8 {
			return nil, errors.New("an answer without its length")
		}
		if uint64(len(message)-8) >= binary.BigEndian.Uint64(message) {
			return message[8:], nil
		}
	}
}

// awaitDrain returns once a parent that was relieved accepts no more connections: it would let them in by the state of
// before, while the rules are those of the next. It is told to stop and does not say that it has; one that goes on is ended.
func (r *Runner) awaitDrain(parent *Process, limit time.Duration) {
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	states, err := socketStates(parent.PID()) // it makes no new ones
	for {
		var left sockets
		if err == nil {
			left, err = r.socketsAmong(states, parent)
		}
		if err == nil && left.listening == 0 {
			return
		}
		select {
		case <-parent.exited:
			return
		case <-deadline.C:
			r.Log.Warn("ending an Envoy that was relieved and goes on accepting connections", "epoch", parent.Epoch,
				"listening_sockets", left.listening, "error", err)
			parent.Kill()
			<-parent.exited
			return
		case <-tick.C:
		}
	}
}
