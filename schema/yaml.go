package schema

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// maxFile is four times what a ConfigMap can hold.
const maxFile = 4 << 20

// reader reads one YAML document strictly, beside the Go type of its form. What it reads becomes settings, lists of them
// ([]any) and objects (map[string]any).
type reader struct {
	source string
	report *report
}

// read returns the object that the document holds, empty for an empty one, and nil if it is no such object. All problems
// are reported, as far as the text can be understood.
func (r *reader) read(content []byte, form reflect.Type) map[string]any {
	if reason, line := unreadable(content); reason != "" {
		r.report.add(Origin{Source: r.source, Line: line, Column: min(line, 1)}, "", "", reason)
		return nil
	}
	root, ok := r.parse(bytes.TrimPrefix(content, []byte("\xef\xbb\xbf")))
	if !ok {
		return nil
	}
	if root == nil {
		return map[string]any{}
	}
	object, _ := r.value(root, form, "").(map[string]any)
	return object
}

// unreadable finds what is no text for YAML, before a parser makes something of it.
func unreadable(content []byte) (reason string, line int) {
	if len(content) > maxFile {
		return fmt.Sprintf("is %d bytes long; at most %d are read", len(content), maxFile), 0
	}
	if bytes.HasPrefix(content, []byte("\xff\xfe")) || bytes.HasPrefix(content, []byte("\xfe\xff")) {
		return "is UTF-16; write it in UTF-8", 0
	}
	if i := bytes.IndexByte(content, 0); i >= 0 {
		return "holds a NUL byte; it must be text in UTF-8", 1 + bytes.Count(content[:i], []byte("\n"))
	}
	for i, line := range bytes.Split(content, []byte("\n")) {
		if !utf8.Valid(line) {
			return "holds bytes that are no UTF-8", i + 1
		}
	}
	return "", 0
}

