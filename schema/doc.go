// Package schema turns text that people write into a Mesh: one value that says what the sidecar shall do.
//
// ParseEnvironment reads the variables, and Environment.Load merges the override file over them, where the variables name one.
// The result is a Config: the Mesh, and where each of its values comes from (Config.Explain).
//
// The package parses, validates and explains. It knows nothing of the kernel, of Envoy, or of files that change. An error holds
// every problem of the input, each with its place, the value and what would be right: see Problems. Where there is an error, there
// is no Mesh to use.
//
// The same types make the JSON schema of the override file (JSONSchema) and the reference in docs/configuration.md.
package schema
