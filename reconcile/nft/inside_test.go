package nft

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"mantlet/internal/lab"
	"mantlet/render"
	"mantlet/schema"
)

// What the rules and Envoy take for granted about addresses, and what happens where it is not so:
//
//   - The address that a client dialled is the pod's when Envoy connects to it: TestWorkloadLegStaysInThePod, and with the real
//     Envoy TestAddressGoesAway.
//   - It is so for as long as that connection lives, at both its ends: TestConnectionFromInsideStaysInside.
//   - What belongs to a connection within the pod comes over lo: TestForgedPartOfAConnectionWithinThePod.
//   - Egress listeners are on lo: TestLoopbackAddressThatIsNotThere.
//   - Nobody outside reaches what listens on loopback, route_localnet or not: TestLoopbackIsNotReachedFromOutside, and
//     TestForgedSource for who pretends to be there.
//   - What ingress takes for somebody else's is not delivered to the pod: TestAddressComesInBetween.
//   - What tproxy gave to Envoy is delivered to Envoy: TestTimeWait, TestSYNCookies. Where its address is the pod's no more, the
//     kernel drops it (ip_forward: a packet with a socket is not forwarded).
//   - A destination that is not unicast has no TCP: TestNoTCPToGroups.
//   - Link-local addresses are the pod's like others: TestLinkLocalAddress.
//   - The status port is mantlet's, whichever address it listens at: TestStatusPort.
//   - In a VRF local traffic does not go over lo. A socket that is not bound to the VRF, as Envoy's, does not reach its addresses,
//     and what leaves by it is dropped like all else that does not go over lo.
//
// Envoy's admin interface, mantlet's own socket and Envoy's hot restart have no address: they are unix sockets in the runtime
// directory.

var insideMark = marked(render.MarkInside)

// dialAs dials from the pod with a socket option, from an address if it is valid.
func (x *trial) dialAs(from netip.Addr, to netip.AddrPort, option, value int, wait time.Duration) (net.Conn, error) {
	return x.dialWith(netip.AddrPortFrom(from, 0), to, wait, func(_ string, fd int) error {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, value)
	})
}

// dialWith dials from the pod, from an address if it is valid, with socket options.
func (x *trial) dialWith(from, to netip.AddrPort, wait time.Duration, set func(network string, fd int) error) (net.Conn, error) {
	dialer := net.Dialer{Control: func(network, _ string, raw syscall.RawConn) (err error) {
		controlled := raw.Control(func(fd uintptr) { err = set(network, int(fd)) })
		return errors.Join(err, controlled)
	}}
	if from.Addr().IsValid() {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(from)
	}
	dialer.SetMultipathTCP(false)
	ctx, cancel := context.WithTimeout(x.t.Context(), wait)
	defer cancel()
	var conn net.Conn
	err := x.pod.Do(func() (err error) {
		conn, err = dialer.DialContext(ctx, "tcp", to.String())
		return err
	})
	return x.keep(conn, err)
}

// dialAsEnvoy dials as Envoy dials the workload.
func (x *trial) dialAsEnvoy(to netip.AddrPort) (net.Conn, error) {
	return x.dialAs(netip.Addr{}, to, unix.SO_PRIORITY, int(render.WorkloadPriority), x.wait)
}

// dialled reports whether the stranger is sent the first segment of a connection, which it leaves without an answer.
func (x *trial) dialled(s *stranger, dial func()) bool {
	var dialling sync.WaitGroup
	dialling.Go(dial)
	x.t.Cleanup(dialling.Wait)
	return x.happens(func() bool {
		_, left := s.find(isSYN)
		return left
	})
}

