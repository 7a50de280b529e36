package schema

import (
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/knadh/koanf/v2"
)

// setting is one value of one source, or for allow and serverNames a list of them.
type setting struct {
	text     string
	list     []string // canonical; nil where the value is one text
	origin   Origin
	overrode *setting // the value of an earlier source
}

func (s *setting) value() string {
	if s.list != nil {
		return "[" + strings.Join(s.list, ", ") + "]"
	}
	return s.text
}

// entry is what a source says, or all sources together, about one key of a list.
type entry struct {
	key    string // canonical
	fields map[string]*setting
}

// origin is where the entry's key stands, the last time that it was named.
func (e *entry) origin() Origin { return e.fields[originKey].origin }

func (e *entry) text(field string) string {
	if s := e.fields[field]; s != nil {
		return s.text
	}
	return ""
}

func (e *entry) list(field string) []string {
	if s := e.fields[field]; s != nil {
		return s.list
	}
	return nil
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

// The lists, and the field that is the key of each.
var listKeys = map[string]string{"ingress": "port", "egress": "listen"}

// fromYAML reads a layer from a YAML text.
func fromYAML(source string, content []byte, report *report) layer {
	l := layer{}
	for name, v := range (&reader{source, report}).read(content, reflect.TypeFor[fileForm]()) {
		switch v := v.(type) {
		case *setting:
			l.set(name, v)
		case []any:
			l[name] = hide(entriesOf(name, v, report))
		case map[string]any:
			for field, nested := range v {
				if s, ok := nested.(*setting); ok {
					l.set(name+"."+field, s)
				}
			}
		}
	}
	return l
}

// entriesOf gives a list's objects their keys.
func entriesOf(list string, objects []any, report *report) entries {
	all := entries{}
	for _, o := range objects {
		object := o.(map[string]any)
		origin := object[originKey].(Origin)
		key, ok := object[listKeys[list]].(*setting)
		if !ok { // missing, or reported already
			if _, present := object[listKeys[list]]; !present {
				report.add(origin, list, "", fmt.Sprintf("an entry needs the key %q", listKeys[list]))
			}
			continue
		}
		e := &entry{key: key.text, fields: map[string]*setting{originKey: {text: key.text, origin: origin}}}
		for name, v := range object {
			switch v := v.(type) {
			case *setting:
				e.fields[name] = v
			case []any:
				e.fields[name] = listOf(v)
			}
		}
		if e.removed() && len(e.fields) > 3 { // its origin, its key and remove
			report.add(e.fields["remove"].origin, list+"["+e.key+"].remove", "true", "an entry that is removed has no other fields")
		}
		all.add(list, e, report)
	}
	return all
}

// listOf joins the items of allow and serverNames.
func listOf(items []any) *setting {
	s := &setting{list: []string{}}
	for i, item := range items {
		one := item.(*setting)
		if i == 0 {
			s.origin = one.origin
		}
		if !slices.Contains(s.list, one.text) {
			s.list = append(s.list, one.text)
		}
	}
	return s
}

// add takes an entry of the same source in: the same meaning twice is fine, another one is a problem.
func (all entries) add(list string, e *entry, report *report) {
	first, ok := all[e.key]
	if !ok {
		all[e.key] = e
		return
	}
	if !first.means(e) {
		report.add(e.origin(), list+"["+e.key+"]", "", fmt.Sprintf("says something else than %s; leave one of them", first.origin()))
	}
}

// means reports whether both say the same; names do not count.
func (e *entry) means(other *entry) bool {
	for _, field := range []string{"mode", "upstream", "remove"} {
		if e.text(field) != other.text(field) {
			return false
		}
	}
	return slices.Equal(e.list("allow"), other.list("allow")) && slices.Equal(e.list("serverNames"), other.list("serverNames"))
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
	return &setting{text: s.text, list: s.list, origin: s.origin, overrode: old}
}

// over returns the entry with what it says over what an earlier source said. An entry that was removed says nothing.
func (e *entry) over(old *entry) *entry {
	if old == nil || old.removed() {
		return e
	}
	merged := &entry{key: e.key, fields: maps.Clone(old.fields)}
	for name, s := range e.fields {
		merged.fields[name] = s.over(merged.fields[name])
	}
	return merged
}
