package reconcile

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"mantlet/render"
	"mantlet/schema"
)

// TestAdvance: over any changes, a port gets another generation when it is tightened, and keeps its own otherwise.
func TestAdvance(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		mesh := rapid.Custom(func(t *rapid.T) schema.Mesh {
			m := schema.Mesh{TLS: schema.TLS{MinVersion: rapid.SampledFrom([]schema.TLSVersion{schema.TLS12, schema.TLS12, schema.TLS12, schema.TLS13}).Draw(t, "least")}}
			for first := uint16(1); first < 60; {
				last := first + rapid.Uint16Range(0, 5).Draw(t, "more")
				in := schema.Ingress{
					Ports: schema.Ports{First: first, Last: last},
					Mode:  rapid.SampledFrom([]schema.Mode{schema.ModeMTLS, schema.ModeTLS, schema.ModePassthrough}).Draw(t, "mode"),
				}
				if in.Mode == schema.ModeMTLS {
					in.Allow = rapid.SampledFrom([][]string{nil, {"a"}, {"b"}, {"a", "b"}}).Draw(t, "allow")
				}
				if rapid.Bool().Draw(t, "named") {
					m.Ingress = append(m.Ingress, in)
				}
				first = last + 1
			}
			return m
		})
		from, generations := mesh.Draw(t, "mesh"), render.Generations{}
		for range 50 {
			to, revoked := mesh.Draw(t, "mesh"), rapid.IntRange(0, 9).Draw(t, "revoked") == 0
			next := nextGenerations(generations, from, to, revoked)
			for port := uint16(1); port < 80; port++ {
				was, is := schema.PolicyOf(from.Ingress, port), schema.PolicyOf(to.Ingress, port)
				tightened := revoked && was.Mode != schema.ModeTLS || to.TLS.MinVersion > from.TLS.MinVersion || !was.Within(is)
				if changed := next.At(port) != generations.At(port); changed != tightened {
					t.Fatalf("port %d, tightened %t: generation %d follows %d", port, tightened, next.At(port), generations.At(port))
				}
			}
			if !slices.IsSortedFunc(next.Ports, func(a, b render.PortsGeneration) int { return int(a.Ports.First) - int(b.Ports.First) }) {
				t.Fatalf("not sorted: %v", next.Ports)
			}
			from, generations = to, next
		}
	})
}

// TestGenerationsAreShared: the chains in the kernel are as many as the generations in use, so ports that are tightened one
// after the other take the same one.
func TestGenerationsAreShared(t *testing.T) {
	var from schema.Mesh
	var generations render.Generations
	for port := uint16(1); port < 100; port++ {
		to := schema.Mesh{Ingress: []schema.Ingress{{Ports: schema.Ports{First: port, Last: port}, Mode: schema.ModeTLS}}}
		generations = nextGenerations(generations, from, to, false)
		from = to
	}
	without := len(render.Rules(from, render.Generations{}).Chains)
	if more := len(render.Rules(from, generations).Chains) - without; more > 2 {
		t.Errorf("there are %d more chains than without generations after 100 changes of a port each", more)
	}
}

// TestRaises: before a port's generation can be one again that silent connections have, Envoy's end is due; not where ports
// take turns, nor where it takes longer than a connection can be silent.
func TestRaises(t *testing.T) {
	all := func(until int, pause time.Duration, port func(int) uint16) (exhausted []int) {
		var r advances
		var have render.Generations
		now := time.Now()
		open := schema.Mesh{}
		for i := range until {
			shut := schema.Mesh{Ingress: []schema.Ingress{{Ports: schema.Ports{First: port(i), Last: port(i)}, Mode: schema.ModeMTLS, Allow: []string{"a"}}}}
			next := nextGenerations(have, open, shut, false)
			if r.add(now, have, next) {
				exhausted = append(exhausted, i+1)
			}
			have = nextGenerations(next, shut, open, false)
			now = now.Add(pause)
		}
		return exhausted
	}
	same := func(int) uint16 { return 8080 }
	if got := all(60, time.Second, same); !slices.Equal(got, []int{30, 60}) {
		t.Errorf("one port, each second: exhausted at changes %v", got)
	}
	if got := all(100, 10*time.Second, same); got != nil {
		t.Errorf("one port, each ten seconds: exhausted at changes %v", got)
	}
	if got := all(100, 0, func(i int) uint16 { return uint16(8000 + i%10) }); got != nil {
		t.Errorf("ten ports in turn: exhausted at changes %v", got)
	}
}

// TestGenerationsRunOut: mesh CAs that are taken away again and again use up the generations. What the next one could let in again, which
// Envoy has still open, ends with Envoy.
func TestGenerationsRunOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.run(t)
		expect(t, w, "start Envoy", "rules")
		for revocation := range maxRaisesOfPort {
			if did := w.done(); len(did) > 0 {
				t.Fatalf("before revocation %d, the daemon did %q", revocation+1, did)
			}
			w.set(func() { w.revoked = true })
			time.Sleep(pollMissing)
			synctest.Wait()
			if did := w.done(); len(did) == 0 || did[0] != "rules" || slices.Contains(did, "stop Envoy") != (revocation+1 == maxRaisesOfPort) {
				t.Fatalf("upon revocation %d, the daemon did %q", revocation+1, did)
			}
		}
		close(w.latest.exited)
		expect(t, w, "start Envoy")
		ready(t, w, "")
	})
}
