package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"

	"mantlet/internal/lab"
	"mantlet/internal/status"
)

// logLine is a line of mantlet's log about a connection.
type logLine struct {
	Level       string   `json:"level"`
	Message     string   `json:"msg"`
	Direction   string   `json:"direction"`
	Peer        string   `json:"peer"`
	Destination string   `json:"destination"`
	Upstream    string   `json:"upstream"`
	SANs        []string `json:"peer_sans"`
	TLSVersion  string   `json:"tls_version"`
	Curve       string   `json:"curve"`
	BytesIn     int      `json:"bytes_in"`
	BytesOut    int      `json:"bytes_out"`
	Duration    int      `json:"duration_ms"`
	Code        string   `json:"code"`
	Reason      string   `json:"reason"`
	Detail      string   `json:"detail"`
	Ended       string   `json:"ended"`
}

// logged waits for the line about a connection, and returns it.
func (p *pod) logged(conn net.Conn) (line logLine) {
	p.t.Helper()
	p.await("a line in the log about "+conn.LocalAddr().String(), func() bool {
		for text := range strings.Lines(p.log.String()) {
			line = logLine{}
			if json.Unmarshal([]byte(text), &line) == nil && line.Peer == conn.LocalAddr().String() {
				return true
			}
		}
		return false
	})
	return line
}

