package schema_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v3"
	"pgregory.net/rapid"

	"mantlet/schema"
)

var update = flag.Bool("update", false, "rewrite examples/schema.json, and the problems that the files of testdata start with")

// TestSchemaFile checks that the schema that mantlet prints, and the one that editors read, are that of the parser's types.
func TestSchemaFile(t *testing.T) {
	want, err := schema.GenerateJSONSchema()
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"schema.json", "../examples/schema.json"} {
		if *update {
			if err := os.WriteFile(file, want, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), string(got)); diff != "" {
			t.Errorf("%s is old; -update rewrites it: %s", file, diff)
		}
	}
	if !*update && string(schema.JSONSchema()) != string(want) {
		t.Error("mantlet prints another one")
	}
}

// TestSchemaAgrees checks that the JSON Schema and the parser say the same of each file of testdata:
//
//	good     both accept it
//	bad      both refuse it
//	beyond   the parser alone refuses it, for what no JSON Schema can express: what two values have to do with each other,
//	         how YAML spells a value, how an IPv6 address is spelled, and lengths of times and of names within a text
//
// Files that the parser refuses start with its problems, as comments.
func TestSchemaAgrees(t *testing.T) {
	validator := compile(t)
	for kind, want := range map[string]struct{ schema, parser bool }{"good": {true, true}, "bad": {false, false}, "beyond": {true, false}} {
		files, err := filepath.Glob(filepath.Join("testdata", kind, "*.yaml"))
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %d files, %v", kind, len(files), err)
		}
		for _, file := range files {
			t.Run(kind+"/"+filepath.Base(file), func(t *testing.T) {
				content, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				verdict := validator.Validate(asJSON(t, content))
				if (verdict == nil) != want.schema {
					t.Errorf("the schema says: %v", verdict)
				}
				_, err = environment(t).Merge(content)
				if (err == nil) != want.parser {
					t.Errorf("the parser says: %v", err)
				}
				comments, text := problemComments(string(content))
				if *update && err != nil {
					rewrite(t, file, places(err), text)
					return
				}
				if diff := cmp.Diff(comments, places(err)); diff != "" {
					t.Errorf("-update rewrites the problems: %s", diff)
				}
			})
		}
	}
}

const problemComment = "# problem: "

// problemComments returns the problems that a file of testdata says it has, and the rest of its text.
func problemComments(content string) (problems []string, text string) {
	for strings.HasPrefix(content, problemComment) {
		var line string
		line, content, _ = strings.Cut(content, "\n")
		problems = append(problems, strings.TrimPrefix(line, problemComment))
	}
	return problems, content
}