func TestWorkloadLegStaysInThePod(t *testing.T) {
	t.Parallel()
	for name, whole := range map[string]render.Ruleset{
		"mesh": rules(), "deny all": render.DenyAll(true), "deny all, bare": render.DenyAll(false), "only status": render.OnlyStatus(statusPort),
	} {
		t.Run(name, func(t *testing.T) {
			broken := without(t, whole, "egress", "priority")
			if name == "mesh" {
				broken = without(t, broken, "leaving", "priority")
			}
			stops(t, whole, broken, func(x *trial) bool {
				x.apply()
				s := x.stranger()
				return x.dialled(s, func() { _, _ = x.dialAsEnvoy(s.at(x.family)) })
			})
			// A process that has the priority by itself is none the worse within the pod.
			try(t, "over lo", whole, true, func(x *trial) bool {
				x.serve(lab.Service{Address: ":9000"})
				x.apply()
				conn, err := x.dialAsEnvoy(x.target(9000))
				return err == nil && x.passes(conn, conn)
			})
		})
	}
}

// Whoever speaks: an address of the pod's that goes away leads packets to whoever has it then.
func TestConnectionFromInsideStaysInside(t *testing.T) {
	t.Parallel()
	whole := rules(port1(9000, schema.ModePassthrough)) // a port where answers leave
	broken := without(t, without(t, whole, "egress", insideMark), "leaving", insideMark)
	for name, c := range map[string]struct {
		broken         render.Ruleset
		workloadSpeaks bool
	}{
		"Envoy speaks":        {without(t, broken, "egress", "goto mtls_out"), false},
		"the workload speaks": {broken, true},
	} {
		t.Run(name, func(t *testing.T) {
			stops(t, whole, c.broken, func(x *trial) bool {
				s, listener := x.stranger(), x.listen()
				address(x.t, x.pod, x.lent(s))
				x.apply()
				from, to := x.target(0).Addr(), netip.AddrPortFrom(x.lent(s).Addr(), 9000)
				if c.workloadSpeaks {
					from, to = to.Addr(), x.target(9000)
				}
				envoy, err := x.dialAs(from, to, unix.SO_REUSEADDR, 1, limit)
				if err != nil {
					x.t.Fatal(err)
				}
				workload, err := x.keep(listener.Accept())
				if err != nil {
					x.t.Fatal(err)
				}
				x.exchange(envoy, workload)
				x.address(netlink.AddrDel, x.lent(s))
				speaker := envoy
				if c.workloadSpeaks {
					speaker = workload
				}
				if _, err := io.WriteString(speaker, lab.Marker); err != nil {
					x.t.Fatal(err)
				}
				return x.happens(func() bool {
					_, left := s.find(func(seg segment) bool { return seg.data == lab.Marker })
					return left
				})
			})
		})
	}
}

// lent is the stranger's address: the pod has it for a while, and the stranger afterwards.
func (x *trial) lent(s *stranger) netip.Prefix {
	return netip.PrefixFrom(s.addrs[x.family], []int{24, 64}[x.family])
}

// address adds an address to the pod's eth0, or deletes it.
func (x *trial) address(do func(netlink.Link, *netlink.Addr) error, prefix netip.Prefix) {
	x.t.Helper()
	x.onLink("eth0", func(eth0 netlink.Link) error { return do(eth0, &netlink.Addr{IPNet: ipNet(prefix)}) })
}

// onLink calls do with one of the pod's interfaces.
func (x *trial) onLink(name string, do func(netlink.Link) error) {
	x.t.Helper()
	if err := x.pod.Do(func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return do(link)
	}); err != nil {
		x.t.Fatal(err)
	}
}

// A stranger who knows a connection within the pod pretends to be its other end. IPv4 has the reverse path filter against that.
func TestForgedPartOfAConnectionWithinThePod(t *testing.T) {
	t.Parallel()
	whole := rules(ports(1, 65535, schema.ModePassthrough))
	broken := without(t, without(t, whole, "ingress", insideMark), "passthrough_in", insideMark)
	forge := func(x *trial) bool {
		listener, s, heard := x.listen(), x.stranger(), x.overhear()
		x.apply()
		client, workload := x.within(listener, x.target(9000))
		if _, err := io.WriteString(workload, "hello"); err != nil {
			x.t.Fatal(err)
		}
		last := heard("hello")
		last.seq += uint32(len(last.data))
		last.data = lab.Marker
		s.send(last)
		return hear(client, "hello") == nil && x.heard(client, lab.Marker)
	}
	stops(t, whole, broken, func(x *trial) bool {
		if x.family == 0 && x.wait != patience {
			return true
		}
		return forge(x)
	})
}

