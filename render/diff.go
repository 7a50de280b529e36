package render

import (
	"cmp"
	"fmt"
	"reflect"
	"slices"
)

// Diff returns what have has otherwise than want, a line each; none where both are the same. The order of chains, and of
// maps, means nothing.
func Diff(want, have Ruleset) []string {
	if len(have.Chains)+len(have.Maps)+len(have.Others) == 0 && len(want.Chains) > 0 {
		return []string{"the table inet " + Table + " is not there, or empty"}
	}
	var lines []string
	for _, other := range have.Others {
		if !slices.Contains(want.Others, other) {
			lines = append(lines, other+": not mantlet's")
		}
	}
	mapName := func(m Map) string { return m.Name }
	lines = append(lines, diffNamed("map", want.Maps, have.Maps, mapName, mapName, diffMap)...)
	chainName := func(c Chain) string { return c.Name }
	return append(lines, diffNamed("chain", want.Chains, have.Chains, chainName, Chain.describe, diffChain)...)
}

// describe names a chain, and where it stands if the kernel starts there.
func (c Chain) describe() string {
	if c.Hook == (Hook{}) {
		return c.Name
	}
	return fmt.Sprintf("%s (%s)", c.Name, c.Hook.Text())
}

// diffNamed compares what has a name with what has the same.
func diffNamed[T any](kind string, want, have []T, name, describe func(T) string, diff func(title string, want, have T) []string) []string {
	named := map[string]T{}
	for _, h := range have {
		named[name(h)] = h
	}
	var lines []string
	for _, w := range want {
		title := kind + " " + name(w)
		h, ok := named[name(w)]
		delete(named, name(w))
		if !ok {
			lines = append(lines, title+": missing")
			continue
		}
		lines = append(lines, diff(title, w, h)...)
	}
	for _, h := range have {
		if _, extra := named[name(h)]; extra {
			lines = append(lines, kind+" "+describe(h)+": not mantlet's")
		}
	}
	return lines
}

// diffMap walks both lists of elements, which are sorted.
func diffMap(title string, want, have Map) []string {
	var lines []string
	w, h := want.Elements, have.Elements
	for len(w) > 0 || len(h) > 0 {
		switch order := compareHeads(w, h); {
		case order < 0:
			lines = append(lines, fmt.Sprintf("%s: `%s` missing", title, w[0].text()))
			w = w[1:]
		case order > 0:
			lines = append(lines, fmt.Sprintf("%s: `%s` not mantlet's", title, h[0].text()))
			h = h[1:]
		default:
			if w[0].Verdict != h[0].Verdict {
				lines = append(lines, fmt.Sprintf("%s: have `%s`, want `%s`", title, h[0].text(), w[0].text()))
			}
			w, h = w[1:], h[1:]
		}
	}
	return lines
}

func compareHeads(w, h []Element) int {
	switch {
	case len(w) == 0:
		return 1
	case len(h) == 0:
		return -1
	default:
		return cmp.Or(cmp.Compare(w[0].Ports.First, h[0].Ports.First), cmp.Compare(w[0].Ports.Last, h[0].Ports.Last))
	}
}

func diffChain(title string, want, have Chain) []string {
	var lines []string
	if want.Hook != have.Hook {
		lines = append(lines, fmt.Sprintf("%s: have `%s`, want `%s`", title, have.Hook.Text(), want.Hook.Text()))
	}
	return append(lines, diffRules(title, want.Rules, have.Rules)...)
}

// diffRules tells as few rules as lead from one list to the other. A rule is numbered where it stands, or should stand.
func diffRules(title string, want, have []Rule) []string {
	// common[i][j] is the length of the longest common subsequence of want[i:] and have[j:].
	common := make([][]int, len(want)+1)
	for i := range common {
		common[i] = make([]int, len(have)+1)
	}
	same := func(i, j int) bool { return reflect.DeepEqual(want[i], have[j]) }
	for i := len(want) - 1; i >= 0; i-- {
		for j := len(have) - 1; j >= 0; j-- {
			common[i][j] = max(common[i+1][j], common[i][j+1])
			if same(i, j) {
				common[i][j] = common[i+1][j+1] + 1
			}
		}
	}
	var lines []string
	for i, j := 0, 0; i < len(want) || j < len(have); {
		switch {
		case i < len(want) && j < len(have) && same(i, j):
			i, j = i+1, j+1
		case i < len(want) && j < len(have) && common[i+1][j+1] == common[i][j]: // neither is needed for what is common
			lines = append(lines, fmt.Sprintf("%s rule %d: have `%s`, want `%s`", title, j+1, have[j].Text(), want[i].Text()))
			i, j = i+1, j+1
		case j == len(have) || i < len(want) && common[i+1][j] == common[i][j]:
			lines = append(lines, fmt.Sprintf("%s rule %d: `%s` missing", title, i+1, want[i].Text()))
			i++
		default:
			lines = append(lines, fmt.Sprintf("%s rule %d: `%s` not mantlet's", title, j+1, have[j].Text()))
			j++
		}
	}
	return lines
}
