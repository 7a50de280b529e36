package envoy

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"mantlet/internal/lab"
	"mantlet/render"
)

// must returns v, or fails the test.
func must[T any](t *testing.T) func(v T, err error) T {
	t.Helper()
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func write(t *testing.T, directory, name string, text []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(directory, name), text, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestLoadCertificates(t *testing.T) {
	mesh, foreign := must[*lab.Authority](t)(lab.NewAuthority("mesh")), must[*lab.Authority](t)(lab.NewAuthority("mesh"))
	now := time.Now()
	issue := func(by *lab.Authority, leaf lab.Leaf) *lab.Identity { return must[*lab.Identity](t)(by.Issue(leaf)) }
	good := issue(mesh, lab.Leaf{DNSNames: []string{"pod"}})
	other := issue(mesh, lab.Leaf{DNSNames: []string{"pod"}})
	expired := issue(mesh, lab.Leaf{NotBefore: now.Add(-2 * time.Hour), NotAfter: now.Add(-time.Hour)})
	early := issue(mesh, lab.Leaf{NotBefore: now.Add(time.Hour), NotAfter: now.Add(2 * time.Hour)})
	signer := issue(mesh, lab.Leaf{Usages: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}})
	anyUsage := issue(mesh, lab.Leaf{Usages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	clients := issue(mesh, lab.Leaf{Usages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, NotAfter: good.Leaf.NotAfter})
	chain, ca := good.ChainPEM(), mesh.CAPEM()
	leaf, rest := pem.Decode(chain)
	key := must[[]byte](t)(x509.MarshalPKCS8PrivateKey(good.Key))
	sec1 := must[[]byte](t)(x509.MarshalECPrivateKey(good.Key))
	for name, c := range map[string]struct {
		change map[string][]byte // what differs from good's files; nil: it is missing
		says   []string          // none: it is good
	}{
		"good":                   {},
		"the leaf alone":         {map[string][]byte{chainFile: pem.EncodeToMemory(leaf)}, nil},
		"text around the blocks": {map[string][]byte{chainFile: slices.Concat([]byte("the leaf\n"), chain, []byte("\n\nthe end\n"))}, nil},
		"an SEC 1 key": {map[string][]byte{keyFile: slices.Concat(
			pem.EncodeToMemory(&pem.Block{Type: "EC PARAMETERS", Bytes: []byte{6, 5, 0x2b, 0x81, 4, 0, 0x22}}),
			pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: sec1}))}, nil},
		"several CAs": {map[string][]byte{meshCAFile: slices.Concat(foreign.CAPEM(), ca)}, nil},

		"a client's usage": {files(t, clients), nil},
		"no usage":         {files(t, signer), []string{chainFile, "its extended key usage is codeSigning", "should have serverAuth and clientAuth"}},
		"any usage":        {files(t, anyUsage), []string{chainFile, "its extended key usage is anyExtendedKeyUsage"}},

		"nothing":      {map[string][]byte{chainFile: nil, keyFile: nil, meshCAFile: nil}, []string{chainFile, keyFile, meshCAFile, "no such file"}},
		"no chain":     {map[string][]byte{chainFile: nil}, []string{chainFile, "no such file"}},
		"no key":       {map[string][]byte{keyFile: nil}, []string{keyFile, "no such file"}},
		"no CA":        {map[string][]byte{meshCAFile: nil}, []string{meshCAFile, "no such file"}},
		"empty chain":  {map[string][]byte{chainFile: {}}, []string{chainFile, "holds no certificate"}},
		"empty key":    {map[string][]byte{keyFile: {}}, []string{keyFile, "failed to find any PEM data in key"}},
		"empty CA":     {map[string][]byte{meshCAFile: {}}, []string{meshCAFile, "holds no certificate"}},
		"garbage":      {map[string][]byte{chainFile: []byte("garbage")}, []string{chainFile, "holds no certificate"}},
		"a key for CA": {map[string][]byte{meshCAFile: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})}, []string{meshCAFile, `"PRIVATE KEY"`}},
		"no DER": {
			map[string][]byte{meshCAFile: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")})},
			[]string{meshCAFile, "certificate 1"},
		},
		"half a leaf":         {map[string][]byte{chainFile: chain[:100]}, []string{chainFile, "within a PEM block"}},
		"half a chain":        {map[string][]byte{chainFile: chain[:len(chain)-100]}, []string{chainFile, "within a PEM block"}},
		"half a CA":           {map[string][]byte{meshCAFile: slices.Concat(foreign.CAPEM(), ca[:100])}, []string{meshCAFile, "within a PEM block"}},
		"half a key":          {map[string][]byte{keyFile: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})[:100]}, []string{keyFile}},
		"another's key":       {map[string][]byte{chainFile: other.ChainPEM()}, []string{keyFile, "does not match"}},
		"intermediate first":  {map[string][]byte{chainFile: slices.Concat(rest, pem.EncodeToMemory(leaf))}, []string{chainFile, "that of certificate 2; the leaf must come first"}},
		"a foreign CA":        {map[string][]byte{meshCAFile: foreign.CAPEM()}, []string{chainFile, "does not verify up to " + meshCAFile}},
		"expired":             {files(t, expired), []string{chainFile, "expired at"}},
		"not valid yet":       {files(t, early), []string{chainFile, "is the clock right?"}},
		"expired, foreign CA": {map[string][]byte{meshCAFile: foreign.CAPEM(), chainFile: expired.ChainPEM(), keyFile: files(t, expired)[keyFile]}, []string{chainFile}},
	} {
		t.Run(name, func(t *testing.T) {
			directory := t.TempDir()
			for name, text := range files(t, good) {
				if change, ok := c.change[name]; ok {
					text = change
				}
				if text != nil {
					write(t, directory, name, text)
				}
			}
			read, err := LoadCertificates(directory, now)
			if len(c.says) == 0 {
				if err != nil || !read.expires.Equal(good.Leaf.NotAfter) {
					t.Errorf("%+v, %v", read, err)
				}
				return
			}
			if err == nil {
				t.Fatal("it is accepted")
			}
			for _, text := range c.says {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("%v; want %q", err, text)
				}
			}
		})
	}
}

