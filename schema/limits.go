package schema

import (
	"fmt"
	"slices"
	"strings"
)

// What a configuration may cost, so that a small file can't take a node's memory. Measured with Envoy 1.40: an egress entry
// takes 115 KiB and 2.5 ms of a processor to start with, a list of clients or protocols 40 KiB and 1.4 ms, a name 6 KiB. A hot
// restart takes it twice.
const (
	maxEgress = 10_000
	maxLists  = 4_000  // of clients and of protocols, equal ones counted once
	maxNames  = 20_000 // of clients and endpoints, those of equal lists of clients counted once
)

// price is what a part of a configuration costs.
type price struct {
	setting              *setting
	path                 string
	key                  string // of lists: equal ones cost once
	egress, lists, names int
}

// limits reports where a configuration costs more than it may: at the first setting, in the order of the sources, that is
// too much.
func (c *Config) limits(r *report) {
	var prices []price
	for key, e := range c.merged.entries("ingress") {
		if e.removed() {
			continue
		}
		lists := "+" + strings.Join(sorted(e.list("allow")), "\x00") + "\x00\x00" + strings.Join(e.list("alpn"), "\x00")
		if s := e.fields["allow"]; s != nil {
			prices = append(prices, price{setting: s, path: "ingress[" + key + "].allow", key: lists, lists: 1, names: len(s.list)})
		} else if s := e.fields["alpn"]; s != nil { // of which both listeners have it
			prices = append(prices, price{setting: s, path: "ingress[" + key + "].alpn", key: lists, lists: 2})
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
	names, lists := 0, 0
	for _, p := range prices {
		names, lists = names+p.names, lists+p.lists
	}
	if lists <= maxLists && len(prices) <= maxEgress && names <= maxNames { // as a rule: that is enough to know
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
		if seen[p.key] {
			continue
		}
		seen[p.key] = p.key != ""
		sum.lists += p.lists
		sum.egress += p.egress
		sum.names += p.names
		for _, limit := range []struct {
			before, now, most int
			what              string
		}{
			{before.egress, sum.egress, maxEgress, "egress entries"},
			{before.lists, sum.lists, maxLists, "different lists of clients and protocols (allow, alpn)"},
			{before.names, sum.names, maxNames, "names in lists (allow, serverNames)"},
		} {
			if limit.before <= limit.most && limit.now > limit.most {
				r.add(p.setting.origin, p.path, "", fmt.Sprintf("is too much: there can be at most %d %s, since each costs Envoy memory", limit.most, limit.what))
			}
		}
	}
}
