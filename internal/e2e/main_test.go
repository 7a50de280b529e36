// Package e2e runs mantlet where its users run it: in pods of a real Kubernetes, by the manifests of examples/, as they are but
// for the images' tags. `go tool task e2e` makes what it needs.
package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"mantlet/internal/e2e/image"
	"mantlet/internal/e2e/node"
	"mantlet/internal/e2e/pki"
)

var (
	bin     = flag.String("bin", "", "directory of the node's components and of the workload")
	scratch = flag.String("scratch", "", "directory for logs and for the mesh CA of this run")
	mantlet = flag.String("mantlet", "", "mantlet's binary")
	envoy   = flag.String("envoy", "", "Envoy's binary")
	stay    = flag.Bool("stay", false, "start a shell in the node when the tests are over; kubectl is there")
)

// cluster is the node that all tests share.
var cluster *node.Node

func TestMain(m *testing.M) {
	node.Main()
	flag.Parse()
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 2
	}
	os.Exit(code)
}

// run starts a node and runs the tests. Where the tests are interrupted or take too long, the node ends by itself.
func run(m *testing.M) (code int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	start := time.Now()
	logs := filepath.Join(*scratch, "logs")
	if err := errors.Join(os.RemoveAll(logs), os.MkdirAll(logs, 0o755)); err != nil {
		return 0, err
	}
	if cluster, err = node.Start(ctx, *bin, logs); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, cluster.Close()) }()
	if err := loadImages(ctx); err != nil {
		return 0, err
	}
	fmt.Printf("the node is ready after %v\n", time.Since(start).Round(time.Second))
	code = m.Run()
	if *stay {
		shell := cluster.Command(context.Background(), "sh")
		shell.Stdin, shell.Stdout, shell.Stderr = os.Stdin, os.Stdout, os.Stderr
		_ = shell.Run() // an error is that of the last command in it
	}
	return code, nil
}

// loadImages makes the images that the manifests name, and hands them to the node.
func loadImages(ctx context.Context) error {
	ca := filepath.Join(*scratch, "ca")
	if err := errors.Join(os.MkdirAll(ca, 0o700), pki.NewAuthority(ca)); err != nil {
		return err
	}
	files, err := os.ReadDir(ca)
	if err != nil {
		return err
	}
	workload := filepath.Join(*bin, "workload")
	for _, name := range []string{"pause", "initializer", "web", "shop", "job"} {
		i := program(name, workload)
		if name == "initializer" {
			for _, file := range files {
				i.Files["/ca/"+file.Name()] = filepath.Join(ca, file.Name())
			}
		}
		if err := load(ctx, i); err != nil {
			return err
		}
	}
	i, err := mantletImage()
	if err != nil {
		return err
	}
	if err := load(ctx, i); err != nil {
		return err
	}
	return load(ctx, contrastImage(i))
}

// mantletImage returns what the Containerfile makes, but for the distribution around Envoy, of which it has the libraries only.
func mantletImage() (image.Image, error) {
	i := program("mantlet", *mantlet)
	i.Config.Entrypoint = append(i.Config.Entrypoint, "run")
	i.Config.User = "0"
	i.Config.Env = []string{"MANTLET_ENVOY_PATH=/usr/local/bin/envoy"}
	i.Files["/usr/local/bin/envoy"] = *envoy
	libraries, err := image.Libraries(*envoy)
	for _, library := range libraries {
		i.Files[library] = library
	}
	return i, err
}

// contrastImage returns the flavour of mantlet's image that takes the place of Contrast's sidecar, but for iptables: no guest's rule is here.
func contrastImage(i image.Image) image.Image {
	i.Name = "docker.io/library/mantlet-contrast:e2e"
	i.Files = maps.Clone(i.Files)
	i.Files["/usr/local/bin/test"] = *mantlet
	i.Config.Env = append(slices.Clone(i.Config.Env), "MANTLET_READY_FILE=/ready", "MANTLET_LIFT_DEFAULT_DENY=true")
	return i
}

// program returns an image of one program.
func program(name, file string) image.Image {
	path := "/usr/local/bin/" + name
	return image.Image{
		Name:   "docker.io/library/" + name + ":e2e",
		Files:  map[string]string{path: file},
		Config: v1.Config{Entrypoint: []string{path}},
	}
}

// load hands an image to the node.
func load(ctx context.Context, i image.Image) error {
	r, w := io.Pipe()
	defer r.Close()
	go func() { w.CloseWithError(i.Write(w)) }()
	cmd := cluster.Command(ctx, "ctr", "images", "import", "--local", "--snapshotter=overlayfs", "-")
	cmd.Stdin = r
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("loading image %s: %w: %s", i.Name, err, out)
	}
	return nil
}
