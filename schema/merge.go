package schema

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"github.com/knadh/koanf/v2"
)

// setting is one value of one source, or for allow, serverNames and alpn a list of them.
type setting struct {
	parsed   any      // what its parser returned; of a list []any
	text     string   // canonical
	list     []string // canonical; nil where the value is one text
	origin   Origin
	overrode *setting // the value of an earlier source
}

func newSetting(parsed any, origin Origin) *setting {
	return &setting{parsed: parsed, text: canonical(parsed), origin: origin}
}

// valueOf returns what a setting holds; the zero value where there is none, or one of another type.
func valueOf[T any](s *setting) (v T) {
	if s != nil {
		v, _ = s.parsed.(T)
	}
	return v
}

func (s *setting) value() string {
	if s.list != nil {
		return listed(s.list)
	}
	return s.text
}

// entry is what a source says, or all sources together, about one key of a list.
type entry struct {
	key     string // canonical
	origin  Origin // where the key stands, the last time that it was named
	fields  map[string]*setting
	bad     map[string]bool // fields that have no valid value, which was reported
	unknown bool            // there were unknown keys, which was reported; a missing field may be meant by one of them
}

func (e *entry) text(field string) string {
	if s := e.fields[field]; s != nil {
		return s.text
	}
	return ""
}

// keyOf returns the key of an entry of a list.
func keyOf[T any](list string, e *entry) T { return valueOf[T](e.fields[lists[list].key]) }

func (e *entry) list(field string) []string {
	if s := e.fields[field]; s != nil {
		return s.list
	}
	return nil
}

// mayMean reports whether one of the fields may have been meant by something that was reported.
func (e *entry) mayMean(fields ...string) bool {
	return e.unknown || e.bad["remove"] || slices.ContainsFunc(fields, func(field string) bool { return e.bad[field] })
}

// removed tells that a source took the entry away.
func (e *entry) removed() bool { return e.fields["remove"] != nil }

// entries are a list's, by key.
type entries map[string]*entry

// layer is what one source says, as a tree that koanf merges. Its leaves are opaque: a *setting for a scalar, entries for
// a list, so that merge alone decides how they merge. It implements koanf.Provider.
type layer map[string]any

// opaque hides a value from koanf, which copies deeply, by reflection, whatever it merges into. What is hidden here is
// never changed again, so that copies may share it.
type opaque func() any

func hide(v any) opaque { return func() any { return v } }

// reveal returns what is hidden in a leaf, or nothing where it is not of the type.
func reveal[T any](leaf any) T {
	var v T
	if o, ok := leaf.(opaque); ok {
		v, _ = o().(T)
	}
	return v
}

// Read implements koanf.Provider.
func (l layer) Read() (map[string]any, error) { return l, nil }

// ReadBytes implements koanf.Provider.
func (layer) ReadBytes() ([]byte, error) { return nil, errors.New("a layer has no bytes") }

// set stores a scalar at a path as "tls.minVersion".
func (l layer) set(path string, s *setting) {
	section, field := cutPath(path)
	if field == "" {
		l[path] = hide(s)
		return
	}
	if l[section] == nil {
		l[section] = map[string]any{}
	}
	l[section].(map[string]any)[field] = hide(s)
}

// scalar returns what is stored at a path, or nil.
func (l layer) scalar(path string) *setting {
	section, field := cutPath(path)
	if field == "" {
		return reveal[*setting](l[path])
	}
	nested, _ := l[section].(map[string]any)
	return reveal[*setting](nested[field])
}

// entries returns a list's, those that were removed among them.
func (l layer) entries(list string) entries { return reveal[entries](l[list]) }

// cutPath splits "tls.minVersion"; the field is empty for a path of one part.
func cutPath(path string) (section, field string) {
	section, field, _ = strings.Cut(path, ".")
	return section, field
}

// lists are the lists of entries: the form of an entry, the field that is its key, and how the mesh is sorted. Entries that were removed
// may overlap others.
var lists = map[string]struct {
	form    reflect.Type
	key     string
	compare func(a, b *entry) int
}{
	"ingress": {reflect.TypeFor[ingressForm](), "port", func(a, b *entry) int {
		return valueOf[Ports](a.fields["port"]).compare(valueOf[Ports](b.fields["port"]))
	}},
	"egress": {reflect.TypeFor[egressForm](), "listen", func(a, b *entry) int {
		return valueOf[netip.AddrPort](a.fields["listen"]).Compare(valueOf[netip.AddrPort](b.fields["listen"]))
	}},
	"probes": {reflect.TypeFor[probeForm](), "name", func(a, b *entry) int { return strings.Compare(a.key, b.key) }},
}

// probeKinds are the fields of a probe of which it has one.
var probeKinds = []string{string(ProbeHTTP), string(ProbeTCP), string(ProbeGRPC)}