// refusals are those that the client of a connection can see to: what it does, and what mantlet must say of it.
var refusals = []struct {
	what, code, reason string
	port               uint16
	speak              func(p *pod, conn net.Conn)
	sans               []string
}{
	{"no certificate", "no_client_certificate", "no client certificate", mtlsPort, speakTLS(nil), nil},
	{"a foreign CA", "unknown_ca", "unknown CA: the client's certificate does not lead to the mesh CA", mtlsPort, speakTLS(foreign), []string{"stranger"}},
	{"a foreign CA, for a port with a list", "unknown_ca", "unknown CA: the client's certificate does not lead to the mesh CA", listedPort, speakTLS(foreign), []string{"stranger"}},
	{
		"no intermediate", "incomplete_chain", "incomplete chain: the client sent its certificate without the intermediate that signed it", mtlsPort,
		speakTLS(func(p *pod, config *tls.Config) { show(config, alone(p.client)) }),
		[]string{"client"},
	},
	{
		"no intermediate, of a foreign CA", "unknown_ca", "unknown CA: the client's certificate does not lead to the mesh CA", mtlsPort,
		speakTLS(func(p *pod, config *tls.Config) { show(config, alone(stranger(p))) }),
		[]string{"stranger"},
	},
	{
		"a CA whose name is that of another mesh CA", "bad_certificate", "the client's certificate does not verify", mtlsPort,
		speakTLS(func(p *pod, config *tls.Config) { show(config, p.twin) }),
		[]string{"twin"},
	},
	{
		"a SAN of 90 KB", "san_not_allowed", "SAN not in allow: no name in the client's certificate is allowed", listedPort,
		speakTLS(of(lab.Leaf{CommonName: "long", DNSNames: []string{strings.Repeat("x", 90_000)}})),
		[]string{strings.Repeat("x", 256) + "… (90000 bytes)"},
	},
	{
		"a SAN of 90 KB of control characters", "san_not_allowed", "SAN not in allow: no name in the client's certificate is allowed", listedPort,
		speakTLS(of(lab.Leaf{CommonName: "long", DNSNames: []string{strings.Repeat("\x01", 90_000)}})),
		[]string{strings.Repeat("\x01", 256) + "… (90000 bytes)"},
	},
	{
		"15,000 SANs", "san_not_allowed", "SAN not in allow: no name in the client's certificate is allowed", listedPort,
		speakTLS(of(lab.Leaf{CommonName: "many", DNSNames: slices.Repeat([]string{"name"}, 15_000)})),
		append(slices.Repeat([]string{"name"}, 10), "… and 14990 more"),
	},
	{
		"a SAN that is made to look like more", "san_not_allowed", "SAN not in allow: no name in the client's certificate is allowed", listedPort,
		speakTLS(of(lab.Leaf{CommonName: "forged", DNSNames: []string{"a\x1b[2J\n\x00\"b,frontend]:TLS_error_end"}})),
		[]string{"a\x1b[2J\n\x00\"b,frontend]:TLS_error_end"},
	},
	{
		"another SAN", "san_not_allowed", "SAN not in allow: no name in the client's certificate is allowed", listedPort,
		speakTLS(of(lab.Leaf{DNSNames: []string{"cart", "cart.shop.svc"}, URIs: []string{"spiffe://mesh/cart"}})),
		[]string{"cart", "cart.shop.svc", "spiffe://mesh/cart"},
	},
	{"no SAN", "san_not_allowed", "SAN not in allow: no name in the client's certificate is allowed", listedPort, speakTLS(of(lab.Leaf{CommonName: "frontend"})), nil},
	{
		"an expired certificate", "expired", "expired: the client's certificate, or the CA's, is not valid any more", mtlsPort,
		speakTLS(of(lab.Leaf{DNSNames: []string{"late"}, NotBefore: time.Now().AddDate(0, 0, -2), NotAfter: time.Now().Add(-time.Hour)})),
		[]string{"late"},
	},
	{
		"an expired certificate, for a port with a list", "expired", "expired: the client's certificate, or the CA's, is not valid any more", listedPort,
		speakTLS(of(lab.Leaf{DNSNames: []string{"late"}, NotBefore: time.Now().AddDate(0, 0, -2), NotAfter: time.Now().Add(-time.Hour)})),
		[]string{"late"},
	},
	{
		"a certificate of tomorrow", "not_yet_valid", "not yet valid: the client's certificate is from the future, or a clock is wrong", mtlsPort,
		speakTLS(of(lab.Leaf{DNSNames: []string{"early"}, NotBefore: time.Now().AddDate(0, 0, 1), NotAfter: time.Now().AddDate(0, 0, 2)})),
		[]string{"early"},
	},
	{"a certificate of somebody else", "wrong_key", "the client does not hold the key of its certificate", mtlsPort, speakTLS(func(p *pod, config *tls.Config) {
		certificate := p.client.Certificate()
		certificate.PrivateKey = p.identity.Key
		show(config, certificate)
	}), []string{"client"}},
	{"a certificate for servers", "bad_certificate", "the client's certificate does not verify", mtlsPort, speakTLS(func(p *pod, config *tls.Config) {
		identity, err := p.mesh.Issue(lab.Leaf{DNSNames: []string{"server"}, Usages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
		p.must(err)
		show(config, identity.Certificate())
	}), []string{"server"}},
	{"plaintext", "plaintext", "no TLS: plaintext", mtlsPort, speakPlain("hello, is anybody there?"), nil},
	{"HTTP", "plaintext", "no TLS: plaintext", mtlsPort, speakPlain("GET / HTTP/1.1\r\nHost: pod\r\n\r\n"), nil},
	{"HTTP to a proxy", "plaintext", "no TLS: plaintext", mtlsPort, speakPlain("CONNECT pod:443 HTTP/1.1\r\n\r\n"), nil},
	{"plaintext to a tls port", "plaintext", "no TLS: plaintext", tlsPort, speakPlain("hello, is anybody there?"), nil},
	{"TLS 1.1", "tls_version", "the client's TLS version is too old", mtlsPort, speakTLS(func(p *pod, config *tls.Config) {
		config.MinVersion, config.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	}), nil},
	{"a cipher of old", "no_shared_algorithm", "no TLS cipher, curve or signature in common", mtlsPort, speakTLS(func(p *pod, config *tls.Config) {
		config.MaxVersion, config.CipherSuites = tls.VersionTLS12, []uint16{tls.TLS_RSA_WITH_AES_128_CBC_SHA256}
	}), nil},
	{"another curve", "no_shared_algorithm", "no TLS cipher, curve or signature in common", mtlsPort, speakTLS(func(p *pod, config *tls.Config) {
		config.CurvePreferences = []tls.CurveID{tls.CurveP521}
	}), nil},
	{"a client of another mesh", "certificate_not_accepted", "the client does not accept this workload's certificate", mtlsPort, speakTLS(func(p *pod, config *tls.Config) {
		other, err := lab.NewAuthority("other")
		p.must(err)
		config.RootCAs = other.Pool()
	}), nil},
	{
		"a client of another mesh that says so as OpenSSL does", "broken_off",
		"the client broke off the TLS handshake, likely since it does not accept this workload's certificate", mtlsPort, alertInClear, nil,
	},
	{
		"a client of another mesh that resets the connection", "broken_off",
		"the client broke off the TLS handshake, likely since it does not accept this workload's certificate", mtlsPort, resetInHandshake, nil,
	},
	{"what is no handshake", "handshake_failed", "the TLS handshake failed", mtlsPort, speakPlain("\x16\x03\x01\x00\x05\x09\x09\x09\x09\x09"), nil},
	{"silence", "handshake_timeout", "the TLS handshake was not finished in time", mtlsPort, speakPlain(""), nil},
	{
		"a port that nothing listens on", "workload_unreachable", "the client was let in, but the workload takes no connection at this port", 4444,
		speakTLS(func(p *pod, config *tls.Config) { show(config, p.client.Certificate()) }),
		[]string{"client"},
	},
}

// listedPort is a port that lets in "frontend" alone.
const listedPort = 9091

func show(config *tls.Config, certificate tls.Certificate) {
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &certificate, nil }
}

// of has a client show a certificate of the mesh.
func of(leaf lab.Leaf) func(*pod, *tls.Config) {
	return func(p *pod, config *tls.Config) {
		identity, err := p.mesh.Issue(leaf)
		p.must(err)
		show(config, identity.Certificate())
	}
}

// foreign has a client show a certificate of a CA that calls itself what the mesh CA is called.
func foreign(p *pod, config *tls.Config) { show(config, stranger(p).Certificate()) }

// stranger returns an identity of a mesh whose CAs are called what those of the pod's mesh are.
func stranger(p *pod) *lab.Identity {
	authority, err := lab.NewAuthority("mesh")
	p.must(err)
	authority, err = authority.Subordinate("intermediate")
	p.must(err)
	identity, err := authority.Issue(lab.Leaf{DNSNames: []string{"stranger"}})
	p.must(err)
	return identity
}

// alone returns a certificate without its chain.
func alone(identity *lab.Identity) tls.Certificate {
	certificate := identity.Certificate()
	certificate.Certificate = certificate.Certificate[:1]
	return certificate
}

// twins returns two CAs of one name without key identifiers, as PEM, and a leaf that the second signed.
func twins(p *pod) (cas []byte, leaf tls.Certificate) {
	sign := func(template, parent *x509.Certificate, key, signer *ecdsa.PrivateKey) *x509.Certificate {
		der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
		p.must(err)
		certificate, err := x509.ParseCertificate(der)
		p.must(err)
		return certificate
	}
	for range 2 {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		p.must(err)
		ca := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "twins"},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			// With IsCA the package would add a key identifier.
			ExtraExtensions: []pkix.Extension{{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte("\x30\x03\x01\x01\xff")}}, // basicConstraints: CA
		}
		ca = sign(ca, ca, key, key)
		cas = append(cas, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw})...)
		leaf.PrivateKey, leaf.Leaf = key, sign(&x509.Certificate{
			SerialNumber: big.NewInt(2), DNSNames: []string{"twin"}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		}, ca, key, key)
	}
	leaf.Certificate = [][]byte{leaf.Leaf.Raw}
	return cas, leaf
}

