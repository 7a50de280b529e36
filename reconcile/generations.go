package reconcile

import (
	"slices"

	"mantlet/render"
	"mantlet/schema"
)

// advance returns the generations for a mesh that follows another one: a new one at each port where connections may be
// open that would not be let in any more, and the old one at all others. revoked tells that a mesh CA was taken away, which
// is nothing to ports that ask for no certificate.
//
// The mode's mark alone would not do: a connection that says nothing while its port goes to another mode and back would
// outlive what was tightened meanwhile. Each port counts by itself, so ports share generations, and the chains of these: a
// connection has one port, and a mark of another port's past is nothing to it.
func advance(have render.Generations, from, to schema.Mesh, revoked bool) render.Generations {
	raised := to.TLS.MinVersion > from.TLS.MinVersion
	ranges := make([]schema.Ports, 0, len(have.Ports))
	for _, p := range have.Ports {
		ranges = append(ranges, p.Ports)
	}
	next := render.Generations{Default: have.Default}
	if revoked || raised {
		next.Default = after(have.Default)
	}
	for _, part := range schema.Cut(append(ranges, schema.Parts(from.Ingress, to.Ingress)...)) {
		was, is := schema.PolicyOf(from.Ingress, part.First), schema.PolicyOf(to.Ingress, part.First)
		generation := have.At(part.First)
		if raised || revoked && was.Mode != schema.ModeTLS || !was.Within(is) {
			generation = after(generation)
		}
		if generation != next.Default {
			next.Ports = append(next.Ports, render.PortsGeneration{Ports: part, Generation: generation})
		}
	}
	return next
}

// loosest returns the loosest mesh that can have been in force before this mantlet, and its generations: the rules that it
// found tell modes and generations, and not which clients were let in, or with which TLS. Where they can't be read, nobody knows
// what was before. It reports false where there was nothing.
func loosest(found render.Ruleset, want schema.Mesh) (schema.Mesh, render.Generations, bool) {
	ingress, generations, ok := render.ReadBack(found)
	if !ok {
		ingress = slices.Clone(want.Ingress)
		for i := range ingress {
			ingress[i].Allow = nil
		}
	}
	return schema.Mesh{Ingress: ingress, TLS: schema.TLS{MinVersion: schema.TLS12}}, generations, len(found.Chains) > 0
}

// after returns the generation that follows a port's. Once all were in use it is the first again.
func after(g render.Generation) render.Generation { return (g + 1) % (render.MaxGeneration + 1) }
