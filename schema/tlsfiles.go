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

// TLSFiles says where certificates are read from.
type TLSFiles struct {
	Directory string // see DefaultTLSDirectory
	// Names of files in the directory, or absolute paths; empty for the usual names.
	Certificate, Key, CA string
}

// named returns the names that variables give: of the chain, its key and the CAs of the mesh.
func (f TLSFiles) named() [3]string { return [3]string{f.Certificate, f.Key, f.CA} }

// Elsewhere returns the paths of files that variables name by absolute paths.
func (f TLSFiles) Elsewhere() (paths []string) {
	for _, name := range f.named() {
		if filepath.IsAbs(name) {
			paths = append(paths, name)
		}
	}
	return paths
}

// Names returns all names that certificates may have in the directory.
func (f TLSFiles) Names() []string {
	named := f.named()
	all := named[:]
	for _, set := range tlsFiles {
		all = append(all, set[:]...)
	}
	return slices.DeleteFunc(all, func(name string) bool { return name == "" || filepath.IsAbs(name) })
}

// Directories returns the directories that certificates are read from: that of the usual names, then those of files elsewhere.
func (f TLSFiles) Directories() []string {
	all := []string{f.Directory}
	for _, path := range f.Elsewhere() {
		if directory := filepath.Dir(path); !slices.Contains(all, directory) {
			all = append(all, directory)
		}
	}
	return all
}

// Paths returns where the chain, its key and the CAs of the mesh are. The names are those that variables give, else those of one of the
// usual sets that the directory has a file of, by isThere. Where it has none yet, they are those of the first set. Files of two
// sets are an error: nobody can know which is meant.
func (f TLSFiles) Paths(isThere func(path string) bool) (files [3]string, err error) {
	named := f.named()
	path := func(name string) string {
		if filepath.IsAbs(name) {
			return name
		}
		return filepath.Join(f.Directory, name)
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
			"MANTLET_TLS_CERTIFICATE, MANTLET_TLS_KEY and MANTLET_TLS_CA", f.Directory, strings.Join(found[0][:], ", "), strings.Join(found[1][:], ", "))
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
