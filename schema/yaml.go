package schema

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// maxFile is four times what a ConfigMap can hold.
const maxFile = 4 << 20

// reader reads one YAML document strictly, beside the Go type of its form.
type reader struct {
	source string
	report *report
	forms  map[reflect.Type][]formField // see fields
}

// object is what a mapping holds: for each field of its form a *setting, an *object, a list of these, or nil.
type object struct {
	origin  Origin
	form    []formField
	values  []any
	bad     map[string]bool // fields whose values were reported
	unknown bool            // it has keys that were reported
}

// fields returns what the object has, by name.
func (o *object) fields() iter.Seq2[string, any] {
	return func(yield func(string, any) bool) {
		for i, v := range o.values {
			if v != nil && !yield(o.form[i].name, v) {
				return
			}
		}
	}
}

// read returns the object that the document holds, without fields for an empty document, and nil if it is no such object.
// All problems are reported, as far as the text can be understood.
func (r *reader) read(content []byte, form reflect.Type) *object {
	root, ok := r.parse(content)
	if !ok {
		return nil
	}
	if root == nil {
		return &object{}
	}
	o, _ := r.value(root, formField{form: form}, "").(*object)
	return o
}

// unreadable finds the first place that is no text for YAML, before a parser makes something of it.
func unreadable(content []byte) (reason string, line, column int) {
	if len(content) > maxFile {
		return fmt.Sprintf("is longer than %d bytes, which is the limit", maxFile), 0, 0
	}
	if bytes.HasPrefix(content, []byte("\xff\xfe")) || bytes.HasPrefix(content, []byte("\xfe\xff")) {
		return "is encoded in UTF-16; save it as UTF-8", 0, 0
	}
	line, column = 1, 1
	for len(content) > 0 {
		char, size := utf8.DecodeRune(content)
		switch {
		case char == '\n':
			line, column = line+1, 0
		case char == utf8.RuneError && size == 1:
			return fmt.Sprintf("contains the byte %#x, which is not valid UTF-8", content[0]), line, column
		case char == 0:
			return "contains a NUL byte; it must be UTF-8 text", line, column
		case unicode.IsControl(char) && !strings.ContainsRune("\t\r\u0085", char):
			return fmt.Sprintf("contains the control character %U, which YAML does not allow", char), line, column
		}
		content, column = content[size:], column+1
	}
	return "", 0, 0
}

// parse returns the one document's content, or nil for an empty one, and whether there was no problem.
func (r *reader) parse(content []byte) (*yaml.Node, bool) {
	content = bytes.TrimPrefix(content, []byte("\xef\xbb\xbf"))
	if reason, line, column := unreadable(content); reason != "" {
		r.report.add(Origin{Source: r.source, Line: line, Column: column}, "", "", reason)
		return nil, false
	}
	text := &lines{left: content}
	decoder := yaml.NewDecoder(text)
	var document, second yaml.Node
	err := decoder.Decode(&document)
	if errors.Is(err, io.EOF) {
		return nil, true
	}
	if err == nil {
		err = decoder.Decode(&second)
		if err == nil {
			r.add(&second, "", "a second YAML document starts here and would be ignored; the file must have only one")
		}
	}
	if err != nil && !errors.Is(err, io.EOF) {
		origin, line := text.last(r.source)
		r.report.add(origin, "", strings.TrimSpace(line), notYAML(line, err))
	}
	if len(document.Content) == 0 {
		return nil, false
	}
	root := document.Content[0]
	if root.Tag == "!!null" {
		return nil, true
	}
	return root, true
}

// lines hands out a text line by line, so that the parser stops in the line that it can't make sense of. Its errors name,
// if any, a line before it, where something began.
type lines struct {
	left   []byte
	read   []byte // of the current line, so far
	number int
}

func (l *lines) Read(p []byte) (int, error) {
	if len(l.left) == 0 {
		return 0, io.EOF
	}
	if l.number == 0 || bytes.HasSuffix(l.read, []byte("\n")) {
		l.number, l.read = l.number+1, l.read[:0]
	}
	n := copy(p, l.left)
	if end := bytes.IndexByte(p[:n], '\n') + 1; end > 0 {
		n = end
	}
	l.read = append(l.read, l.left[:n]...)
	l.left = l.left[n:]
	return n, nil
}

