package schema

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Policy is what an ingress entry, or the lack of one, means for a port.
type Policy struct {
	Mode  Mode
	Allow []string
	ALPN  []string

	entry Ports // of the entry; the zero value where there is none
}

// Within reports whether p lets in nobody whom other refuses.
func (p Policy) Within(other Policy) bool {
	if p.Mode != ModeMTLS || other.Mode != ModeMTLS {
		return p.Mode.looseness() <= other.Mode.looseness()
	}
	return isPart(p.Allow, other.Allow)
}

// Within reports whether an entry accepts no endpoint, by its names, that other does not.
func (e Egress) Within(other Egress) bool { return isPart(e.ServerNames, other.ServerNames) }

// isPart reports whether list names nobody whom whole does not; nil names everybody.
func isPart(list, whole []string) bool {
	if whole == nil {
		return true
	}
	if list == nil {
		return false
	}
	return !slices.ContainsFunc(list, func(name string) bool { return !slices.Contains(whole, name) })
}

// PolicyOf returns what the entries of a valid mesh say of a port.
func PolicyOf(list []Ingress, port uint16) Policy {
	i, _ := slices.BinarySearchFunc(list, port, func(in Ingress, port uint16) int { return cmp.Compare(in.Ports.Last, port) })
	if i < len(list) && list[i].Ports.Contains(port) {
		return list[i].policy()
	}
	return Policy{Mode: ModeMTLS}
}

func (in Ingress) policy() Policy { return Policy{in.Mode, in.Allow, in.ALPN, in.Ports} }

// listed writes a list as the override file does.
func listed(list []string) string { return "[" + strings.Join(list, ", ") + "]" }

func (p Policy) String() string {
	if p.Allow != nil {
		return fmt.Sprintf("%s for %s", p.Mode, listed(p.Allow))
	}
	return string(p.Mode)
}

// Cut returns the given ranges, sorted and cut where one starts or ends, so that none of the parts overlap.
func Cut(ranges []Ports) []Ports {
	starts := map[int]bool{}
	for _, p := range ranges {
		starts[int(p.First)], starts[int(p.Last)+1] = true, true
	}
	boundaries := slices.Sorted(maps.Keys(starts))
	ranges = slices.SortedFunc(slices.Values(ranges), func(a, b Ports) int { return cmp.Compare(a.First, b.First) })
	var parts []Ports
	covered := 0 // the port after the last one that a range so far contains
	for i, first := range boundaries {
		for ; len(ranges) > 0 && int(ranges[0].First) <= first; ranges = ranges[1:] {
			covered = max(covered, int(ranges[0].Last)+1)
		}
		if first < covered {
			parts = append(parts, Ports{uint16(first), uint16(boundaries[i+1] - 1)})
		}
	}
	return parts
}

// Parts returns the ranges of ports in which two lists of entries have one policy each.
func Parts(a, b []Ingress) []Ports {
	var ranges []Ports
	for _, in := range slices.Concat(a, b) {
		ranges = append(ranges, in.Ports)
	}
	return Cut(ranges)
}
