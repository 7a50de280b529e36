package reconcile

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"mantlet/internal/status"
	"mantlet/render"
	"mantlet/schema"
)

// checkError is an error that knows which check it belongs to.
type checkError struct {
	place string
	error
}

func (l checkError) Unwrap() error { return l.error }

// checkOf returns the check that an error belongs to: Envoy, if the error does not say.
func checkOf(err error) string {
	if l, ok := errors.AsType[checkError](err); ok {
		return l.place
	}
	return status.CheckEnvoy
}

// checkLimit is how long Envoy gets to answer a check. It is less than a probe waits.
const checkLimit = 2 * time.Second

// Unready returns the reasons why the sidecar is not ready; none if it is. It checks everything anew and relies on nothing that was
// checked before. A bad input does not count while a good one is in force.
func (d *Daemon) Unready(ctx context.Context) []status.Reason {
	d.mu.Lock()
	process, have, handover := d.serving.process, d.have, d.handover
	var reasons []status.Reason
	because := func(check string, err error) {
		if err != nil {
			reasons = append(reasons, status.Reason{Check: check, Text: err.Error()})
		}
	}
	if d.stopping {
		because(status.CheckMantlet, errors.New(status.Stopping))
	}
	if d.want == nil {
		because(status.CheckConfig, d.badConfig)
	}
	if !d.certified {
		because(status.CheckCertificates, d.badCertificates)
	}
	if process == nil || have == nil {
		because(checkOf(d.unapplied), d.unapplied)
	}
	d.mu.Unlock()
	var checks sync.WaitGroup
	var certificates, held, envoy, joined, rules, routes, denied error
	checks.Go(func() { certificates = d.Secrets.Valid(time.Now()) })
	if process != nil && !handover {
		checks.Go(func() {
			if found, known := d.joinedListeners(); known {
				joined = found
			}
		})
		checks.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, checkLimit)
			defer cancel()
			held = d.Secrets.Held(ctx)
		})
		checks.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, checkLimit)
			defer cancel()
			envoy = process.Check(ctx)
		})
	}
	if have != nil {
		checks.Go(func() { rules = d.Kernel.Check() })
		checks.Go(func() { _, routes = d.checkRoutes() })
		checks.Go(func() { denied = d.legacyDenial() })
	}
	checks.Wait()
	d.locked(func() {
		if d.handover || d.serving.process != nil && d.serving.process != process {
			envoy = nil
		}
	})
	because(status.CheckCertificates, withReason(status.CertificatesNotValid, certificates))
	because(status.CheckCertificates, withReason(status.CertificatesNotTaken, held))
	because(status.CheckEnvoy, withReason(status.EnvoyNotServing, envoy))
	because(status.CheckEnvoy, withReason(status.EnvoyListenerJoined, joined))
	because(status.CheckRules, withReason(status.RulesChanged, rules))
	because(status.CheckRules, withReason(status.RoutesChanged, routes))
	because(status.CheckRules, withReason(status.DroppedByIptablesLegacy, denied))
	if len(reasons) == 0 && have == nil {
		because(status.CheckMantlet, errors.New(status.Starting))
	}
	return reasons
}

// withReason puts a reason before an error; nil stays nil.
func withReason(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}

// InForce reports whether a state is in force.
func (d *Daemon) InForce() (is bool) {
	d.locked(func() { is = d.have != nil })
	return is
}

// Statistics returns the statistics of the Envoy that serves, in Prometheus' text format and by Envoy's names.
func (d *Daemon) Statistics(ctx context.Context) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, checkLimit)
	defer cancel()
	return d.Proxy.Statistics(ctx)
}

// StatusAddressFailed notes why the status address is not served; nil once it is. It reports whether the reason is new.
func (d *Daemon) StatusAddressFailed(err error) (isNew bool) {
	d.locked(func() { isNew, d.statusErr = !sameError(err, d.statusErr), err })
	return isNew
}

