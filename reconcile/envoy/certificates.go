package envoy

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"reflect"
	"slices"
	"strings"
	"time"

	"mantlet/schema"
)

// Certificates are one generation of the TLS directory: a chain, its key and the mesh CAs.
//
// Whether peers accept them is for Envoy to say, see trial. What is looked at here costs less, and says more plainly what
// is wrong; it rejects nothing that Envoy takes.
type Certificates struct {
	paths [3]string // of the files: chain, key, mesh CAs
	text  [3][]byte // of the files

	chain          []*x509.Certificate // the leaf first
	key            *pem.Block
	anchors        []*x509.Certificate   // the mesh CAs
	verifiedChains [][]*x509.Certificate // from the leaf to a mesh CA, as Go verifies; each begins with the leaf
	verifyErr      error                 // why there is none
}

// placeholder returns certificates that every Envoy starts with, and that nobody accepts or is accepted by: the CA's key is gone.
func placeholder(now time.Time) (*Certificates, error) {
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "placeholder"}, NotBefore: now, NotAfter: now}
	selfSigned := func() (*x509.Certificate, *ecdsa.PrivateKey, error) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, nil, err
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			return nil, nil, err
		}
		cert, err := x509.ParseCertificate(der)
		return cert, key, err
	}
	leaf, key, err := selfSigned()
	if err != nil {
		return nil, err
	}
	anchor, _, err := selfSigned()
	if err != nil {
		return nil, err
	}
	text, err := x509.MarshalPKCS8PrivateKey(key)
	return &Certificates{
		chain: []*x509.Certificate{leaf}, key: &pem.Block{Type: "PRIVATE KEY", Bytes: text}, anchors: []*x509.Certificate{anchor},
	}, err
}

// Equal reports whether both were read from the same bytes.
func (c *Certificates) Equal(other *Certificates) bool {
	return c != nil && other != nil && slices.EqualFunc(c.text[:], other.text[:], bytes.Equal)
}

// LoadCertificates reads a generation and checks what can be told without Envoy. The error names the file and, within it,
// the block.
func LoadCertificates(files schema.TLSFiles, now time.Time) (*Certificates, error) {
	c, err := readCertificates(files)
	if err == nil {
		err = c.check(now)
	}
	if err != nil {
		return nil, err
	}
	return c, nil
}

// maxTLSFile is what a ConfigMap or a Secret can hold: some thousand certificates.
const maxTLSFile = 1 << 20

func readCertificates(files schema.TLSFiles) (*Certificates, error) {
	paths, err := files.Paths(func(path string) bool {
		_, err := os.Lstat(path)
		return err == nil
	})
	if err != nil {
		return nil, err
	}
	c := &Certificates{paths: paths}
	var errs []error
	for i, path := range c.paths {
		text, err := schema.ReadFile(path, maxTLSFile)
		switch {
		case err != nil:
			err = explainUnreadable(path, err)
		case len(text) > maxTLSFile:
			err = fmt.Errorf("%s: is larger than %d bytes", path, maxTLSFile)
		}
		c.text[i] = text
		errs = append(errs, err)
	}
	return c, errors.Join(errs...)
}