// last returns the line that was read last.
func (l *lines) last(source string) (Origin, string) {
	indent := len(l.read) - len(bytes.TrimLeft(l.read, " \t"))
	return Origin{Source: source, Line: l.number, Column: indent + 1}, string(l.read)
}

var (
	tabIndent = regexp.MustCompile(`^ *\t`)
	bareIPv6  = regexp.MustCompile(`: *\[[0-9A-Fa-f:.]+\]:`)
)

// unrendered is the reason against what Helm has not rendered.
const unrendered = "a template that is not rendered: run helm template first"

// parserWords has errors of the YAML parser, and what they say in plain words.
var parserWords = []struct{ part, words string }{
	{"unexpected end of stream", "a quote is not closed"},
	{"incompatible YAML document", "remove the line that starts with %YAML"},
	{"mapping values are not allowed", `a ":" is not allowed here: check the indentation, or put the value in quotes`},
	{"could not find expected ':'", `a key has no ":" after it, on this line or the one before`},
	{"expected node content", "a bracket is not closed, or a value is missing"},
	{"expected ',' or", "a bracket is not closed, or a comma is missing"},
	{"expected key", "a key was expected: check the indentation"},
	{"expected '-' indicator", "an item that starts with - was expected: check the indentation"},
	{"cannot start any token", "a value cannot start with this character: put it in quotes"},
	{"unknown anchor", "anchors and aliases are not supported; write the value out"},
	{"exceeded max depth", "it is nested too deeply"},
}

// notYAML is the reason for an error of the YAML parser, which stopped in a line.
func notYAML(line string, err error) string {
	text := regexp.MustCompile(`^yaml: (line \d+: )?`).ReplaceAllString(err.Error(), "")
	switch {
	case strings.Contains(line, "{{"):
		text = unrendered
	case tabIndent.MatchString(line):
		text = "indent with spaces, not tabs"
	case bareIPv6.MatchString(line):
		text = "an address in brackets must be in quotes"
	default:
		for _, p := range parserWords {
			if strings.Contains(text, p.part) {
				text = p.words
				break
			}
		}
	}
	return "not valid YAML: " + text
}

// isTemplate reports whether a node is what {{ … }} is to YAML: a mapping whose key is a mapping.
func isTemplate(node *yaml.Node) bool {
	isFlow := func(n *yaml.Node) bool { return n.Kind == yaml.MappingNode && n.Style&yaml.FlowStyle != 0 }
	return isFlow(node) && len(node.Content) > 0 && isFlow(node.Content[0])
}

func (r *reader) origin(node *yaml.Node) Origin {
	return Origin{Source: r.source, Line: node.Line, Column: node.Column}
}

func (r *reader) add(node *yaml.Node, path, reason string) {
	value := ""
	// What is text as a whole is another file, maybe one whose content is nobody's business.
	if node.Kind == yaml.ScalarNode && (path != "" || len(node.Value) < 40) {
		value = node.Value
	}
	r.report.add(r.origin(node), path, value, reason)
}

// formField is a field of a form's struct, or what else a form is made of.
type formField struct {
	name string
	form reflect.Type
	kind leaf // nil for lists and objects
}

func fieldOf(name string, form reflect.Type) formField {
	if form.Kind() == reflect.Pointer {
		form = form.Elem()
	}
	kind, _ := reflect.Zero(form).Interface().(leaf)
	return formField{name, form, kind}
}

// fieldsOf returns the fields of a form that is a struct.
func fieldsOf(form reflect.Type) (all []formField) {
	for f := range form.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		all = append(all, fieldOf(name, f.Type))
	}
	return all
}

// fields is fieldsOf, which takes its time, once for each form.
func (r *reader) fields(form reflect.Type) []formField {
	all, ok := r.forms[form]
	if !ok {
		all = fieldsOf(form)
		r.forms[form] = all
	}
	return all
}

