package envoy

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"mantlet/internal/lab"
	"mantlet/internal/sandbox"
	"mantlet/render"
	"mantlet/schema"
)

func TestMain(m *testing.M) {
	lab.Enter()
	goleak.VerifyTestMain(m)
}

// limit bounds every wait: far longer than anything takes, so that a busy machine fails nothing.
const limit = 30 * time.Second

// until fails the test if cond does not come to hold.
func until(t testing.TB, what string, cond func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	if err := lab.Until(ctx, cond); err != nil {
		t.Fatalf("waiting until %s: %v", what, err)
	}
}

// journal is a log that grows while it is read.
type journal struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (j *journal) Write(text []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(text)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.String()
}

func (j *journal) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(j, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// runner returns a Runner for the real Envoy. Closed at the end of the test, it must leave nothing behind.
func runner(t testing.TB) (*Runner, *journal) {
	t.Helper()
	path := os.Getenv("MANTLET_ENVOY_PATH")
	if path == "" {
		t.Fatal("MANTLET_ENVOY_PATH names no Envoy to test with; `go tool task test` fetches one")
	}
	log, directory := &journal{}, t.TempDir()
	lab.Open(directory)
	r := &Runner{Path: path, UID: lab.EnvoyUser(), RuntimeDirectory: filepath.Join(directory, "envoy"), Log: log.logger()}
	rules := sandbox.System()
	rules.Write = append(rules.Write, r.RuntimeDirectory)
	rules.Execute = append(rules.Execute, filepath.Dir(path), os.TempDir()) // for scripts in its place
	if err := r.Confine(rules, func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the log:\n%s", log)
		}
		left, err := filepath.Glob("/dev/shm/envoy*")
		if err != nil {
			t.Error(err)
		}
		files, err := os.ReadDir(r.RuntimeDirectory)
		if err != nil {
			t.Error(err)
		}
		for _, f := range files {
			if !strings.HasPrefix(f.Name(), "sds-") && !strings.HasPrefix(f.Name(), "test-") {
				left = append(left, f.Name())
			}
		}
		if len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
	return r, log
}

// state renders what an environment says.
func state(t testing.TB, r *Runner, environ ...string) (render.State, schema.Envoy) {
	t.Helper()
	env, err := schema.ParseEnvironment(environ)
	if err != nil {
		t.Fatal(err)
	}
	config, err := env.Load()
	if err != nil {
		t.Fatal(err)
	}
	state, err := render.Render(config.Mesh, render.Place{RuntimeDirectory: r.RuntimeDirectory})
	if err != nil {
		t.Fatal(err)
	}
	return state, config.Mesh.Envoy
}

// identity publishes a certificate of a new mesh.
func identity(t testing.TB, r *Runner) *lab.Identity {
	t.Helper()
	identity, err := lab.NewIdentity("pod")
	if err != nil {
		t.Fatal(err)
	}
	directory := t.TempDir()
	if err := identity.Write(directory); err != nil {
		t.Fatal(err)
	}
	secrets := &Secrets{Files: schema.TLSFiles{Directory: directory}, RuntimeDirectory: r.RuntimeDirectory, Runner: r, Log: r.Log}
	if _, err := secrets.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	return identity
}

// started returns an Envoy that is live. It is stopped at the end of the test.
func started(t *testing.T, r *Runner) *Process {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	state, settings := state(t, r)
	p, err := r.Start(ctx, state, settings)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	return p
}