// Notes returns the problems that do not make the sidecar unready: an input that was rejected while the last good one is in force, or a
// state that could not be put in force while the one before it serves.
func (d *Daemon) Notes() (all []status.Problem) {
	unresolved := d.unresolved(time.Now())
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, n := range []struct {
		err  error
		code string
	}{
		{d.badConfig, status.ConfigurationRejected},
		{d.badCertificates, status.CertificatesRejected},
		{d.expiring, status.CertificatesExpireSoon},
		{d.unapplied, status.StateNotInForce},
		{d.statusErr, status.StatusAddressNotServed},
		{d.gateErr, status.GateNotServed},
		{d.have.whyClosed(), status.PortsClosed},
		{d.legacyErr, status.IptablesLegacyNotRead},
	} {
		if n.err != nil {
			all = append(all, status.NewProblem(n.err.Error(), n.code))
		}
	}
	for _, line := range d.Secrets.Warnings() {
		all = append(all, status.Problem{Code: status.CertificatesDoubtful, Text: line})
	}
	for _, line := range slices.Concat(d.conflicts, d.legacyRules) {
		all = append(all, status.Problem{Code: status.RulesUndermined, Text: line})
	}
	if lines, unread := d.logLost(); unread > 0 {
		text := fmt.Sprintf("nobody has read standard error for %s: %d lines of the log were dropped", unread.Round(time.Second), lines)
		all = append(all, status.Problem{Code: status.LogNotRead, Text: text})
	}
	for _, err := range unresolved {
		all = append(all, status.Problem{Code: status.UpstreamUnresolved, Text: err.Error()})
	}
	return all
}

func (d *Daemon) logLost() (lines uint64, unread time.Duration) {
	if d.LogLost == nil {
		return 0, 0
	}
	return d.LogLost()
}

// Status checks and reads everything that a status has.
func (d *Daemon) Status(ctx context.Context) status.Status {
	s := status.Status{
		Version:      d.Version,
		Unready:      append([]status.Reason{}, d.Unready(ctx)...),
		Problems:     []string{},
		Causes:       []status.Problem{},
		Epochs:       append([]status.Epoch{}, d.Proxy.Epochs(ctx)...),
		Certificates: []status.Certificate{},
	}
	s.Ready = len(s.Unready) == 0
	for _, r := range s.Unready {
		s.Problems = append(s.Problems, r.Check+": "+r.Text)
		s.Causes = append(s.Causes, r.Problem())
	}
	for _, note := range d.Notes() {
		if !slices.ContainsFunc(s.Unready, func(r status.Reason) bool { return r.Text == note.Text }) {
			s.Problems = append(s.Problems, note.Text)
			s.Causes = append(s.Causes, note)
		}
	}
	for _, c := range d.Secrets.Certificates(ctx) {
		c.LeftSeconds = seconds(time.Until(c.NotAfter))
		s.Certificates = append(s.Certificates, c)
	}
	d.addCounts(ctx, &s)
	s.PolicyRoutes = d.policyRoutesStatus()
	d.addOutbound(&s)
	s.Repairs, s.Repaired = d.Repairs()
	s.Repairs = append([]status.Repair{}, s.Repairs...)
	s.LogDropped, _ = d.logLost()
	d.locked(func() {
		s.Started = d.since
		s.Desired, s.Applied = d.want.summary(), d.have.summary()
		s.Waits, s.LastError = d.waits, d.lastError
		s.Policy, s.Routes, s.Probes = d.have.policies(), d.have.routes(), d.probeStatuses()
		s.Reload = d.reloaded
		s.Applies = d.applies.all()
		s.Envoys = d.envoys
	})
	return s
}

