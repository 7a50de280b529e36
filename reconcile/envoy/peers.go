package envoy

import (
	"mantlet/internal/peers"
	"mantlet/internal/sockdiag"
)

// Peers returns who is connected, by Envoy's socket that the client dialled: at ports with a list of clients, and through egress entries
// with server names. Of a connection that is not among them it is not known. It must be called on a thread in the network namespace.
func (r *Runner) Peers() (map[sockdiag.Socket]peers.Connection, error) {
	return r.peers.Known()
}
