package analyze

import (
	"crypto/x509"
	"encoding/pem"
	"path"
	"slices"
	"strings"

	"mantlet/schema"
)

// identity is by which names a workload's certificate shows it.
type identity struct {
	names   []string // SANs of the certificate; or, where it is not in the manifests, names that it may have
	isKnown bool     // they are the certificate's
	ca      []byte   // mesh-ca.pem, nil where it is not in the manifests
	chain   []*x509.Certificate
}

// identify finds out the names of a workload.
func (w *workload) identify() {
	if !w.hasMesh {
		return
	}
	read := func(file string) []byte {
		text, _ := w.sidecar.File(file)
		return text
	}
	id := &w.identity
	files, err := w.config.Process.TLS.Paths(func(path string) bool { return read(path) != nil })
	if err == nil { // else certified says what is wrong
		id.ca = read(files[2])
	}
	if chain := read(files[0]); chain != nil {
		id.chain = parse(chain)
		if len(id.chain) == 0 {
			w.problem(path.Base(files[0]), "holds no certificate; it must have the leaf and then the intermediate, as PEM")
		}
	}
	if len(id.chain) > 0 {
		leaf := id.chain[0]
		id.isKnown, id.names = true, slices.Clone(leaf.DNSNames)
		for _, uri := range leaf.URIs {
			id.names = append(id.names, uri.String())
		}
		return
	}
	_, name, _ := strings.Cut(w.Object(), " ")
	id.names = []string{name}
	for _, s := range w.services {
		id.names = append(id.names, s.Name)
		if ns := s.Namespace; ns != "" {
			id.names = append(id.names, s.Name+"."+ns, s.Name+"."+ns+".svc", s.Name+"."+ns+".svc.cluster.local")
		}
	}
}

func parse(text []byte) []*x509.Certificate {
	var all []*x509.Certificate
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			return all
		}
		if c, err := x509.ParseCertificate(block.Bytes); err == nil {
			all = append(all, c)
		}
	}
}

// has reports whether the workload may be one that a list of SANs names. Only with wildcards does one of the certificate count.
func (w *workload) has(list []string, wildcards bool) bool {
	return slices.ContainsFunc(list, func(wanted string) bool {
		if schema.IsURI(wanted) && !w.identity.isKnown {
			return strings.HasSuffix(wanted, "/sa/"+w.ServiceAccount()) &&
				(w.Namespace() == "" || strings.Contains(wanted, "/ns/"+w.Namespace()+"/"))
		}
		return slices.ContainsFunc(w.identity.names, func(name string) bool {
			if strings.EqualFold(name, wanted) {
				return true
			}
			_, domain, _ := strings.Cut(wanted, ".")
			return wildcards && strings.HasPrefix(name, "*.") && strings.EqualFold(name[2:], domain)
		})
	})
}

// known says by which names the workload is known, and from where.
func (w *workload) known() string {
	names := strings.Join(w.identity.names, ", ")
	switch {
	case !w.identity.isKnown:
		return "its certificate is not in the manifests, and it is called " + names
	case names == "":
		return "its certificate has no names"
	default:
		return "its certificate has " + names
	}
}

// trusts reports whether a workload's CA is that of another's certificate, or that is not known.
func (w *workload) trusts(other *workload) bool {
	chain := other.identity.chain
	if w.identity.ca == nil || len(chain) == 0 {
		return true
	}
	options := x509.VerifyOptions{
		Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: chain[0].NotBefore,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	options.Roots.AppendCertsFromPEM(w.identity.ca)
	for _, c := range chain[1:] {
		options.Intermediates.AddCert(c)
		if c.NotBefore.After(options.CurrentTime) {
			options.CurrentTime = c.NotBefore
		}
	}
	for _, c := range parse(w.identity.ca) {
		if c.NotBefore.After(options.CurrentTime) {
			options.CurrentTime = c.NotBefore
		}
	}
	_, err := chain[0].Verify(options)
	return err == nil
}
