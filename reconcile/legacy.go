package reconcile

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// liftLimit is more than a removal takes while iptables-legacy waits for its lock.
const liftLimit = 10 * time.Second

// followLegacy reads the rules of iptables-legacy from time to time, until ctx ends. If it is configured to, it removes the rule that a
// guest booted with once mantlet's own rules are in force.
func (d *Daemon) followLegacy(ctx context.Context) {
	var logged []string
	for {
		d.watchdog.begin(legacy, "looking at iptables-legacy", liftLimit)
		d.lookAtLegacy(ctx, &logged)
		d.watchdog.idle(legacy)
		select {
		case <-ctx.Done():
			return
		case <-d.notes.enforced:
		case <-time.After(resync):
		}
	}
}

// lookAtLegacy reads the rules, and removes what it is configured to. logged are those that were logged last.
func (d *Daemon) lookAtLegacy(ctx context.Context, logged *[]string) {
	rules, err := d.Legacy.Read()
	var inForce bool
	d.locked(func() {
		d.legacyRules, d.legacyErr = rules.Others, err
		inForce = d.have != nil
	})
	if err != nil {
		return
	}
	if len(rules.Denies) > 0 && !slices.Equal(rules.Denies, *logged) {
		d.Log.Warn("iptables-legacy drops what comes in over IPv4", "rules", rules.Denies, "to_be_removed", d.Environment.Process.LiftDefaultDeny)
	}
	*logged = rules.Denies
	if !inForce || !d.Environment.Process.LiftDefaultDeny {
		return
	}
	var failed error
	for _, rule := range rules.Denies {
		if failed = d.Legacy.Lift(ctx, rule); failed != nil {
			break
		}
		d.Log.Info("a rule of iptables-legacy that dropped what comes in is removed: mantlet's own rules are in force", "rule", rule)
	}
	d.locked(func() { d.liftErr = failed })
}

// legacyDenial returns which rules of iptables-legacy drop what mantlet's rules let in over IPv4; nil for none.
func (d *Daemon) legacyDenial() error {
	if d.Legacy == nil {
		return nil
	}
	rules, err := d.Legacy.Read()
	if err != nil || len(rules.Denies) == 0 {
		return nil // Notes has the error
	}
	var unlifted error
	d.locked(func() { unlifted = d.liftErr })
	remedy := errors.New("set MANTLET_LIFT_DEFAULT_DENY=true to have mantlet remove it")
	if d.Environment.Process.LiftDefaultDeny {
		remedy = errors.New("mantlet is about to remove it")
	}
	if unlifted != nil {
		remedy = unlifted
	}
	return fmt.Errorf("%s (table filter); %w", strings.Join(rules.Denies, ", "), remedy)
}
