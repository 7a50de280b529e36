package envoy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"sync"
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

	countersField = 3 // of a Reply's Stats
	gaugesField   = 4
)

// ask sends a question that no child asks here, and returns once it is answered: then so is all that was asked before.
func ask(from *net.UnixConn, socket string) error {
	if err := from.SetDeadline(time.Now().Add(settleLimit)); err != nil {
		return err
	}
	if err := askForStats(from, socket); err != nil {
		return err
	}
	for {
		message, err := receive(from)
		if err != nil {
			return err
		}
		if _, ok := statsOf(message); ok {
			return nil
		}
	}
}

// askForStats asks an Envoy for its statistics, as children do that add them to their own.
func askForStats(from *net.UnixConn, socket string) error {
	request := protowire.AppendBytes(protowire.AppendTag(nil, statsField, protowire.BytesType), nil)
	message := protowire.AppendBytes(protowire.AppendTag(nil, requestField, protowire.BytesType), request)
	message = append(binary.BigEndian.AppendUint64(nil, uint64(len(message))), message...)
	_, err := from.WriteToUnix(message, &net.UnixAddr{Name: socket, Net: "unixgram"})
	return err
}

// statsOf returns the statistics in a message; false where it has none.
func statsOf(message []byte) (stats []byte, ok bool) {
	return within(message, replyField, statsField)
}

// within returns the bytes of a field, in the field before it and so on.
func within(message []byte, path ...protowire.Number) ([]byte, bool) {
	for _, field := range path {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 || number != field || kind != protowire.BytesType {
			return nil, false
		}
		inner, m := protowire.ConsumeBytes(message[n:])
		if m < 0 {
			return nil, false
		}
		message = inner
	}
	return message, true
}

// eachStat calls do for each counter and gauge among statistics. A counter's value is what it grew by since it was told last.
func eachStat(stats []byte, do func(name string, value uint64)) error {
	for len(stats) > 0 {
		number, kind, n := protowire.ConsumeTag(stats)
		if n < 0 {
			return protowire.ParseError(n)
		}
		m := protowire.ConsumeFieldValue(number, kind, stats[n:])
		if m < 0 {
			return protowire.ParseError(m)
		}
		if entry, ok := within(stats, number); ok && (number == countersField || number == gaugesField) {
			do(mapEntry(entry))
		}
		stats = stats[n+m:]
	}
	return nil
}

// mapEntry reads an entry of a map of strings to numbers.
func mapEntry(entry []byte) (name string, value uint64) {
	for len(entry) > 0 {
		number, kind, n := protowire.ConsumeTag(entry)
		m := -1
		switch {
		case n < 0:
		case kind == protowire.BytesType:
			name, m = protowire.ConsumeString(entry[n:])
		case kind == protowire.VarintType:
			value, m = protowire.ConsumeVarint(entry[n:])
		default:
			m = protowire.ConsumeFieldValue(number, kind, entry[n:])
		}
		if m < 0 {
			return name, value
		}
		entry = entry[n+m:]
	}
	return name, value
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

// interview is what mantlet asks an Envoy that has no admin interface, in the place of the Envoy that relieved it, or is to. A child that
// starts has this place to itself.
type interview struct {
	mu      sync.Mutex
	at      *net.UnixConn // nil until it is needed
	waiting bool          // for an answer
	child   bool          // one starts

	stopped     uint64 // listeners that take no more connections
	connections uint64 // that go through the process
}

// isConnection matches the statistics that count connections which would be cut if the process ended.
var isConnection = regexp.MustCompile(openConnections)

// yield leaves the place to a child that starts, or takes it back. What was asked and not answered yet still finds a socket there.
func (i *interview) yield(child bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.at, i.waiting, i.child = nil, false, child
}

// ask has a process tell anew what its interview holds.
func (r *Runner) ask(p *Process) error {
	i := &p.interview
	if i.child {
		return errors.New("the Envoy that is to relieve it asks it")
	}
	err := r.spawner.do(func() (err error) {
		if i.at == nil {
			if i.at, err = listenAt(r.childSocket(p)); err != nil {
				return err
			}
			at := i.at
			r.standIns.Go(func() { <-p.exited; _ = at.Close() }) // an Envoy that finds nobody there aborts
		}
		if err := i.at.SetDeadline(time.Now().Add(askLimit)); err != nil || i.waiting {
			return err
		}
		return askForStats(i.at, r.parentSocket(p))
	})
	if err != nil {
		return fmt.Errorf("asking Envoy: %w", err)
	}
	i.waiting = true
	message, err := receive(i.at)
	if err != nil {
		return fmt.Errorf("asking Envoy: %w", err) // a late answer is as good
	}
	i.waiting = false
	stats, ok := statsOf(message)
	if !ok {
		return errors.New("asking Envoy: it answers something else")
	}
	i.connections = 0
	return eachStat(stats, func(name string, value uint64) {
		switch {
		case name == "listener_manager.listener_stopped":
			i.stopped += value
		case isConnection.MatchString(name):
			i.connections += value
		}
	})
}

// openIn returns how many connections go through a process that has no admin interface.
func (r *Runner) openIn(p *Process) (int, error) {
	p.interview.mu.Lock()
	defer p.interview.mu.Unlock()
	err := r.ask(p)
	return int(p.interview.connections), err
}

// listening returns how many listeners of a process that was relieved still take connections.
func (r *Runner) listening(p *Process) (int, error) {
	p.interview.mu.Lock()
	defer p.interview.mu.Unlock()
	err := r.ask(p)
	return len(p.Bootstrap.StaticResources.Listeners) - int(p.interview.stopped), err
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
		left, err := r.listening(parent)
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
