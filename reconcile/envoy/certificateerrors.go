package envoy

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// This file explains in words what is wrong with certificates, and what would be right.

// nameOf returns a certificate's subject, or else its SANs.
func nameOf(cert *x509.Certificate) string {
	return cmp.Or(cert.Subject.String(), strings.Join(sans(cert), ", "), "without a subject")
}

// sans returns a certificate's SANs of the kinds that mantlet and Envoy compare: DNS names and URIs.
func sans(c *x509.Certificate) []string {
	names := append([]string{}, c.DNSNames...)
	for _, uri := range c.URIs {
		names = append(names, uri.String())
	}
	return names
}

// position says which certificate of the set one is, for an error.
func (c *Certificates) position(cert *x509.Certificate) string {
	if i := slices.IndexFunc(c.chain, cert.Equal); i >= 0 {
		return fmt.Sprintf("certificate %d (%s)", i+1, nameOf(cert))
	}
	return fmt.Sprintf("the mesh CA %s", nameOf(cert))
}

func (c *Certificates) fileNames() (chain, ca string) {
	paths := c.paths
	return filepath.Base(paths[0]), filepath.Base(paths[2])
}

// explain says why crypto/x509 finds no chain from the leaf to a mesh CA at a time. cause is its own error.
func (c *Certificates) explain(cause error, now time.Time) error {
	chainName, caName := c.fileNames()
	chain, complete := c.issuerChain(now)
	if complete {
		for _, cert := range chain {
			if err := c.checkValidity(cert, now); err != nil {
				return err
			}
		}
		return fmt.Errorf("the leaf (%s) does not verify up to %s: %w", nameOf(c.chain[0]), caName, cause)
	}
	holds := fmt.Sprintf("%s holds %s", caName, listCAs(c.anchors))
	var issuers []string
	for _, cert := range chain {
		issued := fmt.Sprintf("%s was issued by %s", c.position(cert), issuerOf(cert))
		if slices.ContainsFunc(c.anchors, func(ca *x509.Certificate) bool { return bytes.Equal(ca.RawSubject, cert.RawIssuer) }) {
			return fmt.Errorf("%s; %s, another CA of the same name", issued, holds)
		}
		issuers = append(issuers, issued)
	}
	text := strings.Join(append(issuers, holds), "; ")
	last := chain[len(chain)-1]
	if bytes.Equal(last.RawIssuer, last.RawSubject) {
		return errors.New(text)
	}
	return fmt.Errorf("%s: append the intermediate %s to %s, or put a CA that issued one of them into %s", text, last.Issuer, chainName, caName)
}

// Unverified returns why crypto/x509 found no chain from the leaf to a mesh CA; nil if it found one. It is certain that Envoy finds none
// either where the files lack an issuer. Otherwise Envoy may differ, since it applies path lengths and name constraints in its own way.
func (c *Certificates) Unverified(now time.Time) (reason error, certain bool) {
	if c.verifyErr == nil {
		return nil, false
	}
	_, complete := c.issuerChain(now)
	return c.verifyErr, !complete
}

// explainRejection adds to Envoy's reason for rejecting the set what mantlet knows of the cause.
func (c *Certificates) explainRejection(why error) error {
	if c.verifyErr != nil {
		return fmt.Errorf("%w; Envoy says: %w", c.verifyErr, why)
	}
	const unsigned = "the leaf's key usage lacks digitalSignature"
	if usage := c.chain[0].KeyUsage; usage != 0 && usage&x509.KeyUsageDigitalSignature == 0 && why.Error() != unsigned {
		why = fmt.Errorf(unsigned+": %w", why)
	}
	return fmt.Errorf("%s: Envoy does not accept the certificates: %w", c.paths[0], why)
}

