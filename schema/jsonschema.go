package schema

import (
	"encoding/json"
	"fmt"

	"github.com/invopop/jsonschema"
)

// JSONSchema returns the JSON Schema of the override file, indented.
func JSONSchema() ([]byte, error) {
	reflector := jsonschema.Reflector{Anonymous: true, DoNotReference: true}
	s := reflector.Reflect(&fileForm{})
	s.Title = "mantlet override file"
	s.Description = "The configuration that adds to what mantlet's environment variables say, or overrides it. Everything is optional."
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("marshalling the JSON Schema: %w", err)
	}
	return append(text, '\n'), nil
}

// JSONSchemaExtend says what depends on other fields.
func (ingressForm) JSONSchemaExtend(s *jsonschema.Schema) {
	mtls := jsonschema.NewProperties()
	mtls.Set("mode", &jsonschema.Schema{Const: ModeMTLS})
	noPassthrough := jsonschema.NewProperties()
	noPassthrough.Set("mode", &jsonschema.Schema{Not: &jsonschema.Schema{Const: ModePassthrough}})
	s.DependentSchemas = map[string]*jsonschema.Schema{"allow": {Properties: mtls}, "alpn": {Properties: noPassthrough}, "remove": onlyKey()}
}

// JSONSchemaExtend says what depends on other fields.
func (egressForm) JSONSchemaExtend(s *jsonschema.Schema) {
	s.DependentSchemas = map[string]*jsonschema.Schema{"remove": onlyKey()}
}

// JSONSchemaExtend allows an entry its name, and one of the others.
func (probeForm) JSONSchemaExtend(s *jsonschema.Schema) { s.MaxProperties = onlyKey().MaxProperties }

// onlyKey allows an entry its key, and remove.
func onlyKey() *jsonschema.Schema { return &jsonschema.Schema{MaxProperties: new(uint64(2))} }
