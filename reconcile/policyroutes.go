package reconcile

import (
	"context"
	"sync"
	"time"

	"mantlet/internal/status"
	"mantlet/render"
)

// PolicyRoutes are the routes by which the workload's answers to clients' addresses come back to Envoy. They open nothing: an answer that
// misses them is dropped by the rules.
type PolicyRoutes interface {
	// Check returns nil if the kernel has these routes and no others of mantlet's, and leads there what is marked; otherwise an error that
	// says what differs.
	Check(render.Routes) error
	// Repair makes the kernel have these routes and no others of mantlet's, and returns what differed. It is idempotent.
	Repair(render.Routes) (found []string, err error)
	// Watch sends a note when routes or routing rules changed, until ctx ends. It may miss changes. The channel is closed once all that it
	// takes has ended.
	Watch(ctx context.Context) <-chan struct{}
}

// routing is what is known of the policy routes.
type routing struct {
	mu        sync.Mutex    // held while they are changed
	want      render.Routes // those of the state in force, and of the one before as long as it has connections
	known     bool          // before, those that an earlier mantlet left stay
	moving    bool          // to another state, which needs them although it is not in force yet
	repairErr error         // why they could not be looked at or put back
}

// policyRoutes returns the routes that a state needs.
func (w *desired) policyRoutes() render.Routes { return w.state.Routes(w.place) }

// route puts the policy routes that a state needs in place, beside those that there are: open connections of the state before need
// theirs. The caller calls settled once the state is in force, or can't be.
func (d *Daemon) route(want *desired) (settled func(), err error) {
	if d.PolicyRoutes == nil {
		return func() {}, nil
	}
	d.watchdog.begin(loop, "putting policy routes in place", kernelLimit)
	defer d.watchdog.begin(loop, "its turn", turnLimit)
	r := &d.routing
	r.mu.Lock()
	defer r.mu.Unlock()
	needs := want.policyRoutes()
	all := render.Routes{IPv4: r.want.IPv4 || needs.IPv4, IPv6: r.want.IPv6 || needs.IPv6}
	if !r.known || all != r.want {
		found, err := d.PolicyRoutes.Repair(all)
		switch {
		case err != nil && needs == (render.Routes{}):
			d.Log.Warn("policy routes of an earlier mantlet can't be looked for", "error", err)
		case err != nil:
			return nil, checkError{status.CheckRules, withReason(status.RoutesNotInForce, err)}
		case len(found) > 0:
			d.Log.Info("policy routes are in place", "ipv4", all.IPv4, "ipv6", all.IPv6, "changed", found)
		}
	}
	r.want, r.known, r.moving = all, true, true
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.moving = false
	}, nil
}

// guardRoutes keeps the policy routes until ctx ends. It does not share a goroutine with the guard of the rules: an Envoy that does not
// say how many connections it has would hold that one up.
func (d *Daemon) guardRoutes(ctx context.Context) {
	changes := d.PolicyRoutes.Watch(ctx)
	defer func() {
		for range changes { // Watch closes it
		}
	}()
	log := newLogLimit()
	look := time.NewTicker(resync)
	defer look.Stop()
	defer d.watchdog.idle(routeGuard)
	for {
		d.watchdog.idle(routeGuard)
		select {
		case <-ctx.Done():
			return
		case <-changes:
		case <-look.C:
		}
		d.repairRoutes(ctx, log)
	}
}

// repairRoutes puts the policy routes back where somebody changed them, and takes them away once no connection needs them any more.
func (d *Daemon) repairRoutes(ctx context.Context, log *logLimit) {
	d.watchdog.begin(routeGuard, "looking at the policy routes", kernelLimit)
	unneeded := d.unneededRoutes(ctx)
	r := &d.routing
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.known {
		return
	}
	var have *desired
	d.locked(func() { have = d.have })
	follows := unneeded && !r.moving && have != nil && r.want != have.policyRoutes()
	if follows {
		r.want = have.policyRoutes()
	}
	found, err := d.PolicyRoutes.Repair(r.want)
	if follows && err == nil {
		d.Log.Info("policy routes are those of the state in force", "ipv4", r.want.IPv4, "ipv6", r.want.IPv6, "changed", found)
		found = nil
	}
	switch {
	case len(found) > 0 && (err == nil || !sameError(err, r.repairErr)):
		d.noteRoutes(found, err, log)
	case err != nil && !sameError(err, r.repairErr):
		d.Log.Error("the policy routes are not as they should be", "error", err)
	}
	r.repairErr = err
}

// unneededRoutes reports whether no connection needs other policy routes than those of the state in force.
func (d *Daemon) unneededRoutes(ctx context.Context) bool {
	r := &d.routing
	r.mu.Lock()
	want, moving := r.want, r.moving
	r.mu.Unlock()
	var have *desired
	d.locked(func() { have = d.have })
	if have == nil || moving || want == have.policyRoutes() {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, checkLimit)
	defer cancel()
	for _, e := range d.Proxy.Epochs(ctx) {
		if !e.Serving && (e.Connections == nil || *e.Connections > 0) {
			return false
		}
	}
	return true
}

// noteRoutes takes note that somebody had changed the policy routes.
func (d *Daemon) noteRoutes(found []string, err error, log *logLimit) {
	about := []any{"found", found}
	if leftOut, ok := log.admit(); ok && err == nil {
		d.Log.Warn("policy routes were changed from outside and are put back", append(about, "left_out_before", leftOut)...)
	} else if ok {
		d.Log.Error("policy routes were changed from outside and could not be put back", append(about, "left_out_before", leftOut, "error", err)...)
	}
	one := status.Repair{Time: time.Now(), Found: found}
	if err != nil {
		one.Error = err.Error()
	}
	d.noteRepair(one)
}

// checkRoutes returns the policy routes that there shall be, and what differs from them.
func (d *Daemon) checkRoutes() (want render.Routes, differs error) {
	d.routing.mu.Lock()
	want = d.routing.want
	d.routing.mu.Unlock()
	if want == (render.Routes{}) {
		return want, nil
	}
	return want, d.PolicyRoutes.Check(want)
}

// policyRoutesStatus tells of the policy routes.
func (d *Daemon) policyRoutesStatus() status.PolicyRoutes {
	want, differs := d.checkRoutes()
	s := status.PolicyRoutes{Families: []string{}}
	if want.IPv4 {
		s.Families = append(s.Families, "IPv4")
	}
	if want.IPv6 {
		s.Families = append(s.Families, "IPv6")
	}
	if differs != nil {
		s.Error = differs.Error()
	}
	return s
}
