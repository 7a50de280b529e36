package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// After SIGTERM a server that loses no request goes on accepting until everybody knows that it ends, and then finishes what it
// has begun. Sidecars that have its address from DNS are the last to know: they ask again within five seconds.
const (
	lameDuck = 8 * time.Second
	finish   = 25 * time.Second
)

// server is the HTTP server of a pod.
type server struct {
	unhealthy atomic.Bool
}

// run serves until SIGTERM.
func (s *server) run(ctx context.Context, ports ...string) error {
	http := &http.Server{Handler: s.handler()}
	ended := make(chan error, len(ports))
	for _, port := range ports {
		listener, err := net.Listen("tcp", ":"+port)
		if err != nil {
			return err
		}
		go func() { ended <- http.Serve(listener) }()
	}
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	time.Sleep(lameDuck)
	ctx, cancel := context.WithTimeout(context.Background(), finish)
	defer cancel()
	return http.Shutdown(ctx)
}

func (s *server) handler() http.Handler {
	host, _ := os.Hostname()
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprintf(w, "%s at %v", host, r.Context().Value(http.LocalAddrContextKey))
	})
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		if s.unhealthy.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	mux.HandleFunc("/sicken", func(http.ResponseWriter, *http.Request) { s.unhealthy.Store(true) })
	mux.HandleFunc("/heal", func(http.ResponseWriter, *http.Request) { s.unhealthy.Store(false) })
	mux.HandleFunc("/download", download)
	return mux
}

// download takes as long as the query's "for" says, and then says that it is complete.
func download(w http.ResponseWriter, r *http.Request) {
	length, err := time.ParseDuration(r.URL.Query().Get("for"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	for end := time.Now().Add(length); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		_, _ = fmt.Fprintln(w, time.Now().Format(time.RFC3339Nano))
		if err := http.NewResponseController(w).Flush(); err != nil {
			return
		}
	}
	_, _ = fmt.Fprint(w, "complete")
}

// web is the server of examples/web.yaml. By its ingress entries 8080 is TLS and 7890 passthrough; 9000, which no entry names,
// is mutual TLS.
func web() error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return new(server).run(ctx, "8080", "7890", "9000")
}

// shop is the client of examples/clients.yaml. It is healthy as long as it can order. What it could not order is in its log, as
// is its last order, which comes after SIGTERM.
func shop() error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	s := new(server)
	s.unhealthy.Store(true)
	ended := make(chan error, 1)
	go func() { ended <- s.run(ctx, "8080") }()
	for ctx.Err() == nil {
		err := order("BILLING_URL", "CART_URL")
		s.unhealthy.Store(err != nil)
		if err != nil {
			say("order", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
	say("last order", order("BILLING_URL", "CART_URL"))
	return <-ended
}

func say(what string, err error) { _, _ = fmt.Fprintf(os.Stderr, "%s: %v\n", what, err) }

// order calls what is at the URLs in these variables.
func order(variables ...string) error {
	for _, variable := range variables {
		if _, err := request(plaintext, os.Getenv(variable)); err != nil {
			return fmt.Errorf("%s: %w", strings.TrimSuffix(variable, "_URL"), err)
		}
	}
	return nil
}

// healthy is the shop's exec probe.
func healthy() error {
	_, err := request(plaintext, "http://127.0.0.1:8080/healthz")
	return err
}

// request returns the body of an answer, which must be a 200 and complete.
func request(as role, url string) (string, error) {
	client, err := as.client()
	if err != nil {
		return "", err
	}
	response, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", url, response.Status)
	}
	return string(body), err
}
