package nft

import (
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"mantlet/render"
)

// TestInboundWhileInterrupted: a signal that a thread gets while it waits for the kernel's answer empties no answer. A socket with a
// time limit is not restarted by itself (signal(7)).
func TestInboundWhileInterrupted(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	p.replace(render.DenyAll(true))
	var thread atomic.Int64
	var done atomic.Bool
	interrupted := make(chan struct{})
	go func() {
		defer close(interrupted)
		for !done.Load() {
			if id := thread.Load(); id != 0 {
				_ = unix.Tgkill(unix.Getpid(), int(id), unix.SIGURG) // which Go's runtime sends threads, too
			}
		}
	}()
	err := p.pod.Do(func() error {
		thread.Store(int64(unix.Gettid()))
		defer thread.Store(0)
		for range 3000 {
			if _, _, _, err := p.table.Inbound(); err != nil {
				return err
			}
		}
		return nil
	})
	done.Store(true)
	<-interrupted
	if err != nil {
		t.Error(err)
	}
}
