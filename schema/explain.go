package schema

import (
	"maps"
	"slices"
	"strings"
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

// Explain lists every value of the configuration: the entries in the order of their keys, then the scalars. Of an entry
// that a source removed, it lists that, and what it took away.
func (c Config) Explain() []Explained {
	var all []Explained
	for _, list := range []string{"ingress", "egress", "probes"} {
		for _, e := range slices.SortedFunc(maps.Values(c.merged.entries(list)), lists[list].compare) {
			all = append(all, e.explain(list)...)
			if list == "ingress" && e.fields["mode"] == nil && !e.removed() {
				all = append(all, Explained{Path: list + "[" + e.key + "].mode", Value: string(ModeMTLS), Origin: "default"})
			}
		}
	}
	var paths []string
	for _, f := range fields {
		paths = append(paths, f.path)
	}
	slices.Sort(paths)
	for _, path := range paths {
		all = append(all, c.merged.scalar(path).explain(path))
	}
	return all
}

func (e *entry) explain(list string) []Explained {
	var all []Explained
	path := list + "[" + e.key + "]."
	for _, f := range fieldsOf(lists[list].form) {
		if s := e.fields[f.name]; s != nil && f.name != lists[list].key && f.name != "remove" {
			all = append(all, s.explain(path+f.name))
		}
	}
	if !e.removed() {
		return all
	}
	remove := e.fields["remove"].explain(path + "remove")
	for _, was := range all {
		remove.Overrides = append(remove.Overrides, Overruled{strings.TrimPrefix(was.Path, path) + ": " + was.Value, was.Origin})
	}
	return []Explained{remove}
}

func (s *setting) explain(path string) Explained {
	e := Explained{Path: path, Value: s.value(), Origin: s.origin.String()}
	for old := s.overrode; old != nil; old = old.overrode {
		e.Overrides = append(e.Overrides, Overruled{old.value(), old.origin.String()})
	}
	return e
}
