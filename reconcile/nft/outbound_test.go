package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"mantlet/internal/lab"
	"mantlet/internal/status"
	"mantlet/render"
	"mantlet/schema"
)

// past returns the rules of a mesh that treats what the pod sends past the egress entries in a mode, with a list.
func past(mode schema.OutboundMode, allow ...netip.AddrPort) render.Ruleset {
	return render.Rules(schema.Mesh{Outbound: withList(mode, allow...)}, render.Generations{})
}

func withList(mode schema.OutboundMode, allow ...netip.AddrPort) schema.Outbound {
	o := schema.Outbound{Mode: mode}
	for _, to := range allow {
		o.Allow = append(o.Allow, schema.Destination{Prefix: netip.PrefixFrom(to.Addr(), to.Addr().BitLen()), Port: to.Port()})
	}
	slices.SortFunc(o.Allow, schema.Destination.Compare)
	return o
}

// fates returns how many connections each destination of a fate has.
func (p *place) fates(fate string) map[string]uint64 {
	p.t.Helper()
	all, err := p.table.Spoken()
	if err != nil {
		p.t.Fatal(err)
	}
	counts := map[string]uint64{}
	for _, s := range all {
		if s.Fate == fate {
			counts[status.ProtocolName(s.Protocol)+" "+s.To.String()] = s.Count
		}
	}
	return counts
}

// TestNothingElseLeaves: in mode drop no packet leaves that is neither allowed nor an answer, whoever makes it and whatever it looks like.
// A workload that can make packets by itself gets no further than one that can't.
func TestNothingElseLeaves(t *testing.T) {
	t.Parallel()
	const drop, accept = schema.OutboundDrop, schema.OutboundAccept
	from := func(x *trial, port uint16) netip.AddrPort { return netip.AddrPortFrom(x.pod.Addrs()[x.family], port) }
	for name, packet := range map[string]func(x *trial, to netip.AddrPort) segment{
		"a SYN": func(x *trial, to netip.AddrPort) segment {
			return segment{from: from(x, 7000), to: to, flags: syn, seq: 1}
		},
		"a SYN with data": func(x *trial, to netip.AddrPort) segment {
			return segment{from: from(x, 7000), to: to, flags: syn, seq: 1, data: lab.Marker}
		},
		"a reset with data": func(x *trial, to netip.AddrPort) segment {
			return segment{from: from(x, 7000), to: to, flags: rst, seq: 1, data: lab.Marker}
		},
		"a datagram": func(x *trial, to netip.AddrPort) segment {
			return segment{from: from(x, 7000), to: to, udp: true, data: lab.Marker}
		},
		"a datagram from a protected port": func(x *trial, to netip.AddrPort) segment {
			return segment{from: from(x, 9000), to: to, udp: true, data: lab.Marker}
		},
	} {
		t.Run(name, func(t *testing.T) {
			stops(t, past(drop), past(accept), func(x *trial) bool {
				x.apply()
				s := x.stranger()
				x.emit(s.at(x.family).Addr(), packet(x, s.at(x.family)).packet())
				return x.happens(func() bool {
					_, arrived := s.find(func(segment) bool { return true })
					return arrived
				})
			})
		})
	}
	// With ingress on, the accepting rules refuse it as well: it could be the workload's answer.
	for name, whole := range map[string]render.Ruleset{
		"ingress on":  past(drop),
		"ingress off": render.Rules(schema.Mesh{IngressOff: true, Outbound: schema.Outbound{Mode: drop}}, render.Generations{}),
	} {
		t.Run("a segment of no connection/"+name, func(t *testing.T) {
			broken := render.Rules(schema.Mesh{IngressOff: true}, render.Generations{})
			stops(t, whole, broken, func(x *trial) bool {
				x.apply()
				s := x.stranger()
				x.emit(s.at(x.family).Addr(), segment{from: from(x, 7000), to: s.at(x.family), flags: ack | psh, seq: 1, ack: 1, data: lab.Marker}.packet())
				return x.happens(func() bool {
					_, arrived := s.find(func(seg segment) bool { return seg.data == lab.Marker })
					return arrived
				})
			})
		})
	}
}

