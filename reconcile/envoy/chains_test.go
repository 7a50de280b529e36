package envoy

import (
	"context"
	"crypto/tls"
	"testing"
)

// TestNoChain: where the ports of a list are told apart, a connection to a port that nothing is known of is closed. It does
// not get the chain for anyone of the mesh.
func TestNoChain(t *testing.T) {
	for what, c := range map[string]struct {
		others string // what describes the ports without a list
		letIn  bool
	}{
		"known":   {"[0-9]+", true},
		"unknown": {"[a-z]+", false},
	} {
		t.Run(what, func(t *testing.T) {
			r, _ := runner(t)
			pod := identity(t, r)
			state, settings := state(t, r, "MANTLET_CONFIG_INLINE=ingress: [{port: 9000, allow: [a]}, {port: 16000-65535, allow: [b]}]")
			rest := state.Bootstrap.StaticResources.Listeners[0].FilterChainMatcher.OnNoMatch.GetMatcher().GetMatcherList().Matchers
			last := rest[len(rest)-1].Predicate.GetSinglePredicate().GetValueMatch().GetSafeRegex()
			if last.Regex != "[0-9]+" {
				t.Fatalf("ports without a list are described as %q", last.Regex)
			}
			last.Regex = c.others
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			p, err := r.Start(ctx, state, settings)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(p.Stop)
			config := pod.ClientConfig("pod")
			config.MaxVersion = tls.VersionTLS12 // in which the handshake's end says that the client is let in
			conn, err := (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", "127.0.0.1:15006")
			if err == nil {
				_ = conn.Close()
			}
			if got := err == nil; got != c.letIn || ctx.Err() != nil {
				t.Errorf("let in is %t: %v", got, err)
			}
		})
	}
}
