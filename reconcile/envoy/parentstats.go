package envoy

import (
	"errors"
	"fmt"
	"net"
	"regexp"
	"sync"
	"time"
)

// parentStats is how mantlet asks an Envoy for statistics once it has no admin interface: it sends the question that a child asks its
// parent, from the child's socket. While a child starts, the socket is the child's alone.
type parentStats struct {
	mu            sync.Mutex
	conn          *net.UnixConn // at the child's socket; nil until it is needed
	waiting       bool          // an answer is due
	childStarting bool          // and has the socket

	stopped     uint64 // listeners that accept no more connections
	connections uint64 // open through the process
}

// isConnection matches the statistics that count connections which would be cut if the process ended.
var isConnection = regexp.MustCompile(openConnections)

// setChildStarting leaves the socket to a child that starts, or takes it back. The old socket stays open: an answer that is still due
// finds somebody there.
func (i *parentStats) setChildStarting(is bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.conn, i.waiting, i.childStarting = nil, false, is
}

// refreshParentStats has a process send its statistics again. The caller holds the lock of its parentStats.
func (r *Runner) refreshParentStats(p *Process) error {
	i := &p.parentStats
	if i.childStarting {
		return errors.New("the Envoy that takes over from it asks it")
	}
	err := r.spawner.do(func() (err error) {
		if i.conn == nil {
			if i.conn, err = listenAt(r.childSocket(p)); err != nil {
				return err
			}
			at := i.conn
			r.standIns.Go(func() { <-p.exited; _ = at.Close() }) // Envoy aborts if nobody listens there
		}
		if err := i.conn.SetDeadline(time.Now().Add(askLimit)); err != nil || i.waiting {
			return err
		}
		return askForStats(i.conn, r.parentSocket(p))
	})
	if err != nil {
		return fmt.Errorf("asking Envoy: %w", err)
	}
	i.waiting = true
	message, err := receive(i.conn)
	if err != nil {
		return fmt.Errorf("asking Envoy: %w", err) // the next call takes an answer that comes late
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

// connectionsOfParent returns how many connections go through a process that has no admin interface.
func (r *Runner) connectionsOfParent(p *Process) (int, error) {
	p.parentStats.mu.Lock()
	defer p.parentStats.mu.Unlock()
	err := r.refreshParentStats(p)
	return int(p.parentStats.connections), err
}

// stillListening returns how many listeners of a process that another one took over from still accept connections.
func (r *Runner) stillListening(p *Process) (int, error) {
	p.parentStats.mu.Lock()
	defer p.parentStats.mu.Unlock()
	err := r.refreshParentStats(p)
	return len(p.listeners) - int(p.parentStats.stopped), err
}
