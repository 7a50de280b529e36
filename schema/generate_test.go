package schema

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"

	"github.com/invopop/jsonschema"
)

// GenerateJSONSchema makes the JSON Schema of the types that the parser reads into.
func GenerateJSONSchema() ([]byte, error) {
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

func (portsText) JSONSchema() *jsonschema.Schema {
	return &jsonschema.Schema{
		AnyOf: []*jsonschema.Schema{
			{Type: "integer", Minimum: "1", Maximum: "65535"},
			{Type: "string", Pattern: "^" + portPattern + "(-" + portPattern + ")?$"},
		},
		Not: &jsonschema.Schema{Enum: []any{IngressMTLSPort, IngressTLSPort, strconv.Itoa(IngressMTLSPort), strconv.Itoa(IngressTLSPort)}},
	}
}

func (nameText) JSONSchema() *jsonschema.Schema {
	return &jsonschema.Schema{Type: "string", Pattern: "^[^#]*$"}
}

func (listenText) JSONSchema() *jsonschema.Schema {
	return &jsonschema.Schema{
		Type:    "string",
		Pattern: `^(127(\.` + octetPattern + `){3}|\[(0{0,4}:){2,7}0{0,3}1\]):` + portPattern + "$",
		Not:     &jsonschema.Schema{Pattern: fmt.Sprintf(`^127\.255\.255\.255:|:(%d|%d)$`, IngressMTLSPort, IngressTLSPort)},
	}
}

func (upstreamText) JSONSchema() *jsonschema.Schema {
	const ipPattern = octetPattern + `(\.` + octetPattern + `){3}|\[[0-9A-Fa-f:.]+\]`
	return &jsonschema.Schema{Type: "string", AnyOf: []*jsonschema.Schema{
		{Pattern: `^(` + ipPattern + `):` + portPattern + "$"},
		{Pattern: `^` + hostPattern + `\.?:` + portPattern + "$", Not: &jsonschema.Schema{Pattern: `(^|\.)[0-9]+\.?:`}},
	}}
}

// address matches what looks like an IPv4 address rather than a DNS name.
func address() *jsonschema.Schema { return &jsonschema.Schema{Pattern: `^([^/]*\.)?[0-9]+$`} }

func (sanText) JSONSchema() *jsonschema.Schema {
	return &jsonschema.Schema{Type: "string", Pattern: `^(\*|(\*\.)?` + hostPattern + "|" + uriPattern + ")$", Not: address()}
}

func (serverNameText) JSONSchema() *jsonschema.Schema {
	return &jsonschema.Schema{Type: "string", Pattern: "^(" + hostPattern + "|" + uriPattern + ")$", Not: address()}
}

func (alpnText) JSONSchema() *jsonschema.Schema {
	s := enum(slices.Sorted(maps.Keys(misnamedALPN)))
	return &jsonschema.Schema{Type: "string", Pattern: "^" + alpnPattern + "$", Not: &jsonschema.Schema{Enum: s.Enum}}
}

// JSONSchemaExtend tells the default of the list, which a tag can't hold.
func (outboundForm) JSONSchemaExtend(s *jsonschema.Schema) {
	if allow, ok := s.Properties.Get("allow"); ok {
		allow.Default = []any{}
	}
}

func (allowText) JSONSchema() *jsonschema.Schema {
	const length4, length6 = `([12]?[0-9]|3[0-2])`, `([1-9]?[0-9]|1[01][0-9]|12[0-8])`
	return &jsonschema.Schema{
		Type:    "string",
		Pattern: `^(dns|(` + octetPattern + `(\.` + octetPattern + `){3}(/` + length4 + `)?|\[[0-9A-Fa-f:.]+\](/` + length6 + `)?):` + portPattern + `)$`,
	}
}

func (probeName) JSONSchema() *jsonschema.Schema {
	return &jsonschema.Schema{Type: "string", Pattern: `^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`}
}

// probeSchema is for a port alone, where that will do, and for a port that something follows.
func probeSchema(follows string) *jsonschema.Schema {
	return &jsonschema.Schema{
		AnyOf: []*jsonschema.Schema{
			{Type: "integer", Minimum: "1", Maximum: "65535"},
			{Type: "string", Pattern: "^" + portPattern + follows + "$", MaxLength: new(uint64(len("65535") + maxPath))},
		},
		Not: &jsonschema.Schema{AnyOf: []*jsonschema.Schema{
			{Enum: []any{IngressMTLSPort, IngressTLSPort}},
			{Type: "string", Pattern: fmt.Sprintf("^(%d|%d)(/|$)", IngressMTLSPort, IngressTLSPort)},
		}},
	}
}

func (httpProbeText) JSONSchema() *jsonschema.Schema { return probeSchema("(" + pathPattern + ")?") }

func (portText) JSONSchema() *jsonschema.Schema { return probeSchema("") }

func (grpcProbeText) JSONSchema() *jsonschema.Schema { return probeSchema("(" + servicePattern + ")?") }

func (threadsText) JSONSchema() *jsonschema.Schema {
	return &jsonschema.Schema{Type: "integer", Minimum: "1", Maximum: json.Number(strconv.Itoa(maxThreads))}
}

func (durationText) JSONSchema() *jsonschema.Schema {
	return &jsonschema.Schema{Type: "string", Pattern: durationPattern}
}

func (removeText) JSONSchema() *jsonschema.Schema { return &jsonschema.Schema{Const: true} }

func enum(choices []string) *jsonschema.Schema {
	s := &jsonschema.Schema{Type: "string"}
	for _, c := range choices {
		s.Enum = append(s.Enum, c)
	}
	return s
}

// JSONSchema lists the choices.
func (m Mode) JSONSchema() *jsonschema.Schema { return enum(m.choices()) }

// JSONSchema lists the choices.
func (m OutboundMode) JSONSchema() *jsonschema.Schema { return enum(m.choices()) }

// JSONSchema lists the choices.
func (v TLSVersion) JSONSchema() *jsonschema.Schema { return enum(v.choices()) }

// JSONSchema lists the choices.
func (l EnvoyLogLevel) JSONSchema() *jsonschema.Schema { return enum(l.choices()) }

// JSONSchema lists the choices.
func (o OtherProtocols) JSONSchema() *jsonschema.Schema { return enum(o.choices()) }

// JSONSchema lists the choices.
func (a AccessLog) JSONSchema() *jsonschema.Schema { return enum(a.choices()) }

func (s SourceAddress) JSONSchema() *jsonschema.Schema { return enum(s.choices()) }

func (ageText) JSONSchema() *jsonschema.Schema {
	return &jsonschema.Schema{Type: "string", Pattern: "^(none|([0-9]+[hms])+)$"}
}
