// Package image makes container images out of files of this machine, without a registry and without an engine.
package image

import (
	"archive/tar"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"

	"github.com/google/go-containerregistry/pkg/compression"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Image is one layer of files, which belong to root and keep their modes, and how its containers start.
type Image struct {
	Name   string            // with a tag
	Files  map[string]string // absolute path in the image: file of this machine
	Config v1.Config
}

// Write writes the image as `ctr images import` takes it.
func (i Image) Write(w io.Writer) error {
	tag, err := name.NewTag(i.Name)
	if err != nil {
		return err
	}
	layer, err := tarball.LayerFromOpener(i.open, tarball.WithCompression(compression.None))
	if err != nil {
		return fmt.Errorf("image %s: %w", i.Name, err)
	}
	image, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Config = "linux", "amd64", i.Config
	if image, err = mutate.ConfigFile(image, config); err != nil {
		return err
	}
	return tarball.Write(tag, image, w)
}

// open returns the layer.
func (i Image) open() (io.ReadCloser, error) {
	r, w := io.Pipe()
	go func() { w.CloseWithError(i.archive(w)) }()
	return r, nil
}

// archive writes the layer. It is the same for the same files: it is read more than once.
func (i Image) archive(w io.Writer) error {
	archive := tar.NewWriter(w)
	seen := map[string]bool{"/": true}
	for _, target := range slices.Sorted(maps.Keys(i.Files)) {
		if err := parents(archive, path.Dir(target), seen); err != nil {
			return err
		}
		if err := file(archive, target, i.Files[target]); err != nil {
			return err
		}
	}
	return archive.Close()
}

// parents writes a directory and those above it, unless they were seen.
func parents(archive *tar.Writer, directory string, seen map[string]bool) error {
	if seen[directory] {
		return nil
	}
	seen[directory] = true
	if err := parents(archive, path.Dir(directory), seen); err != nil {
		return err
	}
	return archive.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: directory[1:] + "/", Mode: 0o755})
}

func file(archive *tar.Writer, target, source string) error {
	f, err := os.Open(source)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	header := &tar.Header{Typeflag: tar.TypeReg, Name: target[1:], Mode: int64(info.Mode().Perm()), Size: info.Size()}
	if err := archive.WriteHeader(header); err != nil {
		return err
	}
	_, err = io.Copy(archive, f)
	return err
}
