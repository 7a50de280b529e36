package lab_test

import (
	"bytes"
	"crypto/elliptic"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"mantlet/internal/lab"
)

func newAuthority(t *testing.T, name string) *lab.Authority {
	t.Helper()
	authority, err := lab.NewAuthority(name)
	if err != nil {
		t.Fatal(err)
	}
	return authority
}

func issue(t *testing.T, authority *lab.Authority, leaf lab.Leaf) *lab.Identity {
	t.Helper()
	identity, err := authority.Issue(leaf)
	if err != nil {
		t.Fatal(err)
	}
	return identity
}

// certificates parses a PEM file.
func certificates(t *testing.T, dir, name string) (all []*x509.Certificate) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, certificate)
	}
	return all
}

func TestFilesHaveShapeOfProduction(t *testing.T) {
	dir := t.TempDir()
	mesh := newAuthority(t, "mesh")
	identity := issue(t, mesh, lab.Leaf{
		DNSNames: []string{"web", "*"}, IPs: []netip.Addr{netip.MustParseAddr("2001:db8::1")}, URIs: []string{"spiffe://mesh/ns/shop/sa/cart"},
	})
	if err := identity.Write(dir); err != nil {
		t.Fatal(err)
	}
	chain, cas := certificates(t, dir, lab.ChainFile), certificates(t, dir, lab.CAFile)
	if len(chain) != 2 || len(cas) != 1 {
		t.Fatalf("%d certificates in the chain and %d in the CA file, want 2 and 1", len(chain), len(cas))
	}
	leaf, intermediate, ca := chain[0], chain[1], cas[0]
	if !bytes.Equal(ca.RawSubject, intermediate.RawSubject) || !bytes.Equal(ca.RawSubjectPublicKeyInfo, intermediate.RawSubjectPublicKeyInfo) {
		t.Error("mesh CA and intermediate differ in subject or key")
	}
	if ca.CheckSignatureFrom(ca) != nil || intermediate.CheckSignatureFrom(ca) == nil {
		t.Error("the mesh CA is not self-signed, or the intermediate is")
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: mesh.Pool(), DNSName: "web"}); err != nil {
		t.Error(err)
	}
	for _, stranger := range []*lab.Authority{newAuthority(t, "mesh"), newAuthority(t, "other")} {
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: stranger.Pool()}); err == nil {
			t.Error("another authority of the same name vouches for the leaf")
		}
	}
	for _, certificate := range []*x509.Certificate{leaf, intermediate, ca} {
		if key, ok := certificate.PublicKey.(interface{ Params() *elliptic.CurveParams }); !ok || key.Params().Name != "P-384" {
			t.Errorf("%s has no P-384 key", certificate.Subject)
		}
	}
	if diff := cmp.Diff([]string{"web", "*"}, leaf.DNSNames); diff != "" {
		t.Error(diff)
	}
	if len(leaf.URIs) != 1 || len(leaf.IPAddresses) != 1 || len(leaf.ExtKeyUsage) != 2 {
		t.Errorf("leaf has SANs %v, %v and usages %v", leaf.URIs, leaf.IPAddresses, leaf.ExtKeyUsage)
	}
	if _, err := tls.LoadX509KeyPair(filepath.Join(dir, lab.ChainFile), filepath.Join(dir, lab.KeyFile)); err != nil {
		t.Error(err)
	}
}

func TestWriteReplacesAndWriteInPlaceRewrites(t *testing.T) {
	dir := t.TempDir()
	identity := issue(t, newAuthority(t, "mesh"), lab.Leaf{DNSNames: []string{"web"}})
	stat := func() os.FileInfo {
		info, err := os.Stat(filepath.Join(dir, lab.KeyFile))
		if err != nil {
			t.Fatal(err)
		}
		return info
	}
	if err := identity.WriteInPlace(dir); err != nil {
		t.Fatal(err)
	}
	first := stat()
	if err := identity.WriteInPlace(dir); err != nil || !os.SameFile(first, stat()) {
		t.Errorf("writing in place made another file (%v)", err)
	}
	if err := identity.Write(dir); err != nil || os.SameFile(first, stat()) {
		t.Errorf("writing by rename kept the file (%v)", err)
	}
	if mode := stat().Mode(); mode != 0o600 {
		t.Errorf("key has mode %v", mode)
	}
}

