package status

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"

	"mantlet/render"
	"mantlet/schema"
)

// OverSocket returns a client of the HTTP server at a unix socket. Connections are not kept: an idle one could stay with
// whoever listened there before.
func OverSocket(path string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		},
	}}
}

// Source is a running mantlet, as a Server asks it. Its methods may be called at any time.
type Source interface {
	// Dead returns why mantlet should be killed and started again, or nil.
	Dead(context.Context) error
	// Unready returns the reasons why the sidecar is not ready; none if it is.
	Unready(context.Context) []Reason
	// InForce reports whether a state is in force: before, some checks have nothing to try.
	InForce() bool
	// Notes returns the problems that do not make the sidecar unready.
	Notes() []Problem
	Status(context.Context) Status
	// Statistics returns those of the Envoy that serves, in Prometheus' text format.
	Statistics(context.Context) ([]byte, error)
	// Probes returns the probes of the workload that are configured.
	Probes() []schema.Probe
	// Probed takes note of what came of a probe.
	Probed(schema.Probe, error)
	// Unserved takes note of why the status address is not served; nil once it is. It reports whether the reason is new.
	Unserved(error) (isNew bool)
}

// Server answers what a Source knows over HTTP. Its exported fields are set before it is used.
type Server struct {
	Source Source
	// Follow returns refusals as they come, until ctx ends; an error where too many follow already. It may be nil.
	Follow func(ctx context.Context) (<-chan Followed, error)
	Log    *slog.Logger

	flight  singleflight.Group // of requests that ask the same
	answers sync.Map           // the last ones, by what was asked
}

// Listen opens the status socket, which only the owner may connect to. One that a mantlet before this one left is replaced.
func Listen(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("removing the socket of a mantlet before this one: %w", err)
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("opening the status socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("closing the status socket to others: %w", err), listener.Close())
	}
	return listener, nil
}

// Serve answers at a listener until ctx ends.
func (s *Server) Serve(ctx context.Context, listener net.Listener) error {
	if err := serve(ctx, listener, s.Handler()); err != nil {
		return fmt.Errorf("serving the status socket: %w", err)
	}
	return nil
}

// rebind is how often the status address is tried that is somebody else's.
const rebind = time.Second

// ServeAddress answers at the status address until ctx ends. Where it can't, the Source is told why, and it is tried again. holder
// names the process that has the address.
func (s *Server) ServeAddress(ctx context.Context, address string, holder func() string) {
	for ; ctx.Err() == nil; pause(ctx, rebind) {
		listener, err := listenMarked(ctx, address)
		if err == nil {
			s.Source.Unserved(nil)
			err = serve(ctx, listener, s.Handler())
		}
		if err == nil || ctx.Err() != nil {
			return
		}
		err = fmt.Errorf("serving the status address: %w", err)
		if errors.Is(err, syscall.EADDRINUSE) {
			err = fmt.Errorf("%w: it is held by %s", err, holder())
		}
		if s.Source.Unserved(err) {
			s.Log.Warn("the status address is not served", "error", err)
		}
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// listenMarked listens as the rules let peers in by: at a socket with mantlet's mark.
func listenMarked(ctx context.Context, address string) (net.Listener, error) {
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var refused error
		err := raw.Control(func(fd uintptr) {
			refused = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(render.StatusSocket))
		})
		if err = errors.Join(err, refused); err != nil {
			return fmt.Errorf("marking the socket (NET_ADMIN lets): %w", err)
		}
		return nil
	}}
	config.SetMultipathTCP(false) // the mark is to be on the very socket that packets are for
	return config.Listen(ctx, "tcp", address)
}

// Limits of the server: whoever may connect must not be able to use up memory, nor to keep a probe from its answer.
const (
	maxConnections = 64
	maxHeader      = 8 << 10
	readLimit      = 5 * time.Second
	writeLimit     = 15 * time.Second
)

func serve(ctx context.Context, listener net.Listener, handler http.Handler) error {
	c := &connections{handler: handler, served: map[net.Conn]bool{}}
	server := &http.Server{
		Handler: c, ConnState: c.changed,
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, conn)
		},
		ReadTimeout: readLimit, WriteTimeout: writeLimit, MaxHeaderBytes: maxHeader,
	}
	server.SetKeepAlivesEnabled(false)
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// connections bounds the connections of a server. Where one is too many, the oldest ends that has not sent its request yet: a probe
// sends its own within milliseconds, and those who hold connections without one can't keep it from being answered.
type connections struct {
	handler http.Handler

	mu     sync.Mutex
	conns  []net.Conn
	served map[net.Conn]bool // those of conns whose requests are being answered
}

// connKey is the key of a request's connection in its context.
type connKey struct{}

// ServeHTTP answers a request, whose connection is the last to be ended meanwhile.
func (c *connections) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	conn, _ := r.Context().Value(connKey{}).(net.Conn)
	c.mu.Lock()
	if slices.Contains(c.conns, conn) {
		c.served[conn] = true
	}
	c.mu.Unlock()
	c.handler.ServeHTTP(w, r)
}

func (c *connections) changed(conn net.Conn, state http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch state {
	case http.StateNew:
		c.conns = append(c.conns, conn)
		if len(c.conns) > maxConnections {
			oldest := max(0, slices.IndexFunc(c.conns[:maxConnections], func(conn net.Conn) bool { return !c.served[conn] }))
			_ = c.conns[oldest].Close()
			c.forget(c.conns[oldest])
		}
	case http.StateClosed, http.StateHijacked:
		c.forget(conn)
	default:
	}
}

