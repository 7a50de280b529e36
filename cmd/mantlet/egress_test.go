package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"mantlet/internal/lab"
	"mantlet/internal/rundir"
	"mantlet/internal/status"
)

// zone starts the DNS server that the pod asks. Names in /etc/hosts would be those of all tests.
func (p *pod) zone(names map[string][]netip.Addr) *lab.Nameserver {
	p.t.Helper()
	server, err := p.Nameserver("127.0.0.1")
	p.must(err)
	p.t.Cleanup(func() { _ = server.Close() })
	server.SetAddrs(names)
	return server
}

// endpoint is another pod's end of the mesh: it demands a certificate that the mesh CA signed.
func (p *pod) endpoint(on *lab.Host, identity *lab.Identity) *lab.Workload {
	p.t.Helper()
	return p.serve(on, lab.Service{Address: ":8080", TLS: identity.ServerConfig()})
}

func listen(addr string) netip.AddrPort { return netip.MustParseAddrPort(addr) }

func TestEgress(t *testing.T) {
	t.Parallel()
	p := newPod(t, "EDG_EGRESS_PROXY_CONFIG=billing#127.137.0.1:8081#billing-svc:8080##cart#127.137.0.2:8081#cart-svc:8080")
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	billingHost, cartHost := p.host("billing"), p.host("cart")
	p.must(lab.Hosts(map[string][]netip.Addr{"billing-svc": {billingHost.IPv4}, "cart-svc": {cartHost.IPv6}}))
	billing, cart := p.endpoint(billingHost, p.issue("billing-svc")), p.endpoint(cartHost, p.issue("cart-svc"))
	p.besiege()
	p.run()
	p.protect(tlsPort)
	p.protect(mtlsPort)
	p.ready()

	for _, c := range []struct {
		listen   string
		endpoint *lab.Workload
		sni      string
	}{
		{"127.137.0.1:8081", billing, "billing-svc"},
		{"127.137.0.2:8081", cart, "cart-svc"},
	} {
		p.reach(c.listen)
		all := c.endpoint.Connections()
		if len(all) != 1 {
			t.Fatalf("%s: %d connections, want mine", c.sni, len(all))
		}
		state, want := all[0].TLS, p.identity.Certificate().Certificate
		if state.ServerName != c.sni {
			t.Errorf("%s: SNI is %q", c.sni, state.ServerName)
		}
		if got := state.PeerCertificates; len(got) != 2 || string(got[0].Raw) != string(want[0]) || string(got[1].Raw) != string(want[1]) {
			t.Errorf("%s: it was shown %d certificates, want leaf and intermediate", c.sni, len(got))
		}
	}
	// Egress is the pod's own: from outside its addresses are not there.
	if _, err := p.dialBriefly(listen("127.137.0.1:8081")); err == nil {
		t.Error("egress can be reached from outside")
	}
}

// TestUpstreamAddresses tries where an upstream's addresses may be: in either family, in both, in the configuration
// itself, and in a place that is dead.
func TestUpstreamAddresses(t *testing.T) {
	t.Parallel()
	p := newPod(t, `EDG_EGRESS_PROXY_CONFIG=
		##v4#127.137.0.1:80#v4-svc:8080
		##v6#127.137.0.2:80#v6-svc:8080
		##both#127.137.0.3:80#both-svc:8080
		##dead v6#127.137.0.4:80#dead-v6-svc:8080
		##dead v4#127.137.0.5:80#dead-v4-svc:8080
		##silent v6#127.137.0.6:80#silent-v6-svc:8080
		##literal v4#127.137.0.7:80#198.51.100.3:8080
		##literal v6#127.137.0.8:80#[2001:db8::3]:8080
		##listens on v6#[::1]:80#v6-svc:8080`)
	for i, variable := range p.sidecar.Env {
		p.sidecar.Env[i] = strings.ReplaceAll(variable, "\n\t\t", "")
	}
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	upstream, refuses := p.host("upstream"), p.host("refuses")
	silent := netip.MustParseAddr("2001:db8::dead")
	p.zone(map[string][]netip.Addr{
		"v4-svc":        {upstream.IPv4},
		"v6-svc":        {upstream.IPv6},
		"both-svc":      upstream.Addrs(),
		"dead-v6-svc":   {upstream.IPv4, refuses.IPv6},
		"dead-v4-svc":   {refuses.IPv4, upstream.IPv6},
		"silent-v6-svc": {upstream.IPv4, silent},
	})
	p.endpoint(upstream, p.issue("*"))
	p.besiege()
	p.run()
	p.protect(mtlsPort)
	p.ready()
	for _, address := range []string{
		"127.137.0.1:80", "127.137.0.2:80", "127.137.0.3:80", "127.137.0.4:80", "127.137.0.5:80",
		"127.137.0.6:80", "127.137.0.7:80", "127.137.0.8:80", "[::1]:80",
	} {
		t.Run(address, func(t *testing.T) {
			_ = p.reach(address).Close()
			for range 4 { // addresses take turns
				began := time.Now()
				conn := p.dial(p.Host, listen(address))
				if err := echo(conn); err != nil {
					t.Error(err)
				}
				if took := time.Since(began); took > 5*time.Second {
					t.Errorf("it took %v", took)
				}
				_ = conn.Close()
			}
		})
	}
}