// TestOddFiles: what is no file, or has no end, is told and does not hold mantlet up.
func TestOddFiles(t *testing.T) {
	identity := must[*lab.Identity](t)(lab.NewIdentity("pod"))
	for says, replace := range map[string]func(path string) error{
		"it must be a file, and is a pipe": func(path string) error { return syscall.Mkfifo(path, 0o600) },
		"it must be a file, and is a dir":  func(path string) error { return os.Mkdir(path, 0o700) },
		"is larger than 1048576 bytes":     func(path string) error { return os.WriteFile(path, make([]byte, maxTLSFile+1), 0o600) },
	} {
		directory := t.TempDir()
		path := filepath.Join(directory, meshCAFile)
		if err := errors.Join(identity.Write(directory), os.Remove(path), replace(path)); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadCertificates(directory, time.Now()); err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), says) {
			t.Errorf("%v, want %s", err, says)
		}
	}
}

// TestRenewedCA: a mesh CA is not taken away where it has another certificate for the same key and name.
func TestRenewedCA(t *testing.T) {
	mesh, another := must[*lab.Authority](t)(lab.NewAuthority("mesh")), must[*lab.Authority](t)(lab.NewAuthority("mesh"))
	renewed := must[*lab.Authority](t)(mesh.Renew())
	has := func(a *lab.Authority) *Certificates {
		return &Certificates{anchors: must[[]*x509.Certificate](t)(parse(a.CAPEM()))}
	}
	if !has(renewed).trustsAllOf(has(mesh)) || has(another).trustsAllOf(has(mesh)) {
		t.Error("a renewed certificate passes for another CA, or another CA for a renewed one")
	}
}

// files returns the three files of an identity.
func files(t *testing.T, i *lab.Identity) map[string][]byte {
	t.Helper()
	directory := t.TempDir()
	if err := i.Write(directory); err != nil {
		t.Fatal(err)
	}
	all := map[string][]byte{}
	for _, name := range []string{chainFile, keyFile, meshCAFile} {
		all[name] = must[[]byte](t)(os.ReadFile(filepath.Join(directory, name)))
	}
	return all
}

