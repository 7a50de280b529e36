package schema

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
)

// tlsFiles are the names that issuers give the files of certificates: the chain with the leaf first, its key, and the CAs of the mesh.
var tlsFiles = [][3]string{
	{"certChain.pem", "key.pem", "mesh-ca.pem"},
	{"tls.crt", "tls.key", "ca.crt"},           // Secrets of type kubernetes.io/tls, as cert-manager writes them
	{"svid.pem", "svid_key.pem", "bundle.pem"}, // SPIFFE
}

// TLSFileNames returns all names that certificates may have in the TLS directory.
func (p Process) TLSFileNames() []string {
	all := []string{p.TLSCertificate, p.TLSKey, p.TLSCA}
	for _, set := range tlsFiles {
		all = append(all, set[:]...)
	}
	return slices.DeleteFunc(all, func(name string) bool { return name == "" || filepath.IsAbs(name) })
}

// TLSDirectories returns the directories that certificates are read from: the TLS directory, then those of files that variables name
// elsewhere.
func (p Process) TLSDirectories() []string {
	all := []string{p.TLSDirectory}
	for _, name := range []string{p.TLSCertificate, p.TLSKey, p.TLSCA} {
		if directory := filepath.Dir(name); filepath.IsAbs(name) && !slices.Contains(all, directory) {
			all = append(all, directory)
		}
	}
	return all
}

// TLSFiles returns where the chain, its key and the CAs of the mesh are. The names are those that variables give, else those of one of the
// usual sets that the TLS directory has a file of, by isThere. Where it has none yet, they are those of the first set. Files of two
// sets are an error: nobody can know which is meant.
func (p Process) TLSFiles(isThere func(path string) bool) (files [3]string, err error) {
	named := [3]string{p.TLSCertificate, p.TLSKey, p.TLSCA}
	path := func(name string) string {
		if filepath.IsAbs(name) {
			return name
		}
		return filepath.Join(p.TLSDirectory, name)
	}
	var found [][3]string
	for _, set := range tlsFiles {
		for i, name := range set {
			if named[i] == "" && !slices.Contains(named[:], name) && isThere(path(name)) {
				found = append(found, set)
				break
			}
		}
	}
	set := tlsFiles[0]
	switch {
	case len(found) == 1:
		set = found[0]
	case len(found) > 1:
		return files, fmt.Errorf("%s: has files of two sets of certificates, %s and %s: remove one, or name the files that are meant with "+
			"MANTLET_TLS_CERTIFICATE, MANTLET_TLS_KEY and MANTLET_TLS_CA", p.TLSDirectory, strings.Join(found[0][:], ", "), strings.Join(found[1][:], ", "))
	}
	for i, name := range set {
		if named[i] != "" {
			name = named[i]
		}
		files[i] = path(name)
	}
	return files, nil
}

// tlsFile is the value of a variable that names one of the files.
func tlsFile(text string) (canonical, reason string) {
	if filepath.IsAbs(text) {
		return absolute(text)
	}
	if strings.Contains(text, "/") || text == "." || text == ".." {
		return "", "must be the name of a file in MANTLET_TLS_DIRECTORY, or an absolute path"
	}
	return text, ""
}
