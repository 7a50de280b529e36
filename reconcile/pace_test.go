package reconcile

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"mantlet/internal/status"
)

// TestFlips: a file that tightens again and again makes few Envoys and few generations. What it forbids is never let in: the rules
// close the ports, and they are served once it ends.
func TestFlips(t *testing.T) {
	const calm = "ingress: [{port: 9000, mode: tls}"
	for name, c := range map[string]struct {
		flips  []string
		envoys int
	}{
		"modes, back and forth":          {[]string{"{port: 8080, mode: tls}", "{port: 8080}"}, 1},
		"clients, back and forth":        {[]string{"{port: 8080, allow: [a]}", "{port: 8080, allow: [a, b]}"}, 8},
		"clients, both of them stricter": {[]string{"{port: 8080, allow: [a]}", "{port: 8080, allow: [b]}"}, 8},
		"modes of two ports, in turn":    {[]string{"{port: 8080, mode: tls}, {port: 8081}", "{port: 8080}, {port: 8081, mode: tls}"}, 1},
		"TLS minimum":                    {[]string{"]\ntls: {minVersion: '1.3'}\nprobes: [", "]\ntls: {minVersion: '1.2'}\nprobes: ["}, 8},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, write := configured(t)
				envoys, pause := 0, time.Duration(0)
				step := func(text string) {
					write(calm + ", " + text + "]")
					for pause = w.converge(t.Context()); pause == immediately; pause = w.converge(t.Context()) {
					}
					for _, did := range w.done() {
						if did == "start Envoy" {
							envoys++
						}
					}
					for _, forbidden := range tightened(w.have.enforced(), w.want.mesh) {
						if !w.have.isClosed(forbidden) {
							t.Fatalf("what is forbidden at %v is let in", forbidden)
						}
					}
					if w.have.closed != nil && !strings.Contains(w.have.rules().Text(), " : drop") {
						t.Fatal("no port is closed")
					}
				}
				for i := range 200 {
					step(c.flips[i%2])
					time.Sleep(150 * time.Millisecond)
				}
				if envoys > c.envoys || strings.Contains(w.logged(), "generations are used up") {
					t.Errorf("%d Envoys in 30 s, want %d at most:\n%s", envoys, c.envoys, w.logged())
				}
				for pause > 0 {
					time.Sleep(pause)
					step(c.flips[1])
				}
				if w.have.closed != nil || w.have.number != w.want.number || w.serving.digest != w.want.state.Digest {
					t.Errorf("what is wanted is not served in the end: %+v", w.have.closed)
				}
			})
		})
	}
}

// TestNext: Envoy changes before the rules, but for a port that comes to ask for certificates while an older TLS is let in.
func TestNext(t *testing.T) {
	w, write := configured(t)
	for _, step := range []struct {
		text string
		does []string
	}{
		{"ingress: [{port: 8080, mode: tls}]\ntls: {minVersion: '1.3'}", []string{"start Envoy", "rules"}},
		{"ingress: [{port: 8080, mode: mtls}]\ntls: {minVersion: '1.2'}", []string{"rules", "start Envoy"}},
		{"ingress: [{port: 8080, mode: tls}]\ntls: {minVersion: '1.3'}", []string{"start Envoy", "rules"}},
		{"ingress: [{port: 8080, mode: mtls, allow: [client]}]", []string{"start Envoy", "rules", "start Envoy"}},
		{"ingress: [{port: 8080, mode: tls}]", []string{"start Envoy", "rules"}},
		{"ingress: [{port: 8080, mode: mtls}]", []string{"rules"}},
	} {
		write(step.text)
		for w.converge(t.Context()) > 0 {
			w.serving.drained = time.Time{}
		}
		if w.have.state.Digest != w.want.state.Digest || w.have.number != w.want.number || w.serving.digest != w.want.state.Digest {
			t.Errorf("%s: what is in force is not what is wanted", step.text)
		}
		if did := w.done(); !slices.Equal(did, step.does) {
			t.Errorf("%s: it did %q, want %q", step.text, did, step.does)
		}
		if w.replaced != 1 {
			t.Errorf("%s: rules were put in force %d times without regard to open connections, want only the first time", step.text, w.replaced)
		}
	}
}

// TestWaits: while a change waits, the status says for what and until when, and the log says so once.
func TestWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, write := configured(t)
		step := func(text string) time.Duration {
			write(text)
			return w.converge(t.Context())
		}
		check := func(when, code string, wait time.Duration) {
			t.Helper()
			said := w.Status(t.Context()).Waits
			switch {
			case code == "" && said != nil:
				t.Errorf("%s: it waits for %+v", when, said)
			case code != "" && (said == nil || said.Code != code || said.Reason == "" || wait != 0 && !said.Until.Equal(time.Now().Add(wait))):
				t.Errorf("%s: it waits for %+v, want %s for %s", when, said, code, wait)
			}
		}
		const drain = 10 * time.Second
		const settings = "envoy: {drainTime: 10s, parentShutdownTime: 15s, concurrency: %d}"
		step(fmt.Sprintf(settings, 1))
		step(fmt.Sprintf(settings, 2))
		check("a hot restart that cuts nothing", "", 0)
		time.Sleep(time.Second)
		for concurrency := range 3 {
			if wait := step(fmt.Sprintf(settings, 3+concurrency)); wait != drain-time.Second {
				t.Errorf("it waits %s", wait)
			}
			check("the next one", status.WaitDrain, drain-time.Second)
		}
		if n := strings.Count(w.logged(), "a change waits"); n != 1 {
			t.Errorf("the log says %d times that a change waits:\n%s", n, w.logged())
		}
		step(fmt.Sprintf(settings, 2))
		check("what was in force is wanted again", "", 0)
		step(fmt.Sprintf(settings, 3))
		time.Sleep(drain)
		w.set(func() { w.startErr = errors.New("no memory") })
		w.converge(t.Context())
		w.converge(t.Context())
		check("an Envoy that does not start", status.WaitBackoff, 0)
		w.set(func() { w.startErr = nil })
		time.Sleep(maxPause)
		w.converge(t.Context())
		check("it starts", "", 0)
		for i := range 30 {
			step(fmt.Sprintf(settings, 3) + []string{"\ningress: [{port: 8080, mode: tls}]", "\ningress: [{port: 8080}]"}[i%2])
			if wait := w.Status(t.Context()).Waits; wait != nil && wait.Code == status.WaitTooOften {
				return
			}
		}
		t.Error("changes that forbid something come too often, and none waits")
	})
}
