package reconcile

import (
	"maps"
	"slices"
	"time"

	"mantlet/schema"
)

// The names of ports that no entry has.
const (
	otherPorts = "other"  // all that no entry names
	statusPort = "status" // where mantlet itself answers
)

// Policy is what is in force for connections from outside to some ports.
type Policy struct {
	Ports string      `json:"ports"` // a port or a range, as Inbound has it: "other" is all ports that no entry names, "status" mantlet's own
	Name  string      `json:"name,omitempty"`
	Mode  schema.Mode `json:"mode"`
	Allow []string    `json:"allow"` // the SANs of which a client must have one; null for anyone whom the mode lets in
}

// Route is what is in force for connections of the workload to an egress entry.
type Route struct {
	Listen      string   `json:"listen"`
	Name        string   `json:"name,omitempty"`
	Upstream    string   `json:"upstream"`
	ServerNames []string `json:"serverNames"` // the SANs of which the endpoint must have one; null for anyone of the mesh
}

// policies returns what is in force for all ports; none while nothing is let in.
func (w *desired) policies() []Policy {
	all := []Policy{}
	if w == nil {
		return all
	}
	for _, in := range w.mesh.Ingress {
		all = append(all, Policy{in.Ports.String(), in.Name, in.Mode, in.Allow})
	}
	if w.mesh.StatusPort != 0 {
		all = append(all, Policy{Ports: statusPort, Mode: schema.ModePassthrough})
	}
	return append(all, Policy{Ports: otherPorts, Mode: schema.ModeMTLS})
}

// routes returns what is in force for all egress entries.
func (w *desired) routes() []Route {
	all := []Route{}
	if w == nil {
		return all
	}
	for _, e := range w.mesh.Egress {
		all = append(all, Route{e.Listen.String(), e.Name, e.Upstream.String(), e.ServerNames})
	}
	return all
}

// ProbeStatus is a probe of the workload and what came of it.
type ProbeStatus struct {
	Name  string     `json:"name"`
	Asks  string     `json:"asks"`            // kind, port and target, as "http 8080/healthz"
	Asked *time.Time `json:"asked"`           // last; null if never
	OK    *bool      `json:"ok"`              // null if it was never asked
	Error string     `json:"error,omitempty"` // why it failed
}

// outcome is what came of a probe.
type outcome struct {
	probe schema.Probe
	at    time.Time
	err   error
}

// probeStatuses returns what came of the probes of the wanted configuration. The caller holds mu.
func (d *Daemon) probeStatuses() []ProbeStatus {
	all := []ProbeStatus{}
	if d.want == nil {
		return all
	}
	for _, p := range d.want.mesh.Probes {
		s := ProbeStatus{Name: p.Name, Asks: string(p.Kind) + " " + p.String()}
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

// noteOutcome keeps what came of a probe, and reports whether it failed the last time. The caller holds mu.
func (d *Daemon) noteOutcome(p schema.Probe, err error) (failed bool) {
	if d.outcomes == nil {
		d.outcomes = map[string]outcome{}
	}
	before, asked := d.outcomes[p.Name]
	d.outcomes[p.Name] = outcome{p, time.Now(), err}
	if d.want != nil { // those of configurations before are forgotten
		maps.DeleteFunc(d.outcomes, func(name string, _ outcome) bool {
			return !slices.ContainsFunc(d.want.mesh.Probes, func(p schema.Probe) bool { return p.Name == name })
		})
	}
	return asked && before.err != nil
}
