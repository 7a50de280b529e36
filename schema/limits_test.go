package schema_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// TestLimits: a configuration that would take Envoy too much memory is refused, where it becomes too much, and one within
// the limits is not.
func TestLimits(t *testing.T) {
	const maxEgress, maxLists, maxNames = 10_000, 4_000, 20_000
	egress := func(n int, form string) string {
		var text strings.Builder
		text.WriteString("egress:\n")
		for i := range n {
			fmt.Fprintf(&text, "  - {listen: \"127.%d.%d.1:80\", upstream: \"a:1\""+form+"}\n", 1+i/256, i%256)
		}
		return text.String()
	}
	ingress := func(n int, list func(i int) string) string {
		var text strings.Builder
		text.WriteString("ingress:\n")
		for i := range n {
			fmt.Fprintf(&text, "  - {port: %d, allow: [%s]}\n", 16000+i, list(i))
		}
		return text.String()
	}
	names := func(n int) string {
		var all []string
		for i := range n {
			all = append(all, fmt.Sprintf("n%d", i))
		}
		return strings.Join(all, ", ")
	}
	hundred := names(100)
	for what, c := range map[string]struct {
		text string
		want []string
	}{
		"most egress entries": {egress(maxEgress, ""), nil},
		"one more": {egress(maxEgress+1, ""), []string{
			"10002:5: egress[127.40.16.1:80]: is too much: there can be at most 10000 egress entries, since each costs Envoy memory",
		}},
		"most lists": {ingress(maxLists, func(i int) string { return fmt.Sprintf("n%d", i) }), nil},
		"one more list": {ingress(maxLists+2, func(i int) string { return fmt.Sprintf("n%d", i) }), []string{
			"4002:27: ingress[20000].allow: is too much: there can be at most 4000 different lists of clients and protocols (allow, alpn), since each costs Envoy memory",
		}},
		"most lists of protocols": {strings.ReplaceAll(ingress(maxLists/2, func(i int) string { return fmt.Sprintf("n%d", i) }), "allow", "alpn"), nil},
		"one more list of protocols": {strings.ReplaceAll(ingress(maxLists/2+2, func(i int) string { return fmt.Sprintf("n%d", i) }), "allow", "alpn"), []string{
			"2002:26: ingress[18000].alpn: is too much: there can be at most 4000 different lists of clients and protocols (allow, alpn), since each costs Envoy memory",
		}},
		"many equal lists": {ingress(40_000, func(int) string { return "a" }), nil},
		"one long list":    {ingress(1, func(int) string { return names(maxNames) }), nil},
		"equal long lists": {ingress(1000, func(int) string { return hundred }), nil},
		"one name more": {ingress(2, func(i int) string { return names(maxNames - i) }), []string{
			"3:27: ingress[16001].allow: is too much: there can be at most 20000 names in lists (allow, serverNames), since each costs Envoy memory",
		}},
		"names of endpoints": {egress(201, ", serverNames: ["+hundred+"]"), []string{
			"202:63: egress[127.1.200.1:80].serverNames: is too much: there can be at most 20000 names in lists (allow, serverNames), since each costs Envoy memory",
		}},
	} {
		_, err := environment(t).Merge([]byte(c.text))
		if got := places(err); !slices.Equal(got, c.want) {
			t.Errorf("%s: got %q, want %q", what, got, c.want)
		}
	}
}