// rewrite puts a file's problems before its text; their number moves its lines.
func rewrite(t *testing.T, file string, problems []string, text string) {
	t.Helper()
	for range 2 {
		var content strings.Builder
		for _, p := range problems {
			content.WriteString(problemComment + p + "\n")
		}
		content.WriteString(text)
		if err := os.WriteFile(file, []byte(content.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		_, err := environment(t).Merge([]byte(content.String()))
		problems = places(err)
	}
}

func compile(t *testing.T) *jsonschema.Schema {
	t.Helper()
	compiler := jsonschema.NewCompiler()
	if err := compiler.AddResource("mantlet.json", schemaValue(t)); err != nil {
		t.Fatal(err)
	}
	compiled, err := compiler.Compile("mantlet.json")
	if err != nil {
		t.Fatal(err)
	}
	return compiled
}

func schemaValue(t *testing.T) any {
	t.Helper()
	text := schema.JSONSchema()
	value, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return value
}

// asJSON is a YAML document as a validator of JSON Schema sees it.
func asJSON(t fataler, content []byte) any {
	t.Helper()
	var value any
	if err := yaml.Unmarshal(content, &value); err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	if value, err = jsonschema.UnmarshalJSON(bytes.NewReader(text)); err != nil {
		t.Fatal(err)
	}
	return value
}

// property is a key of the override file, by its path: "ingress.port", "tls".
type property struct {
	path   string
	schema map[string]any
}

// properties returns all keys that there are.
func properties(t *testing.T) []property {
	t.Helper()
	var all []property
	var walk func(path string, s map[string]any)
	walk = func(path string, s map[string]any) {
		if items, ok := s["items"].(map[string]any); ok {
			walk(path, items)
		}
		under, _ := s["properties"].(map[string]any)
		for name, v := range under {
			p := property{strings.TrimPrefix(path+"."+name, "."), v.(map[string]any)}
			all = append(all, p)
			walk(p.path, p.schema)
		}
	}
	walk("", schemaValue(t).(map[string]any))
	slices.SortFunc(all, func(a, b property) int { return strings.Compare(a.path, b.path) })
	return all
}

// TestSchemaProperties checks that each key is described, that nothing beside the keys is accepted, and that the defaults
// are those of an empty environment.
func TestSchemaProperties(t *testing.T) {
	want := map[string]string{"ingress.mode": string(schema.ModeMTLS)}
	for _, e := range environment(t).Base().Explain() {
		want[e.Path] = e.Value
	}
	got := map[string]string{}
	for _, p := range properties(t) {
		if text, _ := p.schema["description"].(string); !strings.HasSuffix(text, ".") {
			t.Errorf("%s is described as %q", p.path, text)
		}
		if p.schema["properties"] != nil && p.schema["additionalProperties"] != false {
			t.Errorf("%s may hold any key", p.path)
		}
		if value, ok := p.schema["default"]; ok {
			got[p.path] = fmt.Sprint(value)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// TestSchemaAgreesOnTexts draws values from the pieces that they are made of, and checks that schema and parser say the same
// of each.
func TestSchemaAgreesOnTexts(t *testing.T) {
	validator := compile(t)
	ingress := func(field string) func(any) any {
		return func(value any) any {
			return map[string]any{"ingress": []any{map[string]any{"port": 80, field: value}}}
		}
	}
	egress := func(field string) func(any) any {
		return func(value any) any {
			entry := map[string]any{"listen": "127.0.0.9:9", "upstream": "x:1"}
			entry[field] = value
			return map[string]any{"egress": []any{entry}}
		}
	}
	probe := func(field string) func(any) any {
		return func(value any) any {
			entry := map[string]any{"name": "a", "tcp": 80}
			if field != "name" {
				delete(entry, "tcp")
			}
			entry[field] = value
			return map[string]any{"probes": []any{entry}}
		}
	}
	numbers := []string{"80", "80", "1", "65535", "65536", "0", "15006", "15007", "x", " "}
	paths := append(numbers, "/", "/", "/a", "/healthz", "?", "%20", "%2", "%zz", ";", "#", "//", "é", "\n", "..", ":80", "@x")
	services := append(numbers, "/", "/", "/my.Service", "a", "-", "..", "%", "#", "é", strings.Repeat("b", 254))
	names := []string{"a", "B", "-", "_", ".", "*", "*.", "0", "7", "10.", "192.0.2.1", "://", "spiffe://", "/", "#", "[", "::1", "@", " ", "é", "%", "\n", "~", strings.Repeat("b", 62)}
	ports := []string{":80", ":80", ":1", ":65535", ":65536", ":0", ":080", ":", "", ":x", ":15006", ":-1", ":8 "}
	for name, c := range map[string]struct {
		file   func(value any) any
		pieces []string
		ends   []string
		beyond string // why the parser alone may refuse
	}{
		"port":        {ingress("port"), []string{"1", "80", "0", "65535", "65536", "-", "15006", "15008", "x", " ", "+"}, nil, "ends before|own listeners"},
		"name":        {ingress("name"), names, nil, ""},
		"allow":       {func(value any) any { return ingress("allow")([]any{value}) }, names, nil, ""},
		"serverNames": {func(value any) any { return egress("serverNames")([]any{value}) }, names, nil, ""},
		"listen": {
			egress("listen"),
			[]string{"127.0.0.1", "127.1.2.3", "127.", "127.0.0.", "0.", "0.0.", "0.1", "1", "255", "256", "07", "[::1]", "[0:0::1]", "[::2]", "[::01]", "x", "."},
			ports,
			`own listen address|"\[`,
		},
		"upstream": {egress("upstream"), append(names, "192.0.2.1", "255.1.", "256.", "[::1]", "[2001:db8::7]", "[::ffff:1.2.3.4]", "[::g]"), ports, `one host|own listen address|"\[`},
		"outbound": {
			func(value any) any { return map[string]any{"outbound": map[string]any{"allow": []any{value}}} },
			[]string{"dns", "10.0.0.0", "/8", "/32", "/33", "10.0.0.1", "[fd00::]", "[fd00::1]", "/128", "/129", "/08", "x", "/", "127.0.0.1", " "},
			append(ports, ":443", ":15007"),
			`bits beyond|is loopback|must be dns, or an address|"\[`,
		},
		"probe": {probe("name"), []string{"a", "b7", "-", "0", "A", ".", "_", " ", "é", "", strings.Repeat("c", 61)}, nil, ""},
		"http":  {probe("http"), paths, nil, ""},
		"tcp":   {probe("tcp"), append(numbers, "/"), nil, ""},
		"grpc":  {probe("grpc"), services, nil, ""},
		"drainTime": {func(value any) any {
			return map[string]any{"envoy": map[string]any{"drainTime": value, "parentShutdownTime": "24h"}}
		}, []string{"1", "0", "7", "59", "h", "m", "s", ".", "ms", "-", "+", " "}, []string{"s", "m", "h", ""}, "from 1s to 24h|must be less|must be more"},
	} {
		t.Run(name, func(t *testing.T) {
			env, accepted, refused := environment(t), 0, 0
			rapid.Check(t, func(t *rapid.T) {
				for range 8 {
					text := strings.Join(rapid.SliceOfN(rapid.SampledFrom(c.pieces), 0, 3).Draw(t, "pieces"), "")
					if c.ends != nil {
						text += rapid.SampledFrom(c.ends).Draw(t, "end")
					}
					content, err := json.Marshal(c.file(text))
					if err != nil {
						t.Fatal(err)
					}
					verdict := validator.Validate(asJSON(t, content))
					_, err = env.Merge(content)
					if err == nil {
						accepted++
					} else {
						refused++
					}
					if (verdict == nil) == (err == nil) {
						continue
					}
					if verdict != nil || c.beyond == "" || !regexp.MustCompile(c.beyond).MatchString(err.Error()) {
						t.Fatalf("%s\nthe schema says: %v\nthe parser says: %v", content, verdict, err)
					}
				}
			})
			if !t.Failed() && min(accepted, refused) < 3 {
				t.Errorf("%d accepted, %d refused: what is drawn shows little", accepted, refused)
			}
		})
	}
}