// overhear returns a function that waits for the segment on lo that says something.
func (x *trial) overhear() func(what string) segment {
	x.t.Helper()
	var file *os.File
	if err := x.pod.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(network16(unix.ETH_P_ALL)))
		if err != nil {
			return err
		}
		file = os.NewFile(uintptr(fd), "packets on lo")
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: network16(unix.ETH_P_ALL), Ifindex: loopbackIndex})
	}); err != nil {
		x.t.Fatal(err)
	}
	x.t.Cleanup(func() { _ = file.Close() })
	return func(what string) segment {
		x.t.Helper()
		buffer := make([]byte, 64<<10)
		for {
			n, err := file.Read(buffer)
			if err != nil {
				x.t.Fatal(err)
			}
			if seg, ok := parse(buffer[:n]); ok && seg.data == what {
				return seg
			}
		}
	}
}

// Where lo lacks its address, what the workload says to an egress listener would go where the default route leads.
func TestLoopbackAddressThatIsNotThere(t *testing.T) {
	t.Parallel()
	for name, whole := range map[string]render.Ruleset{"mesh": rules(), "deny all": render.DenyAll(true)} {
		t.Run(name, func(t *testing.T) {
			stops(t, whole, without(t, whole, "egress", "127.0.0.0/8", "::1"), func(x *trial) bool {
				s := x.stranger()
				x.onLink("lo", func(lo netlink.Link) error {
					addrs, err := netlink.AddrList(lo, []int{unix.AF_INET, unix.AF_INET6}[x.family])
					for _, addr := range addrs {
						err = netlink.AddrDel(lo, &addr)
					}
					return err
				})
				x.onLink("eth0", func(eth0 netlink.Link) error {
					return netlink.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Gw: s.addrs[x.family].AsSlice()})
				})
				x.apply()
				listener := netip.MustParseAddrPort([]string{"127.137.0.1:8081", "[::1]:8081"}[x.family])
				s.also(listener.Addr())
				return x.dialled(s, func() { _, _ = x.fromThePod("tcp", listener) })
			})
		})
	}
}

// What ingress takes for somebody else's may be the pod's a moment later. The moment is too short to be met, so here ingress takes
// everything for somebody else's.
func TestAddressComesInBetween(t *testing.T) {
	t.Parallel()
	whole := change(t, rules(), "ingress", "fib daddr", func(rule render.Rule) render.Rule { return rule[1:] })
	for _, network := range []string{"tcp", "udp"} {
		t.Run(network, func(t *testing.T) {
			broken := without(t, whole, "input", "drop")
			if network == "tcp" {
				broken = without(t, broken, "egress", "goto mtls_out") // which alone lets no answer out
			}
			stops(t, whole, broken, func(x *trial) bool {
				workload := x.serve(lab.Service{Network: network, Address: x.target(9000).String()})
				x.apply()
				conn, err := x.dialOutside(network, x.target(9000))
				if err != nil {
					return false
				}
				_, _ = io.WriteString(conn, lab.Marker)
				return x.happens(leaks(workload))
			})
		})
	}
}

// dialOutside dials from outside.
func (x *trial) dialOutside(network string, to netip.AddrPort) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(x.t.Context(), x.wait)
	defer cancel()
	return x.keep(x.outside.Dial(ctx, network, to.String()))
}

