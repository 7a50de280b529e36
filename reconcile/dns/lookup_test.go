package dns

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/dns/dnsmessage"

	"mantlet/internal/lab"
)

// place is a resolver with files of its own, and the name servers that these name.
type place struct {
	*Resolver
	t         *testing.T
	servers   []*lab.Nameserver
	addrs     []string
	directory string
	now       time.Time
}

// cluster is what the pods of namespace shop have, in a cluster whose nodes have a search domain.
const cluster = "search shop.svc.cluster.local svc.cluster.local cluster.local corp.example\noptions ndots:5\n"

var places atomic.Int32

// newPlace starts name servers at addresses of loopback that no other place has.
func newPlace(t *testing.T, servers int, resolvConf string) *place {
	t.Helper()
	t.Parallel()
	p := &place{t: t, directory: t.TempDir(), now: time.Now()}
	number := places.Add(1)
	for i := range servers {
		addr := fmt.Sprintf("127.53.%d.%d", number, i+1)
		server, err := lab.NewNameserver(addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = server.Close() })
		p.addrs, p.servers = append(p.addrs, addr), append(p.servers, server)
		resolvConf += "nameserver " + addr + "\n"
	}
	p.Resolver = NewResolver(filepath.Join(p.directory, "resolv.conf"), filepath.Join(p.directory, "hosts"))
	p.write("resolv.conf", resolvConf)
	p.write("hosts", "127.0.0.1 localhost\n")
	return p
}

func (p *place) write(name, content string) {
	p.t.Helper()
	write(p.t, filepath.Join(p.directory, name), content)
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// lookup looks a host up some time after the last lookup.
func (p *place) lookup(host string, known Record, later time.Duration) Record {
	p.t.Helper()
	p.now = p.now.Add(later)
	return p.Lookup(context.Background(), host, known, p.now)
}

// wants checks what is known of a host.
func (p *place) wants(r Record, source, says string, addrs ...string) {
	p.t.Helper()
	var want []netip.Addr
	for _, addr := range addrs {
		want = append(want, netip.MustParseAddr(addr))
	}
	if diff := cmp.Diff(want, r.Addrs(), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		p.t.Errorf("addresses: %s", diff)
	}
	said := ""
	if r.Err != nil {
		said = r.Err.Error()
	}
	for i, addr := range p.addrs {
		said = strings.ReplaceAll(said, addr, fmt.Sprintf("server %d", i+1))
	}
	if r.Source != source || said != says {
		p.t.Errorf("source %q, says %q; want %q, %q", r.Source, said, source, says)
	}
}

// asked returns the names that a server was asked for since the last call of it, each once.
func (p *place) asked(server int, since int) []string {
	var names []string
	for _, q := range p.servers[server].Asked()[since:] {
		if !slices.Contains(names, q.Name) {
			names = append(names, q.Name)
		}
	}
	slices.Sort(names)
	return names
}

func addrs(texts ...string) (all []netip.Addr) {
	for _, text := range texts {
		all = append(all, netip.MustParseAddr(text))
	}
	return all
}

const inShop = ".shop.svc.cluster.local"

func TestSearch(t *testing.T) {
	t.Parallel()
	named := func(texts ...string) lab.Answer { return lab.Answer{Addrs: addrs(texts...), TTL: 5} }
	for name, c := range map[string]struct {
		host   string
		names  map[string]lab.Answer
		source string
		says   string
		addrs  []string
	}{
		"the first domain": {
			"billing",
			map[string]lab.Answer{"billing" + inShop: named("10.0.0.1"), "billing.svc.cluster.local": named("10.0.0.2")},
			"billing" + inShop, "",
			[]string{"10.0.0.1"},
		},
		"a further domain": {
			"billing.other",
			map[string]lab.Answer{"billing.other.svc.cluster.local": named("10.0.0.1", "fd00::1")},
			"billing.other.svc.cluster.local", "",
			[]string{"10.0.0.1", "fd00::1"},
		},
		"as it is": {
			"billing.example", map[string]lab.Answer{"billing.example": named("fd00::1")}, "billing.example", "", []string{"fd00::1"},
		},
		"a final dot": {
			"billing.",
			map[string]lab.Answer{"billing": named("10.0.0.1"), "billing" + inShop: named("10.0.0.2")},
			"billing", "",
			[]string{"10.0.0.1"},
		},
		"one domain is refused": {
			"billing" + inShop,
			map[string]lab.Answer{
				"billing" + inShop:                   named("10.0.0.1"),
				"billing" + inShop + ".corp.example": {RCode: dnsmessage.RCodeRefused},
			},
			"billing" + inShop, "",
			[]string{"10.0.0.1"},
		},
		"one domain fails": {
			"billing" + inShop,
			map[string]lab.Answer{
				"billing" + inShop:                   named("10.0.0.1"),
				"billing" + inShop + ".corp.example": {RCode: dnsmessage.RCodeServerFailure},
			},
			"billing" + inShop, "",
			[]string{"10.0.0.1"},
		},
		"one domain is not answered": {
			"billing" + inShop,
			map[string]lab.Answer{
				"billing" + inShop:                   named("10.0.0.1"),
				"billing" + inShop + ".corp.example": {Silent: true},
			},
			"billing" + inShop, "",
			[]string{"10.0.0.1"},
		},
		"nowhere": {"billing", nil, "", "NXDOMAIN by server 1", nil},
		"no address": {
			"billing.", map[string]lab.Answer{"billing": {}}, "", "NODATA (no A or AAAA record) by server 1", nil,
		},
		"nowhere, as far as can be told": {
			"billing",
			map[string]lab.Answer{"billing.corp.example": {RCode: dnsmessage.RCodeRefused}},
			"", "REFUSED by server 1 for billing.corp.example; NXDOMAIN by server 1 for billing" + inShop, nil,
		},
		"an alias": {
			"billing",
			map[string]lab.Answer{
				"billing" + inShop: {CNAME: "a.example", TTL: 5}, "a.example": {CNAME: "b.example"}, "b.example": named("10.0.0.1"),
			},
			"billing" + inShop, "",
			[]string{"10.0.0.1"},
		},
		"truncated": {
			"billing",
			map[string]lab.Answer{"billing" + inShop: {Addrs: addrs("10.0.0.1", "fd00::1"), Cut: true}},
			"billing" + inShop, "",
			[]string{"10.0.0.1", "fd00::1"},
		},
		"nobody's address": {
			"billing",
			map[string]lab.Answer{"billing" + inShop: named("0.0.0.0", "10.0.0.1", "224.0.0.1", "::", "255.255.255.255")},
			"billing" + inShop, "",
			[]string{"10.0.0.1"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t, 1, cluster)
			p.servers[0].Set(c.names)
			p.wants(p.lookup(c.host, Record{}, 0), c.source, c.says, c.addrs...)
		})
	}
}

