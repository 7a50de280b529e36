package envoy

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"mantlet/internal/lab"
	"mantlet/internal/rundir"
	"mantlet/render"
	"mantlet/schema"
)

// issuer is a CA that issues certificates of any shape.
type issuer struct {
	*x509.Certificate
	key *ecdsa.PrivateKey
}

// shape changes a certificate before it is signed.
type shape func(*x509.Certificate)

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	return must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
}

// root returns a self-signed CA.
func root(t *testing.T, name string, shapes ...shape) issuer {
	t.Helper()
	key := newKey(t)
	return issuer{signed(t, name, key, issuer{nil, key}, append([]shape{isCA}, shapes...)...), key}
}

// below returns a CA that this one issued.
func (ca issuer) below(t *testing.T, name string, shapes ...shape) issuer {
	t.Helper()
	key := newKey(t)
	return issuer{signed(t, name, key, ca, append([]shape{isCA}, shapes...)...), key}
}

// again returns another certificate of the same CA, issued by another one, or by itself.
func (ca issuer) again(t *testing.T, by issuer, shapes ...shape) issuer {
	t.Helper()
	return issuer{signed(t, ca.Subject.CommonName, ca.key, by, append([]shape{isCA}, shapes...)...), ca.key}
}

// leaf is a certificate with its key.
type leaf struct {
	*x509.Certificate
	key any
}

func (ca issuer) leaf(t *testing.T, shapes ...shape) leaf {
	t.Helper()
	key := newKey(t)
	return leaf{signed(t, "web", key, ca, shapes...), key}
}

func isCA(c *x509.Certificate) {
	c.IsCA, c.KeyUsage, c.ExtKeyUsage, c.DNSNames = true, x509.KeyUsageCertSign, nil, nil
}

func signed(t *testing.T, name string, key any, by issuer, shapes ...shape) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: must[*big.Int](t)(rand.Int(rand.Reader, big.NewInt(1<<62))), Subject: pkix.Name{CommonName: name}, DNSNames: []string{"web"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	for _, change := range shapes {
		change(template)
	}
	parent := by.Certificate
	if parent == nil {
		parent = template
	}
	var public any
	switch key := key.(type) {
	case *ecdsa.PrivateKey:
		public = key.Public()
	case *rsa.PrivateKey:
		public = key.Public()
	}
	der := must[[]byte](t)(x509.CreateCertificate(rand.Reader, template, parent, public, by.key))
	return must[*x509.Certificate](t)(x509.ParseCertificate(der))
}

func usage(all ...x509.ExtKeyUsage) shape {
	return func(c *x509.Certificate) { c.ExtKeyUsage = all }
}

func keyUsage(usage x509.KeyUsage) shape {
	return func(c *x509.Certificate) { c.KeyUsage = usage }
}

func pathLength(n int) shape {
	return func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = n, n == 0 }
}

func extension(id asn1.ObjectIdentifier, critical bool, value ...byte) shape {
	return func(c *x509.Certificate) {
		c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: id, Critical: critical, Value: value})
	}
}

// past makes a certificate expired. It was valid while others were.
func past(c *x509.Certificate) {
	c.NotBefore, c.NotAfter = time.Now().Add(-48*time.Hour), time.Now().Add(-time.Minute)
}

// withoutKeyID makes a CA that has no key identifier, so that what it issues names none either.
func withoutKeyID(c *x509.Certificate) {
	c.IsCA, c.BasicConstraintsValid = false, false // or else one is made
	extension(basicConstraints, true, 0x30, 3, 1, 1, 0xff)(c)
}

var basicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19} // RFC 5280, section 4.2.1.9

// set are the contents of the three files.
type set struct{ chain, key, ca []byte }

func (l leaf) set(t *testing.T, cas []issuer, intermediates ...issuer) set {
	t.Helper()
	chain := []*x509.Certificate{l.Certificate}
	for _, i := range intermediates {
		chain = append(chain, i.Certificate)
	}
	var anchors []*x509.Certificate
	for _, ca := range cas {
		anchors = append(anchors, ca.Certificate)
	}
	key := must[[]byte](t)(x509.MarshalPKCS8PrivateKey(l.key))
	return set{encode(chain), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), encode(anchors)}
}

