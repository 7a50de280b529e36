package reconcile

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"unicode"

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

// What a change needs. Certificates need neither.
const (
	NoRestart  Need = "no restart"  // rules in the kernel alone
	HotRestart Need = "hot restart" // a new epoch of Envoy
)

// Compare returns the steps that lead from one mesh to another: none if they do the same. Names alone change nothing.
func Compare(from, to schema.Mesh) []Step {
	var steps []Step
	add := func(need Need, format string, args ...any) {
		steps = append(steps, Step{fmt.Sprintf(format, args...), need})
	}
	comparePorts(from.Ingress, to.Ingress, add)
	compareEgress(from.Egress, to.Egress, add)
	for _, s := range []struct {
		name     string
		from, to any
		need     Need
	}{
		{"tls.minVersion", from.TLS.MinVersion, to.TLS.MinVersion, HotRestart},
		{"envoy.concurrency", from.Envoy.Concurrency, to.Envoy.Concurrency, HotRestart},
		{"envoy.drainTime", from.Envoy.DrainTime, to.Envoy.DrainTime, HotRestart},
		{"envoy.parentShutdownTime", from.Envoy.ParentShutdownTime, to.Envoy.ParentShutdownTime, HotRestart},
		{"envoy.logLevel", from.Envoy.LogLevel, to.Envoy.LogLevel, HotRestart},
		{"otherProtocols", from.OtherProtocols, to.OtherProtocols, NoRestart},
		{"accessLog", from.AccessLog, to.AccessLog, HotRestart},
	} {
		if s.from != s.to {
			add(s.need, "%s: %v -> %v", s.name, s.from, s.to)
		}
	}
	return steps
}

// tightens reports whether connections that were let in under one mesh could be refused under the other.
func tightens(from, to schema.Mesh) bool {
	for _, part := range schema.Parts(from.Ingress, to.Ingress) {
		if !schema.PolicyOf(from.Ingress, part.First).Within(schema.PolicyOf(to.Ingress, part.First)) {
			return true
		}
	}
	return to.TLS.MinVersion > from.TLS.MinVersion
}

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
	}
	for _, e := range from {
		if _, gone := have[e.Listen]; gone {
			add(HotRestart, "egress %s: removed, %s", title(e), e.Listen)
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

func anyOf(names []string) string {
	if names == nil {
		return "anyone"
	}
	return strings.Join(names, ", ")
}