// TestKeys tries on the real Envoy that mutual TLS works with the keys that LoadCertificates lets pass, and does not work
// with those that it refuses.
func TestKeys(t *testing.T) {
	r, log := runner(t)
	identity(t, r)
	started(t, r)
	directory := t.TempDir()
	secrets := &Secrets{TLSDirectory: directory, RuntimeDirectory: r.RuntimeDirectory, Runner: r, Log: r.Log}
	ec := func(curve elliptic.Curve) crypto.Signer {
		return must[crypto.Signer](t)(ecdsa.GenerateKey(curve, rand.Reader))
	}
	t.Setenv("GODEBUG", "rsa1024min=0")
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		key    crypto.Signer
		usable bool
	}{
		"P-224":    {ec(elliptic.P224()), false},
		"P-256":    {ec(elliptic.P256()), true},
		"P-384":    {ec(elliptic.P384()), true},
		"P-521":    {ec(elliptic.P521()), false},
		"RSA 1024": {must[crypto.Signer](t)(rsa.GenerateKey(rand.Reader, 1024)), false},
		"RSA 2048": {must[crypto.Signer](t)(rsa.GenerateKey(rand.Reader, 2048)), true},
		"Ed25519":  {ed, false},
	} {
		t.Run(name, func(t *testing.T) {
			ca, certificate := selfSigned(t, c.key)
			key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: must[[]byte](t)(x509.MarshalPKCS8PrivateKey(c.key))})
			write(t, directory, chainFile, ca)
			write(t, directory, meshCAFile, ca)
			write(t, directory, keyFile, key)
			_, err := secrets.Update(t.Context())
			if accepted := err == nil; accepted != c.usable {
				t.Errorf("accepted: %t, %v", accepted, err)
			}
			rejected := strings.Count(log.String(), "rejected")
			if err := Publish(&Certificates{chain: ca, meshCA: ca, key: key}, r.RuntimeDirectory, time.Now()); err != nil {
				t.Fatal(err)
			}
			works := false
			until(t, "Envoy has read it", func() bool {
				conn, err := dial(15007, nil)
				if err != nil {
					return false
				}
				defer conn.Close()
				works = conn.ConnectionState().PeerCertificates[0].Equal(certificate)
				return works || strings.Count(log.String(), "rejected") > rejected
			})
			if works {
				err = mutual(&tls.Certificate{Certificate: [][]byte{certificate.Raw}, PrivateKey: c.key})
				works = err == nil
			}
			if works != c.usable {
				t.Errorf("works: %t, %v", works, err)
			}
		})
	}
}

// TestUsages tries on the real Envoy that it accepts from its clients the usages that a leaf must have for it.
// What is good for one end alone is published, with one warning.
func TestUsages(t *testing.T) {
	r, _ := runner(t)
	mesh := identity(t, r).Authority
	started(t, r)
	usage := func(all ...x509.ExtKeyUsage) []x509.ExtKeyUsage { return append([]x509.ExtKeyUsage{}, all...) }
	for name, c := range map[string]struct {
		usages         []x509.ExtKeyUsage
		client, server bool
	}{
		"no extension": {usage(), true, true},
		"both":         {usage(x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth), true, true},
		"more":         {usage(x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageAny, x509.ExtKeyUsageServerAuth), true, true},
		"client":       {usage(x509.ExtKeyUsageClientAuth), true, false},
		"server":       {usage(x509.ExtKeyUsageServerAuth), false, true},
		"other":        {usage(x509.ExtKeyUsageCodeSigning), false, false},
		"any":          {usage(x509.ExtKeyUsageAny), false, false},
	} {
		t.Run(name, func(t *testing.T) {
			leaf := must[*lab.Identity](t)(mesh.Issue(lab.Leaf{DNSNames: []string{"pod"}, Usages: c.usages}))
			if client, server := ends(leaf.Leaf); client != c.client || server != c.server {
				t.Errorf("client %t, server %t; want %t, %t", client, server, c.client, c.server)
			}
			certificate := leaf.Certificate()
			if err := mutual(&certificate); (err == nil) != c.client {
				t.Errorf("as a client's: %v, want it accepted: %t", err, c.client)
			}
			log, directory := &journal{}, t.TempDir()
			if err := leaf.Write(directory); err != nil {
				t.Fatal(err)
			}
			s := &Secrets{TLSDirectory: directory, RuntimeDirectory: t.TempDir(), Runner: &Runner{}, Log: log.logger()}
			for range 2 {
				if _, err := s.Update(t.Context()); (err == nil) != (c.client || c.server) {
					t.Errorf("published: %v", err)
				}
			}
			if got := strings.Count(log.String(), "at one end only"); (got == 1) != (c.client != c.server) || got > 1 {
				t.Errorf("%d warnings: %s", got, log)
			}
		})
	}
}

// dial connects to one of Envoy's ports. As of TLS 1.3 it is not known yet whether Envoy lets the certificate in.
func dial(port int, certificate *tls.Certificate) (*tls.Conn, error) {
	return tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port), &tls.Config{
		InsecureSkipVerify:   true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return certificate, nil },
	})
}

// mutual returns nil if Envoy lets the certificate in. What is let in is connected to where it came to, and meets there
// who wants one more handshake.
func mutual(certificate *tls.Certificate) error {
	outer, err := dial(15006, certificate)
	if err != nil {
		return err
	}
	defer outer.Close()
	return tls.Client(outer, &tls.Config{InsecureSkipVerify: true}).Handshake()
}

func selfSigned(t *testing.T, key crypto.Signer) (text []byte, certificate *x509.Certificate) {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "pod"}, DNSNames: []string{"pod"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
	der := must[[]byte](t)(x509.CreateCertificate(rand.Reader, template, template, key.Public(), key))
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), must[*x509.Certificate](t)(x509.ParseCertificate(der))
}

