package render

import (
	"cmp"
	"slices"

	"mantlet/schema"
)

// Mark is mantlet's part of the connection mark. It tells that these rules saw a connection begin, and how: from the pod,
// or under which mode from outside, so that its packets end when the mode of their port changes. Only the bits of MarkMask
// are mantlet's; other software in the pod may use the rest.
type Mark uint32

// The marks. Bits 20 to 22 hold the kind; bits 23 to 27 are the policy generation's.
const (
	MarkNone        Mark = 0 // older than the rules
	MarkMTLS        Mark = 1 << 20
	MarkTLS         Mark = 2 << 20
	MarkPassthrough Mark = 3 << 20
	MarkOutbound    Mark = 4 << 20
	MarkInside      Mark = 5 << 20 // it began over lo
	MarkOwn         Mark = 6 << 20 // Envoy's to an upstream, or of mantlet's resolver
	MarkClient      Mark = 7 << 20 // Envoy made it to the workload, from the client's address
	MarkMask        Mark = 0xff << 20

	generationShift = 23
)

// StatusSocket is the mark (SO_MARK) of the socket that mantlet serves its status at. Sockets of others have it not, so that a
// workload at the same port is not taken for mantlet.
const StatusSocket uint32 = 0x6d6e746c

// WorkloadPriority is the priority (SO_PRIORITY) of the sockets that connect to the workload in plaintext: Envoy's, and those of
// mantlet's probes. What they send must not leave the pod. Every process may set a priority from 0 to 6, so that it takes no
// capability and works on every kernel; SO_MARK takes NET_ADMIN before Linux 5.17. No IP_TOS amounts to a priority of 5
// (ip_tos2prio, net/ipv4/route.c), so no other socket has it by chance. A process that sets it gains nothing: what it sends
// outside is dropped.
const WorkloadPriority uint32 = 5

// EndpointPriority is the priority of the sockets that connect to upstreams of egress entries. They must not connect to listeners
// of Envoy's own: each connection would make another one. As WorkloadPriority it is no IP_TOS's.
const EndpointPriority uint32 = 3

// Generation numbers the policies of a mode that the mode alone does not tell apart: who is let in, by which CA, with
// which TLS. A connection lives on only while its port keeps the generation that it was let in under.
type Generation uint8

// MaxGeneration is the last generation that fits the mark.
const MaxGeneration Generation = 31

// Next returns the generation that follows. Once all were in use it is the first again.
func (g Generation) Next() Generation { return (g + 1) % (MaxGeneration + 1) }

// Generations says which generation is in force at which port.
type Generations struct {
	Default Generation // at ports that none of Ports contains
	Ports   []PortsGeneration
	// Moving admits the next generation of each as well, while connections are moved there that a change does not forbid. Nothing new
	// gets that one.
	Moving bool
}

// PortsGeneration is the generation of a range of ports. Ranges are sorted and do not overlap.
type PortsGeneration struct {
	Ports      schema.Ports
	Generation Generation
}

// At returns the generation of a port.
func (g Generations) At(port uint16) Generation {
	i, _ := slices.BinarySearchFunc(g.Ports, port, func(p PortsGeneration, port uint16) int { return cmp.Compare(p.Ports.Last, port) })
	if i < len(g.Ports) && g.Ports[i].Ports.Contains(port) {
		return g.Ports[i].Generation
	}
	return g.Default
}

// Admits tells which open connections from outside the rules of a mesh let go on in these generations, by their port and mark. Marks of
// other connections are none of its business.
func Admits(mesh schema.Mesh, generations Generations, port uint16, mark Mark) bool {
	if mesh.IngressOff || isStatus(mesh, port) {
		return true
	}
	p := policy{schema.PolicyOf(mesh.Ingress, port).Mode, generations.At(port), generations.Moving}
	return p.mode == schema.ModePassthrough || slices.ContainsFunc(p.admits(), func(one policy) bool { return one.mark() == mark&MarkMask })
}

// MarkOf returns the mark of connections that were let in under a mode in a generation.
func MarkOf(mode schema.Mode, generation Generation) Mark {
	return policy{mode: mode, generation: generation}.mark()
}

// ModeOf returns the mode under which a connection was let in; false where it was not from outside.
func ModeOf(mark Mark) (schema.Mode, bool) {
	const kinds = 7 << 20
	mode, ok := map[Mark]schema.Mode{
		MarkMTLS: schema.ModeMTLS, MarkTLS: schema.ModeTLS, MarkPassthrough: schema.ModePassthrough,
	}[mark&kinds]
	return mode, ok
}
