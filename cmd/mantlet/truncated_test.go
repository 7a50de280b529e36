package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"
)

// TestHowConnectionsEnd: what the workload sees of how its peer ends a connection. A reset is a reset. A FIN without TLS's
// close_notify looks like an end, although whoever is on the way could have sent it: the limit that the documentation tells.
func TestHowConnectionsEnd(t *testing.T) {
	t.Parallel()
	const port, out = 9095, "127.137.0.1:80"
	p := newPod(t, web)
	upstream := p.host("upstream")
	endpoint, err := upstream.Listen("tcp", ":8080")
	p.must(err)
	t.Cleanup(func() { _ = endpoint.Close() })
	workload, err := p.Listen("tcp", fmt.Sprintf(":%d", port))
	p.must(err)
	t.Cleanup(func() { _ = workload.Close() })
	p.override(fmt.Sprintf("egress: [{listen: '%s', upstream: '%s'}]", out, netip.AddrPortFrom(upstream.IPv4, 8080)))
	p.start()

	// Each returns the workload's end of a connection, and the peer's, once some bytes were exchanged.
	directions := map[string]func() (net.Conn, *tls.Conn){
		"ingress": func() (net.Conn, *tls.Conn) {
			conn := tls.Client(p.dial(p.outside, netip.AddrPortFrom(p.IPv4, port)), p.client.ClientConfig("pod"))
			_, err := conn.Write([]byte("x"))
			p.must(err)
			inner, err := workload.Accept()
			p.must(err)
			_, err = io.ReadFull(inner, make([]byte, 1))
			p.must(err)
			return inner, conn
		},
		"egress": func() (net.Conn, *tls.Conn) {
			inner := p.dial(p.Host, listen(out))
			raw, err := endpoint.Accept()
			p.must(err)
			conn := tls.Server(raw, p.issue("endpoint").ServerConfig())
			_, err = conn.Write([]byte("x"))
			p.must(err)
			_, err = io.ReadFull(inner, make([]byte, 1))
			p.must(err)
			return inner, conn
		},
	}
	for direction, connect := range directions {
		for name, c := range map[string]struct {
			end  func(conn *tls.Conn, raw *net.TCPConn) error
			want error
		}{
			"close_notify":     {func(conn *tls.Conn, _ *net.TCPConn) error { return conn.Close() }, io.EOF},
			"FIN":              {func(_ *tls.Conn, raw *net.TCPConn) error { return raw.Close() }, io.EOF},
			"FIN, half-closed": {func(_ *tls.Conn, raw *net.TCPConn) error { return raw.CloseWrite() }, io.EOF},
			"RST":              {func(_ *tls.Conn, raw *net.TCPConn) error { return errors.Join(raw.SetLinger(0), raw.Close()) }, syscall.ECONNRESET},
		} {
			inner, conn := connect()
			p.must(inner.SetDeadline(time.Now().Add(limit)))
			p.must(c.end(conn, conn.NetConn().(*net.TCPConn)))
			if _, err := inner.Read(make([]byte, 1)); !errors.Is(err, c.want) {
				t.Errorf("%s, %s: the workload sees %v, want %v", direction, name, err, c.want)
			}
			_, _ = inner.Close(), conn.NetConn().Close()
		}
	}
}
