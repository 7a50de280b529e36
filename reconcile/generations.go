package reconcile

import (
	"mantlet/render"
	"mantlet/schema"
)

// advance returns the generations for a mesh that follows another one: a new one at each port where connections may be
// open that would not be let in any more and whose mode does not show it, and the old one at all others. everywhere asks
// for a new one at all ports: a mesh CA was taken away.
func advance(have render.Generations, from, to schema.Mesh, everywhere bool) render.Generations {
	if everywhere || to.TLS.MinVersion > from.TLS.MinVersion {
		return render.Generations{Default: fresh(have)}
	}
	var ranges []schema.Ports
	for _, p := range have.Ports {
		ranges = append(ranges, p.Ports)
	}
	next := render.Generations{Default: have.Default}
	for _, part := range schema.Cut(append(ranges, schema.Parts(from.Ingress, to.Ingress)...)) {
		was, is := schema.PolicyOf(from.Ingress, part.First), schema.PolicyOf(to.Ingress, part.First)
		generation := have.At(part.First)
		if was.Mode == is.Mode && !was.Within(is) {
			generation = fresh(have)
		}
		if generation != next.Default {
			next.Ports = append(next.Ports, render.PortsGeneration{Ports: part, Generation: generation})
		}
	}
	return next
}

// fresh returns a generation that is not in force anywhere. It comes round after all others were used, long after the last
// packet of the connections that it stood for.
func fresh(have render.Generations) render.Generation {
	used := map[render.Generation]bool{have.Default: true}
	newest := have.Default
	for _, p := range have.Ports {
		used[p.Generation] = true
		newest = max(newest, p.Generation)
	}
	for g := newest; ; {
		g = (g + 1) % (render.MaxGeneration + 1)
		if !used[g] || g == newest {
			return g
		}
	}
}
