// Package reconcile brings the kernel's rules and Envoy to the desired state and keeps them there.
//
// A Daemon reads the configuration and the certificates, goes step by step from what is in force to what is wanted, and repairs the rules
// where somebody changed them. It knows the kernel, Envoy, name resolution and iptables-legacy by the interfaces of backends.go; cmd
// hands them in. It never lets in more than the old or the new state does: Envoy changes before the rules that send connections to it,
// and what a change forbids ends in the rules first where Envoy can't follow at once. What is wrong is reported by package status.
//
// Compare and Diff say what would change, without a Daemon: between two configurations, and between one and what is live.
package reconcile
