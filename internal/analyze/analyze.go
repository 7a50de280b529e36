package analyze

import (
	"fmt"
	"slices"
	"strings"

	"mantlet/internal/manifest"
	"mantlet/schema"
)

// Report is what there is to say of a pod.
type Report struct {
	Object    string   `json:"object"` // as "Deployment web"
	Namespace string   `json:"namespace,omitempty"`
	HasMesh   bool     `json:"mesh"`    // the pod has a mantlet
	Inbound   []string `json:"inbound"` // in words, a line each
	Callers   []string `json:"callers"`
	Outbound  []string `json:"outbound"`

	Problems []schema.Problem `json:"-"` // what will not work, or is not safe
	Warnings []schema.Problem `json:"-"` // what may not be meant
}

// workload is a pod and what is known of it.
type workload struct {
	manifest.Pod

	sidecar  manifest.Sidecar
	hasMesh  bool
	config   manifest.Configuration
	identity identity
	services []manifest.Service // that select it
	report   *Report
}

// Analyzer looks at the pods of manifests.
type Analyzer struct {
	// Sidecars are the names of containers that are mantlets.
	Sidecars []string
	// Runs returns why the arguments of a mantlet do not make it run as a sidecar.
	Runs func(arguments []string) error
}

// Analyze returns what there is to say of each pod of the manifests, in their order. They are looked at together.
func (a Analyzer) Analyze(manifests []*manifest.Manifest) []Report {
	all := &world{}
	for _, m := range manifests {
		m.Refer(slices.DeleteFunc(slices.Clone(manifests), func(other *manifest.Manifest) bool { return other == m })...)
		all.services = append(all.services, m.Services()...)
		for _, p := range m.Pods() {
			w := &workload{Pod: p, report: &Report{Object: p.Object(), Namespace: p.Namespace()}}
			w.sidecar, w.hasMesh = p.Sidecar(a.Sidecars...)
			w.report.HasMesh = w.hasMesh
			all.workloads = append(all.workloads, w)
		}
	}
	for _, w := range all.workloads {
		for _, s := range all.services {
			if selects(s, w.Pod) {
				w.services = append(w.services, s)
			}
		}
		if w.hasMesh {
			w.config = w.sidecar.Configuration()
			a.judge(w)
		}
		w.identify()
	}
	for _, w := range all.workloads {
		w.inbound()
	}
	for _, w := range all.workloads {
		all.outbound(w)
	}
	for _, m := range manifests {
		for _, b := range m.Backends() {
			all.fromOutside(b)
		}
	}
	var reports []Report
	for _, w := range all.workloads {
		reports = append(reports, *w.report)
	}
	return reports
}

// judge takes what validate says of the pod itself.
func (a Analyzer) judge(w *workload) {
	c := w.config
	findings := append(c.Findings, w.sidecar.Check(manifest.Settings{Process: c.Process, Mesh: &c.Mesh, IsPartial: c.IsPartial, Runs: a.Runs})...)
	for _, f := range findings {
		if f.Severity == manifest.Error {
			w.report.Problems = append(w.report.Problems, f.Problem)
		} else {
			w.report.Warnings = append(w.report.Warnings, f.Problem)
		}
	}
}

// problem adds one of the pod.
func (w *workload) problem(path, format string, args ...any) {
	w.report.Problems = append(w.report.Problems, w.finding(path, format, args...))
}

func (w *workload) warning(path, format string, args ...any) {
	w.report.Warnings = append(w.report.Warnings, w.finding(path, format, args...))
}

func (w *workload) finding(path, format string, args ...any) schema.Problem {
	origin := w.Origin()
	if w.hasMesh {
		origin = w.sidecar.Origin()
	}
	return schema.Problem{Origin: origin, Path: path, Reason: fmt.Sprintf(format, args...)}
}

// inbound says who may call the pod.
func (w *workload) inbound() {
	say := func(format string, args ...any) {
		w.report.Inbound = append(w.report.Inbound, fmt.Sprintf(format, args...))
	}
	if !w.hasMesh {
		say("every port: anyone, in plaintext: it has no mantlet")
		return
	}
	if variable := w.config.Process.IngressOff; variable != "" {
		say("every port: anyone, in plaintext: %s is DISABLED", variable)
		return
	}
	mesh := w.config.Mesh
	for _, in := range mesh.Ingress {
		say("%s%s: %s%s", in.Ports, label(in.Name), who(schema.PolicyOf(mesh.Ingress, in.Ports.First)), w.through(in.Ports))
	}
	if port := mesh.StatusPort; port != 0 {
		say("%d: anyone, in plaintext: mantlet's status and its probes of the workload", port)
	}
	rest := "every other port"
	if len(w.report.Inbound) == 0 {
		rest = "every port"
	}
	say(rest+": %s", who(schema.Policy{Mode: schema.ModeMTLS}))
	if mesh.OtherProtocols == schema.OtherProtocolsAccept {
		say("UDP and other protocols: anyone, in plaintext, at every port")
	}
	if w.config.IsPartial && len(w.report.Problems) == 0 {
		say("more of its configuration is not in the manifests")
	}
}

// label puts the name of an entry behind its port.
func label(name string) string {
	if name == "" {
		return ""
	}
	return fmt.Sprintf(" (%s)", name)
}

// who says whom a policy lets in, and how.
func who(p schema.Policy) string {
	switch {
	case p.Mode == schema.ModePassthrough:
		return "anyone, in plaintext"
	case p.Mode == schema.ModeTLS:
		return "anyone, over TLS that asks for no client certificate"
	case len(p.Allow) > 0:
		return "only " + strings.Join(p.Allow, ", ") + ", over mutual TLS"
	default:
		return "every workload of the mesh, over mutual TLS"
	}
}

// through names the Services that lead to one of the ports.
func (w *workload) through(ports schema.Ports) string {
	var names []string
	for _, s := range w.services {
		for _, port := range s.Ports {
			if target, ok := targetOf(s, port, w.Pod); ok && ports.Contains(target) && port.Protocol != "UDP" {
				names = append(names, fmt.Sprintf("%s:%d", s.Name, port.Port))
			}
		}
	}
	if len(names) == 0 {
		return ""
	}
	return ", by Service " + strings.Join(names, ", ")
}

// name returns the pod's, with its namespace if that is not the one of another.
func (w *workload) name(from *workload) string {
	if w.Namespace() == from.Namespace() || w.Namespace() == "" {
		return w.Object()
	}
	return fmt.Sprintf("%s of namespace %s", w.Object(), w.Namespace())
}
