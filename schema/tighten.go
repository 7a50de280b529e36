package schema

import (
	"cmp"
	"fmt"
	"slices"
)

// With MANTLET_OVERRIDES=tighten the override file may make the mesh stricter and nothing else. What is stricter:
//
//	ingress mode     passthrough > tls > mtls; a port may move to the right. A port without an entry is mtls
//	allow            a list where there was none, or a part of the list that was there
//	serverNames      the same
//	tls.minVersion   1.2 > 1.3
//	probes           fewer of them
//	outbound.mode    accept > observe > drop
//	outbound.allow   a part of the list that was there; any list where the mode becomes stricter and there was none
//	names            say nothing and may change
//
// sourceAddress may not change: neither choice is stricter. A workload that lets in by address lets in other peers by either; and no
// certificate vouches for the address that a client comes from, so whoever controls the network chooses it.
//
// All else must stay as it is: other fields, and the egress entries there are with their upstreams. A new egress entry
// could take an address that the pod's own server means to use. alpn decides which protocol clients and workload take each
// other's bytes for, so another list, longer or shorter, is not stricter; an ingress entry that is removed takes its own along.

// tighten reports where config is not at least as strict as the environment alone, as far as both are right.
func (e *Environment) tighten(config Config, r *report) {
	e.tightenIngress(config, r)
	e.tightenEgress(config, r)
	e.tightenProbes(config, r)
	e.tightenOutbound(config, r)
	base, environment := e.partial, report{problems: e.problems}
	for _, f := range fields {
		path := f.path
		if f.isList {
			continue // see tightenOutbound
		}
		was, is := base.merged.scalar(path), config.merged.scalar(path)
		stricter := valueOf[TLSVersion](is).Compare(valueOf[TLSVersion](was)) > 0 || path == outboundMode // see tightenOutbound
		if is.text != was.text && !stricter && !environment.has(path) {
			r.add(is.origin, path, is.value(), fmt.Sprintf("%s=tighten does not let the file change this; it is %s (%s)",
				overridesVariable, was.text, was.origin))
		}
	}
}

// tightenIngress compares the policies at each port where one of the two could change. Of entries that overlap others it
// compares the first port.
func (e *Environment) tightenIngress(config Config, r *report) {
	base := e.partial
	reported := map[string]bool{}
	refuse := func(at Ports, format string, args ...any) {
		key := at.String()
		if kind := key + format; !reported[kind] {
			reported[kind] = true
			reason := fmt.Sprintf(overridesVariable+"=tighten does not let the file "+format, args...)
			r.add(config.merged.entries("ingress")[key].origin, "ingress["+key+"]", "", reason)
		}
	}
	compare := func(port uint16, was, is Policy) {
		at := cmp.Or(is.entry, was.entry)
		old := base.merged.entries("ingress")[was.entry.String()]
		isKnown := old == nil && !e.incomplete["ingress"] || old != nil && !old.bad["mode"] && !old.bad["allow"]
		if isKnown && !is.Within(was) {
			refuse(at, "open port %d further: it is %s, and would be %s", port, was, is)
		}
		isRemoved := is.entry == (Ports{})
		if isKnown && !isRemoved && was.Mode != ModePassthrough && !slices.Equal(is.ALPN, was.ALPN) && (old == nil || !old.bad["alpn"]) {
			refuse(at, "change alpn of port %d: it is %s, and would be %s", port, listed(was.ALPN), listed(is.ALPN))
		}
	}
	for _, part := range Parts(base.Mesh.Ingress, config.Mesh.Ingress) {
		compare(part.First, PolicyOf(base.Mesh.Ingress, part.First), PolicyOf(config.Mesh.Ingress, part.First))
	}
	for _, in := range config.overlapping {
		compare(in.Ports.First, PolicyOf(base.Mesh.Ingress, in.Ports.First), in.policy())
	}
}

func (e *Environment) tightenEgress(config Config, r *report) {
	refuse := func(key, reason string) {
		r.add(config.merged.entries("egress")[key].origin, "egress["+key+"]", "",
			fmt.Sprintf("%s=tighten does not let the file %s", overridesVariable, reason))
	}
	is := map[string]Egress{}
	for _, entry := range config.Mesh.Egress {
		is[entry.Listen.String()] = entry
	}
	for _, was := range e.partial.Mesh.Egress {
		key := was.Listen.String()
		bad := e.partial.merged.entries("egress")[key].bad
		entry, ok := is[key]
		delete(is, key)
		switch {
		case !ok:
			refuse(key, "remove an entry")
		case entry.Upstream != was.Upstream && !bad["upstream"]:
			refuse(key, fmt.Sprintf("change the upstream: it is %s, and would be %s", was.Upstream, entry.Upstream))
		case !entry.Within(was) && !bad["serverNames"]:
			refuse(key, fmt.Sprintf("add server names: they are %s, and would be %s", listed(was.ServerNames), listed(entry.ServerNames)))
		}
		if ok && !slices.Equal(entry.ALPN, was.ALPN) && !bad["alpn"] {
			refuse(key, fmt.Sprintf("change alpn: it is %s, and would be %s", listed(was.ALPN), listed(entry.ALPN)))
		}
	}
	for key := range is {
		if !e.incomplete["egress"] {
			refuse(key, "add an entry")
		}
	}
}

func (e *Environment) tightenProbes(config Config, r *report) {
	for _, p := range config.Mesh.Probes {
		entry := config.merged.entries("probes")[p.Name]
		if p.Kind != "" && !slices.Contains(e.partial.Mesh.Probes, p) && !e.incomplete["probes"] {
			r.add(entry.origin, "probes["+p.Name+"]", "", overridesVariable+"=tighten does not let the file add a probe, or change one")
		}
	}
}

func (e *Environment) tightenOutbound(config Config, r *report) {
	was, is := e.partial.Mesh.Outbound, config.Mesh.Outbound
	environment := report{problems: e.problems}
	refuse := func(path, format string, args ...any) {
		s := config.merged.scalar(path)
		r.add(s.origin, path, s.value(), fmt.Sprintf(overridesVariable+"=tighten does not let the file "+format, args...))
	}
	switch mode := e.partial.merged.scalar(outboundMode); {
	case is.Within(was) || environment.has(outboundMode) || environment.has(outboundAllow):
	case is.Mode.strictness() < was.Mode.strictness():
		refuse(outboundMode, "loosen this; it is %s (%s)", was.Mode, mode.origin)
	default:
		refuse(outboundAllow, "allow more; %s is not in what is allowed, which is %s (%s)",
			listed(is.beyond(was)), listed(was.List()), e.partial.merged.scalar(outboundAllow).origin)
	}
}
