package nft

import (
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"

	"mantlet/render"
)

// kept is what stays in the table while other rules take the place of those that are there. The zero value is nothing.
//
// A packet that the old rules are looking at when a transaction is committed looks maps up as they are after it (nft_genmask_cur,
// include/net/netfilter/nf_tables.h). Were a map made anew, it would find nothing in the old one, and go where ports without an entry go:
// a healthy connection would be reset. So maps stay, and with them the chains that they lead to. An element that is new must lead to a
// chain that has been there before: in one that is new the old rules find no rules.
type kept struct {
	chains     map[string]bool
	maps, next map[string]render.Map // as they are in the kernel, and as they come to be
}

// keep returns what can stay when r takes the place of what is there: nothing where that is not known.
func (t *Table) keep(r render.Ruleset) kept {
	if t.unsure {
		return kept{}
	}
	if now, err := t.revision(); err != nil || !t.owned && now != t.checkedAt {
		return kept{}
	}
	k := kept{map[string]bool{}, map[string]render.Map{}, map[string]render.Map{}}
	for _, c := range r.Chains {
		k.chains[c.Name] = slices.ContainsFunc(t.want.Chains, func(old render.Chain) bool { return old.Name == c.Name && old.Hook == c.Hook })
	}
	for _, next := range r.Maps {
		for _, m := range t.want.Maps {
			if m.Name == next.Name {
				k.maps[m.Name], k.next[m.Name] = m, next
			}
		}
	}
	if len(k.maps) == 0 {
		return kept{}
	}
	return k
}

// prepare makes the chains that r's maps come to lead to, in a transaction of its own. Nothing leads there yet. Where it fails the maps
// are made anew.
func (t *Table) prepare(k *kept, r render.Ruleset) {
	var chains []render.Chain
	for _, c := range r.Chains {
		leads := slices.ContainsFunc(r.Maps, func(m render.Map) bool {
			return slices.ContainsFunc(m.Elements, func(e render.Element) bool { return e.Verdict.Goto == c.Name })
		})
		if leads && !k.chains[c.Name] && c.Hook.Name == "" {
			chains = append(chains, c)
		}
	}
	if len(chains) == 0 || len(k.maps) == 0 {
		return
	}
	err := t.transaction(func(b *batch) error {
		for name := range k.maps {
			b.maps[name] = mapOf(b.table, name)
		}
		for _, c := range chains {
			t.conn.AddChain(b.chain(c))
		}
		return t.addRules(b, chains, nil)
	})
	if err != nil {
		*k = kept{}
		return
	}
	for _, c := range chains {
		k.chains[c.Name] = true
	}
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

func mapOf(table *nftables.Table, name string) *nftables.Set {
	return &nftables.Set{
		Table: table, Name: name, IsMap: true, Interval: true,
		KeyType: nftables.TypeInetService, DataType: nftables.TypeVerdict, KeyByteOrder: binaryutil.BigEndian,
	}
}

// forget takes elements out of a map that stays, which it is not to have any more.
func (t *Table) forget(old, next render.Map) error {
	return t.elements(mapOf(t.table, old.Name), lacking(old.Elements, next.Elements), t.conn.SetDeleteElements)
}

// extend puts elements into a map that stays, which it does not have yet.
func (b *batch) extend(t *Table, old, next render.Map) error {
	set := mapOf(b.table, next.Name)
	b.maps[next.Name] = set
	return t.elements(set, lacking(next.Elements, old.Elements), b.conn.SetAddElements)
}

// lacking returns the elements that others are not among. Both are sorted.
func lacking(all, others []render.Element) (rest []render.Element) {
	has := map[render.Element]bool{}
	for _, e := range others {
		has[e] = true
	}
	for _, e := range all {
		if !has[e] {
			rest = append(rest, e)
		}
	}
	return rest
}

// elements changes some elements of a map at a time.
func (t *Table) elements(set *nftables.Set, all []render.Element, change func(*nftables.Set, []nftables.SetElement) error) error {
	for some := range slices.Chunk(all, maxElements) {
		var elements []nftables.SetElement
		for _, e := range some {
			elements = append(elements, span(e)...)
		}
		if err := change(set, elements); err != nil {
			return fmt.Errorf("changing elements of map %s: %w", set.Name, err)
		}
	}
	return nil
}