func (c *connections) forget(conn net.Conn) {
	c.conns = slices.DeleteFunc(c.conns, func(other net.Conn) bool { return other == conn })
	delete(c.served, conn)
}

// Handler answers all paths.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, r *http.Request) {
		var reasons []Reason
		if err := s.Source.Dead(r.Context()); err != nil {
			reasons = append(reasons, Reason{CheckMantlet, err.Error()})
		}
		answer(w, r, []string{CheckMantlet}, nil, reasons, nil)
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		var waiting []string
		if !s.Source.InForce() {
			waiting = untried()
		}
		answer(w, r, Checks(), waiting, recent(s, r, "unready", s.Source.Unready), s.Source.Notes())
	})
	mux.HandleFunc("GET /probe/{name}", s.probe)
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		encoder := json.NewEncoder(w)
		encoder.SetEscapeHTML(false)
		_ = encoder.Encode(recent(s, r, "status", s.Source.Status)) // to a client that is gone
	})
	mux.HandleFunc("GET /metrics", s.serveMetrics)
	mux.HandleFunc("GET /stats/prometheus", s.serveStatistics)
	mux.HandleFunc("GET "+RefusalsPath, s.serveRefusals)
	return mux
}

// RefusalsPath is where refusals are served as they come, over the unix socket alone.
const RefusalsPath = "/refusals"

// serveRefusals writes refusals as they come, a line of JSON each, until the client is gone or takes none for too long.
func (s *Server) serveRefusals(w http.ResponseWriter, r *http.Request) {
	if overTCP(r) || s.Follow == nil {
		http.NotFound(w, r)
		return
	}
	follow, err := s.Follow(r.Context())
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	stream := http.NewResponseController(w)
	write := func(line []byte) error {
		if err := stream.SetWriteDeadline(time.Now().Add(writeLimit)); err != nil {
			return err
		}
		if _, err := w.Write(line); err != nil {
			return err
		}
		return stream.Flush()
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	err = errors.Join(stream.SetReadDeadline(time.Time{}), write(nil)) // it is to notice that the client is gone, however late
	for err == nil {
		select {
		case <-r.Context().Done():
			return
		case refusal := <-follow:
			var line []byte
			if line, err = json.Marshal(refusal); err == nil {
				err = write(append(line, '\n'))
			}
		}
	}
	s.Log.Debug("a follower of refusals is gone", "error", err)
}

// overTCP reports whether a request came to the status address.
func overTCP(r *http.Request) bool {
	_, is := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	return is
}

// once lets those who ask the same at the same time share one answer, so that no number of them takes more than one.
func once[T any](s *Server, key string, ask func(context.Context) T) T {
	answer, _, _ := s.flight.Do(key, func() (any, error) { return ask(context.Background()), nil })
	return answer.(T)
}

// cacheLife is how long an answer is given to others who ask the same over TCP: it takes some milliseconds of mantlet and Envoy,
// and strangers must not be able to keep them busy.
const cacheLife = 200 * time.Millisecond

// cached is an answer, and when it was begun.
type cached[T any] struct {
	began  time.Time
	answer T
}

// recent is once for those who ask over the unix socket. All others may get an answer that was finished before, but is
// recent.
func recent[T any](s *Server, r *http.Request, key string, ask func(context.Context) T) T {
	if !overTCP(r) {
		return once(s, key, ask)
	}
	return once(s, key+" over TCP", func(ctx context.Context) T {
		if last, ok := s.answers.Load(key); ok && time.Since(last.(cached[T]).began) < cacheLife {
			return last.(cached[T]).answer
		}
		now := cached[T]{began: time.Now()}
		now.answer = ask(ctx)
		s.answers.Store(key, now)
		return now.answer
	})
}

// answer writes what Kubernetes' own components answer at these paths: ok, or the reasons, one a line; with ?verbose every
// check, of which some may have to wait. Those that ?exclude= names do not count. What is worth a look although it is ok follows it.
func answer(w http.ResponseWriter, r *http.Request, checks, waiting []string, reasons []Reason, notes []Problem) {
	query := r.URL.Query()
	excluded := query["exclude"]
	counts := slices.DeleteFunc(slices.Clone(reasons), func(reason Reason) bool { return slices.Contains(excluded, reason.Check) })
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	verdict := "passed"
	if len(counts) > 0 {
		verdict = "failed"
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	switch {
	case query.Has("verbose"):
		for _, check := range checks {
			_, _ = fmt.Fprintln(w, verbose(check, reasons, slices.Contains(waiting, check), slices.Contains(excluded, check)))
		}
		_, _ = fmt.Fprintf(w, "%s check %s\n", r.URL.Path[1:], verdict)
	case len(counts) == 0:
		_, _ = fmt.Fprintln(w, "ok")
	default:
		for _, reason := range counts {
			_, _ = fmt.Fprintln(w, reason.Text)
		}
		return
	}
	for _, note := range notes {
		_, _ = fmt.Fprintln(w, note.Text)
	}
}

// verbose is the line of one check.
func verbose(check string, reasons []Reason, waiting, excluded bool) string {
	if excluded {
		return "[+]" + check + " excluded: ok"
	}
	line := "[+]" + check + " ok"
	if waiting {
		line = "[-]" + check + " waiting: nothing is in force yet"
	}
	for i, reason := range slices.DeleteFunc(slices.Clone(reasons), func(r Reason) bool { return r.Check != check }) {
		if i == 0 {
			line = "[-]" + check + " failed: " + reason.Text
		} else {
			line += "; " + reason.Text
		}
	}
	return line
}
