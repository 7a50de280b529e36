// Package envoy runs Envoy: its processes, its certificates, and what it says of itself.
//
// A Runner starts one Envoy after another, each as a hot restart of the one before. Start returns once the new Envoy says by its admin
// interface that it is live with the wanted state; where it does not get live, whatever served goes on. Secrets publishes the TLS
// directory's certificates to the Envoy that serves, after an Envoy has tried them. Endpoints tells Envoy the addresses of upstreams.
// Read asks an Envoy that runs without a Runner.
//
// Envoys run as a user of their own. What they write is read within limits, and is never trusted to be well-formed.
package envoy