// TestForeignEndpoint: whoever answers at an upstream's address gets nothing of the workload's data unless the mesh CA
// vouches for it.
func TestForeignEndpoint(t *testing.T) {
	t.Parallel()
	p := newPod(t, "EDG_EGRESS_PROXY_CONFIG=foreign#127.137.0.1:80#foreign-svc:8080##expired#127.137.0.2:80#foreign-svc:8081##plain#127.137.0.3:80#foreign-svc:8082")
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	host := p.host("foreign")
	p.zone(map[string][]netip.Addr{"foreign-svc": host.Addrs()})
	authority, err := lab.NewAuthority("mesh")
	p.must(err)
	foreign, err := authority.Issue(lab.Leaf{DNSNames: []string{"foreign-svc"}})
	p.must(err)
	expired, err := p.mesh.Issue(lab.Leaf{
		DNSNames: []string{"foreign-svc"}, NotBefore: time.Now().AddDate(0, 0, -2), NotAfter: time.Now().Add(-time.Hour),
	})
	p.must(err)
	var endpoints []*lab.Workload
	for address, identity := range map[string]*lab.Identity{":8080": foreign, ":8081": expired} {
		config := identity.ServerConfig()
		config.ClientAuth = 0 // the greedier the better
		endpoints = append(endpoints, p.serve(host, lab.Service{Address: address, TLS: config}))
	}
	plain := p.wiretap(host, ":8082")
	p.besiege()
	p.run()
	p.protect(mtlsPort)
	p.ready()
	const secret = "attack at dawn"
	p.await("all endpoints are tried", func() bool {
		for _, address := range []string{"127.137.0.1:80", "127.137.0.2:80", "127.137.0.3:80"} {
			conn := p.dial(p.Host, listen(address))
			_, _ = io.WriteString(conn, secret)
			if err := cut(conn); err != nil {
				t.Errorf("%s: %v", address, err)
			}
		}
		return len(endpoints[0].Connections()) > 0 && len(endpoints[1].Connections()) > 0 && len(plain.String()) > 0
	})
	for _, e := range endpoints {
		for _, c := range e.Connections() {
			if c.TLS != nil || c.Received > 0 {
				t.Errorf("an endpoint got a connection: %+v", c)
			}
		}
	}
	if strings.Contains(plain.String(), secret) {
		t.Error("the workload's data went out in plaintext")
	}
}

// wiretap is a server that keeps what it is sent, and says something that is not TLS.
func (p *pod) wiretap(on *lab.Host, address string) *journal {
	p.t.Helper()
	listener, err := on.Listen("tcp", address)
	p.must(err)
	var done sync.WaitGroup
	heard := &journal{}
	done.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			done.Go(func() {
				defer conn.Close()
				_ = conn.SetDeadline(time.Now().Add(limit))
				_, _ = io.CopyN(heard, conn, 64)
				_, _ = io.WriteString(conn, "220 ready\r\n")
				_, _ = io.Copy(heard, conn)
			})
		}
	})
	p.t.Cleanup(func() { _ = listener.Close(); done.Wait() })
	return heard
}