// addCounts fills in what is counted. What can't be read now is left out; that is no problem of the mesh.
func (d *Daemon) addCounts(ctx context.Context, s *status.Status) {
	s.Upstreams = d.upstreams()
	s.Traffic = d.Proxy.Traffic(ctx)
	s.Refused = []status.Refused{}
	packets, err := d.Kernel.Refused()
	if err != nil {
		d.Log.Debug("the rules' counters can't be read", "error", err)
	}
	for _, reason := range render.Refusals() {
		direction := "ingress"
		if render.RefusesOutbound(reason) {
			direction = "outbound"
		}
		s.Refused = append(s.Refused, status.Refused{By: "kernel", Direction: direction, Reason: reason, Count: packets[reason]})
	}
	last, counts := d.Proxy.Refusals()
	s.Refusals = append([]status.Refusal{}, last...)
	for _, c := range counts {
		s.Refused = append(s.Refused, status.Refused{By: "envoy", Direction: c.Direction, Reason: c.Code, Count: uint64(c.Count)})
	}
	for _, direction := range slices.Sorted(maps.Keys(s.Traffic.Shed)) {
		if n := s.Traffic.Shed[direction]; n > 0 {
			s.Refused = append(s.Refused, status.Refused{By: "envoy", Direction: direction, Reason: connectionLimit, Count: n})
		}
	}
	d.locked(func() { s.Ended, s.Endings = d.endings.ended(), append([]status.Ending{}, d.endings.last...) })
	s.Capacity = d.capacity()
	open, entries, most, err := d.Kernel.Inbound()
	if err != nil {
		d.Log.Debug("connections can't be counted", "error", err)
	}
	s.Conntrack = status.Conntrack{Entries: entries, Max: most}
	var have *desired
	d.locked(func() { have = d.have })
	s.Inbound = have.entries(open)
}

// entries sums up the connections at the ports of each entry, so that a stranger who connects to many ports does not make a long list.
func (w *desired) entries(open []status.Inbound) []status.Inbound {
	sums := map[status.Inbound]int{}
	for _, in := range open {
		sums[status.Inbound{Ports: w.entry(in.Port), Mode: in.Mode}] += in.Open
	}
	all := []status.Inbound{}
	for in, open := range sums {
		in.Open = open
		all = append(all, in)
	}
	slices.SortFunc(all, func(a, b status.Inbound) int {
		return cmp.Or(cmp.Compare(a.Ports, b.Ports), cmp.Compare(a.Mode, b.Mode))
	})
	return all
}

// entry returns the ports of the entry that a port belongs to.
func (w *desired) entry(port uint16) string {
	if w == nil {
		return status.OtherPorts
	}
	i, _ := slices.BinarySearchFunc(w.mesh.Ingress, port, func(e schema.Ingress, port uint16) int { return cmp.Compare(e.Ports.Last, port) })
	switch {
	case i < len(w.mesh.Ingress) && w.mesh.Ingress[i].Ports.Contains(port):
		return w.mesh.Ingress[i].Ports.String()
	case port == w.mesh.StatusPort:
		return status.StatusPort
	default:
		return status.OtherPorts
	}
}

// seconds returns a duration in seconds, rounded to milliseconds.
func seconds(d time.Duration) float64 { return d.Round(time.Millisecond).Seconds() }

func (w *desired) summary() *status.Summary {
	if w == nil {
		return nil
	}
	return &status.Summary{
		Generation: w.number, Digest: w.state.Digest, Ingress: len(w.mesh.Ingress), Egress: len(w.mesh.Egress), IngressOff: w.mesh.IngressOff,
		Source: w.source, SourceDigest: w.sourceDigest,
	}
}

// noteFailure keeps the last error for the status.
func (d *Daemon) noteFailure(place string, err error) {
	d.locked(func() { d.lastError = &status.Failure{Time: time.Now(), Place: place, Text: err.Error()} })
}

// applies counts what was applied, by kind.
type applies map[string]*status.Applies

func (a applies) all() []status.Applies {
	all := []status.Applies{}
	for _, kind := range []string{status.ApplyRules, status.ApplyCertificates, status.ApplyStart, status.ApplyHotRestart} {
		one := status.Applies{Kind: kind, Within: make([]uint64, len(status.ApplySeconds()))}
		if counted := a[kind]; counted != nil {
			one = *counted
			one.Within = slices.Clone(counted.Within)
		}
		all = append(all, one)
	}
	return all
}

// countApplied counts something that was applied, or failed to be.
func (d *Daemon) countApplied(kind string, took time.Duration, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.applies == nil {
		d.applies = applies{}
	}
	a := d.applies[kind]
	if a == nil {
		a = &status.Applies{Kind: kind, Within: make([]uint64, len(status.ApplySeconds()))}
		d.applies[kind] = a
	}
	if err != nil {
		a.Failed++
	} else {
		a.Succeeded++
	}
	a.Seconds += took.Seconds()
	for i, bound := range status.ApplySeconds() {
		if took.Seconds() <= bound {
			a.Within[i]++
		}
	}
}
