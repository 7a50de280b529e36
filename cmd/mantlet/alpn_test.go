package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	"mantlet/internal/lab"
)

// rpc asks a gRPC server from a host whether it serves.
func (p *pod) rpc(from *lab.Host, to netip.AddrPort, how credentials.TransportCredentials) error {
	p.t.Helper()
	ctx, cancel := p.context()
	defer cancel()
	conn, err := grpc.NewClient("passthrough:///"+to.String(), grpc.WithTransportCredentials(how),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return from.Dial(ctx, "tcp", addr) }))
	p.must(err)
	defer conn.Close()
	answer, err := healthv1.NewHealthClient(conn).Check(ctx, &healthv1.HealthCheckRequest{})
	if err == nil && answer.Status != healthv1.HealthCheckResponse_SERVING {
		err = fmt.Errorf("the server is %s", answer.Status)
	}
	return err
}

// TestGRPC calls a server behind mantlet: past no sidecar of its own, which takes ALPN, and through one.
func TestGRPC(t *testing.T) {
	t.Parallel()
	const (
		without = 9091
		range1  = 9100
		range2  = 9163
	)
	p := newPod(t, `MANTLET_CONFIG_INLINE=
ingress:
  - {port: 8080, mode: tls, alpn: [h2, http/1.1]}
  - {port: 9090, alpn: [h2]}
  - {port: 9091, mode: tls}
  - {port: 9100-9163, allow: [client], alpn: [h2]}
`)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.besiege()
	p.run()
	for _, port := range []uint16{tlsPort, mtlsPort, without, range1, range2} {
		p.serveGRPC(fmt.Sprintf(":%d", port), health.NewServer())
	}
	p.ready()
	p.same()

	stranger, member, other := p.anonymous(), p.client.ClientConfig("pod"), p.issue("other").ClientConfig("pod")
	for _, addr := range p.Addrs() {
		for _, c := range []struct {
			port   uint16
			client *tls.Config
			reason string // of the error
		}{
			{tlsPort, stranger, ""},
			{without, stranger, "missing selected ALPN property"},
			{mtlsPort, member, ""},
			{mtlsPort, stranger, "Unavailable"},
			{range1, member, ""},
			{range2, member, ""},
			{range2, other, "Unavailable"},
			{range2 + 1, member, "missing selected ALPN property"},
		} {
			err := p.rpc(p.outside, netip.AddrPortFrom(addr, c.port), credentials.NewTLS(c.client))
			if (err == nil) != (c.reason == "") || err != nil && !strings.Contains(err.Error(), c.reason) {
				t.Errorf("at %d of %s: %v, want %q", c.port, addr, err, c.reason)
			}
		}
	}

	shop := p.host("shop")
	sidecar, err := shop.Sidecar(t.TempDir(), p.sidecar.Binary, append(p.sidecar.Env, fmt.Sprintf(`MANTLET_CONFIG_INLINE=
egress:
  - {listen: "127.137.0.1:80", upstream: "%s:9090", serverNames: [pod], alpn: [h2]}
  - {listen: "127.137.0.2:80", upstream: "%s:9090", serverNames: [pod]}
  - {listen: "127.137.0.3:80", upstream: "[%s]:8080", serverNames: [pod], alpn: [h2]}
`, p.IPv4, p.IPv4, p.IPv6))...)
	p.must(err)
	p.must(shop.Sysctl("net.ipv4.ip_unprivileged_port_start", "0"))
	p.must(p.client.Write(sidecar.TLSDirectory))
	p.must(sidecar.Start())
	ctx, cancel := p.context()
	defer cancel()
	p.must(sidecar.Ready(ctx))
	for _, address := range []string{"127.137.0.1:80", "127.137.0.2:80", "127.137.0.3:80"} {
		if err := p.rpc(shop, listen(address), insecure.NewCredentials()); err != nil {
			t.Errorf("through two sidecars, by %s: %v", address, err)
		}
	}
}

// TestALPN checks which protocol both ends of a connection take it for.
func TestALPN(t *testing.T) {
	t.Parallel()
	p := newPod(t, `MANTLET_CONFIG_INLINE=
ingress:
  - {port: 8080, mode: tls, alpn: [h2, http/1.1]}
  - {port: 9090, alpn: [http/1.1]}
egress:
  - {listen: "127.137.0.1:80", upstream: "endpoint-svc:8080", alpn: [http/1.1, h2]}
  - {listen: "127.137.0.2:80", upstream: "endpoint-svc:8080"}
  - {listen: "127.137.0.3:80", upstream: "endpoint-svc:8080", alpn: [acme-tls/1]}
`)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	endpointHost := p.host("endpoint")
	p.must(lab.Hosts(map[string][]netip.Addr{"endpoint-svc": endpointHost.Addrs()}))
	config := p.issue("endpoint-svc").ServerConfig()
	config.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		config := config.Clone()
		config.GetConfigForClient = nil
		config.NextProtos = hello.SupportedProtos // the client's first
		return config, nil
	}
	endpoint := p.serve(endpointHost, lab.Service{Address: ":8080", TLS: config})
	p.besiege()
	p.run()
	p.protect(tlsPort)
	p.protect(mtlsPort)
	p.ready()

	for _, c := range []struct {
		port     uint16
		protocol string
		offers   []string
	}{
		{tlsPort, "h2", []string{"h2"}},
		{tlsPort, "h2", []string{"http/1.1", "h2"}}, // as mantlet prefers
		{tlsPort, "http/1.1", []string{"http/1.1"}},
		{tlsPort, "", []string{"spdy/3"}},
		{tlsPort, "", nil},
		{mtlsPort, "http/1.1", []string{"h2", "http/1.1"}},
		{mtlsPort, "", []string{"h2"}},
		{mtlsPort, "", nil},
		{mtlsPort + 1, "", []string{"h2"}},
	} {
		for version, number := range versions {
			client := only(number, p.client.ClientConfig("pod"))
			client.NextProtos = c.offers
			conn, err := p.handshake(netip.AddrPortFrom(p.IPv4, c.port), client)
			if err != nil {
				t.Errorf("at %d with %s, offering %q: %v", c.port, version, c.offers, err)
				continue
			}
			if got := conn.ConnectionState().NegotiatedProtocol; got != c.protocol {
				t.Errorf("at %d with %s, offering %q: %q, want %q", c.port, version, c.offers, got, c.protocol)
			}
		}
	}
	for i, want := range []string{"http/1.1", "", "acme-tls/1"} {
		address := fmt.Sprintf("127.137.0.%d:80", i+1)
		if err := echo(p.dial(p.Host, listen(address))); err != nil {
			t.Fatalf("%s: %v", address, err)
		}
		all := endpoint.Connections()
		if got := all[len(all)-1].TLS.NegotiatedProtocol; got != want {
			t.Errorf("%s: %q, want %q", address, got, want)
		}
	}
}