// check parses what was read, and rejects what no Envoy could use.
func (c *Certificates) check(now time.Time) (err error) {
	paths := c.paths
	in := func(path string, err error) error { return fmt.Errorf("%s: %w", path, err) }
	if c.chain, err = parseCertificates(c.text[0]); err != nil {
		return in(paths[0], err)
	}
	key, block, err := parseKey(c.text[1])
	if err != nil {
		return in(paths[1], err)
	}
	if c.anchors, err = parseCertificates(c.text[2]); err != nil {
		return in(paths[2], err)
	}
	c.key = block
	switch owner := slices.IndexFunc(c.chain, func(cert *x509.Certificate) bool { return isKeyOf(key, cert) }); {
	case owner < 0:
		return in(paths[1], fmt.Errorf("is not the key of the leaf (%s)", nameOf(c.chain[0])))
	case owner > 0:
		return in(paths[0], fmt.Errorf("the key is that of certificate %d; the leaf must come first, and then what signed it", owner+1))
	}
	if err := checkKey(key); err != nil {
		return in(paths[1], err)
	}
	if client, server := allowedUsages(c.chain[0]); !client && !server {
		return in(paths[0], fmt.Errorf("the leaf (%s) is good for neither end of a connection: its extended key usage is %s; "+
			"it should have serverAuth and clientAuth, or no such extension", nameOf(c.chain[0]), usageNames(c.chain[0])))
	}
	if err := c.checkValidity(c.chain[0], now); err != nil {
		return in(paths[0], err)
	}
	if c.verifiedChains, err = c.verify(now); err != nil {
		c.verifyErr = in(paths[0], err)
	}
	return nil
}

// isKeyOf reports whether a key is the one that a certificate is for.
func isKeyOf(key crypto.Signer, cert *x509.Certificate) bool {
	public, ok := cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	return ok && public.Equal(key.Public())
}

// checkKey refuses keys with which Envoy would be live and no handshake of the mesh succeed: it refuses small ones itself,
// and P-521 and Ed25519 where peers show them.
func checkKey(key any) error {
	const right = "Envoy wants ECDSA with P-256 or P-384, or RSA with 2048 bits at least"
	switch key := key.(type) {
	case *ecdsa.PrivateKey:
		if key.Curve != elliptic.P256() && key.Curve != elliptic.P384() {
			return fmt.Errorf("has an ECDSA key with %s; %s", key.Curve.Params().Name, right)
		}
	case *rsa.PrivateKey:
		if bits := key.N.BitLen(); bits < 2048 {
			return fmt.Errorf("has an RSA key with %d bits; %s", bits, right)
		}
	default:
		return fmt.Errorf("has a key of type %T; %s", key, right)
	}
	return nil
}

// allowedUsages tells at which ends of a connection peers may accept a leaf, by its own extended key usage. BoringSSL does not take
// anyExtendedKeyUsage for either.
func allowedUsages(leaf *x509.Certificate) (client, server bool) {
	if len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) == 0 {
		return true, true
	}
	return slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth), slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
}

// usageNames are a leaf's extended key usages in words.
func usageNames(leaf *x509.Certificate) string {
	var names []string
	for _, u := range leaf.ExtKeyUsage {
		names = append(names, u.String())
	}
	for _, u := range leaf.UnknownExtKeyUsage {
		names = append(names, u.String())
	}
	return strings.Join(names, ", ")
}

// trustsAllOf reports whether every mesh CA of the other generation is among those of c, be it by a certificate with another
// life.
func (c *Certificates) trustsAllOf(other *Certificates) bool {
	return !slices.ContainsFunc(other.anchors, func(anchor *x509.Certificate) bool { return !c.trusts(anchor) })
}

func (c *Certificates) trusts(anchor *x509.Certificate) bool {
	return slices.ContainsFunc(c.anchors, func(one *x509.Certificate) bool {
		return sameCA(one, anchor) && reflect.DeepEqual(one.Extensions, anchor.Extensions)
	})
}

// sameCA reports whether two certificates are of one CA: what the one verifies, the other does, while it is valid.
func sameCA(a, b *x509.Certificate) bool {
	return bytes.Equal(a.RawSubject, b.RawSubject) && bytes.Equal(a.RawSubjectPublicKeyInfo, b.RawSubjectPublicKeyInfo)
}

// verify returns the ways from the leaf to a mesh CA at a time, as Go verifies them: whatever the leaf's usage. The error
// says in words why there is none.
func (c *Certificates) verify(now time.Time) ([][]*x509.Certificate, error) {
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, cert := range c.anchors {
		roots.AddCert(cert)
	}
	for _, cert := range c.chain[1:] {
		intermediates.AddCert(cert)
	}
	ways, err := c.chain[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return nil, c.explain(err, now)
	}
	return ways, nil
}

