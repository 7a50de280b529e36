// Package status is what a running mantlet says of itself: the types of its status, the reasons why it is not ready with their codes,
// and the HTTP server that tells them (readiness, status, metrics, the workload's probes), with a client.
//
// The server knows nothing of the loop: it asks a Source, which reconcile.Daemon is. The kernel's rules, Envoy and name resolution
// are below the loop and use these types, too, so that none of them imports it.
package status
