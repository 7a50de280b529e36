package reconcile

import (
	"net/netip"
	"reflect"
	"slices"

	"mantlet/render"
	"mantlet/schema"
)

// end ends the connections that were let in or out before and that a state, whose rules are in force, forbids. The rules end those from
// outside by themselves, at their next packet; here both ends are told at once. Where that fails the rules are what is left.
func (d *Daemon) end(next *desired, revoked bool) {
	var listeners []netip.AddrPort
	if d.have != nil {
		listeners = forbidden(d.have.mesh, next.mesh, revoked)
		sameIngress := reflect.DeepEqual(d.have.generations, next.generations) && reflect.DeepEqual(d.have.closedPorts(), next.closedPorts())
		if sameIngress && len(listeners) == 0 {
			return
		}
	}
	mesh := next.enforced()
	admits := func(port uint16, mark render.Mark) bool {
		return !next.isClosed(schema.Ports{First: port, Last: port}) && render.Admits(mesh, next.generations, port, mark)
	}
	d.watchdog.begin(loop, "ending connections", kernelLimit)
	inbound, egress, err := d.Kernel.End(admits, listeners)
	d.watchdog.begin(loop, "its turn", turnLimit)
	if err != nil {
		d.Log.Warn("connections that are forbidden now end at their next packet, and those to egress entries with the Envoy that has them", "error", err)
	}
	if inbound+egress > 0 {
		d.Log.Info("connections that are forbidden now were ended", "inbound", inbound, "egress", egress, "mesh_ca_removed", revoked)
	}
	d.locked(func() {
		d.endedInbound += uint64(inbound)
		d.endedEgress += uint64(egress)
	})
}

// forbidden returns the listen addresses of egress entries at which connections can be open that another mesh would not make: whose
// entry is gone or leads elsewhere, whose endpoint may not be accepted any more, or who may use a TLS version that is too old. revoked
// tells that a mesh CA was taken away, which may have signed any endpoint's certificate.
func forbidden(from, to schema.Mesh, revoked bool) (listeners []netip.AddrPort) {
	for _, was := range from.Egress {
		i, found := slices.BinarySearchFunc(to.Egress, was.Listen, func(is schema.Egress, at netip.AddrPort) int { return is.Listen.Compare(at) })
		if !found || revoked || to.TLS.MinVersion > from.TLS.MinVersion || to.Egress[i].Upstream != was.Upstream || !was.Within(to.Egress[i]) {
			listeners = append(listeners, was.Listen)
		}
	}
	return listeners
}
