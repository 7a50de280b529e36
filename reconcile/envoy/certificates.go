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

// Certificates are one set of the TLS directory's files: a certificate chain, its key and the mesh CAs.
//
// Envoy decides whether peers accept them, see Process.try. The checks here are cheaper, and their errors are plainer. They reject
// nothing that Envoy accepts.
type Certificates struct {
	paths [3]string // of the files: chain, key, mesh CAs
	text  [3][]byte // of the files

	chain          []*x509.Certificate // the leaf first
	key            *pem.Block
	anchors        []*x509.Certificate   // the mesh CAs
	verifiedChains [][]*x509.Certificate // by crypto/x509, each from the leaf to a mesh CA
	verifyErr      error                 // why there is no verified chain
}

// placeholder returns certificates that no peer accepts, and that accept no peer: their keys are not kept. Every Envoy can start with
// them.
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

// LoadCertificates reads a set and checks what can be checked without Envoy. The error names the file and the PEM block in it.
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

// maxTLSFile is the limit of a ConfigMap and of a Secret. Some thousand certificates fit into it.
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

// check parses the files, and rejects what no Envoy could use.
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

// isKeyOf reports whether a private key belongs to a certificate.
func isKeyOf(key crypto.Signer, cert *x509.Certificate) bool {
	public, ok := cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	return ok && public.Equal(key.Public())
}

// checkKey rejects keys with which Envoy starts, or would not, and every handshake of the mesh fails. Envoy itself rejects RSA keys that
// are too short. Its peers do not accept P-521 and Ed25519.
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

// allowedUsages reports whether peers may accept a leaf as a client's and as a server's certificate, by its extended key usage. BoringSSL
// accepts anyExtendedKeyUsage for neither.
func allowedUsages(leaf *x509.Certificate) (client, server bool) {
	if len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) == 0 {
		return true, true
	}
	return slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth), slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
}

// usageNames returns a leaf's extended key usages as text.
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

// trustsAllOf reports whether c has every mesh CA of another set. A CA that was issued anew, with other validity times, counts as the
// same.
func (c *Certificates) trustsAllOf(other *Certificates) bool {
	return !slices.ContainsFunc(other.anchors, func(anchor *x509.Certificate) bool { return !c.trusts(anchor) })
}

func (c *Certificates) trusts(anchor *x509.Certificate) bool {
	return slices.ContainsFunc(c.anchors, func(one *x509.Certificate) bool {
		return sameCA(one, anchor) && reflect.DeepEqual(one.Extensions, anchor.Extensions)
	})
}

// sameCA reports whether two certificates are of one CA, by name and key. What one of them verifies, the other verifies too while it is
// valid.
func sameCA(a, b *x509.Certificate) bool {
	return bytes.Equal(a.RawSubject, b.RawSubject) && bytes.Equal(a.RawSubjectPublicKeyInfo, b.RawSubjectPublicKeyInfo)
}

// verify returns the chains from the leaf to a mesh CA at a time, as crypto/x509 finds them, whatever the leaf's key usage. The error
// says in words why there is none.
func (c *Certificates) verify(now time.Time) ([][]*x509.Certificate, error) {
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, cert := range c.anchors {
		roots.AddCert(cert)
	}
	for _, cert := range c.chain[1:] {
		intermediates.AddCert(cert)
	}
	chains, err := c.chain[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return nil, c.explain(err, now)
	}
	return chains, nil
}

// valid returns why peers do not accept at a time what they accepted when it was checked; nil where they do. Signatures do not change, so
// only times are compared: that is cheap enough for readiness probes. Certificates that are in no verified chain do not count.
func (c *Certificates) valid(now time.Time) error {
	if err := c.checkValidity(c.chain[0], now); err != nil || c.verifyErr != nil {
		return err
	}
	if slices.ContainsFunc(c.verifiedChains, func(chain []*x509.Certificate) bool {
		return !slices.ContainsFunc(chain, func(cert *x509.Certificate) bool { return now.Before(cert.NotBefore) || now.After(cert.NotAfter) })
	}) {
		return nil
	}
	_, err := c.verify(now)
	return err
}

// validityChanges reports whether a certificate of the set becomes valid or expires between two times.
func (c *Certificates) validityChanges(from, to time.Time) bool {
	if from.After(to) { // the clock was set back
		from, to = to, from
	}
	between := func(t time.Time) bool { return !t.Before(from) && !t.After(to) }
	return slices.ContainsFunc(slices.Concat(c.chain, c.anchors), func(cert *x509.Certificate) bool {
		return between(cert.NotBefore) || between(cert.NotAfter)
	})
}

// longestChain returns the verified chain that is valid for the longest time. Where crypto/x509 verifies none although Envoy does, it
// returns the chain of the file.
func (c *Certificates) longestChain() []*x509.Certificate {
	if len(c.verifiedChains) == 0 {
		return c.chain
	}
	return slices.MaxFunc(c.verifiedChains, func(a, b []*x509.Certificate) int { return chainExpiry(a).Compare(chainExpiry(b)) })
}

// chainExpiry returns when the first certificate of a chain expires.
func chainExpiry(chain []*x509.Certificate) time.Time {
	return slices.MinFunc(chain, func(a, b *x509.Certificate) int { return a.NotAfter.Compare(b.NotAfter) }).NotAfter
}

// expires returns when the last verified chain expires; where there is none, when the leaf does.
func (c *Certificates) expires() time.Time {
	if len(c.verifiedChains) == 0 {
		return c.chain[0].NotAfter
	}
	return chainExpiry(c.longestChain())
}

// checkValidity returns an error if a certificate of the set is not valid at a time.
func (c *Certificates) checkValidity(cert *x509.Certificate, now time.Time) error {
	switch {
	case now.After(cert.NotAfter):
		return fmt.Errorf("%s expired at %s", c.position(cert), cert.NotAfter.Format(time.RFC3339))
	case now.Before(cert.NotBefore):
		return fmt.Errorf("%s is not valid before %s: is the clock right?", c.position(cert), cert.NotBefore.Format(time.RFC3339))
	}
	return nil
}

// orderedAnchors returns the mesh CAs in the order in which Envoy gets them. Of several certificates of one CA, Envoy tries only the
// first. So the valid ones come first, and of these the one that expires last.
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
