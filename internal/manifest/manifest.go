package manifest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"mantlet/schema"
)

// Manifest is what a file holds.
type Manifest struct {
	source string
	pods   []pod
	values map[reference]map[string]map[string]string // of kind and name; by namespace, by key
	others []*Manifest

	services []Service
	backends []Backend
}

// pod is a pod, and what it is part of.
type pod struct {
	podSpec

	name     string   // kind and name of the object that it is part of
	path     string   // in that object
	metadata metadata // the namespace is the object's
}

// Severity says how bad a finding is.
type Severity string

// The severities.
const (
	Error   Severity = "error"   // it does not work, or is not safe
	Warning Severity = "warning" // it may not be meant, or could not be checked
)

// Finding is something about a pod that its author should know.
type Finding struct {
	schema.Problem

	Severity Severity
}

// Sidecar is a container of a manifest that runs mantlet.
type Sidecar struct {
	manifest  *Manifest
	pod       pod
	container container
}

// Object names what the sidecar's pod is part of, as "Deployment web".
func (s Sidecar) Object() string { return s.pod.name }

// Parse reads a manifest: objects of any kind, also within Lists, of which it takes the pods, ConfigMaps and Secrets. source
// is what places in it are named by. The error says that it is no manifest, or one that Helm has not rendered.
func Parse(source string, text []byte) (*Manifest, error) {
	m := &Manifest{source: source, values: map[reference]map[string]map[string]string{}}
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	for {
		var document yaml.Node
		err := decoder.Decode(&document)
		if errors.Is(err, io.EOF) {
			return m, nil
		}
		if err != nil && bytes.Contains(text, []byte("{{")) {
			return nil, fmt.Errorf("%s: not rendered: run helm template first", source)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: not valid YAML: %s", source, strings.TrimPrefix(err.Error(), "yaml: "))
		}
		if node := unrendered(&document); node != nil {
			return nil, fmt.Errorf("%s:%d: not rendered: run helm template first", source, node.Line)
		}
		var o object
		if len(document.Content) > 0 {
			err = document.Content[0].Decode(&o)
		}
		if types := new(yaml.TypeError); errors.As(err, &types) {
			if o.concerns() || hasContainers(&document) {
				return nil, fmt.Errorf("%s: %s", source, strings.Join(misfits(types), "; "))
			}
			continue
		} else if err != nil {
			return nil, fmt.Errorf("%s: %w", source, err)
		}
		if err := m.add(o, ""); err != nil {
			return nil, fmt.Errorf("%s: %w", source, err)
		}
	}
}

// helm matches what Helm's templates have, where it stands in quotes.
var helm = regexp.MustCompile(`\{\{-?\s*(\.Values|\.Release|\.Chart|include |template |tpl |toYaml )`)

// unrendered returns the first node that Helm has not rendered. Without quotes, {{ … }} is a mapping whose key is a mapping. What
// ConfigMaps and Secrets hold may be templates of others.
func unrendered(node *yaml.Node) *yaml.Node {
	isFlow := func(n *yaml.Node) bool { return n.Kind == yaml.MappingNode && n.Style&yaml.FlowStyle != 0 }
	if isFlow(node) && len(node.Content) > 0 && isFlow(node.Content[0]) || node.Kind == yaml.ScalarNode && helm.MatchString(node.Value) {
		return node
	}
	for i, n := range node.Content {
		isData := node.Kind == yaml.MappingNode && i%2 == 1 && slices.Contains([]string{"data", "stringData"}, node.Content[i-1].Value)
		if isData && !isFlow(n) {
			continue
		}
		if found := unrendered(n); found != nil {
			return found
		}
	}
	return nil
}

// misfits says in plain words what has another type than Kubernetes has there.
func misfits(err *yaml.TypeError) []string {
	kinds := map[string]string{"!!map": "a mapping", "!!seq": "a list", "!!str": "text", "!!int": "a number", "!!bool": "true or false", "!!null": "nothing"}
	form := regexp.MustCompile("^line ([0-9]+): cannot unmarshal (\\S+)( `.*`)? into .*$")
	var all []string
	for _, text := range err.Errors {
		if match := form.FindStringSubmatch(text); match != nil {
			kind := match[2]
			if words, ok := kinds[kind]; ok {
				kind = words
			}
			text = fmt.Sprintf("line %s: unexpected type: %s%s", match[1], kind, match[3])
		}
		all = append(all, text)
	}
	return all
}

// concerns reports whether it matters that an object has fields of other types than expected. Those of other kinds may.
func (o object) concerns() bool {
	return slices.Contains([]string{configMapKind, secretKind, "List", ""}, o.Kind)
}

