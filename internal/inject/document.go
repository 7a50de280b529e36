package inject

import (
	"bytes"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// document is one of a stream's, with the line that starts it.
type document struct {
	source  string
	first   int // the number of its first line in the source, from 0
	text    string
	lines   []string
	starts  []int // the offsets of the lines, and of the end
	lineEnd string
	root    *yaml.Node // of the document's value; nil where there is none
}

var separator = regexp.MustCompile(`(?m)^(---|\.\.\.)(\s|$)`)

// split returns the documents of a stream. Together their texts are the stream's.
func split(source string, text []byte) ([]*document, error) {
	var all []*document
	line, start := 0, 0
	add := func(end int) error {
		d, err := newDocument(source, line, string(text[start:end]))
		if err != nil {
			return err
		}
		all = append(all, d)
		line += len(d.lines)
		start = end
		return nil
	}
	for _, match := range separator.FindAllIndex(text, -1) {
		isStart := text[match[0]] == '-'
		if isStart && match[0] > start && !isPreamble(text[start:match[0]]) {
			if err := add(match[0]); err != nil {
				return nil, err
			}
		}
	}
	if start < len(text) {
		if err := add(len(text)); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// isPreamble reports whether a text has directives, which belong to the document that follows.
func isPreamble(text []byte) bool {
	for line := range bytes.Lines(text) {
		line = bytes.TrimSpace(line)
		if len(line) > 0 && line[0] != '#' && line[0] != '%' {
			return false
		}
	}
	return true
}

func newDocument(source string, first int, text string) (*document, error) {
	d := &document{source: source, first: first, text: text, lines: splitLines([]byte(text)), lineEnd: "\n"}
	if len(d.lines) > 0 && strings.HasSuffix(d.lines[0], "\r\n") {
		d.lineEnd = "\r\n"
	}
	at := 0
	for _, line := range d.lines {
		d.starts = append(d.starts, at)
		at += len(line)
	}
	d.starts = append(d.starts, at)
	var node yaml.Node
	if err := yaml.Unmarshal([]byte(text), &node); err != nil {
		return nil, fmt.Errorf("%s: not valid YAML: %s", source, atLine(err, first))
	}
	if len(node.Content) > 0 {
		d.root = node.Content[0]
	}
	return d, nil
}

var lineNumber = regexp.MustCompile(`^yaml: line ([0-9]+): `)

// atLine returns an error of the parser with the line's number in the source.
func atLine(err error, first int) string {
	text := err.Error()
	match := lineNumber.FindStringSubmatch(text)
	if match == nil {
		return strings.TrimPrefix(text, "yaml: ")
	}
	var line int
	_, _ = fmt.Sscan(match[1], &line)
	return fmt.Sprintf("line %d: %s", line+first, text[len(match[0]):])
}

// subject is a pod in a document.
type subject struct {
	object    string // kind and name of what it is of
	namespace string
	path      string     // of the pod's spec in the object
	spec      *yaml.Node // a mapping
	metadata  []*yaml.Node
}

// templates are the kinds of objects that have pods, and where their templates stand.
var templates = map[string][]string{
	"Pod":                   {},
	"PodTemplate":           {"template"},
	"Deployment":            {"spec", "template"},
	"StatefulSet":           {"spec", "template"},
	"DaemonSet":             {"spec", "template"},
	"ReplicaSet":            {"spec", "template"},
	"ReplicationController": {"spec", "template"},
	"Job":                   {"spec", "template"},
	"CronJob":               {"spec", "jobTemplate", "spec", "template"},
}

// subjects returns the pods of an object, and of the items of a List.
func subjects(object *yaml.Node, namespace string) []subject {
	if own := text(object, "metadata", "namespace"); own != "" {
		namespace = own
	}
	kind := text(object, "kind")
	if strings.HasSuffix(kind, "List") {
		var all []subject
		for _, item := range items(object, "items") {
			all = append(all, subjects(item, namespace)...)
		}
		return all
	}
	path, known := templates[kind]
	group, _, _ := strings.Cut(text(object, "apiVersion"), "/")
	if !known || !slices.Contains([]string{"", "v1", "apps", "batch"}, group) {
		return nil
	}
	template := at(object, path...)
	spec := at(template, "spec")
	if spec == nil || spec.Kind != yaml.MappingNode {
		return nil
	}
	name := text(object, "metadata", "name")
	s := subject{
		object: strings.TrimSpace(kind + " " + name), namespace: namespace, spec: spec,
		path: strings.Join(append(slices.Clone(path), "spec"), "."), metadata: []*yaml.Node{at(template, "metadata")},
	}
	if len(path) > 0 {
		s.metadata = append(s.metadata, at(object, "metadata"))
	}
	return []subject{s}
}

// annotation returns the value of an annotation of the pod, or of the object that it is of.
func (s subject) annotation(name string) (string, bool) {
	for _, metadata := range s.metadata {
		if n := at(metadata, "annotations", name); n != nil && n.Kind == yaml.ScalarNode {
			return n.Value, true
		}
	}
	return "", false
}

// containers returns the pod's containers of a list.
func (s subject) containers(list string) []*yaml.Node { return items(s.spec, list) }
