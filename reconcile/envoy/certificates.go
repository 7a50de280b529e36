package envoy

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"

	"mantlet/reconcile"
	"mantlet/render"
	"mantlet/schema"
)

// The files of the TLS directory.
const (
	chainFile  = "certChain.pem" // the leaf, then intermediates
	keyFile    = "key.pem"
	meshCAFile = "mesh-ca.pem"
)

// TLSFiles returns the names of the TLS directory's files.
func TLSFiles() []string { return []string{chainFile, keyFile, meshCAFile} }

// Secrets keeps Envoy supplied with the certificates of the TLS directory.
type Secrets struct {
	TLSDirectory     string
	RuntimeDirectory string
	Runner           *Runner
	Log              *slog.Logger

	mu        sync.Mutex
	published *Certificates // never changed again; another one takes its place

	torn bool // a generation was published in part; Update alone looks at it
}

// has returns what Envoy has; nil for nothing.
func (s *Secrets) has() *Certificates {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.published
}

// Update publishes the generation that is in the TLS directory, if it is good and not published yet. Where it is not good
// the error says why, and Envoy keeps what it has.
//
// revoked tells that a mesh CA which the generation before had is gone. Update then returns once Envoy has read it, as far
// as Envoy tells: a connection that it lets in from then on is not by the old CA.
func (s *Secrets) Update(ctx context.Context) (revoked bool, err error) {
	read, err := readCertificates(s.TLSDirectory)
	published := s.has()
	if err != nil || read.Equal(published) && !s.torn { // as a rule: a look at the bytes spares the signatures
		return false, err
	}
	if err := read.check(s.TLSDirectory, time.Now()); err != nil {
		return false, err
	}
	revoked = !read.trustsAllOf(cmp.Or(published, s.former())) || s.torn && !read.trustsAllOf(s.former())
	seen := s.Runner.caReads(ctx)
	err = Publish(read, s.RuntimeDirectory, time.Now())
	if s.torn = err != nil; s.torn {
		return false, err
	}
	s.mu.Lock()
	s.published = read
	s.mu.Unlock()
	s.Runner.refused.own.Store(read)
	s.Log.Info("certificates published", "subject", read.certs[0].Subject.String(), "sans", read.certs[0].DNSNames, "expires", read.expires)
	if client, server := ends(read.certs[0]); !client || !server {
		s.Log.Warn("peers accept the certificate at one end only", "client", client, "server", server,
			"extended_key_usage", usages(read.certs[0]), "remedy", "issue it with serverAuth and clientAuth, unless connections go one way only")
	}
	if revoked {
		s.Log.Info("a mesh CA was taken away: connections that were let in before end")
	}
	if revoked && published != nil && s.Runner.serving() != nil {
		s.awaitRead(ctx, seen)
	}
	return revoked, nil
}

// former returns what a mantlet before this one, that was killed, has published: nothing but its mesh CAs are asked for.
func (s *Secrets) former() *Certificates {
	anchors, err := parse(published(s.RuntimeDirectory, render.MeshCASecret))
	if err != nil {
		return &Certificates{}
	}
	return &Certificates{anchors: anchors}
}

// readLimit bounds how long Envoy may take to read what was published; 30 ms as a rule.
const readLimit = 2 * time.Second

func (s *Secrets) awaitRead(ctx context.Context, seen int) {
	ctx, cancel := context.WithTimeout(ctx, readLimit)
	defer cancel()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for s.Runner.caReads(ctx) <= seen {
		select {
		case <-tick.C:
		case <-ctx.Done():
			s.Log.Warn("Envoy has not said that it read the mesh CA")
			return
		}
	}
}

// Renew publishes the last generation once more, and returns once Envoy has read it, as far as Envoy tells. That ends all TLS
// session tickets, see Publish.
func (s *Secrets) Renew(ctx context.Context) error {
	published := s.has()
	if published == nil {
		return nil
	}
	seen := s.Runner.caReads(ctx)
	if err := Publish(published, s.RuntimeDirectory, time.Now()); err != nil {
		return err
	}
	if s.Runner.serving() != nil {
		s.awaitRead(ctx, seen)
	}
	return nil
}

// Expires returns when the first certificate of what Envoy has does; the zero time where it has nothing.
func (s *Secrets) Expires() time.Time {
	published := s.has()
	if published == nil {
		return time.Time{}
	}
	return published.expires
}

// Valid returns why peers do not accept, at a time, what Envoy has; nil where they do, or where it has nothing.
func (s *Secrets) Valid(now time.Time) error {
	published := s.has()
	if published == nil {
		return nil
	}
	_, err := published.verify(now)
	return err
}