func speakTLS(change func(*pod, *tls.Config)) func(*pod, net.Conn) {
	return func(p *pod, conn net.Conn) {
		config := p.anonymous()
		if change != nil {
			change(p, config)
		}
		if err := echo(tls.Client(conn, config)); err == nil {
			p.t.Error("the client is let in")
		}
	}
}

// alertInClear speaks TLS 1.3 up to the server's certificate, which it refuses by an alert that is not encrypted.
func alertInClear(p *pod, conn net.Conn) {
	other, err := lab.NewAuthority("other")
	p.must(err)
	config := p.anonymous()
	config.RootCAs = other.Pool()
	if err := tls.Client(&alerter{Conn: conn}, config).Handshake(); err == nil {
		p.t.Error("the server is accepted")
	}
	_, _ = io.Copy(io.Discard, conn)
}

// alerter is a connection that sends TLS's first message and, for all that comes after it, the alert unknown_ca in clear.
type alerter struct {
	net.Conn
	greeted bool
}

func (c *alerter) Write(text []byte) (int, error) {
	if c.greeted {
		_, err := io.WriteString(c.Conn, "\x15\x03\x03\x00\x02\x02\x30")
		return len(text), err
	}
	c.greeted = true
	return c.Conn.Write(text)
}

// resetInHandshake resets the connection once the server's first flight is there.
func resetInHandshake(p *pod, conn net.Conn) {
	_ = tls.Client(&resetter{Conn: conn}, p.anonymous()).Handshake()
}

