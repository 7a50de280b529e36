package dns

import (
	"net/netip"
	"testing"

	"mantlet/internal/lab"
)

// TestName: an address has the name of the hosts file, or else the one that name servers have for it.
func TestName(t *testing.T) {
	p := newPlace(t, 1, cluster)
	p.servers[0].Set(map[string]lab.Answer{
		"4.3.0.10.in-addr.arpa": {PTR: "db.shop.svc.cluster.local"},
		"5.3.0.10.in-addr.arpa": {PTR: "other.example"},
		"8.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa": {PTR: "six.example"},
	})
	p.write("hosts", "127.0.0.1 localhost\n10.0.3.5 own.example\n")
	for addr, want := range map[string]string{
		"10.0.3.4": "db.shop.svc.cluster.local", "10.0.3.5": "own.example", "2001:db8::8": "six.example", "10.0.3.6": "",
	} {
		if got := p.Name(t.Context(), netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s is %q, want %q", addr, got, want)
		}
	}
}
