package render_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"mantlet/render"
)

// BenchmarkPipeline is the way from texts to the desired state: parsed, merged, validated, rendered, the rules' text included;
// not the bootstrap's, which Envoy alone wants. Of 1,000 ingress and as many egress entries it is to take 50 ms at most, of
// ten times as many twelve times as long.
func BenchmarkPipeline(b *testing.B) {
	var thousand time.Duration
	for _, entries := range []int{1_000, 10_000} {
		environ, file := manyEntries(entries)
		b.Run(fmt.Sprintf("entries=%d", entries), func(b *testing.B) {
			for b.Loop() {
				mesh, err := load(environ, file)
				if err != nil {
					b.Fatal(err)
				}
				state, err := render.Render(mesh, place)
				if err != nil {
					b.Fatal(err)
				}
				if state.Ruleset.Text() == "" {
					b.Fatal("no rules")
				}
			}
			took := b.Elapsed() / time.Duration(b.N)
			b.ReportMetric(float64(took)/float64(time.Millisecond), "ms")
			if entries == 1_000 {
				thousand = took
			} else if thousand > 0 {
				b.ReportMetric(float64(took)/float64(thousand), "times-1000")
			}
		})
	}
}

// manyEntries makes n ingress and n egress entries: half of them in the environment, and half of those changed by the file;
// the others in the file, where every fourth has a list of names.
func manyEntries(n int) (environ []string, file []byte) {
	var ingress, egress []string
	var in, out strings.Builder
	for i := range n {
		port, listen := 16_000+i, fmt.Sprintf("127.%d.%d.1:8080", 1+i/256, i%256)
		if i%2 == 0 {
			ingress = append(ingress, fmt.Sprintf("in-%d#%d#%t", i, port, i%4 == 0))
			egress = append(egress, fmt.Sprintf("out-%d#%s#service-%d:8080", i, listen, i))
		}
		switch i % 4 {
		case 1:
			fmt.Fprintf(&in, "  - {name: in-%d, port: %d, mode: tls}\n", i, port)
			fmt.Fprintf(&out, "  - {name: out-%d, listen: \"%s\", upstream: \"service-%d:8080\"}\n", i, listen, i)
		case 2:
			fmt.Fprintf(&in, "  - {port: %d, mode: passthrough}\n", port)
			fmt.Fprintf(&out, "  - {listen: \"%s\", serverNames: [service-%d]}\n", listen, i)
		case 3:
			fmt.Fprintf(&in, "  - {name: in-%d, port: %d, allow: [frontend, spiffe://mesh/ns/shop/sa/cart-%d]}\n", i, port, i)
			fmt.Fprintf(&out, "  - {name: out-%d, listen: \"%s\", upstream: \"service-%d:8080\", serverNames: [service-%d]}\n", i, listen, i, i)
		}
	}
	return []string{
		"EDG_INGRESS_PROXY_CONFIG=" + strings.Join(ingress, "##"),
		"EDG_EGRESS_PROXY_CONFIG=" + strings.Join(egress, "##"),
	}, []byte("ingress:\n" + in.String() + "egress:\n" + out.String())
}
