package image

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// directories are where the loaders of Debian, Fedora and Arch look for libraries.
var directories = []string{"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"}

// Libraries returns the loader and the shared libraries that a binary needs, by the paths that the loader looks for them at.
func Libraries(binary string) ([]string, error) {
	var all []string
	seen := map[string]bool{}
	for todo := []string{binary}; len(todo) > 0; todo = todo[1:] {
		loader, needed, err := imports(todo[0])
		if err != nil {
			return nil, fmt.Errorf("libraries of %s: %w", binary, err)
		}
		if loader != "" {
			all = append(all, loader)
			seen[filepath.Base(loader)] = true // libraries need it by its name
		}
		for _, name := range needed {
			if seen[name] {
				continue
			}
			seen[name] = true
			library, err := find(name)
			if err != nil {
				return nil, fmt.Errorf("libraries of %s: %w", binary, err)
			}
			all = append(all, library)
			todo = append(todo, library)
		}
	}
	return all, nil
}

// imports returns the loader that a binary names, empty for a library, and the names of the libraries that it needs.
func imports(path string) (loader string, libraries []string, err error) {
	file, err := elf.Open(path)
	if err != nil {
		return "", nil, err
	}
	defer file.Close()
	for _, segment := range file.Progs {
		if segment.Type == elf.PT_INTERP {
			text, err := io.ReadAll(segment.Open())
			if err != nil {
				return "", nil, err
			}
			loader = strings.TrimRight(string(text), "\x00")
		}
	}
	libraries, err = file.ImportedLibraries()
	return loader, libraries, err
}

func find(name string) (string, error) {
	for _, directory := range directories {
		path := filepath.Join(directory, name)
		if _, err := os.Stat(path); err == nil {
			return path, nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return "", fmt.Errorf("%s is in none of %s", name, strings.Join(directories, ", "))
}
