package lab

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
)

// The files of a TLS directory.
const (
	ChainFile = "certChain.pem" // leaf, then intermediate
	KeyFile   = "key.pem"       // the leaf's key
	CAFile    = "mesh-ca.pem"   // the mesh CA, self-signed
)

// Authority is a mesh CA in the shape of production: ECDSA P-384 throughout, and one CA key with two certificates of the same
// subject. One is self-signed: that is the mesh CA, all that peers trust. The other, the intermediate, is signed by a root that
// peers do not know; it is the one that goes with the leaf. Leaves verify to the mesh CA since subject and key are the same.
//
// Another authority of the same name is a stranger: it has another key.
type Authority struct {
	key                *ecdsa.PrivateKey
	mesh, intermediate *x509.Certificate
}

// NewAuthority makes an authority whose CA certificates have this common name.
func NewAuthority(name string) (*Authority, error) {
	rootKey, err := newKey()
	if err != nil {
		return nil, err
	}
	a := &Authority{}
	if a.key, err = newKey(); err != nil {
		return nil, err
	}
	rootTemplate, template := authorityTemplate(name+" root"), authorityTemplate(name)
	root, err := sign(rootTemplate, rootTemplate, rootKey, rootKey)
	if err != nil {
		return nil, err
	}
	if a.mesh, err = sign(template, template, a.key, a.key); err != nil {
		return nil, err
	}
	if a.intermediate, err = sign(template, root, a.key, rootKey); err != nil {
		return nil, err
	}
	return a, nil
}

func newKey() (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generating key: %w", err)
	}
	return key, nil
}

// authorityTemplate is valid from long enough ago for leaves that are expired.
func authorityTemplate(name string) *x509.Certificate {
	return &x509.Certificate{
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             time.Now().AddDate(-1, 0, 0),
		NotAfter:              time.Now().AddDate(10, 0, 0),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
}

// NewIdentity makes an identity with these DNS names, of a mesh that has no other.
func NewIdentity(names ...string) (*Identity, error) {
	mesh, err := NewAuthority("mesh")
	if err != nil {
		return nil, err
	}
	return mesh.Issue(Leaf{DNSNames: names})
}

// Renew returns the authority with another certificate of the mesh CA, for the same key and name.
func (a *Authority) Renew() (*Authority, error) {
	template := authorityTemplate(a.mesh.Subject.CommonName)
	mesh, err := sign(template, template, a.key, a.key)
	return &Authority{key: a.key, mesh: mesh, intermediate: a.intermediate}, err
}

// Subordinate returns an authority with a key of its own, whose intermediate the authority signs: peers trust the same mesh CA,
// and leaves verify only with the intermediate.
func (a *Authority) Subordinate(name string) (*Authority, error) {
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	intermediate, err := sign(authorityTemplate(name), a.mesh, key, a.key)
	return &Authority{key: key, mesh: a.mesh, intermediate: intermediate}, err
}

// sign makes a certificate for key.
func sign(template, parent *x509.Certificate, key, signer *ecdsa.PrivateKey) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		return nil, fmt.Errorf("signing certificate of %q: %w", template.Subject.CommonName, err)
	}
	return x509.ParseCertificate(der)
}

// CAPEM returns the mesh CA as mesh-ca.pem holds it.
func (a *Authority) CAPEM() []byte { return certificatePEM(a.mesh) }

// Pool returns the mesh CA as the only thing trusted.
func (a *Authority) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.mesh)
	return pool
}

// Leaf says what a mesh certificate is to contain. Each text becomes a SAN of its kind as it stands, so "*" is possible.
type Leaf struct {
	CommonName string // the first DNS name if empty
	DNSNames   []string
	IPs        []netip.Addr
	URIs       []string
	NotBefore  time.Time          // an hour ago if zero
	NotAfter   time.Time          // in a day if zero
	Usages     []x509.ExtKeyUsage // both ends' if nil; no extension if empty
	KeyUsage   x509.KeyUsage      // digitalSignature if zero
}

