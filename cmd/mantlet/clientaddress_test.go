package main

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"mantlet/internal/lab"
	"mantlet/reconcile/routes"
	"mantlet/render"
)

// clients is the setting by which the workload sees its clients' addresses.
const clients = "MANTLET_SOURCE_ADDRESS=client"

// plaintext is what the workloads of these tests say. Nothing of it may be on the wire.
const plaintext = "the workload says this in plaintext to whoever connects\n"

// sniff returns what leaves the pod and is plaintext of the workload's: the packets that contain some of it, as they come in on the
// host. The prober's own words are none of it.
func (p *pod) sniff(on *lab.Host) func() []string {
	p.t.Helper()
	var file *os.File
	p.must(on.Do(func() error {
		const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // in network byte order
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, all)
		if err != nil {
			return err
		}
		file = os.NewFile(uintptr(fd), "the wire")
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<20)
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Attrs().Index})
	}))
	var mu sync.Mutex
	var seen []string
	var listening sync.WaitGroup
	listening.Go(func() {
		buffer := make([]byte, 64<<10)
		for {
			n, err := file.Read(buffer)
			if err != nil {
				return
			}
			if bytes.Contains(buffer[:n], []byte("in plaintext")) {
				mu.Lock()
				seen = append(seen, fmt.Sprintf("%q", buffer[:n]))
				mu.Unlock()
			}
		}
	})
	p.t.Cleanup(func() { _ = file.Close(); listening.Wait() })
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		return seen
	}
}

// unheard is the judgement over what was sniffed.
func (p *pod) unheard(sniffed func() []string) {
	p.t.Helper()
	if seen := sniffed(); len(seen) > 0 {
		p.t.Errorf("%d packets with plaintext left the pod, the first is %s", len(seen), seen[0])
	}
}

// speaking starts workloads that say something first, at the protected ports and at the one that is passed through.
func (p *pod) speaking() map[uint16]*lab.Workload {
	p.t.Helper()
	all := map[uint16]*lab.Workload{}
	for _, port := range []uint16{mtlsPort, tlsPort, passthroughPort} {
		all[port] = p.serve(p.Host, lab.Service{Address: fmt.Sprintf(":%d", port), Banner: plaintext})
	}
	p.protected = append(p.protected, all[mtlsPort], all[tlsPort])
	return all
}

// converse connects from outside through the mesh: the workload must say its words, and echo.
func (p *pod) converse(to netip.AddrPort) error {
	config := p.client.ClientConfig("pod")
	if to.Port() == tlsPort {
		config = p.anonymous()
	}
	conn, err := p.handshake(to, config)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	got := make([]byte, len(plaintext))
	if err := readAll(conn, got); err != nil {
		return err
	}
	if string(got) != plaintext {
		return fmt.Errorf("%q came", got)
	}
	return echo(conn)
}

// lastPeer returns who the workload's last peer is.
func lastPeer(w *lab.Workload) netip.AddrPort {
	all := w.Connections()
	if len(all) == 0 {
		return netip.AddrPort{}
	}
	return all[len(all)-1].Remote
}

// routed returns whether the policy routes are there, for both families, or for none.
func (p *pod) routed(want bool) error {
	return p.Do(func() error { return routes.Kernel{}.Check(render.Routes{IPv4: want, IPv6: want}) })
}

