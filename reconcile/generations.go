package reconcile

import (
	"mantlet/render"
	"mantlet/schema"
)

// advance returns the generations for a mesh that follows another one: a new one at each port where connections may be
// open that would not be let in any more, and the old one at all others. everywhere asks for a new one at all ports: a mesh
// CA was taken away.
//
// The mode's mark alone would not do: a connection that says nothing while its port goes to another mode and back would
// outlive what was tightened meanwhile.
func advance(have render.Generations, from, to schema.Mesh, everywhere bool) render.Generations {
	everywhere = everywhere || to.TLS.MinVersion > from.TLS.MinVersion
	ranges := make([]schema.Ports, 0, len(have.Ports))
	for _, p := range have.Ports {
		ranges = append(ranges, p.Ports)
	}
	next := render.Generations{Default: have.Default}
	if everywhere {
		next.Default = after(have, have.Default)
	}
	for _, part := range schema.Cut(append(ranges, schema.Parts(from.Ingress, to.Ingress)...)) {
		was, is := schema.PolicyOf(from.Ingress, part.First), schema.PolicyOf(to.Ingress, part.First)
		generation := have.At(part.First)
		if everywhere || !was.Within(is) {
			generation = after(have, generation)
		}
		if generation != next.Default {
			next.Ports = append(next.Ports, render.PortsGeneration{Ports: part, Generation: generation})
		}
	}
	return next
}

// after returns a generation to follow that of a port: one that is in force nowhere, the same for every port of a change,
// or, where all are in use, simply another one.
func after(have render.Generations, generation render.Generation) render.Generation {
	const count = render.MaxGeneration + 1
	used := map[render.Generation]bool{have.Default: true}
	newest := have.Default
	for _, p := range have.Ports {
		used[p.Generation] = true
		newest = max(newest, p.Generation)
	}
	for i := range count {
		if g := (newest + 1 + i) % count; !used[g] {
			return g
		}
	}
	return (generation + 1) % count
}
