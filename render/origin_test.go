package render_test

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"mantlet/render"
)

// TestMeshOf: a bootstrap tells which mesh it was made from, and is not believed where it was made from another.
func TestMeshOf(t *testing.T) {
	for name, c := range goldenCases(t) {
		mesh, err := load(c.inputs(t))
		if err != nil {
			continue
		}
		state, err := render.Render(mesh, place)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if _, ok := render.MeshOf(state.Bootstrap, state.Digest, place); ok {
			t.Errorf("%s: it tells a mesh, and none was noted", name)
		}
		if err := render.AddMesh(state.Bootstrap, mesh); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		got, ok := render.MeshOf(state.Bootstrap, state.Digest, place)
		if diff := cmp.Diff(mesh, got, cmpopts.EquateComparable(netip.AddrPort{}, netip.Prefix{})); diff != "" || !ok {
			t.Errorf("%s: %t, %s", name, ok, diff)
		}
		other := mesh
		other.Envoy.Concurrency++
		if err := render.AddMesh(state.Bootstrap, other); err != nil {
			t.Fatal(err)
		}
		if _, ok := render.MeshOf(state.Bootstrap, state.Digest, place); ok {
			t.Errorf("%s: a mesh that makes another state is believed", name)
		}
	}
	if _, ok := render.MeshOf(nil, "", place); ok {
		t.Error("no bootstrap tells a mesh")
	}
}
