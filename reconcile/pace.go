package reconcile

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"mantlet/internal/status"
	"mantlet/render"
	"mantlet/schema"
)

// The kernel's rules end at once what a change forbids. The rest of the change may have to wait: a new Envoy ends the one before last, which
// may still be draining, and a port has few generations. If such changes come too often, their ports are closed until the change is served.
const (
	// Within drainCutsWithin, drainCutsAtOnce hot restarts at most end an epoch that is still draining.
	drainCutsAtOnce = 2
	drainCutsWithin = 30 * time.Second
	// After advancesAtOnce new generations within maxSilence, the next one waits for advancesEvery. So there are fewer than
	// maxRaisesOfPort, at which all connections would have to end.
	advancesAtOnce = 11
	advancesEvery  = 10 * time.Second
)

// delay returns why a state has to wait, and until when; nil if it does not have to: for the back-off, for an epoch that is still
// draining, or because changes that forbid something come too often.
func (d *Daemon) delay(now time.Time, want *desired) (waits *status.Waits) {
	until := func(at time.Time, code string) {
		if at.After(now) && (waits == nil || at.After(waits.Until)) {
			waits = &status.Waits{Until: at, Code: code, Reason: waitReason(code)}
		}
	}
	if d.have != nil && !want.sameRules(d.have) {
		until(now.Add(d.loop.advances.pause(now)), status.WaitTooOften)
	}
	if d.isServing(want) {
		return waits
	}
	until(d.loop.notBefore, status.WaitBackoff)
	drained := d.serving.drained
	switch {
	case d.serving.process == nil || d.have == nil:
	case !tightens(d.have.mesh, want.mesh):
		until(drained, status.WaitDrain)
	case now.Before(drained) && len(d.loop.drainCuts) == drainCutsAtOnce:
		if again := d.loop.drainCuts[0].Add(drainCutsWithin); again.Before(drained) {
			until(again, status.WaitTooOften)
		} else {
			until(drained, status.WaitDrain)
		}
	}
	return waits
}

// waitReason says what a state waits for.
func waitReason(code string) string {
	switch code {
	case status.WaitDrain:
		return "the connections of the Envoy before"
	case status.WaitTooOften:
		return "its turn: changes that forbid something come too often"
	default:
		return "another attempt: the last one failed"
	}
}

// noteWaits takes note of what the wanted state waits for; nil for nothing. The log gets a line when it begins to wait: failures have
// theirs already.
func (d *Daemon) noteWaits(now time.Time, waits *status.Waits) {
	var before *status.Waits
	d.locked(func() { before, d.waits = d.waits, waits })
	if waits == nil || waits.Code == status.WaitBackoff || before != nil && before.Code == waits.Code {
		return
	}
	d.Log.Info("a change waits until it is put in force", "code", waits.Code, "waits_for", waits.Reason, "wait", waits.Until.Sub(now).Round(time.Millisecond).String())
}

// pause returns how long the next generation has to wait.
func (r advances) pause(now time.Time) time.Duration {
	recent := 0
	for _, one := range r {
		if now.Sub(one.at) <= maxSilence {
			recent++
		}
	}
	if recent < advancesAtOnce {
		return 0
	}
	return r[len(r)-1].at.Add(advancesEvery).Sub(now)
}

// portClosure is what a state that has to wait forbids already.
type portClosure struct {
	ports []schema.Ports
	mesh  schema.Mesh // the rules are made from it: at these ports the waiting state, elsewhere the one in force

	egress []schema.Egress // of the waiting state
}

// enforced returns the mesh that the rules are made from.
func (s *desired) enforced() schema.Mesh {
	if s.closed != nil {
		return s.closed.mesh
	}
	return s.mesh
}

// mayOpen returns the mesh that says which connections through egress entries may be open.
func (s *desired) mayOpen() schema.Mesh {
	mesh := s.enforced()
	if s.closed != nil {
		mesh.Egress = s.closed.egress
	}
	return mesh
}

// rules returns the state's rules, as the kernel has them once the state is in force.
func (s *desired) rules() render.Ruleset {
	generations := s.generations
	generations.Moving = s.moving
	return render.RulesIn(s.place, s.enforced(), generations).Closed(s.closedPorts())
}

func (s *desired) closedPorts() []schema.Ports {
	if s.closed != nil {
		return s.closed.ports
	}
	return nil
}

// isClosed reports whether all ports of a range are closed.
func (s *desired) isClosed(ports schema.Ports) bool {
	return slices.ContainsFunc(s.closedPorts(), func(p schema.Ports) bool { return p.Contains(ports.First) && p.Contains(ports.Last) })
}

// sameRules reports whether two states have the same rules, apart from generations.
func (s *desired) sameRules(other *desired) bool {
	return s.closed == nil && other.closed == nil && reflect.DeepEqual(s.mesh.Outbound, other.mesh.Outbound) && len(tightened(s.mesh, other.mesh)) == 0 && len(tightened(other.mesh, s.mesh)) == 0
}

// closePorts ends the connections that a waiting state forbids, and closes their ports until another state is in force. Through egress
// entries the Envoy that serves can make such connections again until then. They end with it.
func (d *Daemon) closePorts(want *desired) error {
	if d.have == nil {
		return nil
	}
	have := d.have.enforced()
	ports := slices.DeleteFunc(tightened(have, want.mesh), d.have.isClosed)
	narrows := !have.Outbound.Within(want.mesh.Outbound) // which needs no Envoy
	if len(ports) == 0 && !narrows && len(forbidden(d.have.mayOpen(), want.mesh, false)) == 0 {
		return nil
	}
	next := *d.have
	next.closed = &portClosure{ports: schema.Cut(append(ports, d.have.closedPorts()...)), mesh: have, egress: want.mesh.Egress}
	if want.mesh.TLS.MinVersion.Compare(have.TLS.MinVersion) > 0 {
		next.closed.mesh.TLS = want.mesh.TLS
	}
	if narrows {
		next.closed.mesh.Outbound = want.mesh.Outbound
	}
	next.closed.mesh.Ingress = nil
	for _, part := range schema.Cut(append(schema.Parts(have.Ingress, want.mesh.Ingress), ports...)) {
		policy := schema.PolicyOf(have.Ingress, part.First)
		if slices.ContainsFunc(ports, func(p schema.Ports) bool { return p.Contains(part.First) }) {
			policy = schema.PolicyOf(want.mesh.Ingress, part.First)
		}
		next.closed.mesh.Ingress = append(next.closed.mesh.Ingress, schema.Ingress{Ports: part, Mode: policy.Mode, Allow: policy.Allow})
	}
	if len(ports) == 0 {
		return d.enforce(&next)
	}
	d.Log.Warn("ports are closed until a change that forbids something may be served: such changes come too often", "ports", portList(next.closed.ports))
	return d.enforce(&next)
}

func portList(ports []schema.Ports) string {
	var all []string
	for _, p := range ports {
		all = append(all, p.String())
	}
	return strings.Join(all, ", ")
}

// whyClosed says which ports are closed, and why; nil if none are.
func (s *desired) whyClosed() error {
	if s == nil || len(s.closedPorts()) == 0 {
		return nil
	}
	return checkError{status.CheckRules, fmt.Errorf("ports %s are closed for seconds: the configuration changes so often to what forbids something that it can't be served at once", portList(s.closed.ports))}
}
