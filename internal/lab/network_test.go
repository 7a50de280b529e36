package lab_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"

	"mantlet/internal/lab"
)

// newNetwork returns a network that lives as long as the test.
func newNetwork(t *testing.T) *lab.Network {
	t.Helper()
	network, err := lab.NewNetwork()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := network.Close(); err != nil {
			t.Error(err)
		}
	})
	return network
}

func addHost(t *testing.T, network *lab.Network, name string) *lab.Host {
	t.Helper()
	host, err := network.Host(name)
	if err != nil {
		t.Fatal(err)
	}
	return host
}

func serve(t *testing.T, host *lab.Host, service lab.Service) *lab.Workload {
	t.Helper()
	workload, err := host.Serve(service)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = workload.Close() })
	return workload
}

// netNamespace names the calling thread's network namespace.
func netNamespace() (string, error) { return os.Readlink("/proc/thread-self/ns/net") }

func TestHostsReachEachOther(t *testing.T) {
	network := newNetwork(t)
	hosts := []*lab.Host{addHost(t, network, "a"), addHost(t, network, "b"), addHost(t, network, "c")}
	for _, server := range hosts {
		workload := serve(t, server, lab.Service{Address: ":8080"})
		for _, client := range hosts {
			for _, addr := range server.Addrs() {
				target := netip.AddrPortFrom(addr, 8080)
				conn, err := client.Dial(t.Context(), "tcp", target.String())
				if err != nil {
					t.Errorf("%s to %s: %v", client.Name, server.Name, err)
					continue
				}
				got := make([]byte, 5)
				_, _ = conn.Write([]byte("hello"))
				if _, err := io.ReadFull(conn, got); err != nil || string(got) != "hello" {
					t.Errorf("%s to %s: echo %q: %v", client.Name, server.Name, got, err)
				}
				local := netip.MustParseAddrPort(conn.LocalAddr().String())
				_ = conn.Close()
				until(t, "the connection is over", func() bool {
					all := workload.Connections()
					return len(all) > 0 && all[len(all)-1].Closed
				})
				all := workload.Connections()
				if got := all[len(all)-1]; got.Local != target || got.Remote != local || got.Received != 5 || got.Leaked != 0 {
					t.Errorf("%s to %s: workload recorded %+v", client.Name, server.Name, got)
				}
			}
		}
	}
}

func TestNetworksAreSeparate(t *testing.T) {
	one, other := newNetwork(t), newNetwork(t)
	server := addHost(t, one, "server")
	serve(t, server, lab.Service{Address: ":8080"})
	addHost(t, other, "takes the same address")
	client := addHost(t, other, "client")
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	if conn, err := client.Dial(ctx, "tcp", netip.AddrPortFrom(server.IPv4, 8080).String()); err == nil {
		_ = conn.Close()
		t.Error("networks are connected")
	}
}

func TestDoKeepsNamespacesToItself(t *testing.T) {
	network := newNetwork(t)
	a, b := addHost(t, network, "a"), addHost(t, network, "b")
	home, err := netNamespace()
	if err != nil {
		t.Fatal(err)
	}
	names := map[*lab.Host]string{}
	for _, h := range []*lab.Host{a, b} {
		if err := h.Do(func() (err error) { names[h], err = netNamespace(); return err }); err != nil {
			t.Fatal(err)
		}
	}
	if names[a] == names[b] || names[a] == home || names[b] == home {
		t.Fatalf("namespaces %v and %s, want three", names, home)
	}
	var done sync.WaitGroup
	for range 500 {
		for _, h := range []*lab.Host{a, b} {
			done.Go(func() {
				var got string
				if err := h.Do(func() (err error) { got, err = netNamespace(); return err }); err != nil || got != names[h] {
					t.Errorf("Do on %s ran in %s (%v), want %s", h.Name, got, err, names[h])
				}
			})
		}
		done.Go(func() {
			if got, err := netNamespace(); err != nil || got != home {
				t.Errorf("a goroutine ran in %s (%v), want %s", got, err, home)
			}
		})
	}
	done.Wait()
	if got, err := os.Readlink("/proc/self/ns/net"); err != nil || got != home {
		t.Errorf("the process is in %s (%v), want %s", got, err, home)
	}
}

func TestDoReturns(t *testing.T) {
	host := addHost(t, newNetwork(t), "a")
	want := errors.New("said")
	if err := host.Do(func() error { return want }); !errors.Is(err, want) {
		t.Errorf("Do returned %v, want %v", err, want)
	}
	if err := host.Do(func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("Do returned nil though its function did not return")
	}
}

func TestAddressesAreLiterals(t *testing.T) {
	host := addHost(t, newNetwork(t), "a")
	if _, err := host.Dial(t.Context(), "tcp", "localhost:80"); err == nil {
		t.Error("Dial took a name")
	}
	if _, err := host.Listen("tcp", "localhost:80"); err == nil {
		t.Error("Listen took a name")
	}
	if _, err := host.ListenPacket("udp", "localhost:80"); err == nil {
		t.Error("ListenPacket took a name")
	}
}

func TestSysctlIsOfTheHost(t *testing.T) {
	network := newNetwork(t)
	a, b := addHost(t, network, "a"), addHost(t, network, "b")
	if err := a.Sysctl("net.ipv4.tcp_syncookies", "2"); err != nil {
		t.Fatal(err)
	}
	for host, want := range map[*lab.Host]string{a: "2", b: "1"} {
		if got, err := host.Run("cat", "/proc/sys/net/ipv4/tcp_syncookies"); err != nil || strings.TrimSpace(got) != want {
			t.Errorf("tcp_syncookies on %s is %q (%v), want %s", host.Name, got, err, want)
		}
	}
	if err := a.Sysctl("net.ipv4.no_such_thing", "1"); err == nil {
		t.Error("setting an unknown variable went well")
	}
}

func TestRun(t *testing.T) {
	host := addHost(t, newNetwork(t), "a")
	if out, err := host.Run("nft", "add table inet here; list tables"); err != nil || out != "table inet here\n" {
		t.Errorf("nft said %q, %v", out, err)
	}
	out, err := host.Run("sh", "-c", "echo out; echo oops >&2; exit 4")
	if err == nil || !strings.Contains(err.Error(), "oops") || out != "out\n" {
		t.Errorf("Run returned %q, %v", out, err)
	}
}

func TestHostsAndResolver(t *testing.T) {
	for _, addr := range []string{"198.51.100.7", "198.51.100.8"} { // the second replaces the first
		if err := lab.Hosts(map[string][]netip.Addr{"billing-svc": {netip.MustParseAddr(addr)}}); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile("/etc/hosts"); err != nil || !strings.HasSuffix(string(got), "\n"+addr+"\tbilling-svc\n") {
			t.Errorf("/etc/hosts is %q (%v)", got, err)
		}
	}
	if addrs, err := net.DefaultResolver.LookupHost(t.Context(), "billing-svc"); err != nil || len(addrs) != 1 || addrs[0] != "198.51.100.8" {
		t.Errorf("billing-svc is %v (%v)", addrs, err)
	}
	if err := lab.Resolver(); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile("/etc/resolv.conf"); err != nil || string(got) != "nameserver 127.0.0.1\n" {
		t.Errorf("/etc/resolv.conf is %q (%v)", got, err)
	}
}
