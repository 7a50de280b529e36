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

// coalesce lets those who ask the same at the same time share one answer, so that no number of them takes more than one.
func coalesce[T any](s *Server, key string, ask func(context.Context) T) T {
	answer, _, _ := s.flight.Do(key, func() (any, error) { return ask(context.Background()), nil })
	return answer.(T)
}

// maxAnswerAge is how long an answer is given to others who ask the same over TCP: it takes some milliseconds of mantlet and Envoy,
// and strangers must not be able to keep them busy.
const maxAnswerAge = 200 * time.Millisecond

// cached is an answer, and when it was begun.
type cached[T any] struct {
	began  time.Time
	answer T
}

// coalesceCached is once for those who ask over the unix socket. All others may get an answer that was finished before, but is
// coalesceCached.
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
