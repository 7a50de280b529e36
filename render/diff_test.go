package render_test

import (
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"mantlet/render"
	"mantlet/schema"
)

// drawGenerations returns generations of ports that have an entry, and of others.
func drawGenerations(t *rapid.T) render.Generations {
	generation := rapid.Custom(func(t *rapid.T) render.Generation {
		return render.Generation(rapid.Uint8Max(uint8(render.MaxGeneration)).Draw(t, "generation"))
	})
	g := render.Generations{Default: generation.Draw(t, "default")}
	edges := rapid.SliceOfNDistinct(rapid.Uint16Min(1), 0, 8, rapid.ID).Draw(t, "edges of generations")
	slices.Sort(edges)
	for pair := range slices.Chunk(edges, 2) {
		at := generation.Filter(func(g2 render.Generation) bool { return g2 != g.Default }).Draw(t, "at ports")
		g.Ports = append(g.Ports, render.PortsGeneration{Ports: schema.Ports{First: pair[0], Last: pair[len(pair)-1]}, Generation: at})
	}
	return g
}

// TestGenerationsAreReadBack: a live ruleset tells the generation of each port, whatever its mode, and renders the same rules
// with them, so that diff finds nothing.
func TestGenerationsAreReadBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		mesh, want := drawMesh(t), drawGenerations(t)
		rules := render.Rules(mesh, want)
		read := rules
		if len(want.Ports) > 0 && rapid.Bool().Draw(t, "ports are closed") {
			read = rules.Closed([]schema.Ports{want.Ports[0].Ports})
		}
		for range rapid.IntRange(0, 2).Draw(t, "mantlets that ended at their start") {
			deny := rapid.SampledFrom([]render.Ruleset{render.DenyAll(true), render.OnlyStatus(9)}).Draw(t, "deny")
			read = deny.Remembering(read)
		}
		ingress, got, ok := render.ReadBack(read)
		if lines := render.Diff(rules, render.Rules(mesh, got)); !ok || len(lines) > 0 {
			t.Errorf("%+v is read back as %+v, %v:\n%s", want, got, ok, strings.Join(lines, "\n"))
		}
		for port := uint16(1); port < 65535; port++ {
			if got.At(port) != want.At(port) {
				t.Fatalf("generation %d of port %d is read back as %d", want.At(port), port, got.At(port))
			}
		}
		for _, part := range schema.Parts(mesh.Ingress, ingress) {
			if is, want := schema.PolicyOf(ingress, part.First).Mode, schema.PolicyOf(mesh.Ingress, part.First).Mode; is != want {
				t.Errorf("mode %s of ports %s is read back as %s", want, part, is)
			}
		}
	})
	for _, r := range []render.Ruleset{{}, render.DenyAll(true), render.DenyAll(false), render.OnlyStatus(9)} {
		if _, g, ok := render.ReadBack(r); ok {
			t.Errorf("generations %+v are read from %s", g, r.Text())
		}
	}
}

// TestDiff: whatever is taken from a ruleset, added to it or put in another place is told, and nothing else.
func TestDiff(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		mesh, generations := drawMesh(t), drawGenerations(t)
		want := render.Rules(mesh, generations)
		have := render.Rules(mesh, generations)
		slices.Reverse(have.Chains) // whose order means nothing
		slices.Reverse(have.Maps)
		if lines := render.Diff(want, have); len(lines) > 0 {
			t.Fatalf("the same differs: %q", lines)
		}
		chain := &have.Chains[rapid.IntRange(0, len(have.Chains)-1).Draw(t, "chain")]
		rule := rapid.IntRange(0, len(chain.Rules)-1).Draw(t, "rule")
		foreign := render.Rule{render.Other{Readable: "x", Raw: "y"}}
		changes := map[string]func(){
			"rule missing": func() { chain.Rules = slices.Delete(slices.Clone(chain.Rules), rule, rule+1) },
			"rule added":   func() { chain.Rules = slices.Insert(slices.Clone(chain.Rules), rule, foreign) },
			"rule replaced": func() {
				chain.Rules = slices.Clone(chain.Rules)
				chain.Rules[rule] = append(slices.Clone(chain.Rules[rule]), foreign...)
			},
			"chain renamed": func() { chain.Name += "x" },
			"chain hooked":  func() { chain.Hook.Priority++ },
			"set added":     func() { have.Others = append(have.Others, "set x") },
			"map missing":   func() { have.Maps = have.Maps[1:] },
		}
		if m := &have.Maps[0]; len(m.Elements) > 0 {
			at := rapid.IntRange(0, len(m.Elements)-1).Draw(t, "element")
			changes["element missing"] = func() { m.Elements = slices.Delete(slices.Clone(m.Elements), at, at+1) }
			changes["element changed"] = func() { m.Elements = slices.Clone(m.Elements); m.Elements[at].Verdict.Goto += "x" }
		}
		names := make([]string, 0, len(changes))
		for name := range changes {
			names = append(names, name)
		}
		slices.Sort(names)
		name := rapid.SampledFrom(names).Draw(t, "change")
		changes[name]()
		lines := render.Diff(want, have)
		switch most := map[string]int{"chain renamed": 2}[name]; {
		case len(lines) == 0:
			t.Errorf("%s: not told", name)
		case len(lines) > max(1, most):
			t.Errorf("%s: told as %q", name, lines)
		}
	})
}

// TestDiffBootstraps: what is another bootstrap to Envoy is told by its path, and what Envoy adds is not.
func TestDiffBootstraps(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		one, err := render.Render(drawMesh(t), place)
		if err != nil {
			t.Fatal(err)
		}
		live := proto.CloneOf(one.Bootstrap)
		render.SetEpoch(live, place.RuntimeDirectory, 7)
		live.Node.UserAgentName = "envoy"
		if lines := render.DiffBootstraps(one.Bootstrap, live); len(lines) > 0 {
			t.Fatalf("the same differs: %q", lines)
		}
		other, err := render.Render(drawMesh(t), place)
		if err != nil {
			t.Fatal(err)
		}
		render.SetEpoch(live, place.RuntimeDirectory, 0)
		live.Admin, live.Node = other.Bootstrap.Admin, other.Bootstrap.Node
		same := proto.CloneOf(one.Bootstrap)
		same.Node = other.Bootstrap.Node
		if lines, equal := render.DiffBootstraps(other.Bootstrap, live), proto.Equal(other.Bootstrap, same); (len(lines) == 0) != equal {
			t.Fatalf("told: %q; that they are equal: %v", lines, equal)
		}
	})
}