// fromYAML reads a layer from a YAML text.
func fromYAML(source string, content []byte, report *report) layer {
	l := layer{}
	r := &reader{source, report, map[reflect.Type][]formField{}}
	file := r.read(content, reflect.TypeFor[fileForm]())
	if file == nil {
		return l
	}
	for name, v := range file.fields() {
		switch v := v.(type) {
		case *setting:
			l.set(name, v)
		case []*object:
			l[name] = hide(entriesOf(name, v, report))
		case *object:
			for field, nested := range v.fields() {
				l.set(name+"."+field, nested.(*setting))
			}
		}
	}
	return l
}

// entriesOf gives a list's objects their keys.
func entriesOf(list string, objects []*object, report *report) entries {
	all := make(entries, len(objects))
	for _, o := range objects {
		e := &entry{origin: o.origin, fields: make(map[string]*setting, len(o.values)), bad: o.bad, unknown: o.unknown}
		for name, v := range o.fields() {
			e.fields[name] = v.(*setting)
		}
		if e.key = e.text(lists[list].key); e.key == "" {
			if !e.unknown && !e.bad[lists[list].key] {
				report.add(o.origin, list, "", fmt.Sprintf("an entry needs the key %q", lists[list].key))
			}
			report.lose(list)
			continue
		}
		if e.removed() && len(e.fields) > 2 { // its key and remove
			report.add(e.fields["remove"].origin, list+"["+e.key+"].remove", "true", "an entry with remove: true must not have other fields")
			e.unknown = true
		}
		if list == "probes" && !e.removed() && len(e.fields) > 2 {
			report.add(e.origin, list+"["+e.key+"]", "", "has more than one of http, tcp and grpc; keep only one of them")
			e.unknown = true
		}
		all.add(list, e, report)
	}
	return all
}

// add takes an entry of the same source in: the same meaning twice is fine, another one is a problem.
func (all entries) add(list string, e *entry, report *report) {
	first, ok := all[e.key]
	if !ok {
		all[e.key] = e
		return
	}
	if !first.unknown && !e.unknown && !first.means(e) {
		report.add(e.origin, list+"["+e.key+"]", "", fmt.Sprintf("differs from the entry at %s; keep only one of them", first.origin))
	}
}

// means reports whether both, which have one key, mean the same as far as they are right. Names are informational.
func (e *entry) means(other *entry) bool {
	for _, having := range []*entry{e, other} {
		for field := range having.fields {
			same := e.text(field) == other.text(field) && slices.Equal(e.list(field), other.list(field))
			if !same && field != "name" && !e.bad[field] && !other.bad[field] {
				return false
			}
		}
	}
	return true
}

// merge lays layers over each other, the later over the earlier: scalars and the fields of entries one by one. The
// layers stay as they are.
func merge(layers ...layer) (layer, error) {
	k := koanf.New(".")
	for _, l := range layers {
		err := k.Load(l, nil, koanf.WithMergeFunc(func(over, under map[string]any) error {
			overlay(under, over)
			return nil
		}))
		if err != nil {
			return nil, fmt.Errorf("merging: %w", err)
		}
	}
	return k.Raw(), nil
}

func overlay(under, over map[string]any) {
	for name, v := range over {
		if nested, ok := v.(map[string]any); ok {
			section, ok := under[name].(map[string]any)
			if !ok {
				section = map[string]any{}
				under[name] = section
			}
			overlay(section, nested)
			continue
		}
		if s := reveal[*setting](v); s != nil {
			under[name] = hide(s.over(reveal[*setting](under[name])))
			continue
		}
		under[name] = hide(reveal[entries](v).over(reveal[entries](under[name])))
	}
}

func (all entries) over(old entries) entries {
	merged := make(entries, len(all)+len(old))
	maps.Copy(merged, old)
	for key, e := range all {
		merged[key] = e.over(old[key])
	}
	return merged
}

func (s *setting) over(old *setting) *setting {
	return &setting{parsed: s.parsed, text: s.text, list: s.list, origin: s.origin, overrode: old}
}

// over returns the entry with what it says over what an earlier source said. An entry that was removed says nothing any
// more, but what it said is remembered.
func (e *entry) over(old *entry) *entry {
	if old == nil {
		return e
	}
	merged := &entry{
		key: e.key, origin: e.origin, fields: make(map[string]*setting, len(old.fields)+1), bad: map[string]bool{}, unknown: e.unknown || old.unknown,
	}
	anew := old.removed() && !e.removed()
	if !anew {
		maps.Copy(merged.fields, old.fields)
		maps.Copy(merged.bad, old.bad)
	}
	maps.Copy(merged.bad, e.bad)
	for name, s := range e.fields {
		if !e.bad[name] {
			delete(merged.bad, name)
		}
		under := old.fields[name]
		if slices.Contains(probeKinds, name) {
			for _, kind := range probeKinds {
				if was := old.fields[kind]; was != nil && kind != name {
					under = &setting{text: kind + ": " + was.text, origin: was.origin, overrode: was.overrode}
					delete(merged.fields, kind)
				}
			}
		}
		if anew {
			under = &setting{text: "removed", origin: old.fields["remove"].origin, overrode: under}
		}
		merged.fields[name] = s.over(under)
	}
	return merged
}
