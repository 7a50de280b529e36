package schema

import (
	"maps"
	"net/netip"
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
		for _, e := range slices.SortedFunc(maps.Values(c.merged.entries(list)), compareKeys[list]) {
			all = append(all, e.explain(listKeys[list], list+"["+e.key+"].")...)
			if list == "ingress" && e.fields["mode"] == nil && !e.removed() {
				all = append(all, Explained{Path: list + "[" + e.key + "].mode", Value: string(ModeMTLS), Origin: "default"})
			}
		}
	}
	paths := slices.Collect(maps.Keys(defaults))
	for _, v := range listVariables {
		paths = append(paths, v.path)
	}
	slices.Sort(paths)
	for _, path := range paths {
		all = append(all, c.merged.scalar(path).explain(path))
	}
	return all
}

func (e *entry) explain(key, path string) []Explained {
	var all []Explained
	for _, field := range []string{"name", "mode", "allow", "upstream", "serverNames", "alpn", "http", "tcp", "grpc"} {
		if s := e.fields[field]; s != nil && field != key {
			all = append(all, s.explain(path+field))
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

// compareKeys sorts as the mesh is sorted. Entries that were removed may overlap others.
var compareKeys = map[string]func(a, b *entry) int{
	"ingress": func(a, b *entry) int { return keyOf[Ports]("ingress", a).compare(keyOf[Ports]("ingress", b)) },
	"egress": func(a, b *entry) int {
		return keyOf[netip.AddrPort]("egress", a).Compare(keyOf[netip.AddrPort]("egress", b))
	},
	"probes": func(a, b *entry) int { return strings.Compare(a.key, b.key) },
}

func (s *setting) explain(path string) Explained {
	e := Explained{Path: path, Value: s.value(), Origin: s.origin.String()}
	for old := s.overrode; old != nil; old = old.overrode {
		e.Overrides = append(e.Overrides, Overruled{old.value(), old.origin.String()})
	}
	return e
}
