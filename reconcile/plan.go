package reconcile

import (
	"fmt"
	"math"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"unicode"

	"mantlet/internal/status"
	"mantlet/render"
	"mantlet/schema"
)

// Step is one difference between two meshes, and what it takes.
type Step struct {
	What string `json:"what"` // as "8080: passthrough -> mtls"
	Need Need   `json:"need"`
}

func (s Step) String() string { return s.What + "; " + string(s.Need) }

// Need is what a step does to Envoy.
type Need string

// What a change needs.
const (
	NoRestart  Need = "no restart"  // rules in the kernel at the most
	SDS        Need = "SDS"         // publication of certificates to the Envoy that runs
	HotRestart Need = "hot restart" // a new epoch of Envoy
	Start      Need = "start"       // of Envoy: none runs
)

// Live is what is there, as the kernel and Envoy say.
type Live struct {
	Rules        render.Ruleset
	Fit          func(render.Ruleset) render.Ruleset // the rules as this mantlet and kernel have them; nil for as they are
	Envoy        status.Envoy
	Certificates []string // what Envoy has otherwise than the TLS directory, a line each
}

// Difference is what there is otherwise than wanted.
type Difference struct {
	Steps   []Step   `json:"steps"`             // that lead to what is wanted, in the words of the configuration; none if it is what is wanted
	Details []string `json:"details,omitempty"` // the rules in the kernel, and the fields of Envoy's bootstrap, that differ
}

// Diff returns what leads from what is there to a mesh in a place. Rules are compared in the generations that are in force.
func Diff(mesh schema.Mesh, place render.Place, have Live) (Difference, error) {
	state, err := render.Render(mesh, place)
	if err != nil {
		return Difference{}, err
	}
	var d Difference
	add := func(need Need, format string, args ...any) {
		d.Steps = append(d.Steps, Step{fmt.Sprintf(format, args...), need})
	}
	live, told := inForce(mesh, place, have)
	d.Steps = Compare(live, mesh)
	_, generations, known := render.ReadBack(have.Rules)
	d.Details = have.diffRules(mesh, generations)
	switch rest := have.diffRules(live, generations); {
	case render.Denies(have.Rules):
		add(NoRestart, "nothing is let in -> what the configuration says")
	case !known && len(rest) == 1: // it is not there
		add(NoRestart, "%s", rest[0])
	case len(rest) > 0:
		add(NoRestart, "rules: the kernel has others than the configuration makes; -v lists them")
	}
	for _, line := range have.Certificates {
		add(SDS, "%s", line)
	}
	steps, details := diffEnvoy(state, mesh.Envoy, have.Envoy, told)
	d.Steps, d.Details = append(d.Steps, steps...), append(d.Details, details...)
	return d, nil
}

// diffRules returns what the rules have otherwise than those of a mesh, a line each.
func (l Live) diffRules(mesh schema.Mesh, generations render.Generations) []string {
	want := render.Rules(mesh, generations)
	if l.Fit != nil {
		want = l.Fit(want)
	}
	return render.Diff(want, l.Rules)
}

// inForce returns the mesh that kernel and Envoy have, as far as they tell; all else is taken from a wanted one. It reports whether
// Envoy tells.
func inForce(mesh schema.Mesh, place render.Place, have Live) (live schema.Mesh, told bool) {
	live = mesh
	if before, ok := render.MeshOf(have.Envoy.Bootstrap, have.Envoy.Digest, place); ok {
		before.Probes, before.OtherProtocols, before.StatusPort = mesh.Probes, mesh.OtherProtocols, mesh.StatusPort
		live, told = before, true
	}
	modes, generations, ok := render.ReadBack(have.Rules)
	if !ok || render.Denies(have.Rules) {
		live.Ingress = mesh.Ingress
		return live, told
	}
	live.Ingress = withModes(modes, live.Ingress)
	differ := func(other schema.OtherProtocols) int {
		mesh := live
		mesh.OtherProtocols = other
		return len(have.diffRules(mesh, generations))
	}
	if differ(schema.OtherProtocolsAccept) < differ(schema.OtherProtocolsDrop) {
		live.OtherProtocols = schema.OtherProtocolsAccept
	} else {
		live.OtherProtocols = schema.OtherProtocolsDrop
	}
	return live, told
}

