package render

import (
	"slices"
	"strings"

	"mantlet/schema"
)

// Remembering returns deny-all rules that tell ReadBack what it would read of the rules before them, in a map and chains that
// no packet gets to: what a mantlet that ends at its start leaves behind must not lose the generations, or the next one would
// take one for new that connections of before have.
func (r Ruleset) Remembering(before Ruleset) Ruleset {
	ingress, generations, ok := ReadBack(before)
	if !ok {
		return r
	}
	standard := policy{mode: schema.ModeMTLS, generation: generations.Default}
	former, all := Map{Name: formerMap}, parts(schema.Mesh{Ingress: ingress}, generations)
	for _, part := range all {
		former.Elements = append(former.Elements, Element{part.ports, goTo(part.in())})
	}
	r.Maps = append(slices.Clip(r.Maps), former)
	r.Chains = append(slices.Clip(r.Chains), Chain{Name: portsChain, Rules: []Rule{{goTo(standard.in())}}})
	for _, p := range inUse(standard, all) {
		r.Chains = append(r.Chains, Chain{Name: p.in()})
	}
	return r
}

// ReadBack returns what the names of a live ruleset's chains tell: the modes of ports, and the generations. It reports false
// where these are no rules of a mesh, nor remember any.
func ReadBack(r Ruleset) (ingress []schema.Ingress, g Generations, ok bool) {
	i := slices.IndexFunc(r.Chains, func(c Chain) bool { return c.Name == portsChain })
	j := slices.IndexFunc(r.Maps, func(m Map) bool { return m.Name == formerMap })
	if j < 0 {
		j = slices.IndexFunc(r.Maps, func(m Map) bool { return m.Name == modesMap })
	}
	if i < 0 || j < 0 {
		return nil, g, false
	}
	for _, rule := range r.Chains[i].Rules {
		if len(rule) == 0 { // a live rule can be empty
			continue
		}
		if v, isVerdict := rule[len(rule)-1].(Verdict); isVerdict {
			if p, isPolicy := parsePolicy(v.Goto); isPolicy {
				g.Default, ok = p.generation, true
			}
		}
	}
	answers := Map{}
	if k := slices.IndexFunc(r.Maps, func(m Map) bool { return m.Name == answersMap }); k >= 0 {
		answers = r.Maps[k]
	}
	for _, e := range r.Maps[j].Elements {
		p, isPolicy := parsePolicy(e.Verdict.Goto)
		if e.Verdict == drop { // the port is closed
			answer, _ := answers.at(e.Ports.First)
			p, isPolicy = parsePolicy(strings.Replace(answer.Goto, "_out", "_in", 1))
		}
		if !isPolicy {
			continue
		}
		ingress = append(ingress, schema.Ingress{Ports: e.Ports, Mode: p.mode})
		if p.generation != g.Default {
			g.Ports = append(g.Ports, PortsGeneration{e.Ports, p.generation})
		}
	}
	return ingress, g, ok
}

// Denies reports whether a live ruleset lets nothing in, whatever it remembers.
func Denies(r Ruleset) bool {
	return slices.ContainsFunc(r.Maps, func(m Map) bool { return m.Name == formerMap })
}

// parsePolicy is the inverse of policy.in.
func parsePolicy(chain string) (policy, bool) {
	for _, mode := range []schema.Mode{schema.ModeMTLS, schema.ModeTLS, schema.ModePassthrough} {
		for generation := range MaxGeneration + 1 {
			if p := (policy{mode: mode, generation: generation}); p.in() == chain {
				return p, true
			}
		}
	}
	return policy{}, false
}