// resetter is a connection that sends TLS's first message and ends by a reset instead of the second.
type resetter struct {
	net.Conn
	greeted bool
}

func (c *resetter) Write(text []byte) (int, error) {
	if c.greeted {
		return 0, errors.Join(errors.New("reset"), reset(c.Conn))
	}
	c.greeted = true
	return c.Conn.Write(text)
}

// reset ends a connection by a reset.
func reset(conn net.Conn) error {
	return errors.Join(conn.(*net.TCPConn).SetLinger(0), conn.Close())
}

func speakPlain(text string) func(*pod, net.Conn) {
	return func(p *pod, conn net.Conn) {
		_, err := io.WriteString(conn, text)
		p.must(err)
		_ = conn.SetReadDeadline(time.Now().Add(limit))
		_, _ = io.Copy(io.Discard, conn)
	}
}

// TestRefusals is refused in each way that there is, at once. There is no prober: it would use up the lines that a second has.
func TestRefusals(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, "MANTLET_CONFIG_INLINE=ingress: [{port: 9091, allow: [frontend]}]")
	var err error
	p.mesh, err = p.mesh.Subordinate("intermediate")
	p.must(err)
	p.identity, p.client = p.issue("pod"), p.issue("client")
	cas, twin := twins(p)
	p.twin = twin
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.must(os.WriteFile(filepath.Join(p.sidecar.TLSDirectory, lab.CAFile), slices.Concat(cas, p.mesh.CAPEM()), 0o644))
	p.run()
	p.protect(mtlsPort)
	p.protect(tlsPort)
	p.protect(listedPort)
	p.ready()
	followed, follower := p.follow()
	p.await("it follows", func() bool { return followed.count("following") == 1 })
	counts := map[string]uint64{}
	t.Run("each", func(t *testing.T) {
		for i, c := range refusals {
			counts[c.code]++
			t.Run(c.what, func(t *testing.T) {
				t.Parallel()
				to := netip.AddrPortFrom(p.Addrs()[i%2], c.port)
				conn := p.dial(p.outside, to)
				c.speak(p, conn)
				got := p.logged(conn)
				if got.Code != c.code || got.Reason != c.reason || got.Message != "connection rejected" || got.Level != "WARN" || got.Detail == "" {
					t.Errorf("the line is %+v, want %s: %s", got, c.code, c.reason)
				}
				if got.Direction != "ingress" || got.Destination != to.String() || !slices.Equal(got.SANs, c.sans) {
					t.Errorf("the line is %+v, want ingress to %s of %q", got, to, c.sans)
				}
			})
		}
	})
	p.await("all are followed", func() bool { return followed.count(" ingress ") >= len(refusals) })
	p.must(follower.Process.Signal(syscall.SIGINT))
	p.check(follower.Wait())
	for code := range counts {
		if followed.count(" "+code+": ") == 0 {
			t.Errorf("who follows is not told of %s", code)
		}
	}
	s := p.status()
	newest := s.Refusals[len(s.Refusals)-1]
	if _, text, _ := p.mantlet("status"); !strings.Contains(text, " ("+newest.Code+")\n") ||
		strings.ContainsFunc(text, func(r rune) bool { return unicode.IsControl(r) && r != '\n' }) {
		t.Errorf("mantlet status does not show that %+v, or has control characters:\n%q", newest, text)
	}
	for _, r := range s.Refused {
		if r.By == "envoy" && r.Count != counts[r.Reason] {
			t.Errorf("%s was counted %d times, want %d", r.Reason, r.Count, counts[r.Reason])
		}
		delete(counts, r.Reason)
	}
	if len(counts) > 0 {
		t.Errorf("not counted: %v", counts)
	}
	for _, c := range refusals {
		if !slices.ContainsFunc(s.Refusals, func(r status.Refusal) bool {
			return r.Code == c.code && r.Reason == c.reason && r.Direction == "ingress" && slices.Contains([]string{p.outside.IPv4.String(), p.outside.IPv6.String()}, r.Peer)
		}) {
			t.Errorf("%s: not among the last refusals: %+v", c.code, s.Refusals)
		}
	}
}

