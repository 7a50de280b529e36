package main

import (
	"crypto/tls"
	"errors"
	"io"
	"net/netip"
	"testing"
	"time"

	"mantlet/internal/lab"
)

// versions are those that the mesh speaks, each to be tried alone.
var versions = map[string]uint16{"TLS 1.2": tls.VersionTLS12, "TLS 1.3": tls.VersionTLS13}

func only(version uint16, config *tls.Config) *tls.Config {
	config = config.Clone()
	config.MinVersion, config.MaxVersion = version, version
	return config
}

// anonymous trusts the mesh and has no certificate.
func (p *pod) anonymous() *tls.Config { return &tls.Config{RootCAs: p.mesh.Pool(), ServerName: "pod"} }

// TestNothingIsProtectedWithoutMantlet shows that the prober finds plaintext where there is any.
func TestNothingIsProtectedWithoutMantlet(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	stream := p.serve(p.Host, lab.Service{Address: ":9090"})
	datagrams := p.serve(p.Host, lab.Service{Network: "udp", Address: ":9090"})
	prober := p.outside.Probe(netip.AddrPortFrom(p.IPv4, mtlsPort), netip.AddrPortFrom(p.IPv6, mtlsPort))
	defer prober.Stop()
	ctx, cancel := p.context()
	defer cancel()
	p.must(prober.Await(ctx, 3))
	for _, w := range []*lab.Workload{stream, datagrams} {
		reached := map[netip.Addr]bool{}
		for _, c := range w.Connections() {
			reached[c.Remote.Addr()] = reached[c.Remote.Addr()] || c.Leaked > 0
		}
		for _, from := range p.outside.Addrs() {
			if !reached[from] {
				t.Errorf("no plaintext from %s reached the workload", from)
			}
		}
	}
}

func TestIngress(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.besiege()
	p.run()
	encrypted, mutual := p.protect(tlsPort), p.protect(mtlsPort)
	plain := p.serve(p.Host, lab.Service{Address: ":7890"})
	plainDatagrams := p.serve(p.Host, lab.Service{Network: "udp", Address: ":7890"})
	banner := p.serve(p.Host, lab.Service{Address: ":2525", Banner: "220 ready\r\n"})
	p.besieged()
	p.ready()
	strangers := p.strangers()

	for _, addr := range p.Addrs() {
		to := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(addr, port) }
		for name, version := range versions {
			t.Run("tls/"+name+"/"+addr.String(), func(t *testing.T) {
				config := only(version, p.anonymous())
				config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
					return nil, errors.New("a client certificate was asked for")
				}
				conn, err := p.handshake(to(tlsPort), config)
				if err != nil {
					t.Fatal(err)
				}
				if err := echo(conn); err != nil {
					t.Fatal(err)
				}
				p.handsOutChain(t, conn)
				meets(t, encrypted, to(tlsPort))
			})
			t.Run("mtls/"+name+"/"+addr.String(), func(t *testing.T) {
				conn, err := p.handshake(to(mtlsPort), only(version, p.client.ClientConfig("pod")))
				if err != nil {
					t.Fatal(err)
				}
				if err := echo(conn); err != nil {
					t.Fatal(err)
				}
				p.handsOutChain(t, conn)
				meets(t, mutual, to(mtlsPort))
				p.refusesStrangers(t, to(mtlsPort), version, strangers, mutual)
			})
			t.Run("server speaks first/"+name+"/"+addr.String(), func(t *testing.T) {
				conn, err := p.handshake(to(2525), only(version, p.client.ClientConfig("pod")))
				if err != nil {
					t.Fatal(err)
				}
				got := make([]byte, len("220 ready\r\n"))
				if _, err := io.ReadFull(conn, got); err != nil || string(got) != "220 ready\r\n" {
					t.Fatalf("%q, %v", got, err)
				}
				p.refusesStrangers(t, to(2525), version, strangers, banner)
			})
		}
		t.Run("passthrough/"+addr.String(), func(t *testing.T) {
			if err := echo(p.dial(p.outside, to(passthroughPort))); err != nil {
				t.Fatal(err)
			}
			meets(t, plain, to(passthroughPort))
			ctx, cancel := p.context()
			defer cancel()
			conn, err := p.outside.Dial(ctx, "udp", to(passthroughPort).String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if err := echo(conn); err != nil {
				t.Fatalf("datagrams: %v", err)
			}
			if got := plainDatagrams.Connections(); got[len(got)-1].Received != 5 {
				t.Errorf("the workload got %+v", got)
			}
		})
		// The first and the last, the neighbours of those that are named, mantlet's own, and some that nobody serves.
		for _, port := range []uint16{1, 22, 443, 7889, 7891, 8079, 8081, 15006, 15007, 65535} {
			for name, version := range versions {
				t.Run("every other port/"+name+"/"+to(port).String(), func(t *testing.T) {
					p.refusesStrangers(t, to(port), version, strangers, nil)
				})
			}
		}
	}
	if got := encrypted.Connections(); len(got) != 4 { // two versions, two families
		t.Errorf("beside mine the workload has connections: %+v", got)
	}
	if got := mutual.Connections(); len(got) != 4 {
		t.Errorf("beside mine the workload has connections: %+v", got)
	}
}