// TestGone: what name servers say counts at once, whatever was known, and whatever other names answer.
func TestGone(t *testing.T) {
	t.Parallel()
	const corp = "billing.corp.example"
	for name, gone := range map[string]map[string]lab.Answer{
		"NXDOMAIN":                       {},
		"NODATA":                         {"billing" + inShop: {}},
		"NXDOMAIN, and a domain refuses": {corp: {RCode: dnsmessage.RCodeRefused}},
		"NXDOMAIN, and a domain fails":   {corp: {RCode: dnsmessage.RCodeServerFailure}},
		"NXDOMAIN for IPv4, and no answer for IPv6": {
			"billing" + inShop: {RCode: dnsmessage.RCodeNameError, Mute: dnsmessage.TypeAAAA},
		},
		"NODATA for IPv4, and no answer for IPv6": {"billing" + inShop: {Mute: dnsmessage.TypeAAAA}},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t, 1, cluster+"options timeout:1 attempts:1\n")
			p.servers[0].SetAddrs(map[string][]netip.Addr{"billing" + inShop: addrs("10.0.0.1")})
			known := p.lookup("billing", Record{}, 0)
			p.wants(known, "billing"+inShop, "", "10.0.0.1")
			p.servers[0].Set(gone)
			known = p.lookup("billing", known, time.Second)
			if len(known.Addrs()) > 0 || known.Err == nil {
				t.Errorf("it is %+v", known)
			}
			if _, stale := known.Stale(); stale {
				t.Error("what is gone is stale")
			}
		})
	}
}

// TestAnotherName: where the name is gone that had the addresses, another one that the host can mean takes its place.
func TestAnotherName(t *testing.T) {
	p := newPlace(t, 1, cluster)
	p.servers[0].SetAddrs(map[string][]netip.Addr{"billing.svc.cluster.local": addrs("10.0.0.1"), "billing.corp.example": addrs("10.0.0.9")})
	known := p.lookup("billing", Record{}, 0)
	p.wants(known, "billing.svc.cluster.local", "", "10.0.0.1")

	before := len(p.servers[0].Asked())
	known = p.lookup("billing", known, time.Second)
	p.wants(known, "billing.svc.cluster.local", "", "10.0.0.1")
	if got := p.asked(0, before); !slices.Equal(got, []string{"billing.svc.cluster.local"}) {
		t.Errorf("it asked for %q, want the one that has the addresses", got)
	}
	p.servers[0].SetAddrs(map[string][]netip.Addr{"billing.corp.example": addrs("10.0.0.9")})
	known = p.lookup("billing", known, time.Second)
	p.wants(known, "billing.corp.example", "", "10.0.0.9")

	p.servers[0].SetAddrs(map[string][]netip.Addr{"billing.corp.example": addrs("10.0.0.9"), "billing" + inShop: addrs("10.0.0.2")})
	p.wants(p.lookup("billing", known, time.Second), "billing.corp.example", "", "10.0.0.9")
	p.wants(p.lookup("billing", known, searchEvery), "billing"+inShop, "", "10.0.0.2")
}

