package dns

import (
	"context"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"mantlet/internal/lab"
)

// BenchmarkLookup measures one lookup of both families, of a name that has addresses. The name server is of this process too.
func BenchmarkLookup(b *testing.B) {
	const addr = "127.53.255.1"
	server, err := lab.NewNameserver(addr)
	if err != nil {
		b.Fatal(err)
	}
	defer server.Close()
	server.SetAddrs(map[string][]netip.Addr{"billing" + inShop: addrs("10.0.0.1")})
	directory := b.TempDir()
	p := &place{directory: directory}
	p.Resolver = NewResolver(filepath.Join(directory, "resolv.conf"), filepath.Join(directory, "hosts"))
	write(b, filepath.Join(directory, "resolv.conf"), cluster+"nameserver "+addr+"\n")
	known := Record{}
	b.ReportAllocs()
	for b.Loop() {
		if known = p.Lookup(context.Background(), "billing", known, time.Now()); known.Err != nil {
			b.Fatal(known.Err)
		}
	}
}
