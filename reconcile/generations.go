package reconcile

import (
	"reflect"
	"slices"
	"time"

	"mantlet/render"
	"mantlet/schema"
)

// nextGenerations returns the generations for a mesh that follows another one: a new one at each port where connections may be
// open that would not be let in any more, and the old one at all others. revoked tells that a mesh CA was taken away, which
// is nothing to ports that ask for no certificate.
//
// The mode's mark alone would not do: a connection that says nothing while its port goes to another mode and back would
// outlive what was tightened meanwhile. Each port counts by itself, so ports share generations, and the chains of these: a
// connection has one port, and a mark of another port's past is nothing to it.
func nextGenerations(have render.Generations, from, to schema.Mesh, revoked bool) render.Generations {
	raised := to.TLS.MinVersion > from.TLS.MinVersion
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

// laxestBefore returns the most permissive mesh that can have been in force before this mantlet, and its generations: the rules that it
// found tell modes and generations, and not which clients were let in, or with which TLS. Where they can't be read, nobody knows
// what was before. It reports false where there was nothing.
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

// advances are the changes of generations that are not longer than maxSilence ago.
type advances []advance

type advance struct {
	at       time.Time
	from, to render.Generations
}

const (
	// maxSilence is more than a connection can go without a packet, by which a change that forbids it ends it: Envoy's keepalive
	// asks after a minute.
	maxSilence = 3 * time.Minute
	// maxAdvances bounds what is kept, and looked through.
	maxAdvances = 500
	// maxRaisesOfPort leaves out the generation that a port is in, and the one that connections are moved to: see render.Generations.
	maxRaisesOfPort = int(render.MaxGeneration) - 1
)

// add takes note of a change. It reports whether some port has had so many that the next one could bring back a generation
// which silent connections have; then all is forgotten, for the caller ends them.
func (r *advances) add(now time.Time, from, to render.Generations) bool {
	if reflect.DeepEqual(from, to) {
		return false
	}
	*r = append(slices.DeleteFunc(*r, func(old advance) bool { return now.Sub(old.at) > maxSilence }), advance{now, from, to})
	exhausted := len(*r) >= maxAdvances
	if len(*r) >= maxRaisesOfPort {
		ports := []uint16{0} // which no entry contains, as most ports
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
