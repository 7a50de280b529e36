package reconcile

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"mantlet/render"
	"mantlet/schema"
)

// TestLastGood: a mantlet that starts beside a bad override file goes on with the last good one, unless the environment
// is another.
func TestLastGood(t *testing.T) {
	directory := t.TempDir()
	file := filepath.Join(directory, "override.yaml")
	daemon := func(environ ...string) *Daemon {
		env, err := schema.ParseEnvironment(append(environ, "MANTLET_CONFIG="+file, "MANTLET_RUNTIME_DIRECTORY="+directory))
		if err != nil {
			t.Fatal(err)
		}
		return &Daemon{Environment: env, Place: render.Place{RuntimeDirectory: directory}, Log: slog.New(slog.DiscardHandler)}
	}
	read := func(d *Daemon) {
		d.readConfig()
		d.takeOffered()
		d.store()
	}
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("ingress: [{port: 8080, mode: tls}]")
	first := daemon()
	read(first)
	if first.want == nil || first.badConfig != nil {
		t.Fatalf("a good file is not taken: %v", first.badConfig)
	}
	before := first.want.sourceDigest
	parsed := first.configuring.parsed
	if read(first); first.configuring.parsed != parsed {
		t.Error("the same bytes are parsed again")
	}
	write("ingress: [{port: 8080, mode: tls}] # the same")
	read(first)
	if first.want.sourceDigest == before || first.want.number != 1 {
		t.Error("a file that means the same is not told to be the source, or for another configuration")
	}
	write("ingress: [{port: 8080, mode: tsl}]")
	read(first)
	if first.badConfig == nil || first.want.mesh.Ingress[0].Mode != schema.ModeTLS {
		t.Errorf("after a bad file: %v, %v", first.badConfig, first.want.mesh.Ingress)
	}
	second := daemon()
	read(second)
	if second.want == nil || second.want.state.Digest != first.want.state.Digest || second.badConfig == nil {
		t.Errorf("beside a bad file the last good one is not taken, or the bad one is not told: %v", second.badConfig)
	}
	other := daemon("MANTLET_TLS_MIN_VERSION=1.3")
	read(other)
	if other.want != nil {
		t.Error("a file that was merged with another environment is taken")
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	third := daemon()
	read(third)
	if third.want == nil || third.want.mesh.Ingress[0].Mode != schema.ModeTLS {
		t.Error("beside a missing file the last good one is not taken")
	}
}

// TestLinkIsNotTold: neither log nor status quote what a link out of the volume of the override file leads to.
func TestLinkIsNotTold(t *testing.T) {
	directory := t.TempDir()
	volume, secret := filepath.Join(directory, "volume"), filepath.Join(directory, "secret")
	err := errors.Join(os.Mkdir(volume, 0o700), os.WriteFile(secret, []byte("password: hunter2"), 0o600), os.Symlink(secret, filepath.Join(volume, "file")))
	if err != nil {
		t.Fatal(err)
	}
	env, err := schema.ParseEnvironment([]string{"MANTLET_CONFIG=" + filepath.Join(volume, "file"), "MANTLET_RUNTIME_DIRECTORY=" + directory})
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	d := &Daemon{Environment: env, Place: render.Place{RuntimeDirectory: directory}, Log: slog.New(slog.NewJSONHandler(&log, nil))}
	d.readConfig()
	for _, said := range []string{log.String(), fmt.Sprint(d.badConfig)} {
		if !strings.Contains(said, "withheld") || strings.Contains(said, "hunter2") || strings.Contains(said, "password") {
			t.Errorf("it says %s", said)
		}
	}
}
