// Package manifest looks at Kubernetes manifests as mantlet's sidecars are described in them: which configuration a sidecar
// gets from variables, ConfigMaps and Secrets, and what in its pod keeps it from doing its work or defeats it.
//
// It reads text and does nothing else. What a manifest does not tell is a warning, never an error.
package manifest
