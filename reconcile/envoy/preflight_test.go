package envoy

import (
	"strings"
	"testing"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	"google.golang.org/protobuf/proto"
)

// TestPreflight: Envoy validates what is new in a bootstrap, by itself, and refuses it as it would refuse the whole. What was live is not
// validated again.
func TestPreflight(t *testing.T) {
	r, _ := runner(t)
	identity(t, r)
	const one, two, three = "one#127.0.0.1:15097#192.0.2.1:1", "two#127.0.0.1:15096#192.0.2.2:1", "three#127.0.0.1:15095#192.0.2.3:1"
	before, _ := state(t, r, "EDG_EGRESS_PROXY_CONFIG="+one+"##"+two)
	after, _ := state(t, r, "EDG_EGRESS_PROXY_CONFIG="+one+"##"+strings.Replace(two, "192.0.2.2", "192.0.2.9", 1)+"##"+three)
	proven := partsOf(before.Bootstrap)
	rest := without(after.Bootstrap, proven)
	names := func(b *bootstrapv3.Bootstrap) string {
		var all []string
		for _, l := range b.StaticResources.Listeners {
			all = append(all, l.Name)
		}
		for _, c := range b.StaticResources.Clusters {
			all = append(all, c.Name)
		}
		return strings.Join(all, ", ")
	}
	if got, want := names(rest), "egress-127.0.0.1:15095, egress-127.0.0.1:15095, egress-127.0.0.1:15096"; got != want {
		t.Errorf("what is new is %s, want %s", got, want)
	}
	if err := r.validate(t.Context(), after, rest); err != nil {
		t.Errorf("what is new does not pass by itself: %v", err)
	}
	if got := names(without(before.Bootstrap, proven)); got != "" {
		t.Errorf("nothing is new, and yet %s is validated", got)
	}
	bad := after
	bad.Bootstrap = proto.CloneOf(after.Bootstrap)
	bad.Bootstrap.StaticResources.Clusters = append(bad.Bootstrap.StaticResources.Clusters, &clusterv3.Cluster{
		Name: "bad", ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
	})
	if err := r.preflight(t.Context(), bad, proven); err == nil || !strings.Contains(err.Error(), "EDS") {
		t.Errorf("a cluster that gets its endpoints from nowhere: %v", err)
	}
}
