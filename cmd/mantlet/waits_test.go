package main

import (
	"fmt"
	"strings"
	"testing"

	"mantlet/internal/status"
)

// TestWaitsAreSaid: while a change waits for the connections of the Envoy before, the status and the log say so, and it is said no more
// once it is in force.
func TestWaitsAreSaid(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, "MANTLET_ENVOY_DRAIN_TIME=5s")
	const entry = "{listen: '127.137.0.%d:8081', upstream: '192.0.2.1:1'}"
	one, other := fmt.Sprintf(entry, 1), fmt.Sprintf(entry, 2)
	m := p.override("{}")
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.ready()
	m.write("egress: [" + one + "]")
	p.await("there was a hot restart", func() bool { return p.log.count("Envoy is live") == 2 })
	m.write("egress: [" + one + ", " + other + "]") // forbids nothing, so it waits
	var s status.Status
	p.await("the next change waits", func() bool { s = p.status(); return s.Waits != nil })
	if s.Waits.Code != status.WaitDrain || s.Applied.Generation == s.Desired.Generation {
		t.Errorf("it waits for %+v, with %+v applied", s.Waits, s.Applied)
	}
	if _, text, _ := p.mantlet("status"); !strings.Contains(text, "s for the connections of the Envoy before\n") {
		t.Errorf("the screen does not say that a change waits:\n%s", text)
	}
	p.await("it is in force, and waits for nothing", func() bool { s = p.status(); return s.Waits == nil && s.Applied.Generation == s.Desired.Generation })
	if n := p.log.count(`"msg":"a change waits until it is put in force"`); n != 1 {
		t.Errorf("the log says it %d times, want once", n)
	}
}