// TestUnresolvedUpstream: a name that does not resolve holds nothing else up, however badly the resolver behaves, and
// works once it does resolve.
func TestUnresolvedUpstream(t *testing.T) {
	t.Parallel()
	for _, silent := range []bool{false, true} {
		t.Run(fmt.Sprintf("resolver is silent: %t", silent), func(t *testing.T) {
			t.Parallel()
			p := newPod(t, "EDG_EGRESS_PROXY_CONFIG=late#127.137.0.1:80#late-svc:8080##literal#127.137.0.2:80#[2001:db8::3]:8080")
			p.must(p.identity.Write(p.sidecar.TLSDirectory))
			upstream := p.host("upstream")
			p.endpoint(upstream, p.issue("*"))
			zone := p.zone(nil)
			if silent {
				zone.SetAll(lab.Answer{Silent: true})
			}
			p.besiege()
			began := time.Now()
			p.run()
			p.protect(mtlsPort)
			p.ready()
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("it was ready after %v", took)
			}
			p.must(p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), p.client.ClientConfig("pod")))
			p.must(echo(p.dial(p.Host, listen("127.137.0.2:80"))))
			if err := echo(p.dial(p.Host, listen("127.137.0.1:80"))); err == nil {
				t.Error("the unknown name works")
			}
			p.await("the failed connection and its refusal are counted alike", func() bool {
				s := p.told()
				return len(s.Traffic.Egress) == 2 && s.Traffic.Egress[0].Failed == 1 && s.Traffic.Egress[1].Failed == 0 &&
					slices.Contains(s.Refused, status.Refused{By: "envoy", Direction: "egress", Reason: "no_endpoint", Count: 1})
			})
			p.ready()
			old := p.envoy()
			p.must(syscall.Kill(old, syscall.SIGKILL))
			p.await("Envoy ends", func() bool { return syscall.Kill(old, 0) != nil })
			began = time.Now()
			p.dial(p.outside, netip.AddrPortFrom(p.IPv4, mtlsPort))
			if took := time.Since(began); took > 2500*time.Millisecond { // SYNs come at 0 s, 1 s, 3 s
				t.Errorf("it took %v to connect after Envoy died: a client's first retransmission was too early", took)
			}
			p.ready()
			zone.SetAddrs(map[string][]netip.Addr{"late-svc": upstream.Addrs()})
			began = time.Now()
			p.reach("127.137.0.1:80")
			t.Logf("the name works after %v", time.Since(began))
		})
	}
}

// TestUnansweredFamily: name servers that answer for one family alone hold nothing up.
func TestUnansweredFamily(t *testing.T) {
	t.Parallel()
	for mute, addrs := range map[dnsmessage.Type]func(*lab.Host) netip.Addr{
		dnsmessage.TypeA:    func(h *lab.Host) netip.Addr { return h.IPv6 },
		dnsmessage.TypeAAAA: func(h *lab.Host) netip.Addr { return h.IPv4 },
	} {
		t.Run(mute.String(), func(t *testing.T) {
			t.Parallel()
			p := newPod(t, "EDG_EGRESS_PROXY_CONFIG=svc#127.137.0.1:80#upstream-svc.:8080")
			p.must(p.identity.Write(p.sidecar.TLSDirectory))
			upstream := p.host("upstream")
			p.endpoint(upstream, p.issue("*"))
			p.zone(nil).Set(map[string]lab.Answer{"upstream-svc": {Addrs: []netip.Addr{addrs(upstream)}, Mute: mute}})
			began := time.Now()
			p.run()
			p.ready()
			if took := time.Since(began); took > 4*time.Second {
				t.Errorf("it was ready after %v", took)
			}
			p.reach("127.137.0.1:80")
		})
	}
}