// TestResets: a connection that succeeded is not refused, however it ends; nor is one that only looked whether the port is open.
func TestResets(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, `MANTLET_CONFIG_INLINE=egress: [{listen: "127.137.0.1:80", upstream: "`+secondHost+`:8000"}]`)
	peers := p.host("peers")
	if peers.IPv4.String() != secondHost {
		t.Fatalf("the endpoint is %s", peers.IPv4)
	}
	listener, err := peers.Listen("tcp", ":8000")
	p.must(err)
	defer listener.Close()
	go resetWhenTold(listener, p.issue("peers").ServerConfig())
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.protect(mtlsPort)
	p.protect(tlsPort)
	p.ready()
	for _, port := range []uint16{mtlsPort, tlsPort} {
		for i, addr := range p.Addrs() {
			for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
				for what, use := range map[string]func(net.Conn) error{
					"after the answer":        echo,
					"after the request":       func(conn net.Conn) error { _, err := io.WriteString(conn, "hello"); return err },
					"after the TLS handshake": func(net.Conn) error { return nil },
				} {
					config := p.client.ClientConfig("pod")
					config.MinVersion, config.MaxVersion = version, version
					raw := p.dial(p.outside, netip.AddrPortFrom(addr, port))
					conn := tls.Client(raw, config)
					if err := errors.Join(conn.Handshake(), use(conn), reset(raw)); err != nil {
						t.Errorf("port %d, version %x, %s: %v", port, version, what, err)
					}
				}
			}
			p.must(reset(p.dial(p.outside, netip.AddrPortFrom(addr, port))))
			begun := p.dial(p.outside, netip.AddrPortFrom(p.Addrs()[i], port))
			_, err := io.WriteString(begun, "\x16\x03\x01")
			p.must(errors.Join(err, reset(begun)))
		}
	}
	for range 2 {
		conn := p.dial(p.Host, listen("127.137.0.1:80"))
		p.must(echo(conn))
		_, err := io.WriteString(conn, "!")
		p.must(err)
		p.must(cut(conn)) // by the endpoint
		conn = p.dial(p.Host, listen("127.137.0.1:80"))
		p.must(echo(conn))
		p.must(reset(conn))
	}
	p.await("all of them are over", func() bool {
		epochs := p.status().Epochs
		return epochs[0].Connections != nil && *epochs[0].Connections == 0
	})
	speakPlain("hello, is anybody there?")(p, p.dial(p.outside, netip.AddrPortFrom(p.IPv4, mtlsPort)))
	var refused []status.Refused
	p.await("a stranger is refused", func() bool {
		refused = slices.DeleteFunc(p.status().Refused, func(r status.Refused) bool { return r.By != "envoy" })
		return len(refused) > 0
	})
	if len(refused) > 1 || refused[0].Reason != "plaintext" || refused[0].Count != 1 {
		t.Errorf("refused are %+v, want the stranger alone", refused)
	}
	if n := p.log.count(`"msg":"connection`); n != 1 {
		t.Errorf("%d connections are logged, want the stranger's alone", n)
	}
}

// secondHost is the address of the host that a network gets after pod and outside.
const secondHost = "198.51.100.3"

// resetWhenTold echoes five bytes on each connection, and resets it at the sixth.
func resetWhenTold(listener net.Listener, config *tls.Config) {
	for {
		raw, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			conn := tls.Server(raw, config)
			_, _ = io.CopyN(conn, conn, 5)
			_, _ = conn.Read(make([]byte, 1))
			_ = reset(raw)
		}()
	}
}

// TestFloodOfRefusals: strangers fill neither the log nor the status.
func TestFloodOfRefusals(t *testing.T) {
	t.Parallel()
	began := time.Now()
	p := start(t, web)
	conn := p.dial(p.outside, netip.AddrPortFrom(p.IPv4, mtlsPort))
	speakTLS(nil)(p, conn)
	const flood = 300
	var s status.Status
	p.await("a flood of plaintext is refused", func() bool {
		s = p.status()
		return slices.ContainsFunc(s.Refused, func(r status.Refused) bool { return r.Reason == "plaintext" && r.Count > flood })
	})
	lines, most := p.log.count(`"msg":"connection rejected"`), 50+5*(1+int(time.Since(began).Seconds()))
	if lines == 0 || lines > most {
		t.Errorf("%d refusals are logged, want %d at the most", lines, most)
	}
	p.await("a line that says how many were left out", func() bool {
		return p.log.count(`"left_out_before":`) > p.log.count(`"left_out_before":0`)
	})
	if !slices.ContainsFunc(s.Refusals, func(r status.Refusal) bool { return r.Code == "no_client_certificate" }) || len(s.Refusals) > 20 {
		t.Errorf("the flood hides the one refusal that somebody looks for: %+v", s.Refusals)
	}
}

