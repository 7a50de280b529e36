// Package render turns a schema.Mesh into all that the sidecar needs of the kernel and of Envoy: a State, which has the Ruleset of
// the table inet mantlet and the bootstrap of Envoy.
//
// It is pure: no I/O, no clock, no environment; the same mesh gives the same bytes. Ruleset.Text prints the rules as nft would read
// them, and JSON the bootstrap. Diff and DiffBootstraps say in words how two of them differ.
//
// The rules are values of this package, not text: reconcile/nft compiles them to the kernel's expressions, and reads the kernel's back
// into them.
package render