// issuerChain follows signatures from the leaf to its issuer, and so on, as far as the set has the issuers. complete says that it ends at
// a mesh CA. Of several certificates that could have signed one, it prefers a mesh CA, and then a valid one.
func (c *Certificates) issuerChain(now time.Time) (chain []*x509.Certificate, complete bool) {
	chain = []*x509.Certificate{c.chain[0]}
	candidates := slices.Concat(c.orderedAnchors(now), c.chain[1:])
	for {
		last := chain[len(chain)-1]
		i := slices.IndexFunc(candidates, func(ca *x509.Certificate) bool {
			return bytes.Equal(ca.RawSubject, last.RawIssuer) && !slices.ContainsFunc(chain, ca.Equal) &&
				ca.CheckSignature(last.SignatureAlgorithm, last.RawTBSCertificate, last.Signature) == nil
		})
		if i < 0 {
			return chain, slices.ContainsFunc(c.anchors, c.chain[0].Equal)
		}
		chain = append(chain, candidates[i])
		if i < len(c.anchors) {
			return chain, true
		}
	}
}

// issuerOf returns the name of a certificate's issuer, with its key identifier if the certificate has that.
func issuerOf(cert *x509.Certificate) string {
	if len(cert.AuthorityKeyId) == 0 {
		return cert.Issuer.String()
	}
	return fmt.Sprintf("%s (key id %s)", cert.Issuer, keyID(cert.AuthorityKeyId))
}

// listCAs returns the names of CAs, of many the first three.
func listCAs(cas []*x509.Certificate) string {
	const most = 3
	var names []string
	for _, ca := range cas[:min(len(cas), most)] {
		name := nameOf(ca)
		if len(ca.SubjectKeyId) > 0 {
			name += fmt.Sprintf(" (key id %s)", keyID(ca.SubjectKeyId))
		}
		names = append(names, name)
	}
	if more := len(cas) - most; more > 0 {
		names = append(names, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(names, ", ")
}

// keyID returns the beginning of a key identifier (RFC 5280, section 4.2.1.2) in OpenSSL's form, long enough to tell two apart.
func keyID(id []byte) string {
	const most = 6
	text := strings.ReplaceAll(fmt.Sprintf("% X", id[:min(len(id), most)]), " ", ":")
	if len(id) > most {
		text += "…"
	}
	return text
}

// explainUnreadable adds the owner and the mode of a file that mantlet is not permitted to read.
func explainUnreadable(path string, err error) error {
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	info, statErr := os.Stat(path)
	if statErr != nil {
		return err
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return err
	}
	return fmt.Errorf("%w: it belongs to user %d and group %d with mode %04o, and mantlet reads it as user %d, without root's power over "+
		"files of others: let its owner be user %d, or its mode 0444", err, owner.Uid, owner.Gid, info.Mode().Perm(), os.Geteuid(), os.Geteuid())
}

// warnings returns what should be corrected although Envoy accepts it.
func (c *Certificates) warnings() []string {
	var all []string
	if c.verifyErr != nil {
		all = append(all, fmt.Sprintf("Envoy accepts the certificates, but other programs may not: %v", c.verifyErr))
	}
	_, caName := c.fileNames()
	bySubject := map[string][]*x509.Certificate{}
	for _, ca := range c.anchors {
		bySubject[string(ca.RawSubject)] = append(bySubject[string(ca.RawSubject)], ca)
	}
	for _, cas := range bySubject {
		several := slices.ContainsFunc(cas, func(ca *x509.Certificate) bool { return !sameCA(ca, cas[0]) })
		if several && slices.ContainsFunc(cas, func(ca *x509.Certificate) bool { return len(ca.SubjectKeyId) == 0 }) {
			all = append(all, fmt.Sprintf("%s holds several CAs that are named %s and lack key identifiers: of these Envoy tries the first alone, and "+
				"refuses what the others issued; issue CAs with a subject key identifier, or under different names", caName, nameOf(cas[0])))
		}
	}
	slices.Sort(all)
	return all
}

// expiredAnchors returns the names of the mesh CAs that have expired. They can be removed.
func (c *Certificates) expiredAnchors(now time.Time) []string {
	var names []string
	for _, ca := range c.anchors {
		if now.After(ca.NotAfter) {
			names = append(names, nameOf(ca))
		}
	}
	return names
}