// TestClientAddress: the workload sees the address of its client, or its own pod's, as the override file says, and a change from one
// to the other ends nothing. From inside the pod, and at the status port, nothing is different.
func TestClientAddress(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, "MANTLET_STATUS_ADDRESS=:9901")
	m := p.override("sourceAddress: client\n")
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	sniffed := p.sniff(p.outside)
	p.run()
	workloads := p.speaking()
	p.ready()
	p.must(p.routed(true))
	peers := func(client bool) {
		t.Helper()
		for i, addr := range p.Addrs() {
			for _, port := range []uint16{mtlsPort, tlsPort} {
				if err := p.converse(netip.AddrPortFrom(addr, port)); err != nil {
					t.Errorf("%s, port %d: %v", addr, port, err)
				}
				want := addr
				if client {
					want = p.outside.Addrs()[i]
				}
				if got := lastPeer(workloads[port]); got.Addr() != want {
					t.Errorf("at port %d the workload sees %s, want %s", port, got, want)
				}
			}
			inside := p.dial(p.Host, netip.AddrPortFrom(addr, mtlsPort))
			if got := make([]byte, len(plaintext)); readAll(inside, got) != nil || lastPeer(workloads[mtlsPort]).Addr() != addr {
				t.Errorf("from inside the workload sees %s, and says %q", lastPeer(workloads[mtlsPort]), got)
			}
			if code, _, err := p.get(addr, http.MethodGet, "/readyz"); code != http.StatusOK {
				t.Errorf("the status address answers %d, %v", code, err)
			}
		}
	}
	peers(true)
	if len(sniffed()) > 0 {
		p.unheard(sniffed)
	}

	old, err := p.handshake(netip.AddrPortFrom(p.IPv4, mtlsPort), p.client.ClientConfig("pod"))
	p.must(err)
	p.must(readAll(old, make([]byte, len(plaintext))))
	m.write("sourceAddress: pod\n")
	p.await("an Envoy that does not use clients' addresses", func() bool {
		epochs := p.told().Epochs
		return len(epochs) == 2 && epochs[1].Serving
	})
	peers(false)
	p.must(echo(old))
	p.must(p.routed(true)) // the old connection needs them
	p.must(old.Close())
	p.await("the routes are gone", func() bool { return p.routed(false) == nil })
	peers(false)
	p.ready()
	m.write("sourceAddress: client\n")
	p.await("the routes are back", func() bool { return p.routed(true) == nil })
	p.await("an Envoy that uses clients' addresses", func() bool {
		return p.converse(netip.AddrPortFrom(p.IPv4, mtlsPort)) == nil && lastPeer(workloads[mtlsPort]).Addr() == p.outside.IPv4
	})
	peers(true)
	p.unheard(sniffed)

	// A port that is passed through shows the client by either, and its words are plaintext on the wire: the sniffer hears them.
	for i, addr := range p.Addrs() {
		conn := p.dial(p.outside, netip.AddrPortFrom(addr, passthroughPort))
		p.must(readAll(conn, make([]byte, len(plaintext))))
		if got := lastPeer(workloads[passthroughPort]); got.Addr() != p.outside.Addrs()[i] {
			t.Errorf("at the port that is passed through the workload sees %s", got)
		}
	}
	p.await("the sniffer hears plaintext where there is some", func() bool { return len(sniffed()) >= 2 })

	p.must(p.sidecar.Stop())
	p.must(p.routed(true)) // as the rules, they stay
	if code, _, said := p.mantlet("cleanup"); code != 0 {
		t.Errorf("cleanup: %s", said)
	}
	p.must(p.routed(false))
}

// readAll fills a buffer.
func readAll(conn net.Conn, buffer []byte) error {
	if err := conn.SetReadDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, buffer)
	return err
}

// steal takes a part of the policy routes away.
func (p *pod) steal(n int) string {
	p.t.Helper()
	family := []int{unix.AF_INET, unix.AF_INET6}[n%2]
	what := "rule"
	err := p.Do(func() error {
		if n/2%2 == 0 {
			rule := netlink.NewRule()
			rule.Family, rule.Table, rule.Priority = family, int(render.RouteTable), int(render.RoutePriority)
			rule.Mark, rule.Mask = uint32(render.MarkClient), new(uint32(render.MarkMask))
			return netlink.RuleDel(rule)
		}
		what = "route"
		all, err := netlink.RouteListFiltered(family, &netlink.Route{Table: int(render.RouteTable)}, netlink.RT_FILTER_TABLE)
		for _, r := range all {
			err = netlink.RouteDel(&r)
		}
		return err
	})
	return fmt.Sprintf("the %s of family %d is taken away: %v", what, family, err)
}

