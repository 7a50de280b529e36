package schema

import (
	"cmp"
	"maps"
	"slices"
)

// Explained is one value of a Config, where it comes from, and what it overrode.
type Explained struct {
	Path      string      `json:"path"` // as "ingress[8080].mode"
	Value     string      `json:"value"`
	Origin    string      `json:"origin"`
	Overrides []Overruled `json:"overrides,omitempty"` // the latest first
}

// Overruled is a value of an earlier source.
type Overruled struct {
	Value  string `json:"value"`
	Origin string `json:"origin"`
}

// Explain lists every value of the configuration: the entries in the order of their keys, then the scalars. Entries that
// a source removed are listed with it.
func (c Config) Explain() []Explained {
	var all []Explained
	for _, list := range []string{"ingress", "egress"} {
		for _, e := range slices.SortedFunc(maps.Values(c.merged.entries(list)), compareKeys) {
			for _, field := range []string{"name", "mode", "allow", "upstream", "serverNames", "remove"} {
				if s := e.fields[field]; s != nil {
					all = append(all, s.explain(list+"["+e.key+"]."+field))
				}
			}
			if list == "ingress" && e.fields["mode"] == nil && !e.removed() {
				all = append(all, Explained{Path: list + "[" + e.key + "].mode", Value: string(ModeMTLS), Origin: "default"})
			}
		}
	}
	for _, path := range slices.Sorted(maps.Keys(defaults)) {
		all = append(all, c.merged.scalar(path).explain(path))
	}
	return all
}

// compareKeys sorts ports by number, and addresses as text.
func compareKeys(a, b *entry) int {
	if a.fields["port"] != nil && b.fields["port"] != nil {
		return cmp.Compare(ports(a.key).First, ports(b.key).First)
	}
	return cmp.Compare(a.key, b.key)
}

func (s *setting) explain(path string) Explained {
	e := Explained{Path: path, Value: s.value(), Origin: s.origin.String()}
	for old := s.overrode; old != nil; old = old.overrode {
		e.Overrides = append(e.Overrides, Overruled{old.value(), old.origin.String()})
	}
	return e
}
