package gate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// The answers. Everything else means not ready.
const (
	ready    = "ready\n"
	notReady = "not ready\n"
)

const (
	// maxClients bounds those that are answered at the same time. Further ones are closed, and ask again.
	maxClients = 16
	// fresh is how long one answer is given to all who ask: finding it out takes some milliseconds of Envoy and the kernel.
	fresh = 100 * time.Millisecond
	// answerLimit bounds one conversation.
	answerLimit = 3 * time.Second
	// askAgain is how often the gate asks.
	askAgain = 100 * time.Millisecond
)

// Listen opens the socket at path, for any user to connect to. A socket that is there already, of a mantlet before this one,
// is replaced; any other file is left alone and is an error.
func Listen(path string) (net.Listener, error) {
	info, err := os.Lstat(path)
	if err == nil && info.Mode().Type() != os.ModeSocket {
		return nil, fmt.Errorf("opening the gate's socket: %s is there and is not a socket", path)
	}
	if err == nil {
		err = os.Remove(path)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("replacing the gate's socket: %w", err)
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("opening the gate's socket: %w", err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		_ = listener.Close()
		return nil, fmt.Errorf("opening the gate's socket to all users: %w", err)
	}
	return listener, nil
}

// Serve answers everybody who connects to the listener, by isReady, until ctx ends. It reads nothing. It returns nil at the
// end of ctx, once all answers are given, and otherwise why it can't go on. It closes the listener.
func Serve(ctx context.Context, listener net.Listener, isReady func(context.Context) bool) error {
	stop := context.AfterFunc(ctx, func() { _ = listener.Close() })
	defer stop()
	defer func() { _ = listener.Close() }()
	var clients sync.WaitGroup
	defer clients.Wait()
	answer := shared(isReady)
	places := make(chan struct{}, maxClients)
	for {
		conn, err := listener.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("serving the gate's socket: %w", err)
		}
		select {
		case places <- struct{}{}:
		default:
			_ = conn.Close()
			continue
		}
		clients.Go(func() {
			defer func() { <-places }()
			defer func() { _ = conn.Close() }()
			ctx, cancel := context.WithTimeout(ctx, answerLimit)
			defer cancel()
			text := notReady
			if answer(ctx) {
				text = ready
			}
			_ = conn.SetDeadline(time.Now().Add(answerLimit))
			_, _ = io.WriteString(conn, text) // a client that is gone asks again
		})
	}
}

// shared finds out one answer for all who ask at about the same time.
func shared(isReady func(context.Context) bool) func(context.Context) bool {
	var mu sync.Mutex
	var last bool
	var found time.Time
	return func(ctx context.Context) bool {
		mu.Lock()
		defer mu.Unlock()
		if time.Since(found) > fresh {
			last, found = isReady(ctx), time.Now()
		}
		return last
	}
}

// errNotReady is mantlet's own answer.
var errNotReady = errors.New("mantlet is not ready")

// Ask returns nil if the mantlet that listens at path says that it is ready, and otherwise why not.
func Ask(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return fmt.Errorf("mantlet does not answer: %w", err)
	}
	defer func() { _ = conn.Close() }()
	deadline, _ := ctx.Deadline()
	_ = conn.SetDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	text, err := io.ReadAll(io.LimitReader(conn, int64(len(notReady))))
	switch {
	case err != nil:
		return fmt.Errorf("mantlet does not answer: %w", err)
	case string(text) == ready:
		return nil
	default:
		return errNotReady
	}
}

// Wait returns nil once the mantlet that listens at path says that it is ready. Where ctx ends before, the error says why it
// was not ready last. waiting is told that reason whenever it is another one than before.
func Wait(ctx context.Context, path string, waiting func(reason error)) error {
	tick := time.NewTicker(askAgain)
	defer tick.Stop()
	for last := ""; ; {
		err := Ask(ctx, path)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil && err.Error() != last {
			last = err.Error()
			waiting(err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s (asked at %s): %w", last, path, context.Cause(ctx))
		case <-tick.C:
		}
	}
}
