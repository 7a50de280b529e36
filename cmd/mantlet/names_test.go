package main

import (
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"mantlet/internal/lab"
	"mantlet/internal/status"
)

// clusterDNS is the /etc/resolv.conf of a pod of namespace shop, in a cluster whose nodes have a search domain.
const clusterDNS = "search shop.svc.cluster.local svc.cluster.local cluster.local corp.example\nnameserver 127.0.0.1\noptions ndots:5\n"

// namedPod is a pod with egress entries that have names, in a cluster. Endpoints are to be made on other hosts.
func namedPod(t *testing.T, egress string) (*pod, *lab.Nameserver) {
	t.Helper()
	p := newPod(t, "EDG_EGRESS_PROXY_CONFIG="+egress)
	p.must(p.ResolvConf(clusterDNS))
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	return p, p.zone(nil)
}

// refusedAt connects to an egress entry and returns the last line of the log about it; it must have come to nothing.
func (p *pod) refusedAt(address string) logLine {
	p.t.Helper()
	conn := p.dial(p.Host, listen(address))
	if err := echo(conn); err == nil {
		p.t.Errorf("%s is answered", address)
	}
	return p.logged(conn)
}

// gone waits until an egress entry leads nowhere since its name has no address.
func (p *pod) gone(address string) {
	p.t.Helper()
	p.await(address+" leads nowhere", func() bool {
		conn := p.dial(p.Host, listen(address))
		if echo(conn) == nil {
			return false
		}
		return p.logged(conn).Code == "no_endpoint"
	})
}

// TestNameIsGone: once a name does not exist, or has no address, no new connection goes to the address that it had: another
// workload of the mesh may have it by then.
func TestNameIsGone(t *testing.T) {
	t.Parallel()
	const billing, cart = "127.137.0.1:80", "127.137.0.2:80"
	p, zone := namedPod(t, "billing#"+billing+"#billing:8080##cart#"+cart+"#cart.shop.svc.cluster.local:8080")
	endpoint, other := p.host("endpoint"), p.host("other")
	served := p.endpoint(endpoint, p.issue("*"))
	p.endpoint(other, p.issue("*"))
	const inShop = ".shop.svc.cluster.local"
	named := func(billing, cart lab.Answer) map[string]lab.Answer {
		return map[string]lab.Answer{
			"billing" + inShop: billing, "cart" + inShop: cart,
			"billing.corp.example": {RCode: dnsmessage.RCodeRefused}, "cart" + inShop + ".corp.example": {RCode: dnsmessage.RCodeRefused},
		}
	}
	here := lab.Answer{Addrs: []netip.Addr{endpoint.IPv4}, TTL: 30}
	zone.Set(named(here, here))
	p.run()
	p.ready()
	open := p.reach(billing)
	p.reach(cart)
	if u := p.upstream(billing); u.Source != "billing"+inShop || u.Answer != "" || u.StaleSince != nil {
		t.Errorf("the upstream is %+v", u)
	}
	if problems := p.told().Problems; len(problems) > 0 {
		t.Errorf("the problems are %q", problems)
	}

	absent := named(lab.Answer{}, lab.Answer{})
	delete(absent, "billing"+inShop) // NXDOMAIN; the other has no address of either family
	zone.Set(absent)
	for address, cause := range map[string]string{billing: "NXDOMAIN by 127.0.0.1", cart: "NODATA (no A or AAAA record) by 127.0.0.1"} {
		p.gone(address)
		before := len(served.Connections())
		line := p.refusedAt(address)
		if line.Code != "no_endpoint" || len(served.Connections()) > before {
			t.Errorf("a new connection went to the address that the name had: %+v", line)
		}
		if u := p.upstream(address); len(u.Addresses) > 0 || !strings.Contains(u.Answer, cause) || u.StaleSince != nil {
			t.Errorf("the upstream is %+v", u)
		}
		if problems := strings.Join(p.told().Problems, "\n"); !strings.Contains(problems, "egress "+address) || !strings.Contains(problems, cause) {
			t.Errorf("%q is not among the problems:\n%s", cause, problems)
		}
	}
	p.must(echo(open)) // it was made while the name had the address
	p.ready()

	there := lab.Answer{Addrs: []netip.Addr{other.IPv6}}
	zone.Set(named(there, there))
	p.reach(billing)
	p.reach(cart)
	p.await("no problem", func() bool { return len(p.told().Problems) == 0 })
}

