package schema_test

import (
	"fmt"
	"strconv"
	"strings"
	"testing"

	"mantlet/schema"
)

// large returns an environment and an override file of n ingress and n egress entries: half of each come from the
// environment, and the file changes a quarter of those and adds the other half.
func large(n int) (environ []string, file []byte) {
	var ingress, egress, list, outgoing strings.Builder
	list.WriteString("ingress:\n")
	outgoing.WriteString("egress:\n")
	for i := range n {
		port := strconv.Itoa(20000 + 2*i)
		listen := fmt.Sprintf("127.%d.%d.1:8080", 1+i/256, i%256)
		fromFile := i >= n/2
		if !fromFile {
			fmt.Fprintf(&ingress, "service-%d#%s#false##", i, port)
			fmt.Fprintf(&egress, "service-%d#%s#service-%d.shop.svc:8080##", i, listen, i)
		}
		if fromFile {
			fmt.Fprintf(&list, "  - name: service-%d\n    port: %s\n    mode: mtls\n    allow: [frontend, spiffe://mesh/ns/shop/sa/s%d]\n", i, port, i)
			fmt.Fprintf(&outgoing, "  - name: service-%d\n    listen: %s\n    upstream: service-%d.shop.svc:8080\n    serverNames: [service-%d]\n", i, listen, i, i)
		} else if i%2 == 0 {
			fmt.Fprintf(&list, "  - port: %s\n    mode: mtls\n", port)
			fmt.Fprintf(&outgoing, "  - listen: %s\n    serverNames: [service-%d]\n", listen, i)
		}
	}
	return []string{
		"EDG_INGRESS_PROXY_CONFIG=" + ingress.String(),
		"EDG_EGRESS_PROXY_CONFIG=" + egress.String(),
		"MANTLET_CONFIG=/etc/mantlet/config.yaml",
	}, []byte(list.String() + outgoing.String())
}

// BenchmarkLoad parses, merges and validates; issue 4 gives that and rendering 50 ms for 1,000 entries, and ten times as
// many at most twelve times that.
func BenchmarkLoad(b *testing.B) {
	for _, n := range []int{1_000, 10_000} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			environ, file := large(n)
			b.ReportAllocs()
			for b.Loop() {
				env, err := schema.ParseEnvironment(environ)
				if err != nil {
					b.Fatal(err)
				}
				config, err := env.Merge(file)
				if err != nil {
					b.Fatal(err)
				}
				if len(config.Mesh.Ingress) != n || len(config.Mesh.Egress) != n {
					b.Fatalf("%d ingress and %d egress entries", len(config.Mesh.Ingress), len(config.Mesh.Egress))
				}
			}
		})
	}
}
