// Package gate lets a workload insist on its mesh. mantlet answers at a unix socket whether the sidecar is ready, and nothing
// else. The workload's command line, `mantlet gate -- COMMAND`, waits for that answer and then becomes the command.
//
// The socket lies in a volume that both containers mount. Where mantlet is missing, nobody listens there and the command is
// never executed: so the order and the presence of containers, which an untrusted operator decides, cannot make a workload
// run without its mesh.
package gate