// value reads a node that must have the form: an *object, a list of them or a *setting. It returns nil where it has not,
// and all problems are reported.
func (r *reader) value(node *yaml.Node, f formField, path string) any {
	kind := f.form.Kind()
	switch {
	case !r.plain(node, path):
	case f.kind != nil:
		if s := r.scalar(node, f.kind, path); s != nil {
			return s
		}
	case kind == reflect.Slice && node.Kind == yaml.SequenceNode:
		return r.list(node, fieldOf("", f.form.Elem()), path)
	case kind == reflect.Struct && node.Kind == yaml.MappingNode:
		return r.object(node, f.form, path)
	case node.Tag == "!!null":
		r.add(node, path, "has no value; set one or remove the key")
	case kind == reflect.Slice:
		r.add(node, path, "must be a list")
	default:
		r.add(node, path, "must be a mapping of keys to values")
	}
	return nil
}

// plain reports what would make of a node something else than what stands there.
func (r *reader) plain(node *yaml.Node, path string) bool {
	switch {
	case node.Kind == yaml.AliasNode || node.Anchor != "":
		r.add(node, path, "anchors and aliases are not supported; write the value out")
	case isTemplate(node):
		r.add(node, path, unrendered)
	case node.Style&yaml.TaggedStyle != 0:
		r.add(node, path, fmt.Sprintf("tags are not supported; remove %s", quote(node.Tag)))
	default:
		return true
	}
	return false
}

// scalar returns nil where the node holds no such value.
func (r *reader) scalar(node *yaml.Node, kind leaf, path string) *setting {
	want := kind.scalar()
	var value any
	var reason string
	switch {
	case node.Kind != yaml.ScalarNode:
		reason = "must be " + want.words
	case node.Tag == "!!null":
		reason = "has no value; it must be " + want.words
	default:
		if value, reason = parse(kind.parse, node.Value); reason == "" && !slices.Contains(want.tags, node.Tag) {
			reason = "is " + yamlWords(node.Tag) + " in YAML and must be " + want.words
			if node.Tag == "!!str" {
				reason += "; remove the quotes"
			} else {
				reason += fmt.Sprintf("; put it in quotes: %q", node.Value)
			}
		}
	}
	if reason != "" {
		r.add(node, path, reason)
		return nil
	}
	return newSetting(value, r.origin(node))
}

// yamlWords says in words what YAML takes a value for.
func yamlWords(tag string) string {
	switch tag {
	case "!!str":
		return "a string"
	case "!!int", "!!float":
		return "a number"
	case "!!bool":
		return "a boolean"
	case "!!timestamp":
		return "a date"
	default:
		return "something else"
	}
}

func (r *reader) list(node *yaml.Node, item formField, path string) any {
	if item.kind != nil {
		if s := r.texts(node, item.kind, path); s != nil {
			return s
		}
		return nil
	}
	objects := make([]*object, 0, len(node.Content))
	for i, n := range node.Content {
		if o, ok := r.value(n, item, path+"["+r.itemKey(n, item.form, i)+"]").(*object); ok {
			objects = append(objects, o)
		}
	}
	return objects
}

// texts reads lists of texts: allow, serverNames, alpn and outbound.allow. It returns nil where one of them is wrong.
func (r *reader) texts(node *yaml.Node, kind leaf, path string) *setting {
	_, isALPN := kind.(alpnText)
	_, mayBeEmpty := kind.(allowText) // nothing is allowed
	if isALPN && len(node.Content) > maxALPN {
		r.add(node, path, fmt.Sprintf("can have at most %d protocols", maxALPN))
		return nil
	}
	if len(node.Content) == 0 && !mayBeEmpty {
		reason := "is an empty list, which could mean nobody or anybody; list at least one name or remove the key"
		if isALPN {
			reason = "is an empty list; list at least one protocol or remove the key"
		}
		r.add(node, path, reason)
		return nil
	}
	all, good := &setting{list: []string{}, origin: r.origin(node)}, true
	if len(node.Content) > 0 {
		all.origin = r.origin(node.Content[0])
	}
	seen := make(map[string]bool, len(node.Content))
	items := make([]any, 0, len(node.Content))
	for i, n := range node.Content {
		itemPath := path + "[" + strconv.Itoa(i) + "]"
		var s *setting
		if r.plain(n, itemPath) {
			s = r.scalar(n, kind, itemPath)
		}
		switch {
		case s == nil:
			good = false
		case !seen[s.text]:
			seen[s.text] = true
			items, all.list = append(items, s.parsed), append(all.list, s.text)
		}
	}
	if !good {
		return nil
	}
	all.parsed = items
	return all
}

