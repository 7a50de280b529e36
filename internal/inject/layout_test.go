package inject_test

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
	"pgregory.net/rapid"

	"mantlet/internal/inject"
)

// TestLayouts writes pods in layouts of any kind. Whatever the layout is, the result means the same but for what inject adds, it can
// be undone byte for byte, and a second time changes nothing.
func TestLayouts(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		text := layout(rt)
		var before, after map[string]any
		if err := yaml.Unmarshal([]byte(text), &before); err != nil {
			rt.Skip("the encoder wrote what is not YAML")
		}
		in := inject.Source{Name: "in.yaml", Text: []byte(text)}
		injector := inject.Injector{Options: inject.Options{TLSSecret: "mesh", Gate: rapid.Bool().Draw(rt, "gate")}}
		result, err := injector.Inject(in)
		if err != nil || len(result.Refused) > 0 {
			rt.Fatalf("%v, %v of\n%s", err, result.Refused, text)
		}
		if err := yaml.Unmarshal(result.Text, &after); err != nil {
			rt.Fatalf("%v of\n%s", err, result.Text)
		}
		if diff := cmp.Diff(stripped(rt, before, false), stripped(rt, after, true)); diff != "" {
			rt.Fatalf("it means another thing (-before +after): %s\n%s", diff, result.Text)
		}
		removed, err := injector.Remove(inject.Source{Name: "out.yaml", Text: result.Text})
		if err != nil || !bytes.Equal(removed.Text, in.Text) {
			rt.Fatalf("removed: %v\n%s", err, cmp.Diff(text, string(removed.Text)))
		}
		again, err := injector.Inject(inject.Source{Name: "in.yaml", Text: result.Text})
		if err != nil || !bytes.Equal(again.Text, result.Text) {
			rt.Fatalf("again: %v\n%s", err, cmp.Diff(string(result.Text), string(again.Text)))
		}
	})
}

// layout returns a Deployment.
func layout(rt *rapid.T) string {
	flip := func(what string) bool { return rapid.Bool().Draw(rt, what) }
	scalars := []string{"plain", "two words", "# no comment", "a: b", "[a", "a\nb\n", "  a\nb\n\n", "'", `"`, "é 🦔", "- a", "", strings.Repeat("long words ", 12), "$(VALUE) }]"}
	value := func() any { return rapid.SampledFrom(scalars).Draw(rt, "scalar") }
	list := func(what string, item func(int) any) []any {
		var all []any
		for i := range rapid.IntRange(0, 3).Draw(rt, what) {
			all = append(all, item(i))
		}
		return all
	}
	type field struct {
		key   string
		value any
	}
	var node func(v any) *yaml.Node
	object := func(fields ...field) *yaml.Node {
		n := &yaml.Node{Kind: yaml.MappingNode}
		for _, f := range rapid.Permutation(fields).Draw(rt, "order") {
			if f.value != nil {
				n.Content = append(n.Content, node(f.key), node(f.value))
			}
		}
		return n
	}
	node = func(v any) *yaml.Node {
		n := &yaml.Node{Kind: yaml.ScalarNode}
		switch v := v.(type) {
		case *yaml.Node:
			n = v
		case int:
			n.Value, n.Tag = fmt.Sprint(v), "!!int"
		case string:
			n.SetString(v)
			if !strings.Contains(v, "\n") {
				n.Style = rapid.SampledFrom([]yaml.Style{0, 0, yaml.DoubleQuotedStyle, yaml.SingleQuotedStyle, yaml.LiteralStyle, yaml.FoldedStyle}).Draw(rt, "style")
			}
		case []any:
			n.Kind = yaml.SequenceNode
			for _, item := range v {
				n.Content = append(n.Content, node(item))
			}
		}
		if n.Kind != yaml.ScalarNode && rapid.IntRange(0, 9).Draw(rt, "brackets") == 0 {
			n.Style = yaml.FlowStyle
		}
		return n
	}
	comment := func(n *yaml.Node) *yaml.Node {
		if flip("comment") {
			n.HeadComment = "# a comment: [of, several\n# lines}"
		}
		return n
	}
	probe := func(i int) any {
		switch rapid.IntRange(0, 3).Draw(rt, "probe") {
		case 0:
			return nil
		case 1:
			return object(field{"exec", object(field{"command", []any{"true", value()}})}, field{"periodSeconds", 3})
		case 2:
			return object(field{"tcpSocket", object(field{"port", "http"})}, field{"timeoutSeconds", i})
		default:
			return object(field{"httpGet", object(field{"port", 8080 + i}, field{"path", "/healthz"})}, field{"failureThreshold", 3})
		}
	}
	security := object(field{"capabilities", object(field{"drop", []any{"ALL"}})})
	container := func(prefix string, isInit bool) func(int) any {
		return func(i int) any {
			var env, mounts, readiness, liveness any
			if flip("env") {
				env = list("variables", func(i int) any { return object(field{"name", fmt.Sprintf("V%d", i)}, field{"value", value()}) })
			}
			if flip("mounts") {
				mounts = list("mounts", func(i int) any { return object(field{"name", "v"}, field{"mountPath", fmt.Sprintf("/m%d", i)}) })
			}
			if !isInit {
				readiness, liveness = probe(i), probe(i+1)
			}
			return comment(object(
				field{"name", fmt.Sprintf("%s%d", prefix, i)}, field{"image", "image"}, field{"command", []any{"/bin/x", value(), value()}},
				field{"args", list("args", func(int) any { return value() })}, field{"env", env}, field{"volumeMounts", mounts},
				field{"ports", []any{object(field{"name", "http"}, field{"containerPort", 8000})}},
				field{"readinessProbe", readiness}, field{"livenessProbe", liveness}, field{"securityContext", security},
			))
		}
	}
	var inits, volumes any
	if flip("init containers") {
		inits = list("init containers", container("i", true))
	}
	if flip("volumes") {
		volumes = list("volumes", func(i int) any {
			return comment(object(field{"name", fmt.Sprintf("v%d", i)}, field{"emptyDir", object()}))
		})
	}
	containers := append(list("containers", container("c", false)), container("last", false)(7))
	spec := object(field{"initContainers", inits}, field{"volumes", volumes}, field{"containers", containers}, field{"schedulerName", value()})
	root := object(
		field{"apiVersion", "apps/v1"}, field{"kind", "Deployment"}, field{"metadata", object(field{"name", "d"})},
		field{"spec", object(field{"template", object(field{"spec", spec}, field{"metadata", object(field{"labels", object(field{"a", value()})})})})},
	)
	var b bytes.Buffer
	encoder := yaml.NewEncoder(&b)
	encoder.SetIndent(rapid.IntRange(2, 5).Draw(rt, "indent"))
	if err := encoder.Encode(root); err != nil {
		rt.Fatal(err)
	}
	text := b.String()
	if flip("indented lists") {
		text = compact(text)
	}
	if flip("end of file") {
		text = strings.TrimSuffix(text, "\n")
	}
	if flip("CRLF") {
		text = strings.ReplaceAll(text, "\n", "\r\n")
	}
	return text
}

