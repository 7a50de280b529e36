package status

import (
	"context"
	"net"
	"net/http"
	"time"
)

// overTCP reports whether a request came to the status address.
func overTCP(r *http.Request) bool {
	_, is := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	return is
}

// coalesce returns the same answer to all requests with the same key that come while it is made. So any number of requests costs as much as
// one.
func coalesce[T any](s *Server, key string, ask func(context.Context) T) T {
	answer, _, _ := s.flight.Do(key, func() (any, error) { return ask(context.Background()), nil })
	return answer.(T)
}

// maxAnswerAge is how old an answer over TCP may be. An answer costs mantlet and Envoy some milliseconds, and strangers must not be able to
// keep them busy.
const maxAnswerAge = 200 * time.Millisecond

// cached is an answer with the time when it was begun.
type cached[T any] struct {
	began  time.Time
	answer T
}

// coalesceCached is coalesce, but a request over TCP may get an answer that was begun up to maxAnswerAge ago. A request over the unix socket
// never does.
func coalesceCached[T any](s *Server, r *http.Request, key string, ask func(context.Context) T) T {
	if !overTCP(r) {
		return coalesce(s, key, ask)
	}
	return coalesce(s, key+" over TCP", func(ctx context.Context) T {
		if last, ok := s.answers.Load(key); ok && time.Since(last.(cached[T]).began) < maxAnswerAge {
			return last.(cached[T]).answer
		}
		now := cached[T]{began: time.Now()}
		now.answer = ask(ctx)
		s.answers.Store(key, now)
		return now.answer
	})
}
