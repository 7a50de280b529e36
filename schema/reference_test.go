package schema_test

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

// TestReference checks examples/reference.yaml: editors find the schema, both accept it, and each key is there with a
// comment, which tells its default.
func TestReference(t *testing.T) {
	content, err := os.ReadFile("../examples/reference.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if first, _, _ := strings.Cut(string(content), "\n"); first != "# yaml-language-server: $schema=schema.json" {
		t.Errorf("the first line is %q", first)
	}
	if _, err := environment(t).Merge(content); err != nil {
		t.Error(err)
	}
	if err := compile(t).Validate(asJSON(t, content)); err != nil {
		t.Error(err)
	}

	var document yaml.Node
	if err := yaml.Unmarshal(content, &document); err != nil {
		t.Fatal(err)
	}
	comments := map[string]string{}
	var walk func(path string, node *yaml.Node)
	walk = func(path string, node *yaml.Node) {
		if node.Kind != yaml.MappingNode {
			for _, item := range node.Content {
				if len(item.Content) > 0 { // what stands above a list's item is said of its first key
					item.Content[0].HeadComment += item.HeadComment
				}
				walk(path, item)
			}
			return
		}
		for i := 0; i < len(node.Content); i += 2 {
			key := strings.TrimPrefix(path+"."+node.Content[i].Value, ".")
			comments[key] += node.Content[i].HeadComment
			walk(key, node.Content[i+1])
		}
	}
	walk("", document.Content[0])

	want, got := map[string]string{}, map[string]string{}
	says := regexp.MustCompile(`Default: (\S+)\.(\n|$)`)
	for _, p := range properties(t) {
		want[p.path] = ""
		if value, ok := p.schema["default"]; ok {
			want[p.path] = fmt.Sprint(value)
		}
		comment, ok := comments[p.path]
		if !ok {
			continue
		}
		got[p.path] = ""
		if match := says.FindStringSubmatch(comment); match != nil {
			got[p.path] = match[1]
		}
		if comment == "" {
			t.Errorf("%s has no comment", p.path)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("keys and their defaults: %s", diff)
	}
}
