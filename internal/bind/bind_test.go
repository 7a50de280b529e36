package bind_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"mantlet/internal/bind"
	"mantlet/internal/lab"
)

func TestMain(m *testing.M) {
	lab.Enter()
	os.Exit(m.Run())
}

func own(t *testing.T) string {
	t.Helper()
	name, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("pid %d (%s)", os.Getpid(), strings.TrimSpace(string(name)))
}

// TestTry tells who listens at an address, be it as a part of all addresses.
func TestTry(t *testing.T) {
	for at, wanted := range map[string]string{
		"127.0.0.1:0": "127.0.0.1", "[::1]:0": "::1", "0.0.0.0:0": "127.137.0.1", "[::]:0": "::1", ":0": "127.0.0.1",
	} {
		t.Run(at, func(t *testing.T) {
			listener, err := net.Listen("tcp", at)
			if err != nil {
				t.Fatal(err)
			}
			defer listener.Close()
			port := listener.Addr().(*net.TCPAddr).AddrPort().Port()
			address := netip.AddrPortFrom(netip.MustParseAddr(wanted), port)
			conflicts, ok := errors.AsType[bind.Conflicts](bind.Try(nil, address))
			if !ok || len(conflicts) != 1 || conflicts[0].Address != address || conflicts[0].Holder != own(t) {
				t.Fatalf("conflicts are %+v, want one with %s", conflicts, own(t))
			}
			conflicts[0].For = "egress entry billing"
			if want := fmt.Sprintf("%s is held by %s; egress entry billing", address, own(t)); conflicts.Error() != want {
				t.Errorf("it says %q, want %q", conflicts.Error(), want)
			}
			if listening := bind.Listening(); len(listening) != 1 || listening.At(address) != own(t) {
				t.Errorf("listening are %v, want %s", listening, own(t))
			}
			if other := netip.AddrPortFrom(netip.MustParseAddr("127.9.9.9"), port); at == "127.0.0.1:0" && bind.Try(nil, other) != nil {
				t.Errorf("%s is taken", other)
			}
			if err := listener.Close(); err != nil {
				t.Fatal(err)
			}
			if err := bind.Try(nil, address); err != nil {
				t.Errorf("the listener is gone, and %v", err)
			}
		})
	}
}

// TestTryLeavesListenersAlone: to share a port of one's own is no conflict, and takes no connection from who listens.
func TestTryLeavesListenersAlone(t *testing.T) {
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var failed error
		err := raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
		return errors.Join(err, failed)
	}}
	listener, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	address := listener.Addr().(*net.TCPAddr).AddrPort()
	for range 100 {
		if err := bind.Try(nil, address); err != nil {
			t.Fatal(err)
		}
		conn, err := net.Dial("tcp", address.String())
		if err != nil {
			t.Fatal(err)
		}
		accepted, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(conn.Close(), accepted.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestTryWithoutAddress: what is no conflict is an error of its own.
func TestTryWithoutAddress(t *testing.T) {
	err := bind.Try(nil, netip.MustParseAddrPort("192.0.2.1:1"))
	if !errors.Is(err, unix.EADDRNOTAVAIL) || !strings.Contains(err.Error(), "192.0.2.1:1") {
		t.Errorf("the error is %v", err)
	}
}