// Certificates describes what Envoy has: the chain, then the mesh CAs.
func (s *Secrets) Certificates() []reconcile.Certificate {
	published := s.has()
	if published == nil {
		return nil
	}
	var all []reconcile.Certificate
	describe := func(role string, c *x509.Certificate) {
		all = append(all, reconcile.Certificate{
			Role: role, Subject: c.Subject.String(), SANs: sans(c), NotBefore: c.NotBefore, NotAfter: c.NotAfter,
		})
	}
	for i, c := range published.certs {
		if i == 0 {
			describe(reconcile.RoleLeaf, c)
		} else {
			describe(reconcile.RoleIntermediate, c)
		}
	}
	for _, c := range published.anchors {
		describe(reconcile.RoleMeshCA, c)
	}
	return all
}

// sans returns a certificate's names, those that mantlet and Envoy look at.
func sans(c *x509.Certificate) []string {
	names := append([]string{}, c.DNSNames...)
	for _, uri := range c.URIs {
		names = append(names, uri.String())
	}
	return names
}

// Certificates is one matched generation of the TLS directory: what LoadCertificates returned without an error, and so
// what peers will accept until it expires.
type Certificates struct {
	chain, key, meshCA []byte
	certs              []*x509.Certificate // of the chain, the leaf first
	anchors            []*x509.Certificate
	expires            time.Time             // the first certificate of the chain that does
	verified           [][]*x509.Certificate // the ways from the leaf to a mesh CA that were found when they were checked
}

// Equal reports whether both hold the same bytes.
func (c *Certificates) Equal(other *Certificates) bool {
	return c != nil && other != nil &&
		string(c.chain) == string(other.chain) && string(c.key) == string(other.key) && string(c.meshCA) == string(other.meshCA)
}

// trustsAllOf reports whether every mesh CA of the other generation is among those of c, be it by a certificate with another
// life.
func (c *Certificates) trustsAllOf(other *Certificates) bool {
	return !slices.ContainsFunc(other.anchors, func(anchor *x509.Certificate) bool {
		return !slices.ContainsFunc(c.anchors, func(one *x509.Certificate) bool {
			return bytes.Equal(one.RawSubject, anchor.RawSubject) && reflect.DeepEqual(one.Extensions, anchor.Extensions) &&
				bytes.Equal(one.RawSubjectPublicKeyInfo, anchor.RawSubjectPublicKeyInfo)
		})
	})
}

// LoadCertificates reads a generation and checks what Envoy would not: that all three files are there, the key is the
// leaf's, the chain verifies up to the mesh CA, and nothing is expired or not valid yet at now. The error names the file.
func LoadCertificates(directory string, now time.Time) (*Certificates, error) {
	c, err := readCertificates(directory)
	if err == nil {
		err = c.check(directory, now)
	}
	if err != nil {
		return nil, err
	}
	return c, nil
}

// maxTLSFile is what a ConfigMap or a Secret can hold: some thousand certificates.
const maxTLSFile = 1 << 20

func readCertificates(directory string) (*Certificates, error) {
	var errs []error
	read := func(name string) []byte {
		path := filepath.Join(directory, name)
		data, err := schema.ReadFile(path, maxTLSFile)
		if err == nil && len(data) > maxTLSFile {
			err = fmt.Errorf("%s: is larger than %d bytes", path, maxTLSFile)
		}
		if err != nil {
			errs = append(errs, err)
		}
		return data
	}
	c := &Certificates{chain: read(chainFile), key: read(keyFile), meshCA: read(meshCAFile)}
	return c, errors.Join(errs...)
}

func (c *Certificates) check(directory string, now time.Time) error {
	in := func(name string, err error) error { return fmt.Errorf("%s: %w", filepath.Join(directory, name), err) }
	chain, err := parse(c.chain)
	if err != nil {
		return in(chainFile, err)
	}
	anchors, err := parse(c.meshCA)
	if err != nil {
		return in(meshCAFile, err)
	}
	// X509KeyPair's errors speak of the key; a certificate that it can't read was found above.
	pair, err := tls.X509KeyPair(c.chain, c.key)
	if err != nil {
		for i, cert := range chain[1:] {
			if _, err := tls.X509KeyPair(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), c.key); err == nil {
				return in(chainFile, fmt.Errorf("the key is that of certificate %d; the leaf must come first, and then what signed it", i+2))
			}
		}
		return in(keyFile, err)
	}
	if err := usable(pair.PrivateKey); err != nil {
		return in(keyFile, err)
	}
	if client, server := ends(chain[0]); !client && !server {
		return in(chainFile, fmt.Errorf("the leaf (%s) is good for neither end of a connection: its extended key usage is %s; "+
			"it should have serverAuth and clientAuth, or no such extension", chain[0].Subject, usages(chain[0])))
	}
	c.certs, c.anchors, c.expires = chain, anchors, chain[0].NotAfter
	for _, cert := range chain {
		if cert.NotAfter.Before(c.expires) {
			c.expires = cert.NotAfter
		}
	}
	if c.verified, err = c.verify(now); err != nil {
		return in(chainFile, err)
	}
	return nil
}

