package gate_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"mantlet/internal/gate"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestAnswers checks both answers, that the change of one to the other is seen, and that Serve ends with its context.
func TestAnswers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "gate.sock")
	listener, err := gate.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	var ready atomic.Bool
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- gate.Serve(ctx, listener, func(context.Context) bool { return ready.Load() }) }()

	silent, err := net.Dial("unix", path) // a client that neither reads nor writes holds up nobody
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()

	reasons := make(chan error, 10)
	waited := make(chan error, 1)
	go func() { waited <- gate.Wait(t.Context(), path, func(reason error) { reasons <- reason }) }()
	if reason := <-reasons; reason.Error() != "mantlet is not ready" {
		t.Errorf("waits for %v", reason)
	}
	ready.Store(true)
	if err := <-waited; err != nil {
		t.Errorf("waiting: %v", err)
	}
	if len(reasons) > 0 {
		t.Errorf("it is told again: %v", <-reasons)
	}
	cancel()
	if err := <-served; err != nil {
		t.Errorf("serving: %v", err)
	}
	if err := gate.Ask(t.Context(), path); err == nil {
		t.Error("a server that ended answers")
	}
}

// TestListen checks that a socket of before is replaced, and that nothing else is.
func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "gate.sock")
	for range 2 {
		listener, err := gate.Listen(path)
		if err != nil {
			t.Fatal(err)
		}
		listener.(*net.UnixListener).SetUnlinkOnClose(false)
		_ = listener.Close()
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o666 {
		t.Errorf("%v, %v", info, err)
	}
	if err := errors.Join(os.Remove(path), os.WriteFile(path, []byte("precious"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := gate.Listen(path); err == nil || !strings.Contains(err.Error(), "is not a socket") {
		t.Errorf("beside a file: %v", err)
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != "precious" {
		t.Errorf("the file holds %q, %v", text, err)
	}
}

// TestForeignAnswer checks that nothing but the one answer means ready.
func TestForeignAnswer(t *testing.T) {
	for _, text := range []string{"", "ready", "not ready\n", "ready\nready\n", "READY\n", "HTTP/1.1 200 OK\r\n"} {
		path := filepath.Join(t.TempDir(), "gate.sock")
		listener, err := gate.Listen(path)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			conn, err := listener.Accept()
			if err == nil {
				_, _ = conn.Write([]byte(text))
				_ = conn.Close()
			}
		}()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		if err := gate.Ask(ctx, path); err == nil {
			t.Errorf("%q means ready", text)
		}
		cancel()
		_ = listener.Close()
	}
}