// valid returns why peers do not accept at a time what they accepted when it was checked; nil where they do. Signatures stay
// good, so it looks at times alone, and costs little: readiness asks often. A certificate that no way leads over does not
// count.
func (c *Certificates) valid(now time.Time) error {
	if err := c.checkValidity(c.chain[0], now); err != nil || c.verifyErr != nil {
		return err
	}
	if slices.ContainsFunc(c.verifiedChains, func(way []*x509.Certificate) bool {
		return !slices.ContainsFunc(way, func(cert *x509.Certificate) bool { return now.Before(cert.NotBefore) || now.After(cert.NotAfter) })
	}) {
		return nil
	}
	_, err := c.verify(now)
	return err
}

// validityChanges reports whether a certificate of the generation comes to be valid, or ceases to be, between two times.
func (c *Certificates) validityChanges(from, to time.Time) bool {
	if from.After(to) { // the clock was set back
		from, to = to, from
	}
	between := func(t time.Time) bool { return !t.Before(from) && !t.After(to) }
	return slices.ContainsFunc(slices.Concat(c.chain, c.anchors), func(cert *x509.Certificate) bool {
		return between(cert.NotBefore) || between(cert.NotAfter)
	})
}

// longestChain returns the way that peers can go for the longest time. Where Go finds none although Envoy does, each certificate of the
// chain counts.
func (c *Certificates) longestChain() []*x509.Certificate {
	if len(c.verifiedChains) == 0 {
		return c.chain
	}
	return slices.MaxFunc(c.verifiedChains, func(a, b []*x509.Certificate) int { return chainExpiry(a).Compare(chainExpiry(b)) })
}

// chainExpiry returns when the first certificate of a way expires.
func chainExpiry(way []*x509.Certificate) time.Time {
	return slices.MinFunc(way, func(a, b *x509.Certificate) int { return a.NotAfter.Compare(b.NotAfter) }).NotAfter
}

// expires returns when the last way ends, as far as is known.
func (c *Certificates) expires() time.Time {
	if len(c.verifiedChains) == 0 {
		return c.chain[0].NotAfter
	}
	return chainExpiry(c.longestChain())
}

// checkValidity returns an error if a certificate of the generation is not valid at a time.
func (c *Certificates) checkValidity(cert *x509.Certificate, now time.Time) error {
	switch {
	case now.After(cert.NotAfter):
		return fmt.Errorf("%s expired at %s", c.position(cert), cert.NotAfter.Format(time.RFC3339))
	case now.Before(cert.NotBefore):
		return fmt.Errorf("%s is not valid before %s: is the clock right?", c.position(cert), cert.NotBefore.Format(time.RFC3339))
	}
	return nil
}

// orderedAnchors returns the mesh CAs in the order that Envoy gets them in. Of several certificates for one CA it tries the first
// alone, so that one comes first that is valid, and then the one that lasts longest.
func (c *Certificates) orderedAnchors(now time.Time) []*x509.Certificate {
	ordered := slices.Clone(c.anchors)
	for i := range ordered {
		best := i
		for j := i + 1; j < len(ordered); j++ {
			if sameCA(ordered[i], ordered[j]) && preferred(ordered[j], ordered[best], now) {
				best = j
			}
		}
		ordered[i], ordered[best] = ordered[best], ordered[i]
	}
	return ordered
}

func preferred(a, b *x509.Certificate, now time.Time) bool {
	valid := func(c *x509.Certificate) int {
		if now.Before(c.NotBefore) || now.After(c.NotAfter) {
			return 0
		}
		return 1
	}
	return cmp.Or(cmp.Compare(valid(a), valid(b)), a.NotAfter.Compare(b.NotAfter)) > 0
}