// The kernel answers no SYN to a multicast, broadcast or anycast address (tcp_v4_conn_request, tcp_v6_conn_request), so that Envoy
// is never asked to connect to one.
func TestNoTCPToGroups(t *testing.T) {
	t.Parallel()
	groups := [2][]string{{"224.0.0.1", "198.51.100.255", "255.255.255.255"}, {"ff02::1", "2001:db8::"}}
	for name, r := range map[string]render.Ruleset{"mtls": rules(), "passthrough": rules(ports(1, 65535, schema.ModePassthrough))} {
		try(t, name, r, false, func(x *trial) bool {
			x.forwards() // a router has the anycast address of its subnets
			x.serve(lab.Service{Address: ":9000"})
			x.standIn(schema.IngressMTLSPort)
			x.apply()
			s := x.stranger()
			for _, group := range groups[x.family] {
				s.send(s.syn(netip.AddrPortFrom(netip.MustParseAddr(group), 9000)))
			}
			return x.happens(func() bool { _, answered := s.find(has(syn | ack)); return answered })
		})
	}
}

// A stranger pretends to be the pod itself, or on its loopback, where workloads may trust whoever speaks. IPv6 has no reverse path
// filter, and in IPv4 it can be switched off.
func TestForgedSource(t *testing.T) {
	t.Parallel()
	for name, whole := range map[string]render.Ruleset{
		"passthrough":     rules(port1(9000, schema.ModePassthrough)),
		"other protocols": states()["other protocols"],
	} {
		for who, source := range map[string]func(x *trial) netip.Addr{
			"own address": func(x *trial) netip.Addr { return x.target(0).Addr() },
			"loopback":    func(*trial) netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 0, 1}) },
		} {
			t.Run(name+"/"+who, func(t *testing.T) {
				stops(t, whole, without(t, whole, "ingress", "fib saddr"), func(x *trial) bool {
					if who == "loopback" && x.family == 1 {
						return x.wait != patience // from ::1 and not over lo: the kernel drops it
					}
					x.sysctl("1", "net.ipv4.conf.eth0.route_localnet", "net.ipv4.conf.eth0.accept_local")
					workload := x.serve(lab.Service{Network: "udp", Address: x.target(9000).String()})
					x.apply()
					s := x.stranger()
					s.send(segment{from: netip.AddrPortFrom(source(x), 53), to: x.target(9000), udp: true, data: lab.Marker})
					return x.happens(leaks(workload))
				})
			})
		}
	}
}

// A stranger who has the router's address on the link names another router.
func TestRedirect(t *testing.T) {
	t.Parallel()
	for name, whole := range map[string]render.Ruleset{
		"mesh": rules(), "deny all": render.DenyAll(true), "deny all, bare": render.DenyAll(false), "only status": render.OnlyStatus(statusPort),
	} {
		t.Run(name, func(t *testing.T) {
			stops(t, whole, without(t, whole, "icmp_in", "redirect"), func(x *trial) bool {
				s := x.stranger()
				far := []netip.Addr{netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("2001:db8:9::9")}[x.family]
				router := []netip.Addr{s.addrs[0], netip.MustParseAddr("fe80::66")}[x.family]
				other := []netip.Addr{x.outside.IPv4, netip.MustParseAddr("fe80::67")}[x.family]
				x.onLink("eth0", func(eth0 netlink.Link) error {
					to := ipNet(netip.PrefixFrom(far, far.BitLen()))
					return netlink.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Dst: to, Gw: router.AsSlice()})
				})
				x.sysctl("1", "net.ipv4.conf.eth0.accept_redirects", "net.ipv6.conf.eth0.accept_redirects")
				x.apply()
				return x.happens(func() (led bool) {
					s.put(redirection(router, x.target(0).Addr(), far, other))
					if err := x.pod.Do(func() error {
						routes, err := netlink.RouteGet(far.AsSlice())
						led = err == nil && len(routes) == 1 && routes[0].Gw.Equal(other.AsSlice())
						return err
					}); err != nil {
						x.t.Fatal(err)
					}
					return led
				})
			})
		})
	}
}

