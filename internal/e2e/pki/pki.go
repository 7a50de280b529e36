// Package pki is the mesh CA of the cluster's pods: what a confidential cluster's coordinator is in production.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// The files of a TLS directory, and the two that only the CA has.
const (
	chainFile        = "certChain.pem"
	keyFile          = "key.pem"
	meshFile         = "mesh-ca.pem"
	intermediateFile = "intermediate.pem"
	signerFile       = "ca-key.pem"
)

// NewAuthority writes a new CA into a directory. Its one key has two certificates of the same subject: the mesh CA is
// self-signed and is what peers trust, the intermediate is signed by a root that peers do not know.
func NewAuthority(directory string) error {
	root, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return err
	}
	ca := func(name string) *x509.Certificate {
		return &x509.Certificate{
			Subject:               pkix.Name{CommonName: name},
			NotBefore:             time.Now().Add(-time.Hour),
			NotAfter:              time.Now().AddDate(0, 0, 10),
			KeyUsage:              x509.KeyUsageCertSign,
			BasicConstraintsValid: true,
			IsCA:                  true,
		}
	}
	mesh, err := x509.CreateCertificate(rand.Reader, ca("mesh"), ca("mesh"), key.Public(), key)
	if err != nil {
		return err
	}
	intermediate, err := x509.CreateCertificate(rand.Reader, ca("mesh"), ca("root"), key.Public(), root)
	if err != nil {
		return err
	}
	return errors.Join(
		writeKey(directory, signerFile, key),
		writeCertificates(directory, meshFile, mesh),
		writeCertificates(directory, intermediateFile, intermediate),
	)
}

// Issue signs a certificate with these DNS names, and with a SPIFFE ID of the last one, by the CA of a directory, and writes
// the three files of a TLS directory. The key comes last: readers have all once it is there.
func Issue(authority, directory string, names ...string) error {
	if err := os.MkdirAll(directory, 0o755); err != nil {
		return err
	}
	signer, err := readKey(filepath.Join(authority, signerFile))
	if err != nil {
		return err
	}
	mesh, err := readCertificate(filepath.Join(authority, meshFile))
	if err != nil {
		return err
	}
	intermediate, err := readCertificate(filepath.Join(authority, intermediateFile))
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return err
	}
	leaf, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		Subject:     pkix.Name{CommonName: names[0]},
		DNSNames:    names,
		URIs:        []*url.URL{{Scheme: "spiffe", Host: "mesh", Path: "/" + names[len(names)-1]}},
		NotBefore:   time.Now().Add(-time.Hour),
		NotAfter:    time.Now().AddDate(0, 0, 1),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, mesh, key.Public(), signer)
	if err != nil {
		return err
	}
	return errors.Join(
		writeCertificates(directory, chainFile, leaf, intermediate.Raw),
		writeCertificates(directory, meshFile, mesh.Raw),
		writeKey(directory, keyFile, key),
	)
}

func writeCertificates(directory, name string, certificates ...[]byte) error {
	var text strings.Builder
	for _, der := range certificates {
		text.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	return os.WriteFile(filepath.Join(directory, name), []byte(text.String()), 0o644)
}

func writeKey(directory, name string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(directory, name), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}

func readCertificate(file string) (*x509.Certificate, error) {
	der, err := readPEM(file)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func readKey(file string) (crypto.PrivateKey, error) {
	der, err := readPEM(file)
	if err != nil {
		return nil, err
	}
	return x509.ParsePKCS8PrivateKey(der)
}

func readPEM(file string) ([]byte, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, fmt.Errorf("%s holds no PEM", file)
	}
	return block.Bytes, nil
}