// yamlLine finds the line in the parser's errors.
var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?(.*)`)

// parse returns the one document's content, or nil for an empty one, and whether there was no problem.
func (r *reader) parse(content []byte) (*yaml.Node, bool) {
	decoder := yaml.NewDecoder(bytes.NewReader(content))
	var document, second yaml.Node
	err := decoder.Decode(&document)
	if errors.Is(err, io.EOF) {
		return nil, true
	}
	if err == nil {
		err = decoder.Decode(&second)
		if err == nil {
			r.add(&second, "", "a second document starts here, and would be ignored; there must be one")
			return nil, false
		}
	}
	if !errors.Is(err, io.EOF) {
		origin := Origin{Source: r.source}
		parts := yamlLine.FindStringSubmatch(err.Error())
		if parts == nil {
			parts = []string{"", "", err.Error()}
		}
		if line, err := strconv.Atoi(parts[1]); err == nil {
			origin.Line, origin.Column = line, 1
		}
		r.report.add(origin, "", "", "is no YAML: "+parts[2])
		return nil, false
	}
	root := document.Content[0]
	if root.Tag == "!!null" && root.Value == "" {
		return nil, true
	}
	return root, true
}

func (r *reader) origin(node *yaml.Node) Origin {
	return Origin{Source: r.source, Line: node.Line, Column: node.Column}
}

func (r *reader) add(node *yaml.Node, path, reason string) {
	value := ""
	if node.Kind == yaml.ScalarNode {
		value = node.Value
	}
	r.report.add(r.origin(node), path, value, reason)
}

// value reads a node that must have the form. It returns nil where it has not, and all problems are reported.
func (r *reader) value(node *yaml.Node, form reflect.Type, path string) any {
	if form.Kind() == reflect.Pointer {
		form = form.Elem()
	}
	kind, isLeaf := reflect.Zero(form).Interface().(leaf)
	switch {
	case node.Kind == yaml.AliasNode || node.Anchor != "":
		r.add(node, path, "anchors and aliases are not supported; write the value out")
	case isLeaf:
		return r.scalar(node, kind, path)
	case form.Kind() == reflect.Slice && node.Kind == yaml.SequenceNode:
		return r.list(node, form.Elem(), path)
	case form.Kind() == reflect.Struct && node.Kind == yaml.MappingNode:
		return r.object(node, form, path)
	case form.Kind() == reflect.Slice:
		r.add(node, path, "must be a list"+orLeftOut(node))
	default:
		r.add(node, path, "must be an object: keys and values"+orLeftOut(node))
	}
	return nil
}

// orLeftOut helps where a key has no value: an empty one could mean nothing or everything.
func orLeftOut(node *yaml.Node) string {
	if node.Tag == "!!null" {
		return "; leave the key out if it holds none"
	}
	return ""
}

func (r *reader) scalar(node *yaml.Node, kind leaf, path string) any {
	allowed := kind.scalar()
	if node.Kind != yaml.ScalarNode || !slices.Contains(allowed.tags, node.Tag) {
		reason := "must be " + allowed.words + orLeftOut(node)
		if node.Kind == yaml.ScalarNode && allowed.words == yamlString.words && node.Tag != "!!null" {
			reason += fmt.Sprintf(": YAML takes it for something else; write it in quotes, %q", node.Value)
		}
		r.add(node, path, reason)
		return nil
	}
	canonical, reason := kind.parse(node.Value)
	if reason != "" {
		r.add(node, path, reason)
		return nil
	}
	return &setting{text: canonical, origin: r.origin(node)}
}

func (r *reader) list(node *yaml.Node, form reflect.Type, path string) any {
	if len(node.Content) == 0 && form.Kind() != reflect.Struct {
		r.add(node, path, "is an empty list, which could mean nobody or anybody; name somebody or leave the key out")
		return nil
	}
	list := make([]any, 0, len(node.Content))
	for i, item := range node.Content {
		itemPath := fmt.Sprintf("%s[%d]", path, i)
		if form.Kind() == reflect.Struct {
			itemPath = path + "[" + itemKey(item, form, i) + "]"
		}
		if v := r.value(item, form, itemPath); v != nil {
			list = append(list, v)
		}
	}
	return list
}

// itemKey is what an entry of a list is called in paths: the value of its first field, its key, or else its number.
func itemKey(item *yaml.Node, form reflect.Type, i int) string {
	for k := 0; k+1 < len(item.Content); k += 2 {
		if item.Content[k].Value == fieldName(form.Field(0)) && item.Content[k+1].Kind == yaml.ScalarNode {
			return item.Content[k+1].Value
		}
	}
	return "item " + strconv.Itoa(i+1)
}

func (r *reader) object(node *yaml.Node, form reflect.Type, path string) any {
	fields := map[string]reflect.Type{}
	var names []string
	for f := range form.Fields() {
		fields[fieldName(f)] = f.Type
		names = append(names, fieldName(f))
	}
	object, lines := map[string]any{}, map[string]int{}
	for i := 0; i+1 < len(node.Content); i += 2 {
		key, value := node.Content[i], node.Content[i+1]
		at := strings.TrimPrefix(path+"."+key.Value, ".")
		field, known := fields[key.Value]
		switch {
		case key.Kind != yaml.ScalarNode || key.Tag != "!!str" || key.Anchor != "":
			r.add(key, path, "is no key that is known here; known are "+strings.Join(names, ", "))
		case !known:
			r.add(key, path, "is no key that is known here"+didYouMeanKey(key.Value, names))
		case lines[key.Value] != 0:
			r.add(key, at, fmt.Sprintf("stands in line %d already; leave one of them", lines[key.Value]))
		default:
			lines[key.Value] = key.Line
			object[key.Value] = r.value(value, field, at) // nil where it is wrong, and has been reported
		}
	}
	object[originKey] = r.origin(node)
	return object
}

// originKey holds an object's own Origin among its fields; no field of a form has that name.
const originKey = ""

func didYouMeanKey(word string, names []string) string {
	if near := didYouMean(word, names); near != "" {
		return near
	}
	return "; known are " + strings.Join(names, ", ")
}

func fieldName(f reflect.StructField) string {
	name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
	return name
}