// TestEachRefusalIsTried shows that no row of the table of refusals goes untried.
func TestEachRefusalIsTried(t *testing.T) {
	document, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(document), "| code | in words | what to do |\n|---|---|---|\n")
	table, _, _ = strings.Cut(table, "\n\n")
	for row := range strings.Lines(table) {
		code := strings.Split(row, "`")[1]
		tried := slices.ContainsFunc(egressRefusals, func(r egressRefusal) bool { return r.code == code })
		for _, r := range refusals {
			tried = tried || r.code == code
		}
		if !tried {
			t.Errorf("%s: nobody is refused for it here", code)
		}
	}
}

// egressRefusal is what mantlet must say of an endpoint.
type egressRefusal struct {
	code, reason, upstream string
	sans                   []string
}

var egressRefusals = []egressRefusal{
	{"unknown_ca", "unknown CA: the endpoint's certificate does not lead to the mesh CA", "peers:8001", nil},
	{"expired", "expired: the endpoint's certificate, or the CA's, is not valid any more", "peers:8002", nil},
	{"san_not_allowed", "SAN not in serverNames: no name in the endpoint's certificate is allowed", "peers:8003", []string{"peers", "peers.shop.svc"}},
	{"plaintext", "no TLS: plaintext", "peers:8004", nil},
	{"tls_version", "the endpoint's TLS version is too old", "peers:8005", nil},
	{"certificate_not_accepted", "the endpoint does not accept this workload's certificate", "peers:8006", nil},
	{"endpoint_unreachable", "the endpoint takes no connection, or does not finish the TLS handshake in time", "peers:8007", nil},
	{"no_endpoint", "the upstream's name has no address: nobody:8008 (NXDOMAIN by 127.0.0.1)", "nobody:8008", nil},
	{"endpoint_is_self", "the endpoint is this pod itself, whose own connections do not pass mantlet", "myself:8009", nil},
	{"endpoint_is_self", "the endpoint is this pod itself, whose own connections do not pass mantlet", "myself:8010", nil},
}

// TestEgressRefusals dials endpoints that are not who they should be, or not there.
func TestEgressRefusals(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	peers := p.host("peers")
	p.zone(map[string][]netip.Addr{"peers": peers.Addrs(), "myself": p.Addrs()})
	p.serve(p.Host, lab.Service{Address: ":8009", Banner: "220 ready\r\n"})
	stranger, err := lab.NewAuthority("mesh")
	p.must(err)
	foreign, err := stranger.Issue(lab.Leaf{DNSNames: []string{"peers"}})
	p.must(err)
	late, err := p.mesh.Issue(lab.Leaf{DNSNames: []string{"peers"}, NotBefore: time.Now().AddDate(0, 0, -2), NotAfter: time.Now().Add(-time.Hour)})
	p.must(err)
	good := p.issue("peers", "peers.shop.svc")
	picky := good.ServerConfig()
	picky.ClientCAs = stranger.Pool()
	for port, service := range map[int]lab.Service{
		8001: {TLS: foreign.ServerConfig()},
		8002: {TLS: late.ServerConfig()},
		8003: {TLS: good.ServerConfig()},
		8004: {Banner: "220 ready\r\n"},
		8005: {TLS: only(tls.VersionTLS11, good.ServerConfig())},
		8006: {TLS: only(tls.VersionTLS12, picky)},
	} {
		service.Address = fmt.Sprintf(":%d", port)
		p.serve(peers, service)
	}
	inline := "MANTLET_CONFIG_INLINE=egress:\n"
	for i, c := range egressRefusals {
		names := ""
		if c.code == "san_not_allowed" {
			names = ", serverNames: [billing]"
		}
		inline += fmt.Sprintf("  - {listen: \"127.137.0.%d:80\", upstream: %q%s}\n", 1+i, c.upstream, names)
	}
	p.sidecar.Env = append(p.sidecar.Env, inline)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.ready()
	p.resolved()
	closed := p.dial(p.outside, netip.AddrPortFrom(p.IPv4, mtlsPort))
	p.must(closed.Close())
	for i, c := range egressRefusals {
		to := listen(fmt.Sprintf("127.137.0.%d:80", 1+i))
		conn := p.dial(p.Host, to)
		if err := echo(conn); err == nil {
			t.Errorf("%s: the endpoint is accepted", c.code)
		}
		got := p.logged(conn)
		if got.Code != c.code || got.Reason != c.reason || got.Direction != "egress" || got.Destination != to.String() || !slices.Equal(got.SANs, c.sans) {
			t.Errorf("the line is %+v, want %s of %q: %s", got, c.code, c.sans, c.reason)
		}
	}
	var failed, refused uint64
	said := p.told()
	for _, e := range said.Traffic.Egress {
		failed += e.Failed
	}
	for _, r := range said.Refused {
		if r.Direction == "egress" {
			refused += r.Count
		}
	}
	if failed != uint64(len(egressRefusals)) || refused != failed {
		t.Errorf("of %d connections that were refused, %d are told to have failed and %d to be refused", len(egressRefusals), failed, refused)
	}
	if _, text, _ := p.mantlet("check"); strings.Count(text, "is this pod itself") != 1 {
		t.Errorf("check says of the pod itself:\n%s", text)
	}
	if p.log.count(closed.LocalAddr().String()) > 0 {
		t.Error("a client that closes its connection is refused")
	}
}

