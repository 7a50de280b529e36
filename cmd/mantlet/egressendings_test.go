package main

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"mantlet/internal/lab"
	"mantlet/internal/status"
)

// replicated is the egress entry of tests with replicas.
const replicated = "127.137.0.1:8081"

// replicas are endpoints behind one address that have certificates of their own: each connection meets the next one.
type replicas struct {
	*lab.Workload
	identities []*lab.Identity
	mu         sync.Mutex
	met        []*lab.Identity // by each connection
}

// replicate serves on a host's port 8443. The endpoints trust the clients of these CAs.
func (p *pod) replicate(on *lab.Host, trusted []*lab.Authority, identities ...*lab.Identity) *replicas {
	p.t.Helper()
	r := &replicas{identities: identities}
	clients := identities[0].Authority.Pool()
	for _, ca := range trusted {
		clients.AppendCertsFromPEM(ca.CAPEM())
	}
	r.Workload = p.serve(on, lab.Service{Address: ":8443", TLS: &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		r.mu.Lock()
		defer r.mu.Unlock()
		identity := r.identities[len(r.met)%len(r.identities)]
		r.met = append(r.met, identity)
		config := identity.ServerConfig()
		config.ClientCAs, config.SessionTicketsDisabled = clients, true // a resumed session is the endpoint's that began it
		return config, nil
	}}})
	return r
}

// only has the endpoints with these certificates serve what comes from now on.
func (r *replicas) only(identities ...*lab.Identity) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.identities = identities
}

// connect has the workload connect to the egress entry, one connection after another, until it has as many to each endpoint as asked for.
func (r *replicas) connect(p *pod, each int) map[*lab.Identity][]net.Conn {
	p.t.Helper()
	all := map[*lab.Identity][]net.Conn{}
	for range each * len(r.identities) {
		conn := p.reach(replicated)
		r.mu.Lock()
		met := r.met[len(r.met)-1]
		r.mu.Unlock()
		all[met] = append(all[met], conn)
	}
	return all
}

// open returns how many connections an endpoint still has.
func (r *replicas) open(identity *lab.Identity) (n int) {
	all := r.Connections()
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, met := range r.met {
		if met == identity && !all[i].Closed {
			n++
		}
	}
	return n
}

// end wants connections to an endpoint to be over for the workload and for the endpoint.
func (r *replicas) end(p *pod, identity *lab.Identity, conns []net.Conn) {
	p.t.Helper()
	for _, conn := range conns {
		if err := cut(conn); err != nil {
			p.t.Errorf("the workload's end of a connection to %v, which is forbidden: %v", identity.Leaf.DNSNames, err)
		}
	}
	p.await("the endpoint's ends are over", func() bool { return r.open(identity) == 0 })
}

// live wants connections to exchange bytes.
func live(p *pod, identity *lab.Identity, conns []net.Conn) {
	p.t.Helper()
	for _, conn := range conns {
		if err := echo(conn); err != nil {
			p.t.Errorf("a connection by %v, which nothing forbids: %v", identity.Leaf.DNSNames, err)
		}
	}
}

// endedTwo waits until the status tells of two connections that a change ended.
func (p *pod) endedTwo(code status.EndReason, sans ...string) {
	p.t.Helper()
	p.await("status tells of two connections that ended by "+string(code), func() bool {
		all := p.status().Endings
		return slices.ContainsFunc(all, func(e status.Ending) bool {
			return e.Code == code && e.Count == 2 && slices.Equal(e.SANs, sans)
		})
	})
}

// TestEgressOthersLiveOn: a change of an egress entry ends the connections that it would not make, at both ends. The others go on, in
// the Envoy that they are in. Such a change does not wait until the connections of the Envoy before are drained.
func TestEgressOthersLiveOn(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, "MANTLET_ENVOY_DRAIN_TIME=9m")
	billing, shop := p.issue("billing"), p.issue("shop")
	first, second := p.host("first"), p.host("second")
	endpoints := p.replicate(first, nil, billing, shop)
	elsewhere := p.replicate(second, nil, billing)
	entry := func(at *lab.Host, names string) string {
		return fmt.Sprintf("egress: [{listen: '%s', upstream: '%s', serverNames: [%s]}]", replicated, netip.AddrPortFrom(at.IPv4, 8443), names)
	}
	m := p.override(entry(first, "billing, shop"))
	p.start()
	open := endpoints.connect(p, 2)

	m.write(entry(first, "billing"))
	endpoints.end(p, shop, open[shop])
	live(p, billing, open[billing])
	p.endedTwo(status.EndServerNames, "shop")

	for _, conn := range open[billing] { // else the next change would end them as well, or the Envoy that they are in would end first
		p.must(conn.Close())
	}
	p.await("they are over", func() bool { return endpoints.open(billing) == 0 })
	endpoints.only(billing)
	fresh := endpoints.connect(p, 2)
	m.write(entry(second, "billing"))
	endpoints.end(p, billing, fresh[billing])
	p.endedTwo(status.EndUpstream, "billing")

	moved := elsewhere.connect(p, 2)
	m.write("{}")
	elsewhere.end(p, billing, moved[billing])
	p.endedTwo(status.EndEntry, "billing")
}

// TestOneOfTwoCAs: a mesh CA is removed from the bundle. The connections of clients and endpoints that only it vouches for end, the
// others go on.
func TestOneOfTwoCAs(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	next, err := lab.NewAuthority("mesh")
	p.must(err)
	issue := func(name string) *lab.Identity {
		identity, err := next.Issue(lab.Leaf{DNSNames: []string{name}})
		p.must(err)
		return identity
	}
	pod, billing, nextBilling := issue("pod"), p.issue("billing"), issue("billing")
	host := p.host("billing")
	endpoints := p.replicate(host, []*lab.Authority{next}, billing, nextBilling)
	p.override(fmt.Sprintf("ingress: [{port: %d, allow: [client]}]\negress: [{listen: '%s', upstream: '%s', serverNames: [billing]}]",
		silentPort, replicated, netip.AddrPortFrom(host.IPv4, 8443)))
	p.bundle(pod, p.mesh.CAPEM(), next.CAPEM())
	p.besiege()
	p.run()
	p.protect(tlsPort)
	p.protect(mtlsPort)
	p.ready()
	p.serve(p.Host, lab.Service{Address: fmt.Sprintf(":%d", silentPort)})
	clients := map[*lab.Identity][]net.Conn{}
	nextClient := issue("client")
	for _, client := range []*lab.Identity{p.client, nextClient} {
		for _, addr := range p.Addrs() {
			config := client.ClientConfig("pod")
			config.RootCAs = next.Pool()
			conn, err := p.handshake(netip.AddrPortFrom(addr, silentPort), config)
			p.must(err)
			p.must(echo(conn))
			clients[client] = append(clients[client], conn)
		}
	}
	open := endpoints.connect(p, 2)

	p.bundle(pod, next.CAPEM())
	for _, conn := range clients[p.client] {
		if err := cut(conn); err != nil {
			t.Errorf("a client of the CA that is gone: %v", err)
		}
	}
	live(p, nextClient, clients[nextClient])
	endpoints.end(p, billing, open[billing])
	live(p, nextBilling, open[nextBilling])
	p.endedTwo(status.EndCARemoved, "client")
	p.endedTwo(status.EndCARemoved, "billing")
}
