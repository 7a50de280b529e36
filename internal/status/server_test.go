package status

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
)

// pipes is a listener of connections that are no more than pipes.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case conn := <-p.conns:
		return conn, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error { close(p.done); return nil }

func (p *pipes) Addr() net.Addr { return &net.UnixAddr{} }

func (p *pipes) dial() net.Conn {
	here, there := net.Pipe()
	p.conns <- there
	return here
}

// TestSilentConnections: those who connect and ask nothing are cut for those who ask, and do not cut what is being answered.
func TestSilentConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		listener := &pipes{conns: make(chan net.Conn), done: make(chan struct{})}
		release := make(chan struct{})
		go func() {
			_ = serve(t.Context(), listener, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				<-release
				_, _ = io.WriteString(w, "well")
			}))
		}()
		silent := func(n int) (conns []net.Conn) {
			for range n {
				conns = append(conns, listener.dial())
			}
			synctest.Wait()
			return conns
		}
		before := silent(maxConnections - 1)
		probe := listener.dial()
		if _, err := io.WriteString(probe, "GET /livez HTTP/1.1\r\nHost: pod\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		after := silent(3 * maxConnections)
		for i, conn := range append(before, after[:2*maxConnections]...) {
			if _, err := conn.Write([]byte("x")); err == nil {
				t.Fatalf("silent connection %d is still there", i)
			}
		}
		close(release)
		answer, err := http.ReadResponse(bufio.NewReader(probe), nil)
		if err != nil || answer.StatusCode != http.StatusOK {
			t.Fatalf("the probe got %v, %v", answer, err)
		}
		_ = answer.Body.Close()
	})
}
