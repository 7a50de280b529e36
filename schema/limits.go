package schema

import (
	"fmt"
	"slices"
	"strings"
)

// What a configuration may cost, so that a small file can't take a node's memory. Measured with Envoy 1.40: an egress entry
// takes 115 KiB and 2.5 ms of a processor to start with, a list of clients 40 KiB and 1.4 ms, a name 6 KiB. A hot restart takes
// it twice.
const (
	maxEgress = 10_000
	maxLists  = 4_000  // of clients, equal ones counted once
	maxNames  = 20_000 // of clients and endpoints, those of equal lists of clients counted once
)

// price is what a part of a configuration costs.
type price struct {
	setting              *setting
	path                 string
	egress, lists, names int
}

// limits reports where a configuration costs more than it may: at the first setting, in the order of the sources, that is
// too much.
func (c *Config) limits(r *report) {
	var prices []price
	for key, e := range c.merged.entries("ingress") {
		if s := e.fields["allow"]; s != nil && !e.removed() {
			prices = append(prices, price{setting: s, path: "ingress[" + key + "].allow", names: len(s.list)})
		}
	}
	for key, e := range c.merged.entries("egress") {
		if e.removed() {
			continue
		}
		if s := e.fields["serverNames"]; s != nil {
			prices = append(prices, price{setting: s, path: "egress[" + key + "].serverNames", names: len(s.list)})
		}
		prices = append(prices, price{setting: &setting{origin: e.origin}, path: "egress[" + key + "]", egress: 1})
	}
	names := 0
	for _, p := range prices {
		names += p.names
	}
	if len(prices) <= maxLists && names <= maxNames { // as a rule: that is enough to know
		return
	}
	seen := map[string]bool{}
	slices.SortStableFunc(prices, func(a, b price) int {
		if order := a.setting.origin.compare(b.setting.origin); order != 0 {
			return order
		}
		return strings.Compare(a.path, b.path)
	})
	var sum price
	for _, p := range prices {
		before := sum
		if list := strings.Join(sorted(p.setting.list), "\x00"); strings.HasPrefix(p.path, "ingress") {
			if seen[list] {
				continue
			}
			seen[list] = true
			sum.lists++
		}
		sum.egress += p.egress
		sum.names += p.names
		for _, limit := range []struct {
			before, now, most int
			what              string
		}{
			{before.egress, sum.egress, maxEgress, "egress entries"},
			{before.lists, sum.lists, maxLists, "different lists of clients (allow)"},
			{before.names, sum.names, maxNames, "names in lists (allow, serverNames)"},
		} {
			if limit.before <= limit.most && limit.now > limit.most {
				r.add(p.setting.origin, p.path, "", fmt.Sprintf("is too much: there can be at most %d %s, since each costs Envoy memory", limit.most, limit.what))
			}
		}
	}
}
