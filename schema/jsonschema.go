package schema

import _ "embed" // the JSON Schema

//go:embed schema.json
var jsonSchema []byte

// JSONSchema returns the JSON Schema of the override file, indented. A test generates it from the types that the parser reads into.
// The library for that would make the binary 300 KiB larger.
func JSONSchema() []byte { return jsonSchema }
