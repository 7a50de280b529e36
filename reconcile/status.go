package reconcile

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// StatusSocket returns the path of the socket that a running mantlet answers at.
func StatusSocket(runtimeDirectory string) string {
	return filepath.Join(runtimeDirectory, "mantlet.sock")
}

// Serve answers /livez and /readyz on the status socket until ctx ends.
func (d *Daemon) Serve(ctx context.Context) error {
	path := StatusSocket(d.Environment.Process.RuntimeDirectory)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("removing the socket of a mantlet before this one: %w", err)
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return fmt.Errorf("opening the status socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return fmt.Errorf("closing the status socket to others: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { answer(w, nil, nil) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) { answer(w, d.Unready(r.Context()), d.Notes()) })
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving the status socket: %w", err)
	}
	return nil
}

// answer writes what Kubernetes' own components answer at these paths: ok, or the reasons, one a line. What is worth a
// look although it is ok follows it.
func answer(w http.ResponseWriter, reasons, notes []error) {
	if len(reasons) == 0 {
		_, _ = fmt.Fprintln(w, "ok")
		for _, note := range notes {
			_, _ = fmt.Fprintln(w, note)
		}
		return
	}
	w.WriteHeader(http.StatusServiceUnavailable)
	for _, reason := range reasons {
		_, _ = fmt.Fprintln(w, reason)
	}
}
