// Package inject adds mantlet's sidecar to the pods of Kubernetes manifests, and takes it away again.
//
// It edits text. What it does not add or replace stays as it was, byte for byte; what it adds stands between comments that also hold
// the lines which it replaces. So Remove needs nothing but the text, and Inject first removes what an earlier one added.
package inject