// TestRoutesAreRepaired: routes that somebody takes away are back soon, connections go on, and the status says what happened. Where they
// can't be put back, mantlet is not ready.
func TestRoutesAreRepaired(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, clients)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	sniffed := p.sniff(p.outside)
	p.run()
	p.speaking()
	p.ready()
	conn, err := p.handshake(netip.AddrPortFrom(p.IPv4, mtlsPort), p.client.ClientConfig("pod"))
	p.must(err)
	p.must(readAll(conn, make([]byte, len(plaintext))))
	for n := range 4 {
		before := p.told().Repaired
		p.steal(n)
		p.await("the routes are back", func() bool { return p.routed(true) == nil })
		p.await("the repair is told", func() bool { return p.told().Repaired > before })
		p.must(echo(conn))
	}
	if said := p.told().Repairs; !strings.Contains(strings.Join(said[len(said)-1].Found, ""), render.Route()+" is missing") {
		t.Errorf("the last repair is %+v", said[len(said)-1])
	}

	// A rule before mantlet's is somebody else's, and leads elsewhere.
	rule := netlink.NewRule()
	rule.Family, rule.Table, rule.Priority = unix.AF_INET, unix.RT_TABLE_MAIN, 0
	p.must(p.Do(func() error { return netlink.RuleAdd(rule) }))
	p.unready("the policy routes are not as they should be")
	if code, said, _ := p.mantlet("diff"); code != 1 || !strings.Contains(said, "policy routes: IPv4: ") {
		t.Errorf("diff ends with %d and says %s", code, said)
	}
	dropped := p.refused("left_the_pod")
	if _, err := conn.Write([]byte("hello")); err != nil {
		t.Error(err)
	}
	p.await("answers are dropped", func() bool { return p.refused("left_the_pod") > dropped })
	p.must(p.Do(func() error { return netlink.RuleDel(rule) }))
	p.must(readAll(conn, make([]byte, len("hello"))))
	p.ready()
	p.must(p.sidecar.Stop())
	p.unheard(sniffed)
}

// TestAnswersStayInside: a prober on the wire hears no plaintext of the workload's, whatever is done to routes, rules, Envoy and mantlet.
func TestAnswersStayInside(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	m := p.override("sourceAddress: client\n")
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	sniffed := p.sniff(p.outside)
	p.besiege()
	p.run()
	p.speaking()
	p.ready()
	stop := make(chan struct{})
	var traffic sync.WaitGroup
	var mu sync.Mutex
	done := 0
	for _, addr := range p.Addrs() {
		for _, port := range []uint16{mtlsPort, tlsPort} {
			traffic.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					if p.brief(netip.AddrPortFrom(addr, port)) == nil {
						mu.Lock()
						done++
						mu.Unlock()
					}
				}
			})
		}
	}
	through := func() int { mu.Lock(); defer mu.Unlock(); return done }
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 0))
	var did []string
	actions := []func() string{
		func() string { return p.steal(random.IntN(4)) },
		func() string { return p.steal(random.IntN(4)) },
		func() string {
			_, err := p.Run("nft", "delete", "table", "inet", "mantlet") // it is owned, where the kernel can do that
			return fmt.Sprintf("the table is deleted: %v", err != nil)
		},
		func() string {
			envoys, err := p.sidecar.Envoys()
			p.must(err)
			for _, pid := range envoys {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
			return "Envoy is killed"
		},
		func() string {
			p.must(p.sidecar.Signal(syscall.SIGKILL))
			_ = p.sidecar.Wait()
			p.run()
			return "mantlet is killed"
		},
		func() string { m.write("sourceAddress: pod\n"); return "the pod's address" },
		func() string { m.write("sourceAddress: client\n"); return "clients' addresses" },
		func() string {
			m.write(fmt.Sprintf("sourceAddress: client\nenvoy: {concurrency: %d}\n", 2+random.IntN(2)))
			return "a hot restart"
		},
		func() string {
			m.write(fmt.Sprintf("sourceAddress: client\ningress: [{port: 8080, mode: %s}]\n", []string{"tls", "mtls"}[random.IntN(2)]))
			return "another mode"
		},
	}
	// Each once, in any order, and then some.
	for i, n := range append(random.Perm(len(actions)), random.Perm(len(actions))[:4]...) {
		did = append(did, actions[n]())
		if i%3 == 2 {
			before := through()
			p.await("connections get through", func() bool { return through() > before })
		}
	}
	m.write("sourceAddress: client\n")
	p.await("all is well again", func() bool {
		ctx, cancel := p.context()
		defer cancel()
		return p.sidecar.Unready(ctx) == "" && p.routed(true) == nil
	})
	p.must(p.converse(netip.AddrPortFrom(p.IPv4, mtlsPort)))
	p.must(p.converse(netip.AddrPortFrom(p.IPv6, mtlsPort)))
	close(stop)
	traffic.Wait()
	p.must(p.sidecar.Stop())
	p.unheard(sniffed)
	t.Logf("seed %d, %d connections: %s", seed, through(), strings.Join(did, "; "))
}

