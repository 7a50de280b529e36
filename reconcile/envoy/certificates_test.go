package envoy

import (
	"bytes"
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
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"mantlet/internal/lab"
	"mantlet/internal/rundir"
	"mantlet/render"
	"mantlet/schema"
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
		"the leaf alone":         {map[string][]byte{lab.ChainFile: pem.EncodeToMemory(leaf)}, nil},
		"text around the blocks": {map[string][]byte{lab.ChainFile: slices.Concat([]byte("the leaf\n"), chain, []byte("\n\nthe end\n"))}, nil},
		"an SEC 1 key": {map[string][]byte{lab.KeyFile: slices.Concat(
			pem.EncodeToMemory(&pem.Block{Type: "EC PARAMETERS", Bytes: []byte{6, 5, 0x2b, 0x81, 4, 0, 0x22}}),
			pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: sec1}))}, nil},
		"several CAs": {map[string][]byte{lab.CAFile: slices.Concat(foreign.CAPEM(), ca)}, nil},

		"a client's usage": {filesOf(t, clients), nil},
		"no usage":         {filesOf(t, signer), []string{lab.ChainFile, "its extended key usage is codeSigning", "should have serverAuth and clientAuth"}},
		"any usage":        {filesOf(t, anyUsage), []string{lab.ChainFile, "its extended key usage is anyExtendedKeyUsage"}},

		"nothing":             {map[string][]byte{lab.ChainFile: nil, lab.KeyFile: nil, lab.CAFile: nil}, []string{lab.ChainFile, lab.KeyFile, lab.CAFile, "no such file"}},
		"no chain":            {map[string][]byte{lab.ChainFile: nil}, []string{lab.ChainFile, "no such file"}},
		"no key":              {map[string][]byte{lab.KeyFile: nil}, []string{lab.KeyFile, "no such file"}},
		"no CA":               {map[string][]byte{lab.CAFile: nil}, []string{lab.CAFile, "no such file"}},
		"empty chain":         {map[string][]byte{lab.ChainFile: {}}, []string{lab.ChainFile, "is empty"}},
		"empty key":           {map[string][]byte{lab.KeyFile: {}}, []string{lab.KeyFile, "is empty"}},
		"empty CA":            {map[string][]byte{lab.CAFile: {}}, []string{lab.CAFile, "is empty"}},
		"half a chain":        {map[string][]byte{lab.ChainFile: chain[:len(chain)-100]}, []string{lab.ChainFile, "block 2 (line "}},
		"half a CA":           {map[string][]byte{lab.CAFile: slices.Concat(foreign.CAPEM(), ca[:100])}, []string{lab.CAFile, "block 2 (line "}},
		"half a key":          {map[string][]byte{lab.KeyFile: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})[:100]}, []string{lab.KeyFile, "is cut off"}},
		"another's key":       {map[string][]byte{lab.ChainFile: other.ChainPEM()}, []string{lab.KeyFile, "is not the key of the leaf (CN=pod)"}},
		"intermediate first":  {map[string][]byte{lab.ChainFile: slices.Concat(rest, pem.EncodeToMemory(leaf))}, []string{lab.ChainFile, "that of certificate 2; the leaf must come first"}},
		"expired":             {filesOf(t, expired), []string{lab.ChainFile, "certificate 1 (without a subject) expired at"}},
		"not valid yet":       {filesOf(t, early), []string{lab.ChainFile, "is the clock right?"}},
		"expired, foreign CA": {map[string][]byte{lab.CAFile: foreign.CAPEM(), lab.ChainFile: expired.ChainPEM(), lab.KeyFile: filesOf(t, expired)[lab.KeyFile]}, []string{lab.ChainFile}},
	} {
		t.Run(name, func(t *testing.T) {
			directory := t.TempDir()
			for name, text := range filesOf(t, good) {
				if change, ok := c.change[name]; ok {
					text = change
				}
				if text != nil {
					write(t, directory, name, text)
				}
			}
			read, err := LoadCertificates(schema.TLSFiles{Directory: directory}, now)
			if len(c.says) == 0 {
				if err != nil || read.verifyErr != nil || !read.expires().Equal(good.Leaf.NotAfter) {
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
		"it must be a regular file, but is a pipe":      func(path string) error { return syscall.Mkfifo(path, 0o600) },
		"it must be a regular file, but is a directory": func(path string) error { return os.Mkdir(path, 0o700) },
		"is larger than 1048576 bytes":                  func(path string) error { return os.WriteFile(path, make([]byte, maxTLSFile+1), 0o600) },
	} {
		directory := t.TempDir()
		path := filepath.Join(directory, lab.CAFile)
		if err := errors.Join(identity.Write(directory), os.Remove(path), replace(path)); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadCertificates(schema.TLSFiles{Directory: directory}, time.Now()); err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), says) {
			t.Errorf("%v, want %s", err, says)
		}
	}
}

// TestRenewedCA: a mesh CA is not taken away where it has another certificate for the same key and name.
func TestRenewedCA(t *testing.T) {
	mesh, another := must[*lab.Authority](t)(lab.NewAuthority("mesh")), must[*lab.Authority](t)(lab.NewAuthority("mesh"))
	renewed := must[*lab.Authority](t)(mesh.Renew())
	has := func(a *lab.Authority) *Certificates {
		return &Certificates{anchors: must[[]*x509.Certificate](t)(parseCertificates(a.CAPEM()))}
	}
	if !has(renewed).trustsAllOf(has(mesh)) || has(another).trustsAllOf(has(mesh)) {
		t.Error("a renewed certificate passes for another CA, or another CA for a renewed one")
	}
}

// filesOf returns the three files of an identity.
func filesOf(t *testing.T, i *lab.Identity) map[string][]byte {
	t.Helper()
	directory := t.TempDir()
	if err := i.Write(directory); err != nil {
		t.Fatal(err)
	}
	all := map[string][]byte{}
	for _, name := range []string{lab.ChainFile, lab.KeyFile, lab.CAFile} {
		all[name] = must[[]byte](t)(os.ReadFile(filepath.Join(directory, name)))
	}
	return all
}

// TestKeys tries on the real Envoy that mutual TLS works with the keys that LoadCertificates lets pass, and does not work
// with those that it refuses.
func TestKeys(t *testing.T) {
	r, _ := runner(t)
	identity(t, r)
	p := started(t, r)
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
		certificate := selfSigned(t, c.key)
		key := must[[]byte](t)(x509.MarshalPKCS8PrivateKey(c.key))
		if err := checkKey(c.key); (err == nil) != c.usable {
			t.Errorf("%s: %v", name, err)
		}
		all := []*x509.Certificate{certificate}
		v, err := p.try(t.Context(), &Certificates{chain: all, anchors: all, key: &pem.Block{Type: "PRIVATE KEY", Bytes: key}}, r.RuntimeDirectory)
		if works := err == nil && v == (verdict{}); works != c.usable {
			t.Errorf("%s: Envoy says %+v, %v", name, v, err)
		}
		if _, isRejected := errors.AsType[rejectedError](err); err != nil && !isRejected {
			t.Errorf("%s can't be tried: %v", name, err)
		}
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

func selfSigned(t *testing.T, key crypto.Signer) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "pod"}, DNSNames: []string{"pod"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
	der := must[[]byte](t)(x509.CreateCertificate(rand.Reader, template, template, key.Public(), key))
	return must[*x509.Certificate](t)(x509.ParseCertificate(der))
}

// expires returns when what Envoy accepted expires; the zero time where it accepted nothing.
func expires(s *Secrets) time.Time {
	if good := s.lastAccepted(); good != nil {
		return good.expires()
	}
	return time.Time{}
}

// TestSecrets: a generation is offered where no Envoy runs, good once Envoy has tried it, and stays until Envoy has accepted
// another one.
func TestSecrets(t *testing.T) {
	r, log := runner(t)
	mesh := must[*lab.Authority](t)(lab.NewAuthority("mesh"))
	first, second := must[*lab.Identity](t)(mesh.Issue(lab.Leaf{DNSNames: []string{"pod"}})), must[*lab.Identity](t)(mesh.Issue(lab.Leaf{DNSNames: []string{"pod"}}))
	s := &Secrets{Files: schema.TLSFiles{Directory: t.TempDir()}, RuntimeDirectory: r.RuntimeDirectory, KeptFile: filepath.Join(t.TempDir(), "kept"), Runner: r, Log: r.Log}
	path := rundir.Envoy(s.RuntimeDirectory).Secret(render.IdentitySecret)
	read := func() string { return string(must[[]byte](t)(os.ReadFile(path))) }

	if _, err := s.Update(t.Context()); err == nil || !expires(s).IsZero() || s.Offered() {
		t.Errorf("nothing is there: %v, expires %v", err, expires(s))
	}
	if err := errors.Join(s.Renew(t.Context()), s.Valid(time.Now()), s.Held(t.Context())); err != nil || s.Certificates(t.Context()) != nil || s.Warnings() != nil {
		t.Errorf("nothing is there: %v", err)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("nothing was published")
	}
	// What is there already has no say in the mode, by which Envoy's user reads.
	if err := errors.Join(first.Write(s.Files.Directory), os.WriteFile(path, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Update(t.Context()); err != nil || !s.Offered() || !expires(s).IsZero() || strings.Contains(log.String(), "certificates published") {
		t.Errorf("%v, expires %v: nobody has tried it", err, expires(s))
	}
	if info := must[os.FileInfo](t)(os.Stat(path)); info.Mode() != 0o640 {
		t.Errorf("the key's file has mode %v", info.Mode())
	}
	before := read()
	started(t, r)
	if _, err := s.Update(t.Context()); err != nil || !expires(s).Equal(first.Leaf.NotAfter) || read() != before || strings.Count(log.String(), "certificates published") != 1 {
		t.Errorf("%v, expires %v", err, expires(s))
	}
	for at, want := range map[time.Time]string{
		time.Now(): "", first.Leaf.NotAfter.Add(time.Second): "expired at", first.Leaf.NotBefore.Add(-time.Second): "is not valid before",
	} {
		if err := s.Valid(at); want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("at %s: %v, want %q", at, err, want)
		}
	}
	var roles []string
	for _, c := range s.Certificates(t.Context()) {
		roles = append(roles, c.Role)
	}
	if !slices.Equal(roles, []string{"leaf", "intermediate", "mesh CA"}) || !s.Certificates(t.Context())[0].NotAfter.Equal(first.Leaf.NotAfter) {
		t.Errorf("%+v", s.Certificates(t.Context()))
	}
	if _, err := s.Update(t.Context()); err != nil || read() != before {
		t.Errorf("nothing changed, and the file did: %v", err)
	}
	if err := s.Renew(t.Context()); err != nil || read() == before {
		t.Errorf("renewed, it is the same: %v", err)
	}
	before = read()
	write(t, s.Files.Directory, lab.ChainFile, second.ChainPEM())
	if _, err := s.Update(t.Context()); err == nil || read() != before || !expires(s).Equal(first.Leaf.NotAfter) {
		t.Errorf("the last good one does not stay: %v", err)
	}
	if err := second.Write(s.Files.Directory); err != nil {
		t.Fatal(err)
	}
	if revoked, err := s.Update(t.Context()); err != nil || revoked || read() == before {
		t.Errorf("the next one was not published: %v", err)
	}

	// There is no room for another one, then there is.
	other := must[*lab.Authority](t)(lab.NewAuthority("mesh"))
	inTheWay := rundir.Envoy(s.RuntimeDirectory).Secret(render.MeshCASecret)
	if err := errors.Join(os.Rename(inTheWay, inTheWay+".aside"), os.MkdirAll(filepath.Join(inTheWay, "x"), 0o700), must[*lab.Identity](t)(other.Issue(lab.Leaf{DNSNames: []string{"pod"}})).Write(s.Files.Directory)); err != nil {
		t.Fatal(err)
	}
	if revoked, err := s.Update(t.Context()); err == nil || revoked || !expires(s).Equal(second.Leaf.NotAfter) {
		t.Errorf("it can't be published, and passes for it: revoked %t, %v", revoked, err)
	}
	if err := errors.Join(os.RemoveAll(inTheWay), os.Rename(inTheWay+".aside", inTheWay)); err != nil {
		t.Fatal(err)
	}
	if revoked, err := s.Update(t.Context()); err != nil || !revoked {
		t.Errorf("half a generation stays: revoked %t, %v", revoked, err)
	}
	if revoked, err := s.Update(t.Context()); err != nil || revoked {
		t.Errorf("told twice: revoked %t, %v", revoked, err)
	}
}

// TestPaths: while one path from the leaf to a mesh CA is valid, certificates are. What no path needs may expire.
func TestPaths(t *testing.T) {
	now := time.Now()
	until := func(d time.Duration) shape { return func(c *x509.Certificate) { c.NotAfter = now.Add(d) } }
	const soon = time.Minute
	ca, other := root(t, "mesh"), root(t, "another")
	inter := ca.below(t, "inter")
	ending := ca.below(t, "ending", until(soon))
	for name, c := range map[string]struct {
		set    set
		needed []string // subjects
		says   string   // of what is wrong once the time has come; empty where nothing is
	}{
		"the leaf alone":                         {ca.leaf(t).set(t, []issuer{ca}), []string{"CN=web", "CN=mesh"}, ""},
		"an intermediate":                        {ending.leaf(t).set(t, []issuer{ca}, ending), []string{"CN=web", "CN=ending", "CN=mesh"}, "certificate 2 (CN=ending) expired at"},
		"an intermediate that is renewed":        {ending.leaf(t).set(t, []issuer{ca}, ending, ending.again(t, ca)), []string{"CN=web", "CN=ending", "CN=mesh"}, ""},
		"an expired cross certificate":           {ca.leaf(t).set(t, []issuer{ca}, ca.again(t, other, until(soon))), []string{"CN=web", "CN=mesh"}, ""},
		"an expired certificate of others":       {inter.leaf(t).set(t, []issuer{ca}, inter, other.below(t, "unrelated", until(soon))), []string{"CN=web", "CN=inter", "CN=mesh"}, ""},
		"a mesh CA of before":                    {ca.leaf(t).set(t, []issuer{root(t, "old", until(soon)), ca}), []string{"CN=web", "CN=mesh"}, ""},
		"the mesh CA, by two, one of which ends": {ca.leaf(t).set(t, []issuer{ca.again(t, ca, until(soon)), ca}), []string{"CN=web", "CN=mesh"}, ""},
	} {
		files := schema.TLSFiles{Directory: t.TempDir()}
		c.set.write(t, files.Directory)
		loaded := must[*Certificates](t)(LoadCertificates(files, now))
		if err := loaded.valid(now); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := loaded.valid(now.Add(2 * soon)); c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%s, when one has expired: %v; want %q", name, err, c.says)
		}
		var needed []string
		for _, one := range (envoyCertificates{loaded.chain, loaded.anchors}).describe(loaded.longestChain()) {
			if one.Needed {
				needed = append(needed, one.Subject)
				if c.says == "" && one.NotAfter.Before(now.Add(2*soon)) {
					t.Errorf("%s: %s is not of the longest path", name, one.Subject)
				}
			}
		}
		if !slices.Equal(needed, c.needed) {
			t.Errorf("%s: %q are needed, want %q", name, needed, c.needed)
		}
	}
}

// TestKept: a mantlet that was killed leaves its last good generation to the one after it, which goes on with that where the
// TLS directory holds none that is good, and sees what mesh CA is gone where it does. One that ended leaves it where it is
// needed.
func TestKept(t *testing.T) {
	r, log := runner(t)
	ca, gone := root(t, "mesh"), root(t, "gone")
	directory, kept := t.TempDir(), filepath.Join(t.TempDir(), "kept")
	mantlet := func() *Secrets {
		return &Secrets{Files: schema.TLSFiles{Directory: directory}, RuntimeDirectory: r.RuntimeDirectory, KeptFile: kept, Runner: r, Log: r.Log}
	}
	first := ca.leaf(t)
	first.set(t, []issuer{ca, gone}).write(t, directory)
	s := mantlet()
	if _, err := s.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	p := started(t, r)
	if _, err := s.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	if info := must[os.FileInfo](t)(os.Stat(kept)); info.Mode() != 0o600 {
		t.Errorf("the key is kept with mode %v", info.Mode())
	}
	serves := func(p *Process, l leaf, anchors int) {
		t.Helper()
		has := must[envoyCertificates](t)(must[secretTexts](t)(p.admin.secretTexts(t.Context())).parse())
		if !has.chain[0].Equal(l.Certificate) || len(has.anchors) != anchors {
			t.Errorf("Envoy has %x and %d mesh CAs, want %x and %d", has.chain[0].SerialNumber, len(has.anchors), l.SerialNumber, anchors)
		}
	}
	for name, bad := range map[string]set{
		"what can't be read":     {[]byte("x"), nil, nil},
		"what Envoy does refuse": ca.leaf(t, keyUsage(x509.KeyUsageKeyAgreement)).set(t, []issuer{ca}),
	} {
		p.Kill()
		<-p.Exited()
		bad.write(t, directory)
		s = mantlet()
		_, _ = s.Update(t.Context())
		p = started(t, r)
		if _, err := s.Update(t.Context()); err == nil || expires(s).IsZero() {
			t.Errorf("%s: %v, expires %v", name, err, expires(s))
		}
		serves(p, first, 2)
		if !strings.Contains(log.String(), "going on with the last good certificates") {
			t.Errorf("%s: it is not said", name)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(kept); err != nil {
			t.Errorf("%s: it is needed: %v", name, err)
		}
	}
	p.Kill()
	<-p.Exited()
	second := ca.leaf(t)
	second.set(t, []issuer{ca}).write(t, directory)
	s = mantlet()
	_, _ = s.Update(t.Context())
	p = started(t, r)
	if revoked, err := s.Update(t.Context()); err != nil || !revoked {
		t.Errorf("a mesh CA is gone since: %t, %v", revoked, err)
	}
	serves(p, second, 1)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(kept); err == nil {
		t.Error("a key is left that nobody needs")
	}
}

// TestRevocationWaitsForNoEnvoy: a mesh CA that is taken away is gone from what Envoy reads although none can try what came
// instead. Once one can, that is what holds: the new generation if it is good, else the last one as a whole.
func TestRevocationWaitsForNoEnvoy(t *testing.T) {
	r, _ := runner(t)
	ca, gone := root(t, "mesh"), root(t, "gone")
	s := &Secrets{Files: schema.TLSFiles{Directory: t.TempDir()}, RuntimeDirectory: r.RuntimeDirectory, Runner: r, Log: r.Log}
	first := ca.leaf(t).set(t, []issuer{ca, gone})
	first.write(t, s.Files.Directory)
	if _, err := s.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	p := started(t, r)
	if _, err := s.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	good := ca.leaf(t)
	for name, next := range map[string]set{
		"a good one":             good.set(t, []issuer{ca}),
		"one that Envoy refuses": ca.leaf(t, keyUsage(x509.KeyUsageKeyAgreement)).set(t, []issuer{ca}),
	} {
		first.write(t, s.Files.Directory)
		if _, err := s.Update(t.Context()); err != nil {
			t.Fatal(err)
		}
		p.Kill()
		<-p.Exited()
		next.write(t, s.Files.Directory)
		if revoked, err := s.Update(t.Context()); err != nil || !revoked {
			t.Errorf("%s, while no Envoy runs: revoked %t, %v", name, revoked, err)
		}
		if revoked, err := s.Update(t.Context()); err != nil || revoked {
			t.Errorf("%s, told twice: revoked %t, %v", name, revoked, err)
		}
		p = started(t, r)
		has := must[envoyCertificates](t)(must[secretTexts](t)(p.admin.secretTexts(t.Context())).parse())
		if len(has.anchors) != 1 || !has.anchors[0].Equal(ca.Certificate) || has.chain[0].Equal(good.Certificate) {
			t.Errorf("%s: the next Envoy starts with %d mesh CAs", name, len(has.anchors))
		}
		isGood := bytes.Equal(next.chain, encode([]*x509.Certificate{good.Certificate}))
		if revoked, err := s.Update(t.Context()); isGood && (err != nil || !revoked) || !isGood && err == nil {
			t.Errorf("%s, once an Envoy runs: revoked %t, %v", name, revoked, err)
		}
		has = must[envoyCertificates](t)(must[secretTexts](t)(p.admin.secretTexts(t.Context())).parse())
		if want := map[bool]int{true: 1, false: 2}[isGood]; len(has.anchors) != want || has.chain[0].Equal(good.Certificate) != isGood {
			t.Errorf("%s: Envoy comes to have %d mesh CAs, want %d", name, len(has.anchors), want)
		}
		if err := s.Held(t.Context()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
