package reconcile

import (
	"time"

	"mantlet/internal/status"
	"mantlet/render"
)

// enforce puts a state's rules in force, with new generations at the ports where the state forbids connections that may be open.
func (d *Daemon) enforce(want *desired) (err error) {
	var revoked bool
	d.locked(func() { revoked, d.revoked = d.revoked, false })
	defer func() {
		d.locked(func() { d.revoked = d.revoked || revoked && err != nil })
	}()
	next, mesh := *want, want.enforced()
	if d.have != nil {
		next.generations = nextGenerations(d.have.generations, d.have.enforced(), mesh, revoked)
	} else if before, generations, ok := laxestBefore(d.Found, mesh); ok {
		next.generations = nextGenerations(generations, before, mesh, revoked)
	}
	next.moving = false
	change := d.tighten(&next, revoked)
	d.endOutbound(&next, true)
	if rules := next.rules(); d.have == nil || rules.Text() != d.have.rules().Text() {
		spared, put := d.moveAllowed(change), d.Kernel.Replace
		if d.have != nil {
			put = d.Kernel.Exchange // connections may be open that the change does not concern
		}
		if err := d.replace(put, rules); err != nil {
			d.loop.exhausted = d.loop.exhausted || spared > 0 // the next attempt may forbid what was moved to the next generation already
			return err
		}
		d.Log.Info("rules are in force", "ingress_entries", len(want.mesh.Ingress), "egress_entries", len(want.mesh.Egress))
	}
	d.end(change)
	d.endOutbound(&next, false)
	d.loop.exhausted = d.loop.exhausted || d.have != nil && d.loop.advances.add(time.Now(), d.have.generations, next.generations)
	d.locked(func() { d.have = &next })
	d.follow()
	notify(d.notes.enforced)
	return nil
}

// revoke ends the connections of a mesh CA that was removed. It does not wait for Envoy.
func (d *Daemon) revoke() {
	var revoked bool
	d.locked(func() { revoked = d.revoked })
	if !revoked || d.have == nil {
		return
	}
	if err := d.enforce(d.have); err != nil {
		d.Log.Error("connections by a mesh CA that was taken away live on", "error", err)
	}
}

// restartExhausted ends all connections, by stopping Envoy, if a port has no generation left: the next one would admit connections that
// an earlier change ended.
func (d *Daemon) restartExhausted() {
	if !d.loop.exhausted {
		return
	}
	d.loop.exhausted = false
	d.Log.Warn("the rules can't tell what is forbidden from what is not any more, as after too many changes of one port: Envoy is started anew")
	d.watchdog.begin(loop, "stopping Envoy", stopLimit)
	d.Proxy.Stop()
	d.watchdog.begin(loop, "its turn", turnLimit)
}

// replace puts rules in force by one of the kernel's ways.
func (d *Daemon) replace(put func(render.Ruleset) error, rules render.Ruleset) error {
	began := time.Now()
	d.watchdog.begin(loop, "putting the rules in force", kernelLimit)
	err := put(rules)
	d.watchdog.begin(loop, "its turn", turnLimit)
	d.countApplied(status.ApplyRules, time.Since(began), err)
	if err != nil {
		return checkError{status.CheckRules, withReason(status.RulesNotInForce, err)}
	}
	return nil
}