// TestStale: while name servers can't tell, what they told last stays, for a time and no longer.
func TestStale(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		answer lab.Answer
		says   string
	}{
		"SERVFAIL": {lab.Answer{RCode: dnsmessage.RCodeServerFailure}, "SERVFAIL by server 1"},
		"REFUSED":  {lab.Answer{RCode: dnsmessage.RCodeRefused}, "REFUSED by server 1"},
		"NOTIMP":   {lab.Answer{RCode: dnsmessage.RCodeNotImplemented}, "NOTIMP by server 1"},
		"timeout":  {lab.Answer{Silent: true}, "no answer from server 1 (timeout)"},
	} {
		for domain, source := range map[string]string{"first": "billing" + inShop, "last": "billing"} {
			t.Run(name+", of the "+domain+" name", func(t *testing.T) {
				p := newPlace(t, 1, cluster+"options timeout:1 attempts:1\n")
				p.servers[0].SetAddrs(map[string][]netip.Addr{source: addrs("10.0.0.1", "fd00::1")})
				known := p.lookup("billing", Record{}, 0)
				p.wants(known, source, "", "10.0.0.1", "fd00::1")
				confirmed := p.now
				p.servers[0].SetAll(c.answer)
				for range 2 {
					known = p.lookup("billing", known, StaleLimit/2)
					if since, stale := known.Stale(); !stale || !since.Equal(confirmed) || len(known.Addrs()) != 2 || known.Err == nil {
						t.Errorf("stale %t since %v, want since %v; %v", stale, since, confirmed, known)
					}
				}
				known = p.lookup("billing", known, time.Second)
				p.wants(known, "", c.says)
				p.servers[0].SetAddrs(map[string][]netip.Addr{source: addrs("10.0.0.2")})
				known = p.lookup("billing", known, time.Second)
				p.wants(known, source, "", "10.0.0.2")
			})
		}
	}
}

// TestOneFamily: what is said of one family does not wait for the other, whose addresses stay meanwhile.
func TestOneFamily(t *testing.T) {
	p := newPlace(t, 1, cluster)
	p.servers[0].Set(map[string]lab.Answer{"billing" + inShop: {Addrs: addrs("10.0.0.1", "fd00::1"), Mute: dnsmessage.TypeAAAA}})
	known := p.lookup("billing", Record{}, 0)
	p.wants(known, "billing"+inShop, "", "10.0.0.1")
	p.servers[0].Set(map[string]lab.Answer{"billing" + inShop: {Addrs: addrs("10.0.0.1", "fd00::1")}})
	known = p.lookup("billing", known, time.Second)
	p.wants(known, "billing"+inShop, "", "10.0.0.1", "fd00::1")
	p.servers[0].Set(map[string]lab.Answer{"billing" + inShop: {Addrs: addrs("10.0.0.2", "fd00::2"), Mute: dnsmessage.TypeAAAA}})
	confirmed := p.now
	known = p.lookup("billing", known, time.Second)
	p.wants(known, "billing"+inShop, "no answer from server 1 yet", "10.0.0.2", "fd00::1")
	if since, stale := known.Stale(); !stale || !since.Equal(confirmed) {
		t.Errorf("stale %t since %v, want since %v", stale, since, confirmed)
	}
	known = p.lookup("billing", known, StaleLimit+time.Second)
	p.wants(known, "billing"+inShop, "", "10.0.0.2")
}

