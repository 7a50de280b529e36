package sockdiag

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"mantlet/internal/lab"
)

func TestMain(m *testing.M) {
	lab.Enter()
	m.Run()
}

// TestCookies: a socket keeps its cookie, and the next one with the same addresses has another.
func TestCookies(t *testing.T) {
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, listen := range []string{"127.0.0.1:0", "[::1]:0"} {
		listener, err := net.Listen("tcp", listen)
		must(err)
		defer func() { _ = listener.Close() }()
		finder, err := NewFinder()
		must(err)
		defer func() { _ = finder.Close() }()
		at := listener.Addr().(*net.TCPAddr).AddrPort()
		dialer := net.Dialer{}
		var before Cookie
		for range 2 {
			client, err := dialer.DialContext(t.Context(), "tcp", at.String())
			must(err)
			server, err := listener.Accept()
			must(err)
			from := client.LocalAddr().(*net.TCPAddr)
			dialer.LocalAddr = from
			socket := Socket{Local: at, Remote: from.AddrPort()}
			found, err := finder.Find(socket)
			must(err)
			all, err := List()
			must(err)
			if found == 0 || all[socket].Cookie != found || found == before {
				t.Errorf("%v: cookie %d, in the list %d, that of the socket before %d", socket, found, all[socket].Cookie, before)
			}
			if again, err := finder.Find(socket); err != nil || again != found {
				t.Errorf("%v: cookie %d, then %d: %v", socket, found, again, err)
			}
			before = found
			for _, conn := range []net.Conn{client, server} { // by a reset, so that nothing is left in TIME_WAIT
				must(conn.(*net.TCPConn).SetLinger(0))
				must(conn.Close())
			}
			must(lab.Until(t.Context(), func() bool {
				gone, err := finder.Find(socket)
				must(err)
				return gone == 0
			}))
		}
		nobody := Socket{Local: at, Remote: netip.AddrPortFrom(at.Addr(), 1)}
		if found, err := finder.Find(nobody); found != 0 || err != nil {
			t.Errorf("%v: cookie %d, %v; want none, although somebody listens there", nobody, found, err)
		}
	}
}

// TestDestroy ends sockets of IPv4, of IPv6 and of both, more than are ended together, and no others.
func TestDestroy(t *testing.T) {
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(Supported())
	listener, err := net.Listen("tcp", ":0") // for both
	must(err)
	defer func() { _ = listener.Close() }()
	_, port, err := net.SplitHostPort(listener.Addr().String())
	must(err)
	type pair struct{ client, server net.Conn }
	var all []pair
	matches := map[Socket]bool{}
	for i := range 2*atOnce + 10 {
		client, err := net.Dial("tcp", net.JoinHostPort([]string{"127.0.0.1", "::1"}[i%2], port))
		must(err)
		defer func() { _ = client.Close() }()
		server, err := listener.Accept()
		must(err)
		defer func() { _ = server.Close() }()
		all = append(all, pair{client, server})
		if i >= 2 {
			matches[Socket{Local: client.RemoteAddr().(*net.TCPAddr).AddrPort(), Remote: client.LocalAddr().(*net.TCPAddr).AddrPort()}] = true
		}
	}
	var order []Socket
	ended, err := Destroy(func(open map[Socket]Details) []Socket {
		for s := range open {
			if matches[s] {
				order = append(order, s)
			}
		}
		return order
	})
	if err != nil || len(ended) != len(matches) || !slices.Equal(ended, order) {
		t.Errorf("ended %d of %d: %v", len(ended), len(matches), err)
	}
	for i, p := range all {
		if i < 2 {
			_, err := p.client.Write([]byte("x"))
			must(err)
			_, err = p.server.Read(make([]byte, 1))
			must(err)
			continue
		}
		for _, conn := range []net.Conn{p.client, p.server} {
			if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
				t.Errorf("connection %d ends by %v", i, err)
			}
		}
	}
}

// TestPriority: a socket's priority is told, and that of its peer is another.
func TestPriority(t *testing.T) {
	for _, listen := range []string{"127.0.0.1:0", "[::1]:0"} {
		listener, err := net.Listen("tcp", listen)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = listener.Close() }()
		dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
			return errors.Join(c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PRIORITY, 5) }), err)
		}}
		client, err := dialer.DialContext(t.Context(), "tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = client.Close() }()
		all, err := List()
		if err != nil {
			t.Fatal(err)
		}
		own := Socket{Local: client.LocalAddr().(*net.TCPAddr).AddrPort(), Remote: client.RemoteAddr().(*net.TCPAddr).AddrPort()}
		if got, its := all[own].Priority, all[Socket{Local: own.Remote, Remote: own.Local}].Priority; got != 5 || its != 0 {
			t.Errorf("%s: the priority is %d, want 5; its peer's %d, want 0", listen, got, its)
		}
	}
}

// BenchmarkFind is what one look for a socket costs.
func BenchmarkFind(b *testing.B) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	client, err := (&net.Dialer{}).DialContext(context.Background(), "tcp", listener.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	finder, err := NewFinder()
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = finder.Close() }()
	socket := Socket{Local: client.LocalAddr().(*net.TCPAddr).AddrPort(), Remote: client.RemoteAddr().(*net.TCPAddr).AddrPort()}
	for b.Loop() {
		if found, err := finder.Find(socket); found == 0 || err != nil {
			b.Fatal(found, err)
		}
	}
}
