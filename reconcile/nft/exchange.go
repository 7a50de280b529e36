package nft

import (
	"maps"
	"slices"
	"strings"

	"github.com/google/nftables"

	"mantlet/render"
)

// kept is what stays in the table while other rules take the place of those that are there. The zero value is nothing.
//
// Open connections must not notice, so no map or list changes that a packet may be looked up in. A packet that the old rules are looking at
// when a transaction is committed sees maps as they are after it (nft_genmask_cur, include/net/netfilter/nf_tables.h): in one that is made
// anew it finds nothing. While elements of an interval map are exchanged, the kernel may find those of the ports beside
// (__nft_rbtree_lookup, net/netfilter/nft_set_rbtree.c). So a map with other content gets another name, and is there, with the chains that it
// leads to, before the rules that use it; and the old one goes after the old rules.
type kept struct {
	chains map[string]bool
	sets   map[string]bool // maps and lists
}

// alternate ends the other one of the two names that a map or list can have.
const alternate = ".2"

// otherName returns the name that a map or list has after the next exchange.
func otherName(name string) string {
	if first, is := strings.CutSuffix(name, alternate); is {
		return first
	}
	return name + alternate
}

// firstName returns the name by which it is rendered.
func firstName(name string) string { return strings.TrimSuffix(name, alternate) }

// keep returns what can stay when r takes the place of what is there, nothing where that is not known, and r with the names that its maps and
// lists get: those that are there with the same content keep theirs.
func (t *Table) keep(r render.Ruleset) (kept, render.Ruleset) {
	if t.unsure || len(t.want.Maps) == 0 {
		return kept{}, r
	}
	if now, err := t.revision(); err != nil || !t.owned && now != t.checkedAt {
		return kept{}, r
	}
	k, names := kept{map[string]bool{}, map[string]bool{}}, map[string]string{}
	for _, c := range t.want.Chains {
		k.chains[c.Name] = !slices.ContainsFunc(r.Chains, func(next render.Chain) bool { return next.Name == c.Name && next.Hook != c.Hook })
	}
	for _, old := range t.want.Maps {
		k.sets[old.Name] = true
		for _, next := range r.Maps {
			if next.Name == firstName(old.Name) {
				names[next.Name] = nameOf(old.Name, slices.Equal(old.Elements, next.Elements))
			}
		}
	}
	for _, old := range t.want.Lists {
		k.sets[old.Name] = true
		for _, next := range r.Lists {
			if next.Name == firstName(old.Name) {
				names[next.Name] = nameOf(old.Name, slices.Equal(old.Destinations, next.Destinations))
			}
		}
	}
	return k, r.Renamed(names)
}

func nameOf(old string, same bool) string {
	if same {
		return old
	}
	return otherName(old)
}

// prepare makes the maps and lists of r that are not there, and the chains that they lead to, in a transaction of its own. Nothing leads there
// yet. Where it fails nothing is kept.
func (t *Table) prepare(r render.Ruleset) {
	k := t.keeps
	if len(k.sets) == 0 {
		return
	}
	var part render.Ruleset
	for _, c := range r.Chains {
		leads := slices.ContainsFunc(r.Maps, func(m render.Map) bool {
			return slices.ContainsFunc(m.Elements, func(e render.Element) bool { return e.Verdict.Goto == c.Name })
		})
		if leads && !k.chains[c.Name] && c.Hook.Name == "" {
			part.Chains = append(part.Chains, c)
		}
	}
	part.Maps = slices.DeleteFunc(slices.Clone(r.Maps), func(m render.Map) bool { return k.sets[m.Name] })
	part.Lists = slices.DeleteFunc(slices.Clone(r.Lists), func(l render.List) bool { return k.sets[l.Name] })
	if len(part.Chains)+len(part.Maps)+len(part.Lists) == 0 {
		return
	}
	if t.transaction(func(b *batch) error { return t.add(b, part, nil) }) != nil {
		t.keeps = kept{}
		return
	}
	for _, c := range part.Chains {
		k.chains[c.Name] = true
	}
	for _, m := range part.Maps {
		k.sets[m.Name] = true
	}
	for _, l := range part.Lists {
		k.sets[l.Name] = true
	}
}

// sweep deletes what was kept and is not r's. Nothing leads there any more.
func (t *Table) sweep(r render.Ruleset) error {
	for _, c := range r.Chains {
		delete(t.keeps.chains, c.Name)
	}
	for _, m := range r.Maps {
		delete(t.keeps.sets, m.Name)
	}
	for _, l := range r.Lists {
		delete(t.keeps.sets, l.Name)
	}
	maps.DeleteFunc(t.keeps.chains, func(_ string, stayed bool) bool { return !stayed })
	if len(t.keeps.chains)+len(t.keeps.sets) == 0 {
		return nil
	}
	return t.transaction(func(*batch) error {
		for name := range t.keeps.sets {
			t.conn.DelSet(&nftables.Set{Table: t.table, Name: name})
		}
		for name := range t.keeps.chains {
			t.conn.DelChain(&nftables.Chain{Table: t.table, Name: name})
		}
		return nil
	})
}

// addRules adds the rules of chains. The first one says who holds the table.
func (t *Table) addRules(b *batch, chains []render.Chain, holder []byte) error {
	for _, c := range chains {
		for _, rule := range c.Rules {
			exprs, err := b.expressions(rule)
			if err != nil {
				return err
			}
			t.conn.AddRule(&nftables.Rule{
				Table: t.table, Chain: &nftables.Chain{Name: c.Name, Table: t.table}, Exprs: exprs, UserData: holder,
			})
			holder = nil
		}
	}
	return nil
}