// redirection returns a packet by which a router tells a host that another one leads to where it sends.
func redirection(router, host, destination, other netip.Addr) []byte {
	const checksumAt = 2
	if host.Is4() {
		message := append([]byte{5, 1, 0, 0}, other.AsSlice()...)
		sent := datagram(host, destination, render.ICMP, make([]byte, 8), checksumAt) // an echo's answer: it takes no socket
		return datagram(router, host, render.ICMP, append(message, sent...), checksumAt)
	}
	message := append([]byte{137, 0, 0, 0, 0, 0, 0, 0}, other.AsSlice()...)
	packet := datagram(router, host, render.ICMPv6, append(message, destination.AsSlice()...), checksumAt)
	packet[7] = 255 // RFC 4861, 8.1: hop limit
	return packet
}

// What leads from Envoy to a listener of its own is refused, at once, and nothing else that goes over lo.
func TestOwnListeners(t *testing.T) {
	t.Parallel()
	listeners := [2][]schema.Egress{listening("127.137.0.1:8081", "127.137.0.2:8081"), listening("[::1]:8081", "[::1]:8082")}
	whole := render.Rules(schema.Mesh{StatusPort: statusPort, Egress: slices.Concat(listeners[:]...)}, render.Generations{})
	dials := func(priority uint32, to func(x *trial) []netip.AddrPort) func(x *trial) bool {
		return func(x *trial) bool {
			x.apply()
			through := false
			for _, addr := range to(x) {
				x.serve(lab.Service{Address: addr.String()})
				conn, err := x.dialAs(netip.Addr{}, addr, unix.SO_PRIORITY, int(priority), limit)
				switch {
				case err == nil && x.passes(conn, conn):
					through = true
				case !errors.Is(err, unix.ECONNREFUSED):
					x.t.Errorf("dialling %s: %v", addr, err)
				}
			}
			return through
		}
	}
	tproxied := func(x *trial) []netip.AddrPort {
		loopback := []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}[x.family]
		return []netip.AddrPort{
			netip.AddrPortFrom(loopback, schema.IngressMTLSPort), netip.AddrPortFrom(loopback, schema.IngressTLSPort),
		}
	}
	egress := func(x *trial) []netip.AddrPort {
		all := []netip.AddrPort{x.target(statusPort)}
		for _, e := range listeners[x.family] {
			all = append(all, e.Listen)
		}
		return all
	}
	stops(t, whole, without(t, whole, "begins_inside", "reset"), dials(0, tproxied))
	stops(t, whole, without(t, whole, "loops", "reset"), dials(render.EndpointPriority, egress))
	try(t, "others", whole, true, func(x *trial) bool {
		// The workload's own connections, and those to upstreams that are in the pod.
		return dials(0, egress)(x) && dials(render.EndpointPriority, func(x *trial) []netip.AddrPort {
			return []netip.AddrPort{x.target(8081), netip.AddrPortFrom(tproxied(x)[0].Addr(), 9443)}
		})(x)
	})
}

// The priority of what goes out to upstreams does not leave the pod: queues prefer some.
// Only TCP is looked at: the kernel gives a priority to its own IGMP and MLD.
func TestPriorityIsForTheRulesAlone(t *testing.T) {
	t.Parallel()
	load := func(x *trial) bool {
		load(x.t, x.pod, "table inet other { chain c { type filter hook postrouting priority 0; meta l4proto tcp meta priority != none oif != lo counter; }; }")
		x.apply()
		conn, err := x.dialAs(netip.Addr{}, x.echo("tcp"), unix.SO_PRIORITY, int(render.EndpointPriority), limit)
		return err == nil && x.passes(conn, conn) && !strings.Contains(nft(x.t, x.pod, "list", "table", "inet", "other"), "packets 0 ")
	}
	stops(t, rules(), without(t, rules(), "egress", "set none"), load)
}
