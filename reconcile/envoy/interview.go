package envoy

import (
	"errors"
	"fmt"
	"net"
	"regexp"
	"sync"
	"time"
)

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