// withModes returns entries, which are sorted, with the lists of clients that others have.
func withModes(modes, lists []schema.Ingress) (all []schema.Ingress) {
	rest := modes
	for _, ports := range schema.Parts(modes, lists) {
		for len(rest) > 0 && rest[0].Ports.Last < ports.First {
			rest = rest[1:]
		}
		if len(rest) == 0 || !rest[0].Ports.Contains(ports.First) {
			continue
		}
		in := schema.Ingress{Ports: ports, Mode: rest[0].Mode}
		if in.Mode == schema.ModeMTLS {
			in.Allow = schema.PolicyOf(lists, ports.First).Allow
		}
		all = append(all, in)
	}
	return all
}

// diffEnvoy compares a running Envoy with a state. Where the Envoy told which mesh it was started for, steps to another one are known
// already.
func diffEnvoy(state render.State, settings schema.Envoy, have status.Envoy, told bool) (steps []Step, details []string) {
	add := func(format string, args ...any) {
		steps = append(steps, Step{fmt.Sprintf(format, args...), HotRestart})
	}
	switch {
	case have.State == "":
		return []Step{{"Envoy: none runs", Start}}, nil
	case have.State != "LIVE":
		add("Envoy: epoch %d is %s, not LIVE", have.Epoch, have.State)
	}
	if have.Digest == state.Digest {
		for _, l := range state.Bootstrap.StaticResources.Listeners {
			if !have.Listeners[l.Name] {
				add("Envoy: epoch %d has no listener %s", have.Epoch, l.Name)
			}
		}
		return steps, nil
	}
	for _, line := range render.DiffBootstraps(state.Bootstrap, have.Bootstrap) {
		details = append(details, "Envoy: "+line)
	}
	if !told {
		compareSettings(have.Settings, settings, add)
		add("Envoy: epoch %d runs the state %.12s, not %.12s; -v lists what differs", have.Epoch, have.Digest, state.Digest)
	}
	return steps, details
}

// Compare returns the steps that lead from one mesh to another: none if they do the same. Names alone change nothing.
func Compare(from, to schema.Mesh) []Step {
	var steps []Step
	add := func(need Need, format string, args ...any) {
		steps = append(steps, Step{fmt.Sprintf(format, args...), need})
	}
	if from.IngressOff != to.IngressOff {
		add(HotRestart, "ingress: %s -> %s", onOff(!from.IngressOff), onOff(!to.IngressOff))
	}
	comparePorts(from.Ingress, to.Ingress, add)
	compareEgress(from.Egress, to.Egress, add)
	compareProbes(from.Probes, to.Probes, add)
	restarts := func(format string, args ...any) { add(HotRestart, format, args...) }
	if from.TLS.MinVersion != to.TLS.MinVersion {
		restarts("tls.minVersion: %v -> %v", from.TLS.MinVersion, to.TLS.MinVersion)
	}
	compareSettings(from.Envoy, to.Envoy, restarts)
	if from.OtherProtocols != to.OtherProtocols {
		add(NoRestart, "otherProtocols: %v -> %v", from.OtherProtocols, to.OtherProtocols)
	}
	if from.MaxConnectionAge != to.MaxConnectionAge {
		restarts("maxConnectionAge: %s -> %s", ageOf(from), ageOf(to))
	}
	if from.AccessLog != to.AccessLog {
		need := NoRestart // without a listener nothing is logged, whatever is to be
		if hasListeners(from) || hasListeners(to) {
			need = HotRestart
		}
		add(need, "accessLog: %v -> %v", from.AccessLog, to.AccessLog)
	}
	return steps
}

// hasListeners reports whether Envoy has any for a mesh.
func hasListeners(m schema.Mesh) bool { return !m.IngressOff || len(m.Egress) > 0 }

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

func ageOf(m schema.Mesh) string {
	if m.MaxConnectionAge == 0 {
		return "none"
	}
	return m.MaxConnectionAge.String()
}

func compareSettings(from, to schema.Envoy, add func(format string, args ...any)) {
	for _, s := range []struct {
		name     string
		from, to any
	}{
		{"concurrency", from.Concurrency, to.Concurrency},
		{"drainTime", from.DrainTime, to.DrainTime},
		{"parentShutdownTime", from.ParentShutdownTime, to.ParentShutdownTime},
		{"logLevel", from.LogLevel, to.LogLevel},
	} {
		if s.from != s.to {
			add("envoy.%s: %v -> %v", s.name, s.from, s.to)
		}
	}
}

