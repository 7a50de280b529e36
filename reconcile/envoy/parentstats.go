package envoy

import (
	"errors"
	"fmt"
	"net"
	"regexp"
	"sync"
	"time"
)

// parentStats is what mantlet asks an Envoy that has no admin interface, in the place of the Envoy that relieved it, or is to. A child that
// starts has this place to itself.
type parentStats struct {
	mu            sync.Mutex
	conn          *net.UnixConn // nil until it is needed
	waiting       bool          // for an answer
	childStarting bool          // one starts

	stopped     uint64 // listeners that take no more connections
	connections uint64 // that go through the process
}

// isConnection matches the statistics that count connections which would be cut if the process ended.
var isConnection = regexp.MustCompile(openConnections)

// setChildStarting leaves the place to a child that starts, or takes it back. What was asked and not answered yet still finds a socket there.
func (i *parentStats) setChildStarting(child bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.conn, i.waiting, i.childStarting = nil, false, child
}

// refreshParentStats has a process tell anew what its interview holds.
func (r *Runner) refreshParentStats(p *Process) error {
	i := &p.parentStats
	if i.childStarting {
		return errors.New("the Envoy that is to relieve it asks it")
	}
	err := r.spawner.do(func() (err error) {
		if i.conn == nil {
			if i.conn, err = listenAt(r.childSocket(p)); err != nil {
				return err
			}
			at := i.conn
			r.standIns.Go(func() { <-p.exited; _ = at.Close() }) // an Envoy that finds nobody there aborts
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

// connectionsOfParent returns how many connections go through a process that has no admin interface.
func (r *Runner) connectionsOfParent(p *Process) (int, error) {
	p.parentStats.mu.Lock()
	defer p.parentStats.mu.Unlock()
	err := r.refreshParentStats(p)
	return int(p.parentStats.connections), err
}

// stillListening returns how many listeners of a process that was relieved still take connections.
func (r *Runner) stillListening(p *Process) (int, error) {
	p.parentStats.mu.Lock()
	defer p.parentStats.mu.Unlock()
	err := r.refreshParentStats(p)
	return len(p.Bootstrap.StaticResources.Listeners) - int(p.parentStats.stopped), err
}