// emit sends an IP packet from the pod, past all of its sockets.
func (x *trial) emit(to netip.Addr, packet []byte) {
	x.t.Helper()
	err := x.pod.Do(func() error {
		domain, level, option := unix.AF_INET6, unix.SOL_IPV6, unix.IPV6_HDRINCL
		var at unix.Sockaddr = &unix.SockaddrInet6{Addr: to.As16()}
		if to.Is4() {
			domain, level, option = unix.AF_INET, unix.SOL_IP, unix.IP_HDRINCL
			at = &unix.SockaddrInet4{Addr: to.As4()}
		}
		fd, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		if err := unix.SetsockoptInt(fd, level, option, 1); err != nil {
			return err
		}
		if err := unix.Sendto(fd, packet, 0, at); err != nil && !errors.Is(err, unix.EPERM) { // which says that the rules dropped it
			return err
		}
		return nil
	})
	if err != nil {
		x.t.Fatal(err)
	}
}

// TestPortlessProtocols: a protocol without ports is refused and accounted, whatever stands where others have their ports.
func TestPortlessProtocols(t *testing.T) {
	t.Parallel()
	const gre, port = 47, 0x0800 // IPv4 in GRE, which stands where a destination port would
	p := newPlace(t)
	outside := p.outside.Addrs()
	for mode, fate := range map[schema.OutboundMode]string{schema.OutboundDrop: render.FateRefused, schema.OutboundObserve: render.FateLeft} {
		p.replace(past(mode, netip.AddrPortFrom(outside[0], port), netip.AddrPortFrom(outside[1], port)))
		for i, domain := range []int{unix.AF_INET, unix.AF_INET6} {
			err := p.pod.Do(func() error {
				fd, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, gre)
				if err != nil {
					return err
				}
				defer func() { _ = unix.Close(fd) }()
				var at unix.Sockaddr = &unix.SockaddrInet4{Addr: outside[0].As4()}
				if domain == unix.AF_INET6 {
					at = &unix.SockaddrInet6{Addr: outside[1].As16()}
				}
				return unix.Sendto(fd, binary.BigEndian.AppendUint16([]byte{0, 0}, port), 0, at)
			})
			if isRefused := errors.Is(err, unix.EPERM); isRefused != (mode == schema.OutboundDrop) || err != nil && !isRefused {
				t.Errorf("mode %s, GRE to %s: %v", mode, outside[i], err)
			}
			if got := p.fates(fate); got["gre "+netip.AddrPortFrom(outside[i], 0).String()] != 1 {
				t.Errorf("mode %s: of GRE to %s the account says %v", mode, outside[i], got)
			}
		}
	}
}

// TestWhoMayLeave: what Envoy's user begins by TCP leaves, and what mantlet's resolver asks. Whoever has the mark alone is nobody.
func TestWhoMayLeave(t *testing.T) {
	t.Parallel()
	uid := lab.EnvoyUser()
	marked := func(network string) (level, option, value int) {
		return unix.SOL_SOCKET, unix.SO_MARK, int(render.ResolverSocket)
	}
	plain := func(network string) (level, option, value int) { return unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1 }
	for name, c := range map[string]struct {
		network string
		uid     int
		with    func(network string) (level, option, value int)
		want    bool
	}{
		"Envoy by TCP":             {"tcp", uid, plain, true},
		"Envoy's user by UDP":      {"udp", uid, plain, false},
		"mantlet's resolver, UDP":  {"udp", 0, marked, true},
		"mantlet's resolver, TCP":  {"tcp", 0, marked, true},
		"root":                     {"tcp", 0, plain, false},
		"another user":             {"tcp", lab.Stranger, plain, false},
		"another user, marked":     {"tcp", lab.Stranger, marked, false},
		"another user, UDP marked": {"udp", lab.Stranger, marked, false},
	} {
		t.Run(name, func(t *testing.T) {
			try(t, "drop", past(schema.OutboundDrop), c.want, func(x *trial) bool {
				x.table.EnvoyUID = uint32(uid)
				x.apply()
				to := x.echo(c.network)
				conn, err := x.connectAs(c.uid, c.network, to, c.with)
				if err != nil {
					return false
				}
				if !x.passes(conn, conn) {
					return false
				}
				for _, fate := range []string{render.FateAllowed, render.FateLeft, render.FateRefused} {
					if got := x.fates(fate); len(got) > 0 {
						x.t.Errorf("it is accounted as %s: %v", fate, got)
					}
				}
				// The connection stays known when its socket is told apart no more, and when the rules are put in place anew.
				x.replace(past(schema.OutboundObserve))
				x.replace(x.rules)
				return x.passes(conn, conn)
			})
		})
	}
}

