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

// This file says in words what is wrong with certificates, and what would be right.

// nameOf returns what a certificate is called.
func nameOf(cert *x509.Certificate) string {
	return cmp.Or(cert.Subject.String(), strings.Join(sans(cert), ", "), "without a subject")
}

// sans returns a certificate's names, those that mantlet and Envoy look at.
func sans(c *x509.Certificate) []string {
	names := append([]string{}, c.DNSNames...)
	for _, uri := range c.URIs {
		names = append(names, uri.String())
	}
	return names
}

// position says which certificate of the generation one is.
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

// explain says why Go finds no way from the leaf to a mesh CA at a time.
func (c *Certificates) explain(cause error, now time.Time) error {
	chainName, caName := c.fileNames()
	way, complete := c.issuerChain(now)
	if complete {
		for _, cert := range way {
			if err := c.checkValidity(cert, now); err != nil {
				return err
			}
		}
		return fmt.Errorf("the leaf (%s) does not verify up to %s: %w", nameOf(c.chain[0]), caName, cause)
	}
	holds := fmt.Sprintf("%s holds %s", caName, listCAs(c.anchors))
	var issuers []string
	for _, cert := range way {
		issued := fmt.Sprintf("%s was issued by %s", c.position(cert), issuerOf(cert))
		if slices.ContainsFunc(c.anchors, func(ca *x509.Certificate) bool { return bytes.Equal(ca.RawSubject, cert.RawIssuer) }) {
			return fmt.Errorf("%s; %s, another CA of the same name", issued, holds)
		}
		issuers = append(issuers, issued)
	}
	text := strings.Join(append(issuers, holds), "; ")
	last := way[len(way)-1]
	if bytes.Equal(last.RawIssuer, last.RawSubject) {
		return errors.New(text)
	}
	return fmt.Errorf("%s: append the intermediate %s to %s, or put a CA that issued one of them into %s", text, last.Issuer, chainName, caName)
}

// Unverified returns why no way was found from the leaf to a mesh CA; nil if one was. It is certain where the files lack an issuer.
// Else Envoy decides, which judges path lengths and name constraints in its own way.
func (c *Certificates) Unverified(now time.Time) (reason error, certain bool) {
	if c.verifyErr == nil {
		return nil, false
	}
	_, complete := c.issuerChain(now)
	return c.verifyErr, !complete
}

// explainRejection says why Envoy does not accept the generation: in mantlet's words, where it has some, and in Envoy's.
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

// issuerChain goes from the leaf to what signed it, and so on, as far as the generation has it. complete tells that it ends with a
// mesh CA. Of several that signed it takes a mesh CA, and one that is valid, where it can.
func (c *Certificates) issuerChain(now time.Time) (way []*x509.Certificate, complete bool) {
	way = []*x509.Certificate{c.chain[0]}
	candidates := slices.Concat(c.orderedAnchors(now), c.chain[1:])
	for {
		last := way[len(way)-1]
		i := slices.IndexFunc(candidates, func(ca *x509.Certificate) bool {
			return bytes.Equal(ca.RawSubject, last.RawIssuer) && !slices.ContainsFunc(way, ca.Equal) &&
				ca.CheckSignature(last.SignatureAlgorithm, last.RawTBSCertificate, last.Signature) == nil
		})
		if i < 0 {
			return way, slices.ContainsFunc(c.anchors, c.chain[0].Equal)
		}
		way = append(way, candidates[i])
		if i < len(c.anchors) {
			return way, true
		}
	}
}

// issuerOf says who issued a certificate.
func issuerOf(cert *x509.Certificate) string {
	if len(cert.AuthorityKeyId) == 0 {
		return cert.Issuer.String()
	}
	return fmt.Sprintf("%s (key id %s)", cert.Issuer, keyID(cert.AuthorityKeyId))
}

// listCAs names CAs, the first of them.
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

// keyID is as much of a key identifier (RFC 5280, section 4.2.1.2) as tells two apart, in OpenSSL's form.
func keyID(id []byte) string {
	const most = 6
	text := strings.ReplaceAll(fmt.Sprintf("% X", id[:min(len(id), most)]), " ", ":")
	if len(id) > most {
		text += "…"
	}
	return text
}

// explainUnreadable says whose a file is that may not be read.
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

// warnings says what is not as it should be although Envoy accepts it.
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

// expiredAnchors names the mesh CAs that are not valid any more. Nobody needs them.
func (c *Certificates) expiredAnchors(now time.Time) []string {
	var names []string
	for _, ca := range c.anchors {
		if now.After(ca.NotAfter) {
			names = append(names, nameOf(ca))
		}
	}
	return names
}