// pair returns the ends of a connection that has buffers: without them, as net.Pipe, both ends could wait in a write for each other.
func pair(t *testing.T) (here, there net.Conn) {
	t.Helper()
	listener, err := net.Listen("unix", filepath.Join(t.TempDir(), "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	if here, err = net.Dial("unix", listener.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if there, err = listener.Accept(); err != nil {
		t.Fatal(err)
	}
	return here, there
}

// handshake returns what client and server of a TLS connection say.
func handshake(t *testing.T, client, server *tls.Config) (clientErr, serverErr error) {
	t.Helper()
	here, there := pair(t)
	done := make(chan error, 1)
	go func() {
		conn := tls.Server(there, server)
		err := conn.Handshake()
		if err == nil {
			_, err = conn.Write([]byte("."))
		}
		_ = there.Close()
		done <- err
	}()
	conn := tls.Client(here, client)
	clientErr = conn.Handshake()
	if clientErr == nil {
		_, clientErr = conn.Read(make([]byte, 1)) // with TLS 1.3 the server's refusal comes after the handshake
	}
	_ = here.Close()
	return clientErr, <-done
}

func TestHandshake(t *testing.T) {
	mesh, foreign := newAuthority(t, "mesh"), newAuthority(t, "mesh")
	server := issue(t, mesh, lab.Leaf{DNSNames: []string{"web"}})
	member := issue(t, mesh, lab.Leaf{DNSNames: []string{"*"}})
	expired := issue(t, mesh, lab.Leaf{DNSNames: []string{"*"}, NotAfter: time.Now().Add(-time.Minute)})
	subordinate, err := mesh.Subordinate("intermediate")
	if err != nil {
		t.Fatal(err)
	}
	below := issue(t, subordinate, lab.Leaf{DNSNames: []string{"*"}})
	alone := below.ClientConfig("web")
	alone.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		return &tls.Certificate{Certificate: [][]byte{below.Leaf.Raw}, PrivateKey: below.Key}, nil
	}
	stranger := issue(t, foreign, lab.Leaf{DNSNames: []string{"*"}})
	strangerThatTrusts := stranger.ClientConfig("web")
	strangerThatTrusts.RootCAs = mesh.Pool()
	anonymous := member.ClientConfig("web")
	anonymous.GetClientCertificate = nil

	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, c := range []struct {
			name               string
			client             *tls.Config
			clientOK, serverOK bool
		}{
			{"member", member.ClientConfig("web"), true, true},
			{"member without a name", member.ClientConfig(""), true, true},
			{"member with another name", member.ClientConfig("shop"), false, false},
			{"member below an intermediate", below.ClientConfig("web"), true, true},
			{"member without its intermediate", alone, false, false},
			{"expired member", expired.ClientConfig("web"), false, false},
			{"stranger", stranger.ClientConfig("web"), false, false},
			{"stranger without a name", stranger.ClientConfig(""), false, false},
			{"stranger that trusts the mesh", strangerThatTrusts, false, false},
			{"no certificate", anonymous, false, false},
		} {
			t.Run(tls.VersionName(version)+"/"+c.name, func(t *testing.T) {
				c.client.MaxVersion = version
				clientErr, serverErr := handshake(t, c.client, server.ServerConfig())
				if (clientErr == nil) != c.clientOK || (serverErr == nil) != c.serverOK {
					t.Errorf("client: %v; server: %v", clientErr, serverErr)
				}
			})
		}
	}
}
