package reconcile

import (
	"net/netip"
	"reflect"
	"slices"

	"mantlet/render"
	"mantlet/schema"
)

// Ended counts the connections that changes of the configuration or of the mesh CAs ended.
type Ended struct {
	Direction string `json:"direction"` // ingress, egress
	Count     uint64 `json:"count"`
}

// end ends the connections that were let in or out before and that a state, whose rules are in force, forbids. The rules end those from
// outside by themselves, at their next packet; here both ends are told at once. Where that fails the rules are what is left.
func (d *Daemon) end(next *desired, revoked bool) {
	var listeners []netip.AddrPort
	if d.have != nil {
		if reflect.DeepEqual(d.have.generations, next.generations) && reflect.DeepEqual(d.have.closedPorts(), next.closedPorts()) &&
			reflect.DeepEqual(d.have.mesh.Egress, next.mesh.Egress) {
			return
		}
		listeners = forbidden(d.have.mesh, next.mesh, revoked)
	}
	mesh := next.enforced()
	admits := func(port uint16, mark render.Mark) bool {
		isClosed := slices.ContainsFunc(next.closedPorts(), func(p schema.Ports) bool { return p.Contains(port) })
		return !isClosed && render.Admits(mesh, next.generations, port, mark)
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
		i := slices.IndexFunc(to.Egress, func(is schema.Egress) bool { return is.Listen == was.Listen })
		if i < 0 || revoked || to.TLS.MinVersion > from.TLS.MinVersion || to.Egress[i].Upstream != was.Upstream || narrower(was.ServerNames, to.Egress[i].ServerNames) {
			listeners = append(listeners, was.Listen)
		}
	}
	return listeners
}

// narrower reports whether a list of names accepts somebody no more whom another one did. No list accepts everybody.
func narrower(was, is []string) bool {
	if is == nil {
		return false
	}
	return was == nil || slices.ContainsFunc(was, func(name string) bool { return !slices.Contains(is, name) })
}