// usable refuses keys with which Envoy would be live and no handshake of the mesh succeed: it refuses small ones itself,
// and P-521 and Ed25519 where peers show them.
func usable(key any) error {
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

// ends tells at which ends of a connection peers accept a leaf. BoringSSL does not take anyExtendedKeyUsage for either.
func ends(leaf *x509.Certificate) (client, server bool) {
	if len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) == 0 {
		return true, true
	}
	return slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth), slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
}

// usages are a leaf's extended key usages in words.
func usages(leaf *x509.Certificate) string {
	var names []string
	for _, u := range leaf.ExtKeyUsage {
		names = append(names, u.String())
	}
	for _, u := range leaf.UnknownExtKeyUsage {
		names = append(names, u.String())
	}
	return strings.Join(names, ", ")
}

// verify does what a peer does with the chain at a time, and returns its ways to a mesh CA. Signatures stay good: of a way
// that was verified only the times are looked at again. Readiness asks often, while Envoy starts.
func (c *Certificates) verify(now time.Time) ([][]*x509.Certificate, error) {
	for i, cert := range c.certs {
		if now.After(cert.NotAfter) {
			return nil, fmt.Errorf("certificate %d (%s) expired at %s", i+1, cert.Subject, cert.NotAfter.Format(time.RFC3339))
		}
		if now.Before(cert.NotBefore) {
			return nil, fmt.Errorf("certificate %d (%s) is not valid before %s: is the clock right?", i+1, cert.Subject, cert.NotBefore.Format(time.RFC3339))
		}
	}
	if slices.ContainsFunc(c.verified, func(way []*x509.Certificate) bool {
		return !slices.ContainsFunc(way, func(cert *x509.Certificate) bool { return now.Before(cert.NotBefore) || now.After(cert.NotAfter) })
	}) {
		return c.verified, nil
	}
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, cert := range c.anchors {
		roots.AddCert(cert)
	}
	for _, cert := range c.certs[1:] {
		intermediates.AddCert(cert)
	}
	ways, err := c.certs[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return nil, fmt.Errorf("the leaf (%s) does not verify up to %s: %w", c.certs[0].Subject, meshCAFile, err)
	}
	return ways, nil
}

// parse returns the certificates of a PEM text, at least one.
func parse(text []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	block, rest := pem.Decode(text)
	for ; block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("holds a PEM block %q; only CERTIFICATE belongs here", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(certs)+1, err)
		}
		certs = append(certs, cert)
	}
	// pem.Decode passes over a block that is cut off; Envoy would refuse the whole.
	if bytes.Contains(rest, []byte("-----BEGIN")) {
		return nil, errors.New("ends within a PEM block; is it still being written?")
	}
	if len(certs) == 0 {
		return nil, errors.New("holds no certificate in PEM")
	}
	return certs, nil
}

// Publish gives a generation to Envoy as SDS files in the runtime directory, each replaced by a rename, which is the only
// event that Envoy reads them anew at. The key and its chain are one resource, so they never mix with another generation's.
//
// The text that Envoy gets differs at each call, in a line before the PEM: with new content all TLS session tickets end.
// Nothing else ends them when a client's certificate expires.
func Publish(c *Certificates, runtimeDirectory string, now time.Time) error {
	stamp := fmt.Appendf(nil, "published %s\n", now.Format(time.RFC3339Nano))
	inline := func(data []byte) *corev3.DataSource {
		return &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: string(data)}}
	}
	secrets := []*tlsv3.Secret{
		{Name: render.MeshCASecret, Type: &tlsv3.Secret_ValidationContext{
			ValidationContext: &tlsv3.CertificateValidationContext{TrustedCa: inline(c.meshCA)},
		}},
		{Name: render.IdentitySecret, Type: &tlsv3.Secret_TlsCertificate{
			TlsCertificate: &tlsv3.TlsCertificate{CertificateChain: inline(slices.Concat(stamp, c.chain)), PrivateKey: inline(c.key)},
		}},
	}
	for _, s := range secrets {
		text, err := discoveryResponse(s)
		if err != nil {
			return fmt.Errorf("marshalling secret %s: %w", s.Name, err)
		}
		path := filepath.Join(runtimeDirectory, render.SecretFile(s.Name))
		if err := writeFile(path, text); err != nil {
			return fmt.Errorf("publishing secret %s: %w", s.Name, err)
		}
	}
	return nil
}

// discoveryResponse is envoy.service.discovery.v3.DiscoveryResponse with one resource. Its Go type would bring in gRPC.
func discoveryResponse(s *tlsv3.Secret) ([]byte, error) {
	resource, err := anypb.New(s)
	if err != nil {
		return nil, err
	}
	text, err := protojson.Marshal(resource)
	if err != nil {
		return nil, err
	}
	return json.Marshal(map[string][]json.RawMessage{"resources": {text}})
}