// connectAs connects from the pod by a socket of a user's, with a socket option.
func (x *trial) connectAs(uid int, network string, to netip.AddrPort, with func(network string) (level, option, value int)) (net.Conn, error) {
	x.t.Helper()
	var conn net.Conn
	err := x.pod.Do(func() error {
		if err := unix.Setfsuid(uid); err != nil { // of this thread, which ends; it keeps the capabilities that a mark takes
			return err
		}
		domain, kind := unix.AF_INET6, unix.SOCK_STREAM
		var peer unix.Sockaddr = &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
		if to.Addr().Is4() {
			domain, peer = unix.AF_INET, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
		}
		if network == "udp" {
			kind = unix.SOCK_DGRAM
		}
		fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		level, option, value := with(network)
		if err := unix.SetsockoptInt(fd, level, option, value); err != nil {
			return errors.Join(err, unix.Close(fd))
		}
		if err := unix.Connect(fd, peer); err != nil {
			return errors.Join(err, unix.Close(fd))
		}
		conn, err = fileConn(fd)
		return err
	})
	return x.keep(conn, err)
}

// TestDropBeginsWhileConnectionsAreOpen: the rules of mode drop end what is open and not allowed, and leave alone what is. Back in mode
// accept, connections are made again.
func TestDropBeginsWhileConnectionsAreOpen(t *testing.T) {
	t.Parallel()
	for _, network := range []string{"tcp", "udp"} {
		for _, c := range []struct {
			before schema.OutboundMode
			listed bool
		}{{schema.OutboundAccept, true}, {schema.OutboundAccept, false}, {schema.OutboundObserve, true}, {schema.OutboundObserve, false}} {
			t.Run(fmt.Sprintf("%s/from %s/listed %v", network, c.before, c.listed), func(t *testing.T) {
				try(t, "open", render.Ruleset{}, c.listed, func(x *trial) bool {
					to := x.echo(network)
					x.replace(past(c.before))
					var conn net.Conn
					if !x.certainly(func() (passes bool) {
						var err error
						conn, err = x.fromThePod(network, to)
						return err == nil && x.passes(conn, conn)
					}) {
						x.t.Fatal("nothing passes before")
					}
					var allow []netip.AddrPort
					if c.listed {
						allow = append(allow, to)
					}
					x.replace(past(schema.OutboundDrop, allow...))
					return x.passes(conn, conn)
				})
			})
		}
	}
}

// TestAnswersOfForgottenConnections: what the peer still says on a connection that EndOutbound ended does not come in.
func TestAnswersOfForgottenConnections(t *testing.T) {
	t.Parallel()
	attempt := func(ends bool) func(x *trial) bool {
		return func(x *trial) bool {
			x.replace(past(schema.OutboundAccept))
			s := x.stranger()
			conn, err := x.keep(x.pod.Dial(x.t.Context(), "udp", s.at(x.family).String()))
			if err != nil {
				x.t.Fatal(err)
			}
			if _, err := conn.Write([]byte("hello")); err != nil {
				x.t.Fatal(err)
			}
			asked := s.await("a datagram", func(seg segment) bool { return seg.udp })
			x.apply()
			if ends {
				var ended map[netip.AddrPort]int
				if err := x.pod.Do(func() (err error) { ended, err = x.table.EndOutbound(x.rules.Leaves, false); return err }); err != nil || ended[s.at(x.family)] != 1 {
					x.t.Fatalf("ended %v, %v", ended, err)
				}
			}
			return x.happens(func() bool {
				s.send(segment{from: asked.to, to: asked.from, udp: true, data: "answer"})
				once := *x
				once.wait = patience / 2
				return once.heard(conn, "answer")
			})
		}
	}
	try(t, "ended", past(schema.OutboundDrop), false, attempt(true))
	try(t, "open", past(schema.OutboundDrop), true, attempt(false))
}