// hasContainers reports whether a node has a list of containers somewhere.
func hasContainers(node *yaml.Node) bool {
	for i, n := range node.Content {
		isList := node.Kind == yaml.MappingNode && i%2 == 1 && n.Kind == yaml.SequenceNode
		if isList && slices.Contains([]string{"containers", "initContainers"}, node.Content[i-1].Value) {
			return slices.ContainsFunc(n.Content, func(item *yaml.Node) bool { return item.Kind == yaml.MappingNode })
		}
		if hasContainers(n) {
			return true
		}
	}
	return false
}

// add takes an object in. The namespace of a List's items may be the List's.
func (m *Manifest) add(o object, namespace string) error {
	if o.Metadata.Namespace == "" {
		o.Metadata.Namespace = namespace
	}
	for _, item := range o.Items {
		if err := m.add(item, o.Metadata.Namespace); err != nil {
			return err
		}
	}
	if o.Kind == configMapKind || o.Kind == secretKind {
		values, err := o.values()
		if err != nil {
			return err
		}
		key := reference{o.Kind, o.Metadata.Name}
		if m.values[key] == nil {
			m.values[key] = map[string]map[string]string{}
		}
		m.values[key][o.Metadata.Namespace] = values
	}
	m.pods = append(m.pods, o.pods()...)
	return m.addService(o)
}

// pods returns the pods that an object itself describes.
func (o object) pods() []pod {
	var all []pod
	for _, found := range []struct {
		path string
		template
	}{
		{"spec", template{Metadata: o.Metadata, Spec: o.Spec.podSpec}},
		{"template.spec", o.Template},
		{"spec.template.spec", o.Spec.Template},
		{"spec.jobTemplate.spec.template.spec", o.Spec.JobTemplate.Spec.Template},
	} {
		path, t := found.path, found.template
		if len(t.Spec.Containers)+len(t.Spec.InitContainers) == 0 {
			continue
		}
		t.Metadata.Namespace = o.Metadata.Namespace
		p := pod{podSpec: t.Spec, name: strings.TrimSpace(o.Kind + " " + o.Metadata.Name), path: path, metadata: t.Metadata}
		for list, containers := range map[string][]container{
			"initContainers": p.InitContainers, "containers": p.Containers, "ephemeralContainers": p.EphemeralContainers,
		} {
			for i := range containers {
				c := &containers[i]
				c.isInit, c.path = list == "initContainers", fmt.Sprintf("%s.%s[%s]", path, list, c.Name)
			}
		}
		all = append(all, p)
	}
	return all
}

// containers returns all of the pod's, in the order in which they start.
func (p pod) containers() []container {
	return slices.Concat(p.InitContainers, p.Containers, p.EphemeralContainers)
}

// security returns what holds for a container: its own securityContext over the pod's.
func (p pod) security(c container) securityContext {
	s := c.SecurityContext
	if s.RunAsUser == nil {
		s.RunAsUser = p.SecurityContext.RunAsUser
	}
	if s.RunAsNonRoot == nil {
		s.RunAsNonRoot = p.SecurityContext.RunAsNonRoot
	}
	return s
}

// Sidecars returns the containers of a name, in the order of the manifest.
func (m *Manifest) Sidecars(name string) []Sidecar {
	var all []Sidecar
	for _, p := range m.pods {
		for _, c := range p.containers() {
			if c.Name == name {
				all = append(all, Sidecar{m, p, c})
			}
		}
	}
	return all
}

// lookup returns the values of a ConfigMap or a Secret, as a pod of a namespace sees it. An object without a namespace gets
// the one that the manifest is applied to, which may be that of the others.
func (m *Manifest) lookup(kind, name, namespace string) (map[string]string, bool) {
	for _, m := range append([]*Manifest{m}, m.others...) {
		all := m.values[reference{kind, name}]
		if values, ok := all[namespace]; ok {
			return values, true
		}
		if values, ok := all[""]; ok {
			return values, true
		}
		if namespace == "" && len(all) == 1 {
			for _, values := range all {
				return values, true
			}
		}
	}
	return nil, false
}

// finding makes one of a sidecar's pod.
func (s Sidecar) finding(severity Severity, at place, path, value, format string, args ...any) Finding {
	origin := schema.Origin{Source: s.manifest.source, Line: at.line, Column: at.column}
	return Finding{schema.Problem{Origin: origin, Path: path, Value: value, Reason: fmt.Sprintf(format, args...)}, severity}
}

// Refer lets the manifest's pods use the ConfigMaps and Secrets of others, which do not change it.
func (m *Manifest) Refer(others ...*Manifest) { m.others = append(m.others, others...) }

// Lookup returns a value of a ConfigMap or a Secret, as a pod of a namespace sees it.
func (m *Manifest) Lookup(kind, name, namespace, key string) (string, bool) {
	values, _ := m.lookup(kind, name, namespace)
	value, ok := values[key]
	return value, ok
}
