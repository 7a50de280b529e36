package reconcile

import (
	"reflect"
	"slices"
	"time"

	"mantlet/render"
	"mantlet/schema"
)

// nextGenerations returns the generations for a mesh that follows another one: a new one at each port where connections may be open that
// the new mesh would not let in, and the old one at all others. revoked says that a mesh CA was removed; that does not concern ports that
// require no client certificate.
//
// A mark of the mode alone would not be enough: a connection that is silent while its port goes to another mode and back would survive a
// change that forbade it. Generations are counted for each port, so several ports share a generation and its chains. A connection has one
// port, so what another port's generation means for it does not matter.
func nextGenerations(have render.Generations, from, to schema.Mesh, revoked bool) render.Generations {
	raised := to.TLS.MinVersion.Compare(from.TLS.MinVersion) > 0
	ranges := make([]schema.Ports, 0, len(have.Ports))
	for _, p := range have.Ports {
		ranges = append(ranges, p.Ports)
	}
	next := render.Generations{Default: have.Default}
	if revoked || raised {
		next.Default = have.Default.Next()
	}
	for _, part := range schema.Cut(append(ranges, schema.Parts(from.Ingress, to.Ingress)...)) {
		was, is := schema.PolicyOf(from.Ingress, part.First), schema.PolicyOf(to.Ingress, part.First)
		generation := have.At(part.First)
		if raised || revoked && was.Mode != schema.ModeTLS || !was.Within(is) {
			generation = generation.Next()
		}
		if generation != next.Default {
			next.Ports = append(next.Ports, render.PortsGeneration{Ports: part, Generation: generation})
		}
	}
	return next
}

// laxestBefore returns the most permissive mesh that may have been in force before this mantlet, and its generations. The rules that
// mantlet found have modes and generations, but neither the clients that were let in nor the TLS versions. If they can't be read, anybody
// may have been let in. It returns false if there were no rules.
func laxestBefore(found render.Ruleset, want schema.Mesh) (schema.Mesh, render.Generations, bool) {
	ingress, generations, ok := render.ReadBack(found)
	if !ok {
		ingress = slices.Clone(want.Ingress)
		for i := range ingress {
			ingress[i].Allow = nil
		}
	}
	return schema.Mesh{Ingress: ingress, TLS: schema.TLS{MinVersion: schema.TLS12}}, generations, len(found.Chains) > 0
}

// advances are the changes of generations of the last maxSilence.
type advances []advance

type advance struct {
	at       time.Time
	from, to render.Generations
}

const (
	// maxSilence is longer than a connection can be without a packet: Envoy sends keepalives after a minute. A packet of a connection
	// that a change forbids ends it.
	maxSilence = 3 * time.Minute
	// maxAdvances bounds the list.
	maxAdvances = 500
	// maxRaisesOfPort leaves out the generation that a port has, and the one that connections are moved to, see render.Generations.
	maxRaisesOfPort = int(render.MaxGeneration) - 1
)

// add appends a change. It returns true if a port has changed so often that its next generation could be one that silent connections
// still have. The caller ends all connections then, and the list is emptied.
func (r *advances) add(now time.Time, from, to render.Generations) bool {
	if reflect.DeepEqual(from, to) {
		return false
	}
	*r = append(slices.DeleteFunc(*r, func(old advance) bool { return now.Sub(old.at) > maxSilence }), advance{now, from, to})
	exhausted := len(*r) >= maxAdvances
	if len(*r) >= maxRaisesOfPort {
		ports := []uint16{0} // stands for the ports without an entry
		var ranges []schema.Ports
		for _, one := range *r {
			for _, p := range slices.Concat(one.from.Ports, one.to.Ports) {
				ranges = append(ranges, p.Ports)
			}
		}
		for _, part := range schema.Cut(ranges) {
			ports = append(ports, part.First)
		}
		exhausted = exhausted || slices.ContainsFunc(ports, func(port uint16) bool {
			count := 0
			for _, one := range *r {
				if one.from.At(port) != one.to.At(port) {
					count++
				}
			}
			return count >= maxRaisesOfPort
		})
	}
	if exhausted {
		*r = nil
	}
	return exhausted
}