// TestFullAccount: a workload that scans fills no more than the account, and what is not accounted any more leaves or does not, as before.
func TestFullAccount(t *testing.T) {
	t.Parallel()
	for mode, fate := range map[schema.OutboundMode]string{schema.OutboundObserve: render.FateLeft, schema.OutboundDrop: render.FateRefused} {
		try(t, string(mode), past(mode), mode == schema.OutboundObserve, func(x *trial) bool {
			x.apply()
			size := int(x.rules.Accounts[0].Size)
			outside := x.outside.Addrs()[x.family]
			if err := x.pod.Do(func() error {
				for port := range size + 200 {
					conn, err := net.Dial("udp", netip.AddrPortFrom(outside, uint16(10_000+port)).String())
					if err != nil {
						return err
					}
					_, _ = conn.Write([]byte("scan"))
					_ = conn.Close()
				}
				return nil
			}); err != nil {
				x.t.Fatal(err)
			}
			if n := len(x.fates(fate)); n != size {
				x.t.Errorf("%d destinations are accounted, want %d", n, size)
			}
			x.check()
			conn, err := x.fromThePod("tcp", x.echo("tcp"))
			return err == nil && x.passes(conn, conn)
		})
	}
}

// TestAccountsStay: what was accounted is there after other rules came, and after those that stand before anything is known. These refuse
// what the rules before them did.
func TestAccountsStay(t *testing.T) {
	t.Parallel()
	modes(t, func(t *testing.T, p *place) {
		whole := past(schema.OutboundDrop)
		p.replace(whole)
		x := &trial{place: p, rules: whole, wait: patience}
		to := x.echo("tcp")
		refused := func(what string, want uint64) {
			t.Helper()
			if conn, err := x.fromThePod("tcp", to); err == nil {
				_ = conn.Close()
				t.Errorf("%s: %s is reached", what, to)
			}
			if got := p.fates(render.FateRefused)["tcp "+to.String()]; got != want {
				t.Errorf("%s: %d attempts are accounted, want %d", what, got, want)
			}
		}
		refused("at first", 1)
		other := render.Rules(schema.Mesh{
			Ingress: []schema.Ingress{port1(8080, schema.ModeTLS)}, Outbound: withList(schema.OutboundDrop, netip.MustParseAddrPort("192.0.2.1:1")),
		}, render.Generations{})
		p.replace(other)
		refused("under other rules", 2)
		found, err := p.table.Read()
		if err != nil {
			t.Fatal(err)
		}
		if err := p.table.DenyAll(found); err != nil {
			t.Fatal(err)
		}
		refused("under deny-all", 3)
		if err := p.table.OnlyStatus(statusPort, found); err != nil {
			t.Fatal(err)
		}
		refused("while only the status is served", 4)
		if found, err = p.table.Read(); err != nil || render.OutboundOf(found).Mode != schema.OutboundDrop {
			t.Fatalf("deny-all does not tell that it drops: %v, %v", render.OutboundOf(found), err)
		}
		p.replace(past(schema.OutboundAccept))
		if !x.certainly(func() bool { _, err := x.fromThePod("tcp", to); return err == nil }) {
			t.Error("nothing leaves in mode accept")
		}
	})
}

