package render_test

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"mantlet/render"
)

// TestCapacity: more memory or descriptors never mean fewer connections, all that an Envoy can be made to take stays below
// the limits, and the workload has its share of them.
func TestCapacity(t *testing.T) {
	const mib = 1 << 20
	rapid.Check(t, func(t *rapid.T) {
		mesh := drawMesh(t)
		cost := render.CostOf(mesh)
		limits := render.Limits{
			Sockets:     rapid.Bool().Draw(t, "sockets"),
			Memory:      rapid.OneOf(rapid.Just(uint64(0)), rapid.Uint64Range(mib, 1<<40)).Draw(t, "memory"),
			Descriptors: rapid.OneOf(rapid.Just(uint64(0)), rapid.Uint64Range(16, 1<<30)).Draw(t, "descriptors"),
		}
		c := limits.Capacity(cost)
		more := limits
		more.Memory, more.Descriptors = more.Memory*2, more.Descriptors*2
		if m := more.Capacity(cost); m.Ingress < c.Ingress || m.Egress < c.Egress {
			t.Errorf("with twice the limits there are fewer connections: %+v, %+v", c, m)
		}
		if c.Ingress < 64 || c.Egress < 4 || (limits.Memory > 0) != (c.Heap > 0) {
			t.Errorf("%+v", c)
		}
		if limits.Descriptors >= 4096 && limits.Fit(cost) == nil {
			if used := 2 * (c.Ingress + c.Egress*uint64(len(mesh.Egress))); used > limits.Descriptors {
				t.Errorf("%+v take %d of %d descriptors", c, used, limits.Descriptors)
			}
		}
		if limits.Memory >= 512*mib && limits.Fit(cost) == nil {
			// Two Envoys, whose clients have stopped reading: all of the one's, a third of the other's.
			each := uint64(224 << 10)
			if limits.Sockets {
				each = 476 << 10
			}
			if used := c.Ingress * 4 / 3 * each; used > limits.Memory {
				t.Errorf("%+v take %d MiB of %d", c, used/mib, limits.Memory/mib)
			}
		}
	})
	for _, row := range []struct {
		limits  render.Limits
		ingress uint64
		by      string
	}{
		{render.Limits{}, 131072, "conntrack"},
		{render.Limits{Descriptors: 1 << 20}, 131072, "conntrack"},
		{render.Limits{Descriptors: 1024}, 354, "descriptors"},
		{render.Limits{Memory: 512 * mib, Descriptors: 1 << 20}, 1316, "memory"},
		{render.Limits{Memory: 512 * mib, Sockets: true}, 619, "memory"},
		{render.Limits{Memory: 64 * mib}, 64, "memory"},
	} {
		mesh, err := load(nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		if c := row.limits.Capacity(render.CostOf(mesh)); c.Ingress != row.ingress || c.By != row.by {
			t.Errorf("%+v: %+v", row.limits, c)
		}
	}
}

// TestFit: a mesh that Envoy can't run with is refused, with the reason.
func TestFit(t *testing.T) {
	environ, file := manyEntries(1000)
	mesh, err := load(environ, file)
	if err != nil {
		t.Fatal(err)
	}
	cost := render.CostOf(mesh)
	for _, fits := range []render.Limits{{}, {Memory: 512 << 20}, {Descriptors: 1 << 20}} {
		if err := fits.Fit(cost); err != nil {
			t.Errorf("%+v: %v", fits, err)
		}
	}
	for says, limits := range map[string]render.Limits{
		"1000 egress entries and 2 threads (envoy.concurrency) need 2208 file descriptors, and Envoy can have 1024": {Descriptors: 1024},
		"the container's memory limit is 128 MiB: raise it, or have fewer":                                          {Memory: 128 << 20},
	} {
		if err := limits.Fit(cost); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%+v: %v", limits, err)
		}
	}
}

// TestLimitsAreNoDifference: other limits are no reason for another Envoy, nor for diff to speak.
func TestLimitsAreNoDifference(t *testing.T) {
	mesh, err := load([]string{"EDG_EGRESS_PROXY_CONFIG=a#127.0.0.1:80#10.0.0.1:80"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	state, err := render.Render(mesh, place)
	if err != nil {
		t.Fatal(err)
	}
	limited := proto.CloneOf(state.Bootstrap)
	if err := render.Limit(limited, render.Limits{Memory: 256 << 20, Descriptors: 1024}.Capacity(state.Cost)); err != nil {
		t.Fatal(err)
	}
	if err := limited.ValidateAll(); err != nil {
		t.Error(err)
	}
	if proto.Equal(limited, state.Bootstrap) {
		t.Error("the limits limit nothing")
	}
	if lines := render.DiffBootstraps(state.Bootstrap, limited); len(lines) > 0 {
		t.Errorf("they differ: %v", lines)
	}
}