func (s set) write(t *testing.T, directory string) {
	t.Helper()
	write(t, directory, lab.ChainFile, s.chain)
	write(t, directory, lab.KeyFile, s.key)
	write(t, directory, lab.CAFile, s.ca)
}

// TestTrial puts certificates of many shapes before one Envoy. What Envoy would serve with is published, as one; of all else
// the last good generation stays whole, and the reason is told in words.
func TestTrial(t *testing.T) {
	r, log := runner(t)
	ca, other := root(t, "mesh"), root(t, "another")
	gone := root(t, "gone") // a CA that each new generation takes away
	directory := t.TempDir()
	s := &Secrets{Files: schema.TLSFiles{Directory: directory}, RuntimeDirectory: r.RuntimeDirectory, Runner: r, Log: r.Log}
	good := ca.leaf(t).set(t, []issuer{ca, gone})
	good.write(t, directory)
	if _, err := s.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !expires(s).IsZero() || !s.Offered() {
		t.Error("what no Envoy has tried passes for good, or is not offered")
	}
	p := started(t, r)
	if _, err := s.Update(t.Context()); err != nil || expires(s).IsZero() {
		t.Fatalf("the first generation: %v", err)
	}

	inter := ca.below(t, "inter")
	rsaLeaf := func(usage x509.KeyUsage) leaf {
		key := must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048))
		return leaf{signed(t, "web", key, ca, keyUsage(usage)), key}
	}
	first, second := root(t, "twin", withoutKeyID), root(t, "twin", withoutKeyID)
	withID, withID2 := root(t, "twin"), root(t, "twin")
	stale := ca.again(t, ca, past)
	cross := ca.again(t, other, past)
	unrelated := other.below(t, "unrelated", past)
	serverOnly, clientOnly := usage(x509.ExtKeyUsageServerAuth), usage(x509.ExtKeyUsageClientAuth)
	short := root(t, "short", pathLength(0))
	under := short.below(t, "under")
	narrow := inter.below(t, "narrow", pathLength(0))
	deep := narrow.below(t, "deep")
	permits := func(names ...string) issuer {
		return root(t, "constrained", func(c *x509.Certificate) { c.PermittedDNSDomains, c.PermittedDNSDomainsCritical = names, true })
	}
	fits, fails := permits("web"), permits("corp.example")
	oneCA := func(l leaf, ca issuer, intermediates ...issuer) set { return l.set(t, []issuer{ca}, intermediates...) }
	glued := func(cas ...issuer) (text []byte) {
		for _, ca := range cas {
			text = append(text, bytes.TrimSpace(encode([]*x509.Certificate{ca.Certificate}))...)
		}
		return text
	}
	withCA := func(text ...[]byte) set {
		s := oneCA(ca.leaf(t), ca)
		s.ca = bytes.Join(text, nil)
		return s
	}
	caText := encode([]*x509.Certificate{ca.Certificate})

	for _, c := range []struct {
		name string
		set  set
		says []string // why it is rejected; none if it is accepted
		warn string   // what the log says of one that is accepted
	}{
		{"good", oneCA(ca.leaf(t), ca), nil, ""},
		{"with an intermediate", oneCA(inter.leaf(t), ca, inter), nil, ""},
		{"the intermediate is the mesh CA", oneCA(inter.leaf(t), inter), nil, ""},
		{"a self-signed leaf that is its own CA", func() set {
			key := newKey(t)
			l := leaf{signed(t, "web", key, issuer{nil, key}), key}
			return l.set(t, []issuer{{l.Certificate, key}})
		}(), nil, ""},
		{"no key usage", oneCA(ca.leaf(t, keyUsage(0)), ca), nil, ""},
		{"RSA", oneCA(rsaLeaf(x509.KeyUsageDigitalSignature), ca), nil, ""},

		{"another CA", oneCA(ca.leaf(t), other), []string{"certificate 1 (CN=web) was issued by CN=mesh (key id ", "mesh-ca.pem holds CN=another (key id "}, ""},
		{"another CA of that name", oneCA(ca.leaf(t), root(t, "mesh")), []string{"was issued by CN=mesh (key id ", ", another CA of the same name"}, ""},
		{"the leaf alone", oneCA(inter.leaf(t), ca), []string{"was issued by CN=inter", "append the intermediate CN=inter to certChain.pem"}, ""},
		{"an intermediate is missing", oneCA(narrow.leaf(t), ca, narrow), []string{"certificate 2 (CN=narrow) was issued by CN=inter", "append the intermediate CN=inter"}, ""},

		// What one parser reads and the other does not.
		{"CAs glued", withCA(glued(other, root(t, "x")), []byte("\n"), caText), []string{lab.CAFile, "block 2 (line 10) is glued to the one before"}, ""},
		{"BOM before CAs", withCA([]byte(byteOrderMark), caText), []string{lab.CAFile, "byte order mark (BOM)"}, ""},
		{"garbage between CAs", withCA(caText, []byte("-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"), caText), []string{lab.CAFile, "block 2", "is not base64"}, ""},

		// What Go verifies and Envoy does not.
		{"key agreement alone", oneCA(ca.leaf(t, keyUsage(x509.KeyUsageKeyAgreement)), ca), []string{"key usage lacks digitalSignature"}, ""},
		{"RSA with key encipherment alone", oneCA(rsaLeaf(x509.KeyUsageKeyEncipherment), ca), []string{"key usage lacks digitalSignature"}, ""},
		{"no CA, with a path length", oneCA(ca.leaf(t, extension(basicConstraints, true, 0x30, 3, 2, 1, 0)), ca), []string{"Envoy does not accept the certificates", "invalid or inconsistent certificate extension"}, ""},
		{"an intermediate for other things", oneCA(ca.below(t, "signer", usage(x509.ExtKeyUsageCodeSigning)).leaf(t), ca), []string{"append the intermediate"}, ""},
		{"a usage over the chain", func() set {
			i := ca.below(t, "any", usage(x509.ExtKeyUsageAny))
			return oneCA(i.leaf(t), ca, i)
		}(), []string{"the CA 1 above the leaf: unsupported certificate purpose"}, ""},
		{"a name constraint that does not fit", oneCA(fails.leaf(t), fails), []string{"permitted subtree violation"}, ""},
		{"an unknown critical extension", oneCA(ca.leaf(t, extension(asn1.ObjectIdentifier{1, 2, 3, 4}, true, 5, 0)), ca), []string{"unhandled critical extension"}, ""},
		{"a path length below the root", oneCA(deep.leaf(t), ca, deep, narrow, inter), []string{"path length constraint exceeded"}, ""},
		{"a mesh CA that may not issue", func() set {
			ca := root(t, "no issuer", keyUsage(x509.KeyUsageDigitalSignature))
			return oneCA(ca.leaf(t), ca)
		}(), []string{"Envoy says: "}, ""},
		{"two CAs of one name without key identifiers, the other one first", second.leaf(t).set(t, []issuer{first, second}), []string{"certificate signature failure", "put the one that issued the leaf first"}, ""},

		// What Envoy accepts.
		{"a name constraint that fits", oneCA(fits.leaf(t), fits), nil, ""},
		{"a path length at the root", oneCA(under.leaf(t), short, under), nil, "Envoy accepts the certificates, but other programs may not"},
		{"two CAs of one name without key identifiers", first.leaf(t).set(t, []issuer{first, second}), nil, "several CAs that are named CN=twin and lack key identifiers"},
		{"two CAs of one name with key identifiers", withID2.leaf(t).set(t, []issuer{withID, withID2}), nil, ""},
		{"an expired cross certificate", oneCA(ca.leaf(t), ca, cross), nil, ""},
		{"an expired certificate of somebody else", oneCA(ca.leaf(t), ca, unrelated), nil, ""},
		{"a mesh CA's expired certificate first", ca.leaf(t).set(t, []issuer{stale, ca}), nil, "mesh CAs have expired"},
		{"a server's", oneCA(ca.leaf(t, serverOnly), ca), nil, "at one end only\" client=false server=true"},
		{"a client's", oneCA(ca.leaf(t, clientOnly), ca), nil, "at one end only\" client=true server=false"},
		{"a server's, by its intermediate", func() set {
			i := ca.below(t, "servers", serverOnly)
			return oneCA(i.leaf(t), ca, i)
		}(), nil, "at one end only\" client=false server=true"},

		{"an expired mesh CA", func() set {
			ca := root(t, "old", past)
			return oneCA(ca.leaf(t), ca)
		}(), []string{"the mesh CA CN=old expired at"}, ""},
		{"good again", good, nil, ""},
	} {
		before := must[secretTexts](t)(p.admin.secretTexts(t.Context()))
		logged := len(log.String())
		c.set.write(t, directory)
		_, err := s.Update(t.Context())
		has := must[secretTexts](t)(p.admin.secretTexts(t.Context()))
		states := must[secretStates](t)(p.admin.secrets(t.Context(), meshNames()))
		if !states.allAt(s.version) || has.outdated(states) {
			t.Errorf("%s: Envoy has taken %+v, not %s", c.name, states, s.version)
		}
		if err := errors.Join(s.Valid(time.Now()), s.Held(t.Context())); err != nil {
			t.Errorf("%s: what Envoy has is not good: %v", c.name, err)
		}
		if len(c.says) > 0 {
			for _, text := range c.says {
				if err == nil || !strings.Contains(err.Error(), text) {
					t.Errorf("%s: %v; want %q", c.name, err, text)
				}
			}
			if has != before {
				t.Errorf("%s: it is rejected (%v), and Envoy has others", c.name, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		parsed, err := has.parse()
		want := must[*Certificates](t)(LoadCertificates(schema.TLSFiles{Directory: directory}, time.Now()))
		if doubt, certain := want.Unverified(time.Now()); certain {
			t.Errorf("%s: Envoy accepts it, and it is certain not to: %v", c.name, doubt)
		}
		if err != nil || !slices.EqualFunc(parsed.chain, want.chain, (*x509.Certificate).Equal) || len(subtract(parsed.anchors, want.anchors))+len(subtract(want.anchors, parsed.anchors)) > 0 {
			t.Errorf("%s: Envoy has %d and %d certificates, %v; want %d and %d", c.name, len(parsed.chain), len(parsed.anchors), err, len(want.chain), len(want.anchors))
		}
		if said := log.String()[logged:]; c.warn != "" && !strings.Contains(said, c.warn) || c.warn == "" && strings.Contains(said, "level=WARN") {
			t.Errorf("%s: want a warning %q; the log:\n%s", c.name, c.warn, said)
		}
	}
}

// TestTrialIsTheMesh: what the trial accepts and refuses at either end, Envoy accepts from its clients, and shows them.
func TestTrialIsTheMesh(t *testing.T) {
	r, _ := runner(t)
	mesh := identity(t, r).Authority
	p := started(t, r)
	for name, c := range map[string]struct {
		usages         []x509.ExtKeyUsage
		client, server bool
	}{
		"no extension": {[]x509.ExtKeyUsage{}, true, true},
		"both":         {[]x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, true, true},
		"more":         {[]x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageAny, x509.ExtKeyUsageServerAuth}, true, true},
		"client":       {[]x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, true, false},
		"server":       {[]x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, false, true},
		"other":        {[]x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}, false, false},
		"any":          {[]x509.ExtKeyUsage{x509.ExtKeyUsageAny}, false, false},
	} {
		leaf := must[*lab.Identity](t)(mesh.Issue(lab.Leaf{DNSNames: []string{"pod"}, Usages: c.usages}))
		if client, server := allowedUsages(leaf.Leaf); client != c.client || server != c.server {
			t.Errorf("%s: client %t, server %t; want %t, %t", name, client, server, c.client, c.server)
		}
		certificate := leaf.Certificate()
		if err := mutual(&certificate); (err == nil) != c.client {
			t.Errorf("%s, as a client's: %v, want it accepted: %t", name, err, c.client)
		}
		all := &Certificates{}
		for i, text := range [][]byte{leaf.ChainPEM(), filesOf(t, leaf)[lab.KeyFile], mesh.CAPEM()} {
			all.text[i] = text
		}
		all.chain, all.anchors = must[[]*x509.Certificate](t)(parseCertificates(all.text[0])), must[[]*x509.Certificate](t)(parseCertificates(all.text[2]))
		all.key, _ = pem.Decode(all.text[1])
		v, err := p.try(t.Context(), all, r.RuntimeDirectory)
		if err != nil || (v.client == nil) != c.client || (v.server == nil) != c.server {
			t.Errorf("%s: the trial says %+v, %v", name, v, err)
		}
	}
}

