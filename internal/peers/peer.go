package peers

import (
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"net/url"
	"slices"
	"time"

	"mantlet/schema"
)

// Peer is whom a certificate is for. It is never changed.
type Peer struct {
	DNSNames, URIs []string // as they stand in the certificate
	der            []byte
}

// maxCertificate bounds the text of a certificate; one with a hundred names takes a tenth of it.
const maxCertificate = 32 << 10

// parse reads a certificate in Envoy's form: PEM in URL encoding.
func parse(text string) (*Peer, error) {
	if len(text) > maxCertificate {
		return nil, fmt.Errorf("a certificate of %d bytes is too long", len(text))
	}
	plain, err := url.PathUnescape(text)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode([]byte(plain))
	if block == nil {
		return nil, fmt.Errorf("%.20q is no certificate", plain)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, err
	}
	p := &Peer{DNSNames: cert.DNSNames, der: block.Bytes}
	p.URIs, err = uris(cert)
	return p, err
}

// uris returns the URIs of a certificate byte by byte. Those that crypto/x509 parses are in a normal form, which Envoy does not compare.
func uris(cert *x509.Certificate) (all []string, err error) {
	subjectAltName := asn1.ObjectIdentifier{2, 5, 29, 17} // RFC 5280, section 4.2.1.6
	for _, e := range cert.Extensions {
		if !e.Id.Equal(subjectAltName) {
			continue
		}
		var names []asn1.RawValue
		if _, err := asn1.Unmarshal(e.Value, &names); err != nil {
			return nil, fmt.Errorf("reading the subject's alternative names: %w", err)
		}
		for _, name := range names {
			if name.Class == asn1.ClassContextSpecific && name.Tag == 6 { // uniformResourceIdentifier
				all = append(all, string(name.Bytes))
			}
		}
	}
	return all, nil
}

// Names returns all of its names.
func (p *Peer) Names() []string { return slices.Concat(p.DNSNames, p.URIs) }

// IsListed reports whether a list of clients names it, by whole strings. No list names everybody.
func (p *Peer) IsListed(allow []string) bool {
	return allow == nil || slices.ContainsFunc(allow, func(name string) bool {
		if schema.IsURI(name) {
			return slices.Contains(p.URIs, name)
		}
		return slices.Contains(p.DNSNames, name)
	})
}

// Serves reports whether it is an endpoint of one of these names, where a wildcard of its certificate may cover a DNS name. No list
// names everybody.
func (p *Peer) Serves(names []string) bool {
	if names == nil {
		return true
	}
	cert, err := x509.ParseCertificate(p.der)
	return err == nil && slices.ContainsFunc(names, func(name string) bool {
		if schema.IsURI(name) {
			return slices.Contains(p.URIs, name)
		}
		return len(p.DNSNames) > 0 && cert.VerifyHostname(name) == nil
	})
}

// Trust are CAs, and the certificates between them and a peer that are known beside what it sent.
type Trust struct {
	Anchors, Intermediates []*x509.Certificate
}

// Leads reports whether its certificate is known to lead to a CA. Certificates that have expired meanwhile do.
func (p *Peer) Leads(to Trust) bool {
	cert, err := x509.ParseCertificate(p.der)
	if err != nil {
		return false
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	for _, anchor := range to.Anchors {
		roots.AddCert(anchor)
	}
	for _, one := range to.Intermediates {
		between.AddCert(one)
	}
	at := time.Now()
	if at.After(cert.NotAfter) {
		at = cert.NotAfter
	}
	_, err = cert.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return err == nil
}
