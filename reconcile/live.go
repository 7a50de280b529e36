package reconcile

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"mantlet/internal/status"
	"mantlet/render"
	"mantlet/schema"
)

// Live is the state of the kernel and Envoy, as they report it.
type Live struct {
	Rules        render.Ruleset
	Fit          func(render.Ruleset) render.Ruleset // adapts rules to this kernel; nil for no adaptation
	Routes       func(render.Routes) error           // returns how the policy routes differ from some; nil: not at all
	Envoy        status.Envoy
	Certificates []string // differences between what Envoy has and the TLS directory, a line each
}

// Difference is how what is live differs from what is wanted.
type Difference struct {
	Steps   []Step   `json:"steps"`             // from what is live to what is wanted, in the configuration's terms; none if they are the same
	Details []string `json:"details,omitempty"` // the rules in the kernel, and the fields of Envoy's bootstrap, that differ
}

// Diff returns how what is live differs from a mesh in a place. Rules are compared in the generations that are in force.
func Diff(mesh schema.Mesh, place render.Place, have Live) (Difference, error) {
	state, err := render.Render(mesh, place)
	if err != nil {
		return Difference{}, err
	}
	var d Difference
	add := func(need Need, format string, args ...any) {
		d.Steps = append(d.Steps, Step{What: fmt.Sprintf(format, args...), Need: need})
	}
	live, reported := inForce(mesh, place, have)
	d.Steps = Compare(live, mesh)
	_, generations, known := render.ReadBack(have.Rules)
	d.Details = have.diffRules(place, mesh, generations)
	switch rest := have.diffRules(place, live, generations); {
	case render.Denies(have.Rules):
		add(NoRestart, "nothing is let in -> what the configuration says")
	case !known && len(rest) == 1: // it is not there
		add(NoRestart, "%s", rest[0])
	case len(rest) > 0:
		add(NoRestart, "rules: the kernel has others than the configuration makes; -v lists them")
	}
	if have.Routes != nil {
		if err := have.Routes(state.Routes(place)); err != nil {
			for line := range strings.Lines(err.Error()) {
				add(NoRestart, "policy routes: %s", strings.TrimSpace(line))
			}
		}
	}
	for _, line := range have.Certificates {
		add(SDS, "%s", line)
	}
	steps, details := diffEnvoy(state, mesh.Envoy, have.Envoy, reported)
	d.Steps, d.Details = append(d.Steps, steps...), append(d.Details, details...)
	return d, nil
}

// diffRules returns how the live rules differ from those of a mesh, a line each.
func (l Live) diffRules(place render.Place, mesh schema.Mesh, generations render.Generations) []string {
	want := render.RulesIn(place, mesh, generations)
	if l.Fit != nil {
		want = l.Fit(want)
	}
	return render.Diff(want, l.Rules)
}

// inForce returns the mesh that the kernel and Envoy have in force, as far as they report it; the rest is taken from the wanted one.
// reported says whether Envoy reports its part.
func inForce(mesh schema.Mesh, place render.Place, have Live) (live schema.Mesh, reported bool) {
	live = mesh
	if before, ok := render.MeshOf(have.Envoy.Bootstrap, have.Envoy.Digest, place); ok {
		before.Probes, before.OtherProtocols, before.StatusPort = mesh.Probes, mesh.OtherProtocols, mesh.StatusPort
		live, reported = before, true
	}
	live.Outbound = outboundIn(place, mesh.Outbound, have.Rules)
	modes, generations, ok := render.ReadBack(have.Rules)
	if !ok || render.Denies(have.Rules) {
		live.Ingress = mesh.Ingress
		return live, reported
	}
	live.Ingress = withModes(modes, live.Ingress)
	differ := func(other schema.OtherProtocols) int {
		mesh := live
		mesh.OtherProtocols = other
		return len(have.diffRules(place, mesh, generations))
	}
	if differ(schema.OtherProtocolsAccept) < differ(schema.OtherProtocolsDrop) {
		live.OtherProtocols = schema.OtherProtocolsAccept
	} else {
		live.OtherProtocols = schema.OtherProtocolsDrop
	}
	return live, reported
}

// outboundIn returns what live rules do with what the pod sends: as a wanted Outbound says it, where they have the same meaning.
func outboundIn(place render.Place, want schema.Outbound, rules render.Ruleset) schema.Outbound {
	is := render.OutboundOf(rules)
	like := render.OutboundOf(render.RulesIn(place, schema.Mesh{Outbound: want}, render.Generations{}))
	if reflect.DeepEqual(is, like) || len(rules.Chains) == 0 {
		return want
	}
	// Name servers can be on the list by themselves, too. Then "dns" says more than it has to.
	servers := slices.DeleteFunc(slices.Clone(place.Resolvers[:]), func(addr netip.Addr) bool { return !addr.IsValid() || addr.IsLoopback() })
	isServer := func(d schema.Destination) bool {
		return d.Port == 53 && d.Prefix.IsSingleIP() && slices.Contains(servers, d.Prefix.Addr())
	}
	if rest := slices.DeleteFunc(slices.Clone(is.Allow), isServer); len(servers) > 0 && len(is.Allow)-len(rest) == len(servers) {
		is.DNS, is.Allow = true, rest
	}
	return is
}

// withModes returns entries, sorted, with the lists of clients and of protocols of others.
func withModes(modes, lists []schema.Ingress) (all []schema.Ingress) {
	rest := modes
	for _, ports := range schema.Parts(modes, lists) {
		for len(rest) > 0 && rest[0].Ports.Last < ports.First {
			rest = rest[1:]
		}
		if len(rest) == 0 || !rest[0].Ports.Contains(ports.First) {
			continue
		}
		in, policy := schema.Ingress{Ports: ports, Mode: rest[0].Mode}, schema.PolicyOf(lists, ports.First)
		if in.Mode == schema.ModeMTLS {
			in.Allow = policy.Allow
		}
		if in.Mode != schema.ModePassthrough {
			in.ALPN = policy.ALPN
		}
		all = append(all, in)
	}
	return all
}

// diffEnvoy compares a running Envoy with a state. If Envoy reported the mesh that it was started for, the steps to another mesh are
// known already.
func diffEnvoy(state render.State, settings schema.Envoy, have status.Envoy, reported bool) (steps []Step, details []string) {
	add := func(format string, args ...any) {
		steps = append(steps, Step{What: fmt.Sprintf(format, args...), Need: HotRestart})
	}
	switch {
	case have.State == "":
		return []Step{{What: "Envoy: none runs", Need: Start}}, nil
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
	if !reported {
		compareSettings(have.Settings, settings, add)
		add("Envoy: epoch %d runs the state %.12s, not %.12s; -v lists what differs", have.Epoch, have.Digest, state.Digest)
	}
	return steps, details
}