// TestResolverDies: addresses that are known stay while name servers do not answer or can't tell, also for the next Envoy, and
// the status says since when they are not confirmed.
func TestResolverDies(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]lab.Answer{
		"no answer": {Silent: true}, "SERVFAIL": {RCode: dnsmessage.RCodeServerFailure}, "REFUSED": {RCode: dnsmessage.RCodeRefused},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const address = "127.137.0.1:80"
			p, zone := namedPod(t, "billing#"+address+"#billing:8080")
			m := p.override("{}")
			endpoint := p.host("endpoint")
			p.endpoint(endpoint, p.issue("*"))
			zone.Set(map[string]lab.Answer{"billing.shop.svc.cluster.local": {Addrs: endpoint.Addrs()}})
			p.run()
			p.ready()
			p.reach(address)
			zone.SetAll(answer)
			var u status.Upstream
			p.await("the addresses are stale", func() bool { u = p.upstream(address); return u.StaleSince != nil })
			if !strings.Contains(u.Answer, name+" ") || len(u.Addresses) != 2 || time.Since(*u.StaleSince) < 0 {
				t.Errorf("the upstream is %+v", u)
			}
			if s := p.told(); !s.Ready || len(s.Problems) != 1 || !strings.Contains(s.Problems[0], "confirmed last") {
				t.Errorf("ready %t, and the problems are %q", s.Ready, s.Problems)
			}
			code, text, _ := p.mantlet("status")
			if code != 1 || !strings.Contains(text, "not confirmed for ") {
				t.Errorf("exit code %d, and the status is\n%s", code, text)
			}
			p.must(echo(p.dial(p.Host, listen(address))))

			m.write("tls: {minVersion: \"1.3\"}")
			p.await("a hot restart", func() bool { s := p.told(); return s.Applied.Generation == 2 && s.Epochs[len(s.Epochs)-1].Epoch == 1 })
			p.must(echo(p.dial(p.Host, listen(address))))
			envoys, err := p.sidecar.Envoys()
			p.must(err)
			for _, pid := range envoys {
				p.must(syscall.Kill(pid, syscall.SIGKILL))
			}
			p.await("another Envoy", func() bool { return p.told().Envoys.Recovered == 1 })
			p.must(echo(p.dial(p.Host, listen(address))))

			zone.Set(map[string]lab.Answer{"billing.shop.svc.cluster.local": {Addrs: endpoint.Addrs()}})
			p.await("all is well", func() bool { return len(p.told().Problems) == 0 })
		})
	}
}

// TestSearchDomainRefuses: a search domain that is not answered for hides no full name; mantlet check finds the same.
func TestSearchDomainRefuses(t *testing.T) {
	t.Parallel()
	const name = "billing.shop.svc.cluster.local"
	for what, answer := range map[string]lab.Answer{
		"REFUSED": {RCode: dnsmessage.RCodeRefused}, "SERVFAIL": {RCode: dnsmessage.RCodeServerFailure}, "no answer": {Silent: true},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			const address = "127.137.0.1:80"
			p, zone := namedPod(t, fmt.Sprintf("billing#%s#%s:8080", address, name))
			endpoint := p.host("endpoint")
			p.endpoint(endpoint, p.issue("*"))
			zone.Set(map[string]lab.Answer{name: {Addrs: []netip.Addr{endpoint.IPv4}}, name + ".corp.example": answer})
			p.run()
			p.ready()
			p.reach(address)
			_, text, _ := p.mantlet("check")
			if !strings.Contains(text, endpoint.IPv4.String()) {
				t.Errorf("check does not find its address:\n%s", text)
			}
		})
	}
}

// TestResolvConfChanges: mantlet reads it again.
func TestResolvConfChanges(t *testing.T) {
	t.Parallel()
	const address = "127.137.0.1:80"
	p, zone := namedPod(t, "billing#"+address+"#billing:8080")
	endpoint := p.host("endpoint")
	p.endpoint(endpoint, p.issue("*"))
	zone.Set(map[string]lab.Answer{"billing.other.example": {Addrs: endpoint.Addrs()}})
	p.run()
	p.ready()
	p.gone(address)
	p.must(p.ResolvConf("search other.example\nnameserver 127.0.0.1\n"))
	p.reach(address)
}
