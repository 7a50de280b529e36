package reconcile

import (
	"errors"
	"net/netip"
	"slices"

	"mantlet/internal/bind"
	"mantlet/schema"
)

// Explain adds to an error of bind.Try what a mesh wants the addresses for.
func Explain(err error, mesh schema.Mesh) error {
	if conflicts, ok := errors.AsType[bind.Conflicts](err); ok {
		for i := range conflicts {
			conflicts[i].For = purposeOf(conflicts[i].Address, mesh)
		}
	}
	return err
}

func purposeOf(address netip.AddrPort, mesh schema.Mesh) string {
	if i := slices.IndexFunc(mesh.Egress, func(e schema.Egress) bool { return e.Listen == address }); i >= 0 {
		return "egress entry " + title(mesh.Egress[i])
	}
	return "Envoy needs it for what comes in"
}