// reach returns a connection to an egress entry that an endpoint answers at, as soon as there is one.
func (p *pod) reach(address string) (conn net.Conn) {
	p.t.Helper()
	p.await(address+" is answered", func() bool {
		var err error
		if conn, err = p.dialIn(listen(address)); err == nil && echo(conn) == nil {
			return true
		}
		if err == nil {
			_ = conn.Close()
		}
		return false
	})
	p.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// told asks mantlet for its status at its socket.
func (p *pod) told() (s status.Status) {
	p.t.Helper()
	response, err := status.OverSocket(rundir.Directory(p.sidecar.RuntimeDirectory).StatusSocket()).Get("http://mantlet/status")
	p.must(err)
	defer response.Body.Close()
	p.must(json.NewDecoder(response.Body).Decode(&s))
	return s
}

// upstream returns what mantlet says of an egress entry's upstream.
func (p *pod) upstream(address string) status.Upstream {
	p.t.Helper()
	for _, u := range p.told().Upstreams {
		if u.Listen == address {
			return u
		}
	}
	p.t.Fatalf("the status has no egress entry %s", address)
	return status.Upstream{}
}

// resolved waits until all names were looked up, and Envoy has what came of it.
func (p *pod) resolved() {
	p.t.Helper()
	p.await("names are looked up", func() bool {
		said := p.told()
		if len(said.Epochs) == 0 {
			return false
		}
		admin := fmt.Sprintf("%s/envoy/admin-%d.sock", p.sidecar.RuntimeDirectory, said.Epochs[len(said.Epochs)-1].Epoch)
		response, err := status.OverSocket(admin).Get("http://envoy/clusters")
		if err != nil {
			return false
		}
		defer response.Body.Close()
		clusters, err := io.ReadAll(response.Body)
		return err == nil && !slices.ContainsFunc(said.Upstreams, func(u status.Upstream) bool {
			return u.Answer == "" && len(u.Addresses) == 0 || slices.ContainsFunc(u.Addresses, func(addr netip.Addr) bool {
				return !strings.Contains(string(clusters), "egress-"+u.Listen+"::"+strings.TrimSuffix(netip.AddrPortFrom(addr, 0).String(), "0"))
			})
		})
	})
}

// TestEgressMeetsItself: a name server that leads an upstream to a listener of Envoy's own makes no connection of more than one,
// and once it leads elsewhere all is well. Upstreams in the pod are reached.
func TestEgressMeetsItself(t *testing.T) {
	t.Parallel()
	p := newPod(t, "EDG_EGRESS_PROXY_CONFIG="+strings.Join([]string{
		"itself v4#127.137.0.1:8088#itself-v4.:8088",
		"itself v6#[::1]:8088#itself-v6.:8088",
		"another#127.137.0.2:8089#another.:8088",
		"mtls v4#127.137.0.3:8088#localhost-v4.:15006",
		"tls v6#127.137.0.4:8088#localhost-v6.:15007",
		"status#127.137.0.5:8088#pod-v4.:9901",
		"inside v4#127.137.0.6:8088#pod-v4.:8080",
		"inside v6#127.137.0.7:8088#pod-v6.:8080",
	}, "##"), "MANTLET_STATUS_ADDRESS=:9901")
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	led := map[string][]netip.Addr{
		"itself-v4": {netip.MustParseAddr("127.137.0.1")}, "itself-v6": {netip.IPv6Loopback()},
		"another":      {netip.MustParseAddr("127.137.0.1")},
		"localhost-v4": {netip.MustParseAddr("127.0.0.1")}, "localhost-v6": {netip.IPv6Loopback()},
		"pod-v4": {p.IPv4}, "pod-v6": {p.IPv6},
	}
	zone := p.zone(led)
	endpoint := p.host("endpoint")
	p.serve(endpoint, lab.Service{Address: ":8088", TLS: p.issue("*").ServerConfig()})
	inside := p.serve(p.Host, lab.Service{Address: ":8080", TLS: p.issue("*").ServerConfig()})
	p.run()
	p.protect(mtlsPort)
	p.ready()
	before := p.refused("own_listener")
	for _, at := range []string{
		"127.137.0.1:8088", "[::1]:8088", "127.137.0.2:8089", "127.137.0.3:8088", "127.137.0.4:8088", "127.137.0.5:8088",
	} {
		conn := p.dial(p.Host, listen(at))
		_, _ = io.WriteString(conn, "one request")
		if err := cut(conn); err != nil {
			t.Errorf("%s: %v", at, err)
		}
		after := p.refused("own_listener")
		if made := after - before; made == 0 || made > 3 { // attempts
			t.Errorf("%s: Envoy tried to connect to itself %d times", at, made)
		}
		before = after
	}
	for _, at := range []string{"127.137.0.6:8088", "127.137.0.7:8088"} {
		if err := echo(p.dial(p.Host, listen(at))); err != nil {
			t.Errorf("%s, an upstream in the pod: %v", at, err)
		}
	}
	if got := len(inside.Connections()); got != 2 {
		t.Errorf("the upstream in the pod has %d connections", got)
	}
	zone.SetAddrs(map[string][]netip.Addr{"itself-v4": {endpoint.IPv4}, "itself-v6": {endpoint.IPv6}})
	for _, at := range []string{"127.137.0.1:8088", "[::1]:8088"} {
		p.await(at+" leads outside", func() bool { return echo(p.dial(p.Host, listen(at))) == nil })
	}
	p.ready()
}

// dialIn connects from the pod.
func (p *pod) dialIn(to netip.AddrPort) (net.Conn, error) {
	ctx, cancel := p.context()
	defer cancel()
	return p.Dial(ctx, "tcp", to.String())
}
