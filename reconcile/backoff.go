package reconcile

import (
	"math/rand/v2"
	"time"
)

// backoff spaces out starts that fail one after another. After the first failure there is no wait: an Envoy that was killed is back
// within a client's first retransmission.
type backoff struct {
	pause time.Duration
	last  time.Time
}

const (
	firstPause = 100 * time.Millisecond
	maxPause   = 10 * time.Second
	// healthy is how many times the last pause must pass without a failure until the next one counts as the first. So pauses take a tenth
	// of the time at most, and an Envoy that is killed every minute is back at once each time.
	healthy = 10
)

// next returns how long to wait, with jitter, after a failure at now.
func (b *backoff) next(now time.Time) time.Duration {
	if now.Sub(b.last) > healthy*b.pause {
		b.pause = 0
	}
	b.last = now
	pause := b.pause
	b.pause = min(max(2*b.pause, firstPause), maxPause)
	if pause == 0 {
		return 0
	}
	return pause/2 + rand.N(pause/2)
}