// TestServers: each server is asked until one knows.
func TestServers(t *testing.T) {
	t.Parallel()
	good := map[string][]netip.Addr{"billing" + inShop: addrs("10.0.0.1")}
	for name, first := range map[string]lab.Answer{
		"fails": {RCode: dnsmessage.RCodeServerFailure}, "refuses": {RCode: dnsmessage.RCodeRefused}, "is silent": {Silent: true},
	} {
		t.Run("the first "+name, func(t *testing.T) {
			p := newPlace(t, 2, cluster)
			p.servers[0].SetAll(first)
			p.servers[1].SetAddrs(good)
			p.wants(p.lookup("billing", Record{}, 0), "billing"+inShop, "", "10.0.0.1")
		})
	}
	t.Run("the first knows that there is none", func(t *testing.T) {
		p := newPlace(t, 2, cluster)
		p.servers[1].SetAddrs(good)
		p.wants(p.lookup("billing", Record{}, 0), "", "NXDOMAIN by server 1")
	})
	t.Run("none knows", func(t *testing.T) {
		p := newPlace(t, 2, "options timeout:1 attempts:2\n")
		p.servers[0].SetAll(lab.Answer{RCode: dnsmessage.RCodeRefused})
		p.servers[1].SetAll(lab.Answer{Silent: true})
		p.wants(p.lookup("billing", Record{}, 0), "", "REFUSED by server 1, no answer from server 2 (timeout)")
	})
	t.Run("nobody is there", func(t *testing.T) {
		p := newPlace(t, 1, "")
		if err := p.servers[0].Close(); err != nil {
			t.Fatal(err)
		}
		p.wants(p.lookup("billing", Record{}, 0), "", "connection refused by server 1")
	})
	t.Run("a datagram gets lost", func(t *testing.T) {
		p := newPlace(t, 1, cluster)
		p.servers[0].SetAddrs(good)
		p.servers[0].Lose(2)
		p.wants(p.lookup("billing", Record{}, 0), "billing"+inShop, "", "10.0.0.1")
	})
	t.Run("by turns", func(t *testing.T) {
		p := newPlace(t, 2, "options rotate\n")
		for _, server := range p.servers {
			server.SetAddrs(map[string][]netip.Addr{"billing": addrs("10.0.0.1")})
		}
		for range 4 {
			p.lookup("billing", Record{}, 0)
		}
		for i := range p.servers {
			if len(p.asked(i, 0)) == 0 {
				t.Errorf("server %d was not asked", i+1)
			}
		}
	})
	t.Run("by TCP alone", func(t *testing.T) {
		p := newPlace(t, 1, "options use-vc\n")
		p.servers[0].SetAddrs(map[string][]netip.Addr{"billing": addrs("10.0.0.1")})
		p.wants(p.lookup("billing", Record{}, 0), "billing", "", "10.0.0.1")
		if slices.ContainsFunc(p.servers[0].Asked(), func(q lab.Query) bool { return !q.TCP }) {
			t.Error("it asked by UDP")
		}
	})
}

// TestFiles: resolv.conf and hosts are read again when they change, and hosts counts first.
func TestFiles(t *testing.T) {
	p := newPlace(t, 2, "")
	p.write("resolv.conf", "nameserver "+p.addrs[0]+"\n")
	p.servers[0].SetAddrs(map[string][]netip.Addr{"billing": addrs("10.0.0.1")})
	p.servers[1].SetAddrs(map[string][]netip.Addr{"billing.example": addrs("10.0.0.2")})
	known := p.lookup("billing", Record{}, 0)
	p.wants(known, "billing", "", "10.0.0.1")
	p.write("resolv.conf", "search example.\nnameserver "+p.addrs[1]+"\n")
	known = p.lookup("billing", known, time.Second)
	p.wants(known, "billing.example", "", "10.0.0.2")

	p.write("hosts", "127.0.0.1 localhost\n10.0.0.3\tBilling billing.shop # not cart\nfd00::3 billing.\n10.0.0.3 cart\n")
	hosts := filepath.Join(p.directory, "hosts")
	for _, host := range []string{"billing", "BILLING."} {
		p.wants(p.lookup(host, known, time.Second), hosts, "", "10.0.0.3", "fd00::3")
	}
	known = p.lookup("billing", known, time.Second)
	p.wants(p.lookup("cart", Record{}, 0), hosts, "", "10.0.0.3") // and not those of others that share the address
	p.write("hosts", "")
	p.servers[1].SetAll(lab.Answer{RCode: dnsmessage.RCodeServerFailure})
	p.wants(p.lookup("billing", known, time.Second), "", "SERVFAIL by server 2") // the line that was taken out does not stay
}

func TestParseConfig(t *testing.T) {
	t.Parallel()
	const text = `# comment
; comment
nameserver 10.0.0.10
nameserver fe80::1%eth0
nameserver name.example
nameserver 10.0.0.11
nameserver 10.0.0.12
domain a.example
search b.example. c.example .
options ndots:99 timeout:3
options attempts:0 rotate edns0 trust-ad use-vc
`
	want := config{
		servers: []string{"10.0.0.10:53", "[fe80::1%eth0]:53", "10.0.0.11:53"}, search: []string{"b.example", "c.example"},
		ndots: 15, timeout: 3 * time.Second, attempts: 2, rotate: true, tcp: true,
	}
	if diff := cmp.Diff(want, parseConfig([]byte(text)), cmp.AllowUnexported(config{})); diff != "" {
		t.Error(diff)
	}
	want = config{servers: []string{"127.0.0.1:53"}, ndots: 1, timeout: 5 * time.Second, attempts: 2}
	if diff := cmp.Diff(want, parseConfig(nil), cmp.AllowUnexported(config{})); diff != "" {
		t.Errorf("without a file: %s", diff)
	}
}
