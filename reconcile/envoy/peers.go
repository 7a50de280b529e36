package envoy

import (
	"mantlet/internal/peers"
	"mantlet/internal/sockdiag"
)

// Peers returns who is connected, by the socket of Envoy that the client dialled: at ports with a list of clients, and through egress
// entries with server names. It does not know connections that are missing. It must be called on a thread in the pod's network namespace.
func (r *Runner) Peers() (map[sockdiag.Socket]peers.Connection, error) {
	return r.peers.Known()
}