// itemKey is what an entry of a list is called in paths: the value of its first field, its key, or else its number.
func (r *reader) itemKey(item *yaml.Node, form reflect.Type, i int) string {
	key := r.fields(form)[0]
	for k := 0; k+1 < len(item.Content); k += 2 {
		if item.Content[k].Value == key.name {
			if value, reason := key.kind.parse(item.Content[k+1].Value); reason == "" {
				return canonical(value)
			}
		}
	}
	return "item " + strconv.Itoa(i+1)
}

func (r *reader) object(node *yaml.Node, form reflect.Type, path string) *object {
	fields := r.fields(form)
	if path == "" && isManifest(node) {
		r.add(node, "", "this is a Kubernetes manifest: use --manifest to check it; the override file is the value of a key of a ConfigMap")
		return nil
	}
	o := &object{origin: r.origin(node), form: fields, values: make([]any, len(fields)), bad: map[string]bool{}}
	seen := make([]int, len(fields)) // the line
	for i := 0; i+1 < len(node.Content); i += 2 {
		key, value := node.Content[i], node.Content[i+1]
		k := slices.IndexFunc(fields, func(f formField) bool { return f.name == key.Value })
		switch {
		case !r.plain(key, path):
			o.unknown = true
		case key.Kind != yaml.ScalarNode || key.Tag != "!!str" || k < 0:
			o.unknown = true
			r.add(key, path, "unknown key"+r.place(key.Value, fields, path))
		default:
			at := key.Value
			if path != "" {
				at = path + "." + at
			}
			if line := seen[k]; line != 0 {
				r.report.add(r.origin(key), at, "", fmt.Sprintf("already set on line %d; keep only one of them", line))
				o.bad[key.Value] = true
				continue
			}
			seen[k] = key.Line
			if o.values[k] = r.value(value, fields[k], at); o.values[k] == nil {
				o.bad[key.Value] = true
			}
		}
	}
	return o
}

// isManifest reports whether a file is what Kubernetes is given.
func isManifest(root *yaml.Node) bool {
	for i := 0; i < len(root.Content); i += 2 {
		if key := root.Content[i].Value; key == "apiVersion" || key == "kind" {
			return true
		}
	}
	return false
}

// place says where a key belongs that is unknown among the fields at a path, or which of them is meant.
func (r *reader) place(word string, fields []formField, path string) string {
	if owner := r.owner(word); owner != "" && path == "" {
		return "; it belongs to " + owner + ": indent it"
	} else if owner != "" {
		return "; it belongs to " + owner
	}
	if path != "" && slices.ContainsFunc(r.fields(reflect.TypeFor[fileForm]()), func(f formField) bool { return f.name == word }) {
		return "; it belongs to the top level of the file: do not indent it"
	}
	if section, field, _ := strings.Cut(word, "."); field != "" && r.owner(field) == section {
		return fmt.Sprintf("; write it as %s: {%s: …}", section, field)
	}
	names := make([]string, len(fields))
	for i, f := range fields {
		names[i] = f.name
	}
	if near := didYouMean(word, names); near != "" {
		return near
	}
	return "; known keys: " + strings.Join(names, ", ")
}

// owner returns what has a key below the top level of the file: an entry of a list, or a section.
func (r *reader) owner(word string) string {
	var entries []string
	section := ""
	for _, f := range r.fields(reflect.TypeFor[fileForm]()) {
		isList := f.form.Kind() == reflect.Slice
		form := f.form
		if isList {
			form = form.Elem()
		}
		if form.Kind() != reflect.Struct || !slices.ContainsFunc(r.fields(form), func(f formField) bool { return f.name == word }) {
			continue
		}
		if isList {
			entries = append(entries, f.name)
		} else {
			section = f.name
		}
	}
	switch len(entries) {
	case 0:
		return section
	case 1:
		return map[string]string{"ingress": "an ingress entry", "egress": "an egress entry", "probes": "a probe"}[entries[0]]
	default:
		return "an entry of " + strings.Join(entries[:len(entries)-1], ", ") + " or " + entries[len(entries)-1]
	}
}