// TestConnectionLog has a line for every connection.
func TestConnectionLog(t *testing.T) {
	t.Parallel()
	p := newPod(t, "MANTLET_ACCESS_LOG=all")
	peers := p.host("peers")
	p.zone(map[string][]netip.Addr{"peers": {netip.MustParseAddr("2001:db8::dead"), peers.IPv4}})
	p.serve(peers, lab.Service{Address: ":8000", TLS: p.issue("peers", "peers.shop.svc").ServerConfig()})
	p.sidecar.Env = append(p.sidecar.Env, `MANTLET_CONFIG_INLINE=egress: [{listen: "127.137.0.1:80", upstream: "peers:8000"}]`)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.protect(mtlsPort)
	p.ready()
	for _, addr := range p.Addrs() {
		to := netip.AddrPortFrom(addr, mtlsPort)
		conn := p.dial(p.outside, to)
		p.must(echo(tls.Client(conn, p.client.ClientConfig("pod"))))
		p.must(conn.Close())
		want := logLine{
			Level: "INFO", Message: "connection", Direction: "ingress", Peer: conn.LocalAddr().String(), Destination: to.String(),
			SANs: []string{"client"}, TLSVersion: "1.3", Curve: "X25519MLKEM768", BytesIn: 5, BytesOut: 5,
		}
		p.logs(t, conn, want)
	}
	closed := p.dial(p.outside, netip.AddrPortFrom(p.IPv4, mtlsPort))
	p.must(closed.Close())
	p.logs(t, closed, logLine{
		Level: "INFO", Message: "connection", Direction: "ingress", Peer: closed.LocalAddr().String(), Destination: closed.RemoteAddr().String(),
		Ended: "by the client, before it was let in",
	})
	// An attempt at an address that is dead, before the one that is not, makes no refusal.
	for range 4 {
		conn := p.dial(p.Host, listen("127.137.0.1:80"))
		p.must(echo(conn))
		p.must(conn.Close())
		p.logs(t, conn, logLine{
			Level: "INFO", Message: "connection", Direction: "egress", Peer: conn.LocalAddr().String(), Destination: "127.137.0.1:80",
			Upstream: netip.AddrPortFrom(peers.IPv4, 8000).String(), SANs: []string{"peers", "peers.shop.svc"},
			TLSVersion: "1.3", Curve: "X25519MLKEM768", BytesIn: 5, BytesOut: 5,
		})
	}
}

// logs checks the line about a connection; only the time that it took is as it may be.
func (p *pod) logs(t *testing.T, conn net.Conn, want logLine) {
	t.Helper()
	got := p.logged(conn)
	if want.Duration = got.Duration; fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
		t.Errorf("the line is %+v, want %+v", got, want)
	}
}