// TestTrialEndsEnvoy: certificates that an Envoy ends over are not left where the next one meets them, and not tried a third
// time.
func TestTrialEndsEnvoy(t *testing.T) {
	r, _ := runner(t)
	ca := root(t, "mesh")
	directory := t.TempDir()
	s := &Secrets{Files: schema.TLSFiles{Directory: directory}, RuntimeDirectory: r.RuntimeDirectory, Runner: r, Log: r.Log}
	ca.leaf(t).set(t, []issuer{ca}).write(t, directory)
	if _, err := s.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	p := started(t, r)
	if _, err := s.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	ca.leaf(t).set(t, []issuer{ca}).write(t, directory)
	next := must[*Certificates](t)(LoadCertificates(s.Files, time.Now()))
	p.Stop()
	for _, want := range []string{"can't be tried", "Envoy does not accept the certificates"} {
		if err := next.trialPublication(time.Now(), bothLeaves).write(r.RuntimeDirectory); err != nil {
			t.Fatal(err)
		}
		if err := s.reject(next, p, p.Err(), time.Now()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
		text := must[[]byte](t)(os.ReadFile(rundir.Envoy(r.RuntimeDirectory).Secret(render.TrialIdentitySecret)))
		if line := strings.Split(string(pem.EncodeToMemory(next.key)), "\n")[2]; bytes.Contains(text, []byte(line)) {
			t.Error("the next Envoy meets them")
		}
	}
	started(t, r)
	if _, err := s.Update(t.Context()); err == nil || !strings.Contains(err.Error(), "Envoy does not accept the certificates") {
		t.Errorf("%v, and they were not to be tried again", err)
	}
}

// TestEndsAtStart: an Envoy that is given certificates at its start may end over them. The next one starts
// without them all the same, so that it can say what is wrong with them, and can go on with the last good ones.
func TestEndsAtStart(t *testing.T) {
	const egress = "EDG_EGRESS_PROXY_CONFIG=billing#127.137.0.1:8081#192.0.2.1:443##shop#127.137.0.2:8081#192.0.2.2:443"
	for name, isKept := range map[string]bool{"none": false, "kept": true} {
		t.Run(name, func(t *testing.T) {
			r, _ := runner(t)
			ca := root(t, "mesh")
			s := &Secrets{Files: schema.TLSFiles{Directory: t.TempDir()}, RuntimeDirectory: r.RuntimeDirectory, KeptFile: filepath.Join(t.TempDir(), "kept"), Runner: r, Log: r.Log}
			good := ca.leaf(t)
			if isKept {
				good.set(t, []issuer{ca}).write(t, s.Files.Directory)
				s.store(must[*Certificates](t)(readCertificates(s.Files)))
				s.stored = nil
			}
			ca.leaf(t, keyUsage(x509.KeyUsageKeyAgreement)).set(t, []issuer{ca}).write(t, s.Files.Directory)
			if _, err := s.Update(t.Context()); err != nil || !s.Offered() {
				t.Fatalf("offered: %t, %v", s.Offered(), err)
			}
			wanted, settings := state(t, r, egress)
			if _, err := r.Start(t.Context(), wanted, settings); err == nil {
				t.Fatal("Envoy starts with these: this tries nothing")
			}
			for range 2 {
				if _, _ = s.Update(t.Context()); !s.Offered() {
					t.Fatal("no other Envoy would be started")
				}
				p := must[*Process](t)(r.Start(t.Context(), wanted, settings))
				t.Cleanup(p.Stop)
				if _, err := s.Update(t.Context()); err == nil || !strings.Contains(err.Error(), "the leaf's key usage lacks digitalSignature") {
					t.Errorf("%v", err)
				}
				has := must[envoyCertificates](t)(must[secretTexts](t)(p.admin.secretTexts(t.Context())).parse())
				if isKept != has.chain[0].Equal(good.Certificate) || isKept == expires(s).IsZero() {
					t.Errorf("Envoy has %s, and what is good expires %s", nameOf(has.chain[0]), expires(s))
				}
				p.Stop()
			}
			good.set(t, []issuer{ca}).write(t, s.Files.Directory)
			if _, err := s.Update(t.Context()); err != nil {
				t.Fatal(err)
			}
			p := must[*Process](t)(r.Start(t.Context(), wanted, settings))
			t.Cleanup(p.Stop)
			if _, err := s.Update(t.Context()); err != nil || !expires(s).Equal(good.NotAfter) {
				t.Errorf("good ones: %v, they expire %s", err, expires(s))
			}
		})
	}
}