// TestChangedSetsAreRepaired: whatever somebody does to the list of what may leave is told and undone. What the rules account is none of
// that.
func TestChangedSetsAreRepaired(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	want := past(schema.OutboundDrop, netip.MustParseAddrPort("192.0.2.1:443"), netip.MustParseAddrPort("[2001:db8::7]:443"))
	p.replace(want)
	for _, test := range []struct{ change, says string }{
		{"delete element inet mantlet outbound_allow4 { 192.0.2.1 . 443 }", "set outbound_allow4: `192.0.2.1:443` missing"},
		{"add element inet mantlet outbound_allow4 { 10.0.0.0/8 . 5432 }", "set outbound_allow4: `10.0.0.0/8:5432` not wanted"},
		{"add element inet mantlet outbound_allow6 { fd00::/8 . 443 }", "set outbound_allow6: `[fd00::]/8:443` not wanted"},
		{"add element inet mantlet outbound_allow4 { 10.0.0.1-10.0.0.6 . 443 }", "set outbound_allow4, element 0x0a00000101bb0000-0x0a00000601bb0000: no destination: not wanted"},
		{"add element inet mantlet outbound_allow4 { 10.0.0.1 . 1-1000 }", "set outbound_allow4, element 0x0a00000100010000-0x0a00000103e80000: no destination: not wanted"},
		{"flush set inet mantlet outbound_allow6", "set outbound_allow6: `[2001:db8::7]:443` missing"},
		{"add element inet mantlet outbound_refused4 { 10.0.0.1 . tcp . 443 }", ""},
		{"flush set inet mantlet outbound_refused4", ""},
	} {
		nft(t, p.pod, test.change)
		found, err := p.table.Repair()
		if err != nil || strings.Join(found, "; ") != test.says {
			t.Errorf("after %q, Repair returned %q, %v; want %q", test.change, found, err, test.says)
		}
		p.check()
	}
}

// fileConn makes a connection of a socket.
func fileConn(fd int) (net.Conn, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	file := os.NewFile(uintptr(fd), "socket")
	defer func() { _ = file.Close() }()
	return net.FileConn(file)
}

// BenchmarkOutbound measures what the rules of each mode cost a workload that speaks to somebody outside: a round trip by UDP over a flow
// that is open, a datagram of such a flow alone, and a TCP connection. Nothing of it may grow with the list.
func BenchmarkOutbound(b *testing.B) {
	for _, c := range []struct {
		name string
		mode schema.OutboundMode
		n    int
	}{
		{"accept", schema.OutboundAccept, 0},
		{"observe", schema.OutboundObserve, 0},
		{"drop, 1 allowed", schema.OutboundDrop, 1},
		{"drop, 100 allowed", schema.OutboundDrop, 100},
		{"drop, 1000 allowed", schema.OutboundDrop, 1000},
	} {
		b.Run(c.name, func(b *testing.B) {
			p := newPlace(b)
			x := &trial{place: p, wait: limit}
			var allow []netip.AddrPort
			for i := range c.n {
				allow = append(allow, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 1}), uint16(1+i)))
			}
			tcp, udp := x.echo("tcp"), x.echo("udp")
			p.replace(past(c.mode, append(allow, tcp, udp)...))
			b.Run("packet", func(b *testing.B) {
				conn, err := x.keep(p.pod.Dial(context.Background(), "udp", udp.String()))
				if err != nil {
					b.Fatal(err)
				}
				buffer := make([]byte, 16)
				for b.Loop() {
					if _, err := conn.Write(buffer); err != nil {
						b.Fatal(err)
					}
					if _, err := conn.Read(buffer); err != nil {
						b.Fatal(err)
					}
				}
			})
			b.Run("datagram", func(b *testing.B) {
				conn, err := x.keep(p.pod.Dial(context.Background(), "udp", udp.String()))
				if err != nil {
					b.Fatal(err)
				}
				for b.Loop() {
					if _, err := conn.Write([]byte("hello")); err != nil {
						b.Fatal(err)
					}
				}
			})
			b.Run("connection", func(b *testing.B) {
				if err := p.pod.Do(func() error {
					for b.Loop() {
						conn, err := net.Dial("tcp", tcp.String())
						if err != nil {
							return err
						}
						_ = conn.(*net.TCPConn).SetLinger(0) // leaves no TIME_WAIT behind
						_ = conn.Close()
					}
					return nil
				}); err != nil {
					b.Fatal(err)
				}
			})
		})
	}
}