func TestSecrets(t *testing.T) {
	mesh := must[*lab.Authority](t)(lab.NewAuthority("mesh"))
	first, second := must[*lab.Identity](t)(mesh.Issue(lab.Leaf{})), must[*lab.Identity](t)(mesh.Issue(lab.Leaf{}))
	s := &Secrets{TLSDirectory: t.TempDir(), RuntimeDirectory: t.TempDir(), Runner: &Runner{}, Log: slog.New(slog.DiscardHandler)}
	path := filepath.Join(s.RuntimeDirectory, render.SecretFile(render.IdentitySecret))
	read := func() string { return string(must[[]byte](t)(os.ReadFile(path))) }

	if _, err := s.Update(t.Context()); err == nil || !s.Expires().IsZero() {
		t.Errorf("nothing is there: %v, expires %v", err, s.Expires())
	}
	if err := s.Renew(t.Context()); err != nil {
		t.Errorf("nothing is there to renew: %v", err)
	}
	if err := s.Valid(time.Now()); err != nil || s.Certificates() != nil {
		t.Errorf("nothing is there: %v, %+v", err, s.Certificates())
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("nothing was published")
	}
	// What is there already has no say in the mode, by which Envoy's user reads.
	if err := errors.Join(first.Write(s.TLSDirectory), os.WriteFile(path, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Update(t.Context()); err != nil || !s.Expires().Equal(first.Leaf.NotAfter) {
		t.Errorf("%v, expires %v", err, s.Expires())
	}
	for at, want := range map[time.Time]string{
		time.Now(): "", first.Leaf.NotAfter.Add(time.Second): "expired at", first.Leaf.NotBefore.Add(-time.Second): "is not valid before",
	} {
		if err := s.Valid(at); want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("at %s: %v, want %q", at, err, want)
		}
	}
	var roles []string
	for _, c := range s.Certificates() {
		roles = append(roles, c.Role)
	}
	if !slices.Equal(roles, []string{"leaf", "intermediate", "mesh CA"}) || !s.Certificates()[0].NotAfter.Equal(first.Leaf.NotAfter) {
		t.Errorf("%+v", s.Certificates())
	}
	before := read()
	if info := must[os.FileInfo](t)(os.Stat(path)); info.Mode() != 0o640 {
		t.Errorf("the key's file has mode %v", info.Mode())
	}
	if _, err := s.Update(t.Context()); err != nil || read() != before {
		t.Errorf("nothing changed, and the file did: %v", err)
	}
	if err := s.Renew(t.Context()); err != nil || read() == before {
		t.Errorf("renewed, it is the same: %v", err)
	}
	before = read()
	write(t, s.TLSDirectory, chainFile, second.ChainPEM())
	if _, err := s.Update(t.Context()); err == nil || read() != before || !s.Expires().Equal(first.Leaf.NotAfter) {
		t.Errorf("the last good one does not stay: %v", err)
	}
	if err := second.Write(s.TLSDirectory); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Update(t.Context()); err != nil || read() == before {
		t.Errorf("the next one was not published: %v", err)
	}
	s.tear(t)
	if err := os.RemoveAll(s.RuntimeDirectory); err != nil {
		t.Fatal(err)
	}
	if err := first.Write(s.TLSDirectory); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Update(t.Context()); err == nil || !s.Expires().Equal(second.Leaf.NotAfter) {
		t.Errorf("it can't be published, and passes for it: %v", err)
	}
}

// tear publishes another mesh CA without the identity that goes with it, then wants back what was before.
func (s *Secrets) tear(t *testing.T) {
	t.Helper()
	other := must[*lab.Authority](t)(lab.NewAuthority("mesh"))
	identity := filepath.Join(s.RuntimeDirectory, render.SecretFile(render.IdentitySecret))
	move := func(from, to string) {
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	aside, before := filepath.Join(t.TempDir(), "aside"), s.TLSDirectory
	move(identity, aside)
	if err := os.MkdirAll(filepath.Join(identity, "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	s.TLSDirectory = t.TempDir()
	if err := must[*lab.Identity](t)(other.Issue(lab.Leaf{})).Write(s.TLSDirectory); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Update(t.Context()); err == nil {
		t.Error("half a generation passes for a whole one")
	}
	if err := os.RemoveAll(identity); err != nil {
		t.Fatal(err)
	}
	move(aside, identity)
	s.TLSDirectory = before
	if revoked, err := s.Update(t.Context()); err != nil || !revoked || !s.former().trustsAllOf(s.published) {
		t.Errorf("half a generation stays: revoked %t, %v", revoked, err)
	}
}