// Issue makes a key and a mesh certificate for it, good for both ends of a connection.
func (a *Authority) Issue(leaf Leaf) (*Identity, error) {
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: leaf.CommonName},
		DNSNames:              leaf.DNSNames,
		NotBefore:             leaf.NotBefore,
		NotAfter:              leaf.NotAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	if leaf.Usages != nil {
		template.ExtKeyUsage = leaf.Usages
	}
	if leaf.KeyUsage != 0 {
		template.KeyUsage = leaf.KeyUsage
	}
	if leaf.CommonName == "" && len(leaf.DNSNames) > 0 {
		template.Subject.CommonName = leaf.DNSNames[0]
	}
	if leaf.NotBefore.IsZero() {
		template.NotBefore = time.Now().Add(-time.Hour)
	}
	if leaf.NotAfter.IsZero() {
		template.NotAfter = time.Now().AddDate(0, 0, 1)
	}
	for _, ip := range leaf.IPs {
		template.IPAddresses = append(template.IPAddresses, ip.AsSlice())
	}
	for _, text := range leaf.URIs {
		uri, err := url.Parse(text)
		if err != nil {
			return nil, err
		}
		template.URIs = append(template.URIs, uri)
	}
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	certificate, err := sign(template, a.intermediate, key, a.key)
	if err != nil {
		return nil, err
	}
	return &Identity{Authority: a, Leaf: certificate, Key: key}, nil
}

// Identity is what one workload has in its TLS directory.
type Identity struct {
	Authority *Authority
	Leaf      *x509.Certificate
	Key       *ecdsa.PrivateKey
}

// Write puts the three files into dir, each by rename.
func (i *Identity) Write(dir string) error {
	return i.write(func(name string, data []byte, mode os.FileMode) error {
		return renameio.WriteFile(filepath.Join(dir, name), data, mode)
	})
}

// WriteInPlace puts the three files into dir by opening, truncating and writing them, as an init container does: whoever reads
// meanwhile sees parts.
func (i *Identity) WriteInPlace(dir string) error {
	return i.write(func(name string, data []byte, mode os.FileMode) error {
		return os.WriteFile(filepath.Join(dir, name), data, mode)
	})
}

func (i *Identity) write(file func(name string, data []byte, mode os.FileMode) error) error {
	der, err := x509.MarshalPKCS8PrivateKey(i.Key)
	if err != nil {
		return fmt.Errorf("encoding key: %w", err)
	}
	return errors.Join(
		file(ChainFile, i.ChainPEM(), 0o644),
		file(KeyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600),
		file(CAFile, i.Authority.CAPEM(), 0o644),
	)
}

// ChainPEM returns leaf and intermediate as certChain.pem holds them.
func (i *Identity) ChainPEM() []byte {
	return append(certificatePEM(i.Leaf), certificatePEM(i.Authority.intermediate)...)
}

func certificatePEM(certificate *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Raw})
}

// Certificate returns chain and key for crypto/tls.
func (i *Identity) Certificate() tls.Certificate {
	return tls.Certificate{
		Certificate: [][]byte{i.Leaf.Raw, i.Authority.intermediate.Raw},
		PrivateKey:  i.Key,
		Leaf:        i.Leaf,
	}
}

// ServerConfig returns TLS 1.2 or 1.3 that demands a client certificate signed by the mesh CA.
func (i *Identity) ServerConfig() *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS12,
		Certificates: []tls.Certificate{i.Certificate()},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    i.Authority.Pool(),
	}
}

// ClientConfig returns TLS 1.2 or 1.3 that verifies the server to the mesh CA, and to serverName, which it sends as SNI, unless that
// is empty. It presents the chain to every server that asks, also to one that names other CAs: left to choose, crypto/tls would
// present nothing, and a test of foreign certificates would test missing ones. For those set GetClientCertificate to nil.
func (i *Identity) ClientConfig(serverName string) *tls.Config {
	certificate := i.Certificate()
	config := &tls.Config{
		MinVersion: tls.VersionTLS12,
		ServerName: serverName,
		RootCAs:    i.Authority.Pool(),
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &certificate, nil
		},
	}
	if serverName == "" {
		config.InsecureSkipVerify = true // crypto/tls verifies with a name or not at all
		config.VerifyConnection = i.Authority.verify
	}
	return config
}

// verify verifies a server's chain, whatever its name.
func (a *Authority) verify(state tls.ConnectionState) error {
	intermediates := x509.NewCertPool()
	for _, certificate := range state.PeerCertificates[1:] {
		intermediates.AddCert(certificate)
	}
	_, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{
		Roots: a.Pool(), Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	return err
}