// handsOutChain checks that the peer of a connection showed leaf and intermediate, in this order and nothing else.
func (p *pod) handsOutChain(t *testing.T, conn *tls.Conn) {
	t.Helper()
	got, want := conn.ConnectionState().PeerCertificates, p.identity.Certificate().Certificate
	if len(got) != 2 || len(want) != 2 || string(got[0].Raw) != string(want[0]) || string(got[1].Raw) != string(want[1]) {
		t.Errorf("it hands out %d certificates, want leaf and intermediate", len(got))
	}
}

// meets checks that the workload's last connection came to the address that was dialled.
func meets(t *testing.T, w *lab.Workload, dialled netip.AddrPort) {
	t.Helper()
	all := w.Connections()
	if len(all) == 0 || all[len(all)-1].Local != dialled {
		t.Errorf("the workload sees connections %+v, want the last to %s", all, dialled)
	}
}

// strangers are those whom the mesh CA did not sign, or no longer vouches for.
func (p *pod) strangers() map[string]tls.Certificate {
	p.t.Helper()
	foreign, err := lab.NewAuthority("mesh") // of the same name, and a stranger
	p.must(err)
	stranger, err := foreign.Issue(lab.Leaf{DNSNames: []string{"client"}})
	p.must(err)
	expired, err := p.mesh.Issue(lab.Leaf{
		DNSNames: []string{"client"}, NotBefore: time.Now().AddDate(0, 0, -2), NotAfter: time.Now().Add(-time.Hour),
	})
	p.must(err)
	return map[string]tls.Certificate{
		"no certificate": {}, "a foreign CA's certificate": stranger.Certificate(), "an expired certificate": expired.Certificate(),
	}
}

// refusesStrangers checks that a port lets in nobody whom the mesh CA did not sign, and gives the workload, if there is
// one, no connection for them.
func (p *pod) refusesStrangers(t *testing.T, to netip.AddrPort, version uint16, strangers map[string]tls.Certificate, w *lab.Workload) {
	t.Helper()
	before := 0
	if w != nil {
		before = len(w.Connections())
	}
	for name, certificate := range strangers {
		asked := false
		config := only(version, p.anonymous())
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			asked = true
			return &certificate, nil
		}
		if err := p.exchange(to, config); err == nil {
			t.Errorf("%s: %s lets it in", name, to)
		} else if !asked {
			t.Errorf("%s: %s asks for no client certificate: %v", name, to, err)
		}
	}
	plain := p.dial(p.outside, to)
	if err := echo(plain); err == nil {
		t.Errorf("%s answers plaintext", to)
	}
	if w != nil && len(w.Connections()) != before {
		t.Errorf("the workload got connections of strangers: %+v", w.Connections()[before:])
	}
}
