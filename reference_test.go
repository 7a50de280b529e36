package mantlet

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/invopop/jsonschema"

	"mantlet/schema"
)

var update = flag.Bool("update", false, "write what is generated into the documents")

const (
	configuration = "docs/configuration.md"
	generated     = "<!-- generated from the schema by `go test . -run TestReference -update` -->\n"
	generatedEnd  = "<!-- end of what is generated -->\n"
)

// TestReference checks that the reference of the override file's keys is what the JSON Schema says.
func TestReference(t *testing.T) {
	text := schema.JSONSchema()
	var root jsonschema.Schema
	if err := json.Unmarshal(text, &root); err != nil {
		t.Fatal(err)
	}
	var table strings.Builder
	table.WriteString("| key | value | default | meaning |\n|---|---|---|---|\n")
	describe(&table, "", &root)

	document := read(t, configuration)
	before, rest, ok := strings.Cut(document, generated)
	_, after, ended := strings.Cut(rest, generatedEnd)
	if !ok || !ended {
		t.Fatalf("%s has no generated reference", configuration)
	}
	want := before + generated + table.String() + generatedEnd + after
	if *update {
		if err := os.WriteFile(configuration, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if document != want {
		t.Errorf("the reference in %s is not what the schema says: go test . -run TestReference -update", configuration)
	}
}

// describe writes a row for each key below a schema, in the schema's order.
func describe(table *strings.Builder, path string, s *jsonschema.Schema) {
	for pair := s.Properties.Oldest(); pair != nil; pair = pair.Next() {
		key, property := path+pair.Key, pair.Value
		byDefault := ""
		if property.Default != nil {
			byDefault = fmt.Sprintf("`%v`", property.Default)
		}
		fmt.Fprintf(table, "| `%s` | %s | %s | %s |\n", key, values(property), byDefault, strings.ReplaceAll(property.Description, "|", `\|`))
		switch {
		case property.Items != nil && property.Items.Properties.Len() > 0:
			describe(table, key+"[].", property.Items)
		case property.Properties.Len() > 0:
			describe(table, key+".", property)
		}
	}
}

// values says which values a key takes.
func values(s *jsonschema.Schema) string {
	switch {
	case s.Const != nil:
		return fmt.Sprintf("`%v`", s.Const)
	case len(s.Enum) > 0:
		var all []string
		for _, value := range s.Enum {
			all = append(all, fmt.Sprintf("`%v`", value))
		}
		return strings.Join(all, ", ")
	case s.Type == "array":
		return "list"
	case s.Type == "object":
		return "mapping"
	case s.Type != "":
		return s.Type
	}
	var types []string
	for _, either := range s.AnyOf {
		types = append(types, either.Type)
	}
	return strings.Join(types, " or ")
}
