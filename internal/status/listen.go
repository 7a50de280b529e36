package status

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"mantlet/render"
)

// Listen opens the status socket. Only its owner may connect. It replaces a socket that an earlier mantlet left.
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

// listenMarked listens at a socket with mantlet's mark. The rules let peers in to such a socket alone.
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
	config.SetMultipathTCP(false) // the rules look at the socket that a packet is for: with MPTCP a subflow's
	return config.Listen(ctx, "tcp", address)
}

// Limits of the server. No client may be able to use up memory, or to keep a probe from being answered.
const (
	maxConnections = 64
	maxHeader      = 8 << 10
	readLimit      = 5 * time.Second
	writeLimit     = 15 * time.Second
)

func serve(ctx context.Context, listener net.Listener, handler http.Handler) error {
	c := &connLimiter{handler: handler, served: map[net.Conn]bool{}}
	server := &http.Server{
		Handler: c, ConnState: c.connState,
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

// connLimiter limits the open connections of a server. When there is one too many, it closes the oldest that has not sent its request. A
// probe sends its request within milliseconds, so that clients which send none can't keep it from being answered.
type connLimiter struct {
	handler http.Handler

	mu     sync.Mutex
	conns  []net.Conn
	served map[net.Conn]bool // connections whose requests are being answered
}

// connKey is the key of a request's connection in its context.
type connKey struct{}

// ServeHTTP passes a request on, and keeps its connection from being closed before idle ones.
func (c *connLimiter) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	conn, _ := r.Context().Value(connKey{}).(net.Conn)
	c.mu.Lock()
	if slices.Contains(c.conns, conn) {
		c.served[conn] = true
	}
	c.mu.Unlock()
	c.handler.ServeHTTP(w, r)
}

func (c *connLimiter) connState(conn net.Conn, state http.ConnState) {
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

func (c *connLimiter) forget(conn net.Conn) {
	c.conns = slices.DeleteFunc(c.conns, func(other net.Conn) bool { return other == conn })
	delete(c.served, conn)
}