// brief is converse, for a client that does not wait.
func (p *pod) brief(to netip.AddrPort) error {
	conn, err := p.dialBriefly(to)
	if err != nil {
		return err
	}
	defer conn.Close()
	config := p.client.ClientConfig("pod")
	secured := tls.Client(conn, config)
	if err := secured.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return err
	}
	_, err = secured.Write([]byte("hello"))
	if err == nil {
		_, err = secured.Read(make([]byte, len(plaintext)))
	}
	return err
}

// TestLinkLocalClient: the kernel keeps packets to link-local addresses on their link, so what the workload answers there does not come
// back to Envoy. It does not leave the pod either.
func TestLinkLocalClient(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, clients)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	sniffed := p.sniff(p.outside)
	p.run()
	p.speaking()
	p.ready()
	var to netip.AddrPort
	p.must(p.Do(func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		all, err := netlink.AddrList(eth0, unix.AF_INET6)
		for _, a := range all {
			if addr, ok := netip.AddrFromSlice(a.IP); ok && addr.IsLinkLocalUnicast() {
				to = netip.AddrPortFrom(addr.WithZone("eth0"), mtlsPort)
			}
		}
		return err
	}))
	if !to.IsValid() {
		t.Fatal("the pod has no link-local address")
	}
	if err := p.converse(to); err == nil {
		t.Error("the connection works: docs/configuration.md says that it does not")
	}
	p.must(p.converse(netip.AddrPortFrom(p.IPv6, mtlsPort)))
	p.unheard(sniffed)
}

// TestRoutesAreChecked: check tries whether the kernel can have policy routes, where they are asked for.
func TestRoutesAreChecked(t *testing.T) {
	t.Parallel()
	for _, source := range []string{"pod", "client"} {
		var found []finding
		for _, f := range findings(t.Context(), []string{"MANTLET_SOURCE_ADDRESS=" + source}) {
			if f.Need == "policy routes" {
				found = append(found, f)
			}
		}
		if asked := source == "client"; asked != (len(found) == 1 && found[0].Severity == fine) {
			t.Errorf("with %s: %+v", source, found)
		}
	}
}

// TestPortsOfAClient: each client address has the ports of net.ipv4.ip_local_port_range for itself, and one that was used is not free at once.
func TestPortsOfAClient(t *testing.T) {
	t.Parallel()
	const ports = 10
	p := newPod(t, web, clients)
	p.must(p.Sysctl("net.ipv4.ip_local_port_range", "40000 40009"))
	other := p.host("other")
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	workload := p.protect(mtlsPort)
	p.ready()
	to := netip.AddrPortFrom(p.IPv4, mtlsPort)
	used := map[uint16]bool{}
	for range ports {
		p.must(p.exchange(to, p.client.ClientConfig("pod")))
		used[lastPeer(workload).Port()] = true
	}
	if len(used) != ports {
		t.Errorf("the workload sees the ports %v", used)
	}
	if err := p.exchange(to, p.client.ClientConfig("pod")); err == nil {
		t.Errorf("one more connection gets through, from %s", lastPeer(workload))
	}
	conn := tls.Client(p.dial(other, to), p.client.ClientConfig("pod"))
	p.must(conn.Handshake())
	p.must(echo(conn))
}
