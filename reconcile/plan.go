package reconcile

import (
	"fmt"
	"math"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"unicode"

	"mantlet/schema"
)

// Step is one difference between two meshes, and what it needs.
type Step struct {
	What string `json:"what"` // as "8080: passthrough -> mtls"
	Need Need   `json:"need"`
	Ends int    `json:"ends,omitempty"` // how many open connections the step would end, where a running mantlet tells
}

func (s Step) String() string {
	text := s.What + "; " + string(s.Need)
	switch s.Ends {
	case 0:
		return text
	case 1:
		return text + "; ends 1 open connection"
	default:
		return fmt.Sprintf("%s; ends %d open connections", text, s.Ends)
	}
}

// Need is what a step needs of Envoy.
type Need string

// The needs.
const (
	NoRestart  Need = "no restart"  // at most other rules in the kernel
	SDS        Need = "SDS"         // certificates are published to the running Envoy
	HotRestart Need = "hot restart" // a new epoch of Envoy
	Start      Need = "start"       // of Envoy: none runs
)

// Compare returns the steps from one mesh to another; none if they have the same effect. Names have none.
func Compare(from, to schema.Mesh) []Step {
	var steps []Step
	add := func(need Need, format string, args ...any) {
		steps = append(steps, Step{What: fmt.Sprintf(format, args...), Need: need})
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
	if from.Outbound.Mode != to.Outbound.Mode {
		add(NoRestart, "outbound.mode: %v -> %v", from.Outbound.Mode, to.Outbound.Mode)
	}
	hasList := from.Outbound.Mode != schema.OutboundAccept || to.Outbound.Mode != schema.OutboundAccept
	if was, is := from.Outbound.List(), to.Outbound.List(); hasList && !slices.Equal(was, is) {
		add(NoRestart, "outbound.allow: [%s] -> [%s]", strings.Join(was, ", "), strings.Join(is, ", "))
	}
	if from.MaxConnectionAge != to.MaxConnectionAge {
		restarts("maxConnectionAge: %s -> %s", ageOf(from), ageOf(to))
	}
	if from.AccessLog != to.AccessLog {
		need := NoRestart // without listeners Envoy has no access log
		if hasListeners(from) || hasListeners(to) {
			need = HotRestart
		}
		add(need, "accessLog: %v -> %v", from.AccessLog, to.AccessLog)
	}
	if from.SourceAddress != to.SourceAddress {
		add(HotRestart, "sourceAddress: %v -> %v", from.SourceAddress, to.SourceAddress)
	}
	return steps
}

// hasListeners reports whether Envoy has listeners for a mesh.
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

// tightened returns the ports where connections that one mesh lets in could be refused by the other.
func tightened(from, to schema.Mesh) (all []schema.Ports) {
	raised := to.TLS.MinVersion.Compare(from.TLS.MinVersion) > 0
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

// tightens reports whether connections that one mesh makes or lets in could be refused by the other.
func tightens(from, to schema.Mesh) bool {
	return len(tightened(from, to)) > 0 || len(forbidden(from, to, false)) > 0
}

type adder func(need Need, format string, args ...any)

// comparePorts describes changes by ranges of ports that have one policy before and one after.
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
			at := ""
			if name := title(e); name != e.Listen.String() {
				at = ", " + e.Listen.String()
			}
			add(HotRestart, "egress %s: removed%s", title(e), at)
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

// title returns what an entry is called in a step: its name if that is printable, else its address.
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
