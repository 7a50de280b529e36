package reconcile

import (
	"maps"
	"slices"
	"time"

	"mantlet/internal/status"
	"mantlet/schema"
)

// policies returns what is in force for all ports; none while nothing is let in.
func (w *desired) policies() []status.Policy {
	all := []status.Policy{}
	if w == nil {
		return all
	}
	for _, in := range w.mesh.Ingress {
		all = append(all, status.Policy{Ports: in.Ports.String(), Name: in.Name, Mode: in.Mode, Allow: in.Allow})
	}
	if w.mesh.StatusPort != 0 {
		all = append(all, status.Policy{Ports: status.StatusPort, Mode: schema.ModePassthrough})
	}
	return append(all, status.Policy{Ports: status.OtherPorts, Mode: schema.ModeMTLS})
}

// routes returns what is in force for all egress entries.
func (w *desired) routes() []status.Route {
	all := []status.Route{}
	if w == nil {
		return all
	}
	for _, e := range w.mesh.Egress {
		all = append(all, status.Route{Listen: e.Listen.String(), Name: e.Name, Upstream: e.Upstream.String(), ServerNames: e.ServerNames})
	}
	return all
}

// outcome is the result of a probe.
type outcome struct {
	probe schema.Probe
	at    time.Time
	err   error
}

// probeStatuses returns the results of the probes of the wanted configuration. The caller holds mu.
func (d *Daemon) probeStatuses() []status.ProbeStatus {
	all := []status.ProbeStatus{}
	if d.want == nil {
		return all
	}
	for _, p := range d.want.mesh.Probes {
		s := status.ProbeStatus{Name: p.Name, Asks: string(p.Kind) + " " + p.String()}
		if o, ok := d.outcomes[p.Name]; ok && o.probe == p {
			s.Asked, s.OK = new(o.at), new(o.err == nil)
			if o.err != nil {
				s.Error = o.err.Error()
			}
		}
		all = append(all, s)
	}
	return all
}

// noteOutcome keeps the result of a probe, and reports whether the one before failed. The caller holds mu.
func (d *Daemon) noteOutcome(p schema.Probe, err error) (failed bool) {
	if d.outcomes == nil {
		d.outcomes = map[string]outcome{}
	}
	before, asked := d.outcomes[p.Name]
	d.outcomes[p.Name] = outcome{p, time.Now(), err}
	if d.want != nil { // results of probes that are not configured any more
		maps.DeleteFunc(d.outcomes, func(name string, _ outcome) bool {
			return !slices.ContainsFunc(d.want.mesh.Probes, func(p schema.Probe) bool { return p.Name == name })
		})
	}
	return asked && before.err != nil
}

// Probes returns the probes of the wanted configuration.
func (d *Daemon) Probes() (all []schema.Probe) {
	d.locked(func() {
		if d.want != nil {
			all = d.want.mesh.Probes
		}
	})
	return all
}

// Probed logs a probe whose outcome is another than before; the first, if it is not good.
func (d *Daemon) Probed(p schema.Probe, err error) {
	was := false
	d.locked(func() { was = d.noteOutcome(p, err) })
	switch {
	case err != nil && !was:
		d.Log.Warn("a probe of the workload fails", "name", p.Name, "kind", p.Kind, "asks", p.String(), "error", err)
	case err == nil && was:
		d.Log.Info("a probe of the workload succeeds again", "name", p.Name)
	}
}