// compact is a hook for layouts that the encoder does not write: it puts an empty line before each container.
func compact(text string) string {
	return strings.ReplaceAll(text, "\n      containers:\n", "\n\n      containers:\n\n")
}

// stripped returns a Deployment without empty lists and, if it is injected, without what inject adds.
func stripped(rt *rapid.T, object map[string]any, injected bool) map[string]any {
	spec := object["spec"].(map[string]any)["template"].(map[string]any)["spec"].(map[string]any)
	without := func(of map[string]any, key, name string) {
		items, _ := of[key].([]any)
		items = slices.DeleteFunc(items, func(item any) bool {
			is, _ := item.(map[string]any)["name"].(string)
			return injected && strings.HasPrefix(is, name)
		})
		if of[key] = items; len(items) == 0 {
			delete(of, key)
		}
	}
	without(spec, "initContainers", "mantlet")
	without(spec, "volumes", "mantlet-")
	for _, c := range spec["containers"].([]any) {
		c := c.(map[string]any)
		without(c, "env", "MANTLET_GATE_SOCKET")
		without(c, "volumeMounts", "mantlet-gate")
		if command := c["command"].([]any); injected && command[0] == "/gate/mantlet" {
			c["command"] = command[3:]
		}
		for _, key := range []string{"readinessProbe", "livenessProbe"} {
			probe, _ := c[key].(map[string]any)
			if probe == nil || probe["exec"] != nil {
				continue
			}
			get, _ := probe["httpGet"].(map[string]any)
			if injected && (get["port"] != 9901 || !strings.HasPrefix(fmt.Sprint(get["path"]), "/probe/") || probe["timeoutSeconds"] == 1) {
				rt.Fatalf("the kubelet asks %v", probe)
			}
			for _, handled := range []string{"httpGet", "tcpSocket", "timeoutSeconds"} {
				delete(probe, handled)
			}
		}
	}
	return object
}