// tightened returns the ports where connections that were let in under one mesh could be refused under the other.
func tightened(from, to schema.Mesh) (all []schema.Ports) {
	raised := to.TLS.MinVersion > from.TLS.MinVersion
	parts := schema.Parts(from.Ingress, to.Ingress)
	if raised {
		parts = schema.Cut(append(parts, schema.Ports{First: 0, Last: math.MaxUint16}))
	}
	for _, part := range parts {
		was := schema.PolicyOf(from.Ingress, part.First)
		if !was.Within(schema.PolicyOf(to.Ingress, part.First)) || raised && was.Mode != schema.ModePassthrough {
			all = append(all, part)
		}
	}
	return all
}

// tightens reports whether connections that were let in under one mesh could be refused under the other.
func tightens(from, to schema.Mesh) bool { return len(tightened(from, to)) > 0 }

type adder func(need Need, format string, args ...any)

// comparePorts tells changes by ranges of ports that have the same policy before and the same after.
func comparePorts(from, to []schema.Ingress, add adder) {
	for _, at := range schema.Parts(from, to) {
		was, is := schema.PolicyOf(from, at.First), schema.PolicyOf(to, at.First)
		switch {
		case was.Mode != is.Mode && slices.Equal(was.Allow, is.Allow):
			add(NoRestart, "%s: %s -> %s", at, was.Mode, is.Mode)
		case !reflect.DeepEqual(was.Allow, is.Allow):
			add(HotRestart, "%s: %s -> %s", at, was, is)
		}
		if !slices.Equal(was.ALPN, is.ALPN) {
			add(HotRestart, "%s: alpn %s -> %s", at, protocols(was.ALPN), protocols(is.ALPN))
		}
	}
}

func compareEgress(from, to []schema.Egress, add adder) {
	have := map[netip.AddrPort]schema.Egress{}
	for _, e := range from {
		have[e.Listen] = e
	}
	for _, e := range to {
		old, ok := have[e.Listen]
		delete(have, e.Listen)
		switch {
		case !ok:
			add(HotRestart, "egress %s: new, %s -> %s", title(e), e.Listen, e.Upstream)
		case old.Upstream != e.Upstream:
			add(HotRestart, "egress %s: %s -> %s", title(e), old.Upstream, e.Upstream)
		}
		if ok && !slices.Equal(old.ServerNames, e.ServerNames) {
			add(HotRestart, "egress %s: server names %s -> %s", title(e), anyOf(old.ServerNames), anyOf(e.ServerNames))
		}
		if ok && !slices.Equal(old.ALPN, e.ALPN) {
			add(HotRestart, "egress %s: alpn %s -> %s", title(e), protocols(old.ALPN), protocols(e.ALPN))
		}
	}
	for _, e := range from {
		if _, gone := have[e.Listen]; gone {
			add(HotRestart, "egress %s: removed, %s", title(e), e.Listen)
		}
	}
}

func compareProbes(from, to []schema.Probe, add adder) {
	have := map[string]schema.Probe{}
	for _, p := range from {
		have[p.Name] = p
	}
	for _, p := range to {
		old, ok := have[p.Name]
		delete(have, p.Name)
		switch {
		case !ok:
			add(NoRestart, "probe %s: new, %s %s", p.Name, p.Kind, p)
		case old != p:
			add(NoRestart, "probe %s: %s %s -> %s %s", p.Name, old.Kind, old, p.Kind, p)
		}
	}
	for _, p := range from {
		if _, gone := have[p.Name]; gone {
			add(NoRestart, "probe %s: removed, %s %s", p.Name, p.Kind, p)
		}
	}
}

// title is what an entry is called to people: its name where that is fit to print, else its address.
func title(e schema.Egress) string {
	if e.Name == "" || strings.ContainsFunc(e.Name, func(r rune) bool { return !unicode.IsPrint(r) }) || len(e.Name) > 64 {
		return e.Listen.String()
	}
	return e.Name
}

func protocols(alpn []string) string {
	if alpn == nil {
		return "none"
	}
	return strings.Join(alpn, ", ")
}

func anyOf(names []string) string {
	if names == nil {
		return "anyone"
	}
	return strings.Join(names, ", ")
}
