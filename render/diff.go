package render

import (
	"cmp"
	"encoding/json"
	"fmt"
	"iter"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"mantlet/schema"
)

// Diff returns what have has otherwise than want, a line each; none where both are the same. The order of chains, and of
// maps, means nothing.
func Diff(want, have Ruleset) []string {
	if len(have.Timeouts)+len(have.Maps)+len(have.Lists)+len(have.Accounts)+len(have.Chains)+len(have.Others) == 0 && len(want.Chains) > 0 {
		return []string{"the table inet " + Table + " is not there, or empty"}
	}
	var lines []string
	for _, other := range have.Others {
		if !slices.Contains(want.Others, other) {
			lines = append(lines, other+": not wanted")
		}
	}
	timeoutsName := func(t Timeouts) string { return t.Name }
	lines = append(lines, diffNamed("ct timeout", want.Timeouts, have.Timeouts, timeoutsName, timeoutsName, diffTimeouts)...)
	mapName := func(m Map) string { return m.Name }
	lines = append(lines, diffNamed("map", want.Maps, have.Maps, mapName, mapName, diffMap)...)
	listName := func(a List) string { return a.Name }
	lines = append(lines, diffNamed("set", want.Lists, have.Lists, listName, listName, diffList)...)
	accountName := func(a Account) string { return a.Name }
	lines = append(lines, diffNamed("set", want.Accounts, have.Accounts, accountName, accountName, diffAccount)...)
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
			lines = append(lines, kind+" "+describe(h)+": not wanted")
		}
	}
	return lines
}

func diffList(title string, want, have List) (lines []string) {
	if want.IPv6 != have.IPv6 {
		return []string{title + ": of another version of IP"}
	}
	for d := range minus(want.Destinations, have.Destinations) {
		lines = append(lines, fmt.Sprintf("%s: `%s` missing", title, d))
	}
	for d := range minus(have.Destinations, want.Destinations) {
		lines = append(lines, fmt.Sprintf("%s: `%s` not wanted", title, d))
	}
	return lines
}

// minus yields the destinations that are not among others, in their order.
func minus(all, others []schema.Destination) iter.Seq[schema.Destination] {
	are := map[schema.Destination]bool{}
	for _, d := range others {
		are[d] = true
	}
	return func(yield func(schema.Destination) bool) {
		for _, d := range all {
			if !are[d] && !yield(d) {
				return
			}
		}
	}
}

// diffAccount compares what an account can hold. What it holds is the rules' affair.
func diffAccount(title string, want, have Account) []string {
	if want == have {
		return nil
	}
	return []string{fmt.Sprintf("%s: have size %d and timeout %s, want size %d and timeout %s", title, have.Size, have.Timeout, want.Size, want.Timeout)}
}

func diffTimeouts(title string, want, have Timeouts) []string {
	if want == have {
		return nil
	}
	return []string{fmt.Sprintf("%s: have `%s`, want `%s`", title, have.onLine(), want.onLine())}
}

// diffMap compares what becomes of ports, not how they are put together to ranges.
func diffMap(title string, want, have Map) []string {
	if slices.Equal(want.Elements, have.Elements) {
		return nil
	}
	var ranges []schema.Ports
	for _, e := range slices.Concat(want.Elements, have.Elements) {
		ranges = append(ranges, e.Ports)
	}
	var lines []string
	for _, ports := range schema.Cut(ranges) {
		w, wok := want.at(ports.First)
		h, hok := have.at(ports.First)
		wanted, found := Element{ports, w}.text(), Element{ports, h}.text()
		switch {
		case !hok:
			lines = append(lines, fmt.Sprintf("%s: `%s` missing", title, wanted))
		case !wok:
			lines = append(lines, fmt.Sprintf("%s: `%s` not wanted", title, found))
		case w != h:
			lines = append(lines, fmt.Sprintf("%s: have `%s`, want `%s`", title, found, wanted))
		}
	}
	return lines
}

// at returns what becomes of a port.
func (m Map) at(port uint16) (Verdict, bool) {
	i, _ := slices.BinarySearchFunc(m.Elements, port, func(e Element, port uint16) int { return cmp.Compare(e.Ports.Last, port) })
	if i < len(m.Elements) && m.Elements[i].Ports.Contains(port) {
		return m.Elements[i].Verdict, true
	}
	return Verdict{}, false
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
	first := 0 // rule that differs
	for first < min(len(want), len(have)) && reflect.DeepEqual(want[first], have[first]) {
		first++
	}
	want, have = want[first:], have[first:]
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
			lines = append(lines, fmt.Sprintf("%s rule %d: have `%s`, want `%s`", title, first+j+1, have[j].Text(), want[i].Text()))
			i, j = i+1, j+1
		case j == len(have) || i < len(want) && common[i+1][j] == common[i][j]:
			lines = append(lines, fmt.Sprintf("%s rule %d: `%s` missing", title, first+i+1, want[i].Text()))
			i++
		default:
			lines = append(lines, fmt.Sprintf("%s rule %d: `%s` not wanted", title, first+j+1, have[j].Text()))
			j++
		}
	}
	return lines
}

// DiffBootstraps returns what have has otherwise than want, a line each, by the path of the field. What tells no difference of
// meaning is left out: where the admin interface is, and what Envoy adds about itself to the node.
func DiffBootstraps(want, have *bootstrapv3.Bootstrap) []string {
	w, h := plain(want), plain(have)
	var lines []string
	short := strings.NewReplacer("static_resources.listeners.", "listener ", "static_resources.clusters.", "cluster ")
	diffValues("", w, h, func(format string, args ...any) {
		lines = append(lines, short.Replace(fmt.Sprintf(format, args...)))
	})
	return lines
}

// plain returns a bootstrap as generic JSON.
func plain(b *bootstrapv3.Bootstrap) any {
	b = proto.CloneOf(b)
	SetEpoch(b, "", 0)
	b.Admin, b.Node = nil, nil
	b.OverloadManager, b.LayeredRuntime = nil, nil // see Limit
	text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(b)
	var value any
	if err == nil {
		err = json.Unmarshal(text, &value)
	}
	if err != nil {
		return err.Error()
	}
	return value
}

func diffValues(path string, want, have any, add func(format string, args ...any)) {
	if reflect.DeepEqual(want, have) {
		return
	}
	w, wok := members(want)
	h, hok := members(have)
	if !wok || !hok {
		add("%s: have %s, want %s", path, onLine(have), onLine(want))
		return
	}
	names := map[string]bool{}
	for name := range w {
		names[name] = true
	}
	for name := range h {
		names[name] = true
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		below := strings.TrimPrefix(path+"."+name, ".")
		switch {
		case h[name] == nil:
			add("%s missing", below)
		case w[name] == nil:
			add("%s not wanted", below)
		default:
			diffValues(below, w[name], h[name], add)
		}
	}
}

// members returns the parts of an object, or those of a list by their names, or else by their places.
func members(value any) (map[string]any, bool) {
	list, ok := value.([]any)
	if !ok {
		object, ok := value.(map[string]any)
		return object, ok
	}
	parts := map[string]any{}
	for i, item := range list {
		key := strconv.Itoa(i)
		if object, ok := item.(map[string]any); ok {
			if name, ok := object["name"].(string); ok && name != "" {
				key = name
			}
		}
		parts[key] = item
	}
	return parts, true
}

// onLine is a value on a line.
func onLine(value any) string {
	const most = 60
	text, err := json.Marshal(value)
	if err != nil {
		return err.Error()
	}
	if runes := []rune(string(text)); len(runes) > most {
		return string(runes[:most]) + "…"
	}
	return string(text)
}
