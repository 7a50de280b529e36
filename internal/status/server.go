package status

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/singleflight"

	"mantlet/schema"
)

// Source is the running mantlet that a Server asks. Its methods may be called at any time, from several goroutines.
type Source interface {
	// Dead returns why mantlet should be killed and started again, or nil.
	Dead(context.Context) error
	// Unready returns the reasons why the sidecar is not ready; none if it is.
	Unready(context.Context) []Reason
	// InForce reports whether a state is in force. Until then some checks have nothing to look at.
	InForce() bool
	// Notes returns the problems that do not make the sidecar unready.
	Notes() []Problem
	// Status returns the whole status. It asks kernel and Envoy.
	Status(context.Context) Status
	// Forecast returns how many open connections another mesh would end, which is given as render.MarshalMesh writes it.
	Forecast(mesh []byte) (Forecast, error)
	// Statistics returns the statistics of the Envoy that serves, in Prometheus' text format.
	Statistics(context.Context) ([]byte, error)
	// Probes returns the probes of the workload that are configured.
	Probes() []schema.Probe
	// Probed records the result of a probe; nil for success.
	Probed(schema.Probe, error)
	// StatusAddressFailed records why the status address is not served; nil once it is. It reports whether the reason is new.
	StatusAddressFailed(error) (isNew bool)
}

// Server serves the status, the checks, the metrics and the probes of a Source over HTTP. Its exported fields are set before it is used.
type Server struct {
	Source Source
	// Follow returns refusals as they come, until ctx ends. It fails if too many follow already. If it is nil, there is no RefusalsPath.
	Follow func(ctx context.Context) (<-chan Followed, error)
	Log    *slog.Logger

	flight  singleflight.Group // requests that are being answered, by key
	answers sync.Map           // the last answers over TCP, by key
}

// Serve answers at the status socket's listener until ctx ends.
func (s *Server) Serve(ctx context.Context, listener net.Listener) error {
	if err := serve(ctx, listener, s.Handler()); err != nil {
		return fmt.Errorf("serving the status socket: %w", err)
	}
	return nil
}

// rebindInterval is how long ServeAddress waits before it tries again to listen.
const rebindInterval = time.Second

// ServeAddress answers at the status address until ctx ends. If it can't, it reports the reason to the Source and tries again. holder returns
// the name of the process that has the address.
func (s *Server) ServeAddress(ctx context.Context, address string, holder func() string) {
	for ; ctx.Err() == nil; sleep(ctx, rebindInterval) {
		listener, err := listenMarked(ctx, address)
		if err == nil {
			s.Source.StatusAddressFailed(nil)
			err = serve(ctx, listener, s.Handler())
		}
		if err == nil || ctx.Err() != nil {
			return
		}
		err = fmt.Errorf("serving the status address: %w", err)
		if errors.Is(err, syscall.EADDRINUSE) {
			err = fmt.Errorf("%w: it is held by %s", err, holder())
		}
		if s.Source.StatusAddressFailed(err) {
			s.Log.Warn("the status address is not served", "error", err)
		}
	}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// Handler returns the handler of all paths.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, r *http.Request) {
		var reasons []Reason
		if err := s.Source.Dead(r.Context()); err != nil {
			reasons = append(reasons, Reason{CheckMantlet, err.Error()})
		}
		writeChecks(w, r, []string{CheckMantlet}, nil, reasons, nil)
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		var waiting []string
		if !s.Source.InForce() {
			waiting = waitingChecks()
		}
		writeChecks(w, r, Checks(), waiting, coalesceCached(s, r, "unready", s.Source.Unready), s.Source.Notes())
	})
	mux.HandleFunc("GET /probe/{name}", s.probe)
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		encoder := json.NewEncoder(w)
		encoder.SetEscapeHTML(false)
		_ = encoder.Encode(coalesceCached(s, r, "status", s.Source.Status)) // it fails if the client is gone
	})
	mux.HandleFunc("GET /metrics", s.serveMetrics)
	mux.HandleFunc("GET /stats/prometheus", s.serveStatistics)
	mux.HandleFunc("GET "+RefusalsPath, s.serveRefusals)
	mux.HandleFunc("POST "+ForecastPath, s.serveForecast)
	return mux
}

// RefusalsPath is where refusals are streamed, over the unix socket alone.
const RefusalsPath = "/refusals"

// serveRefusals streams refusals, a line of JSON each, until the client is gone, or does not read for writeLimit.
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
	err = errors.Join(stream.SetReadDeadline(time.Time{}), write(nil)) // no read deadline: the read notices when the client goes
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
