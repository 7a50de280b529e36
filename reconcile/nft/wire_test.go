package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
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

// limit bounds what must happen. It takes milliseconds, unless a machine has much else to do.
const limit = time.Minute

func until(t testing.TB, what string, cond func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	if err := lab.Until(ctx, cond); err != nil {
		t.Fatalf("waiting until %s: %v", what, err)
	}
}

// place is a pod with a table and, on the same link, somebody outside.
type place struct {
	t            testing.TB
	network      *lab.Network
	pod, outside *lab.Host
	table        *Table
}

func newPlace(t testing.TB) *place {
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
	p := &place{t: t, network: network}
	for name, host := range map[string]**lab.Host{"pod": &p.pod, "outside": &p.outside} {
		if *host, err = network.Host(name); err != nil {
			t.Fatal(err)
		}
	}
	p.table = open(t, p.pod)
	// Before an address is fully there, a neighbour's question for it may be lost, and is put again a second later.
	for family := range families {
		until(t, "the pod is found", func() bool {
			_, err := p.dial(p.addr(family, 1), limit)
			return errors.Is(err, unix.ECONNREFUSED)
		})
	}
	return p
}

// open returns a connection to the host's table that the test closes, if nobody did before.
func open(t testing.TB, host *lab.Host) *Table {
	t.Helper()
	var table *Table
	if err := host.Do(func() (err error) { table, err = Open(); return err }); err != nil {
		t.Fatal(err)
	}
	table.subscribe = func() (conn subscription, err error) { // on whichever thread
		err = host.Do(func() (err error) { conn, err = subscribe(); return err })
		return conn, err
	}
	t.Cleanup(func() { _ = table.Close() })
	return table
}

func (p *place) replace(rules render.Ruleset) {
	p.t.Helper()
	if err := p.table.Replace(rules); err != nil {
		p.t.Fatal(err)
	}
}

func (p *place) serve(service lab.Service) *lab.Workload {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), limit)
	defer cancel()
	var workload *lab.Workload
	var err error
	// A listener that was closed lives on in a child that is being started.
	_ = lab.Until(ctx, func() bool {
		workload, err = p.pod.Serve(service)
		return !errors.Is(err, unix.EADDRINUSE)
	})
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = workload.Close() })
	return workload
}

// addr is a port of the pod in one of the families: 0 is IPv4, 1 is IPv6.
func (p *place) addr(family int, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(p.pod.Addrs()[family], port)
}

// rules are those of a mesh with these entries.
func rules(ingress ...schema.Ingress) render.Ruleset {
	return render.Rules(schema.Mesh{Ingress: ingress}, render.Generations{})
}

func ports(first, last uint16, mode schema.Mode) schema.Ingress {
	return schema.Ingress{Ports: schema.Ports{First: first, Last: last}, Mode: mode}
}

func port1(number uint16, mode schema.Mode) schema.Ingress { return ports(number, number, mode) }

const statusPort = 9901

// greeting is what a stand-in says first. No workload of these tests says that.
func greeting(port uint16) string { return fmt.Sprintf("mesh at %d", port) }

// standIn takes Envoy's place: it listens on loopback with a transparent socket of each family.
type standIn struct {
	listeners []net.Listener
	done      sync.WaitGroup

	mu   sync.Mutex
	open []net.Conn
}

func (p *place) standIn(port uint16) *standIn {
	p.t.Helper()
	s := &standIn{}
	for _, loopback := range []string{"127.0.0.1", "::1"} {
		listener, err := transparent(p.pod, net.JoinHostPort(loopback, fmt.Sprint(port)))
		if err != nil {
			p.t.Fatal(err)
		}
		s.listeners = append(s.listeners, listener)
		s.done.Go(func() { s.accept(listener, greeting(port)) })
	}
	p.t.Cleanup(s.close)
	return s
}

// status takes the place of mantlet's status: it listens with mantlet's mark.
func (p *place) status(addr string) *standIn {
	p.t.Helper()
	return p.statusOf(0, addr)
}

// statusOf does the same as a user who has NET_RAW.
func (p *place) statusOf(uid int, addr string) *standIn {
	p.t.Helper()
	listener, err := listenAs(uid, p.pod, addr, func(string) (level, option, value int) {
		return unix.SOL_SOCKET, unix.SO_MARK, int(render.StatusSocket)
	})
	if err != nil {
		p.t.Fatal(err)
	}
	s := &standIn{listeners: []net.Listener{listener}}
	s.done.Go(func() { s.accept(listener, greeting(statusPort)) })
	p.t.Cleanup(s.close)
	return s
}

// transparent listens with IP_TRANSPARENT.
func transparent(host *lab.Host, addr string) (listener net.Listener, err error) {
	return listenWith(host, addr, func(network string) (level, option, value int) {
		if network == "tcp6" {
			return unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1
		}
		return unix.SOL_IP, unix.IP_TRANSPARENT, 1
	})
}

// listenWith listens with a socket option.
func listenWith(host *lab.Host, addr string, with func(network string) (level, option, value int)) (net.Listener, error) {
	return listenAs(0, host, addr, with)
}

// listenAs listens with a socket option at a socket of a user's.
func listenAs(uid int, host *lab.Host, addr string, with func(network string) (level, option, value int)) (listener net.Listener, err error) {
	config := net.ListenConfig{Control: func(network, _ string, raw syscall.RawConn) error {
		level, option, value := with(network)
		var refused error
		err := raw.Control(func(fd uintptr) { refused = unix.SetsockoptInt(int(fd), level, option, value) })
		return errors.Join(err, refused)
	}}
	config.SetMultipathTCP(false)
	err = host.Do(func() error {
		if err := unix.Setfsuid(uid); err != nil { // of this thread, which ends; it keeps the capabilities that a mark takes
			return err
		}
		listener, err = config.Listen(context.Background(), "tcp", addr)
		return err
	})
	return listener, err
}

func (s *standIn) accept(listener net.Listener, greeting string) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		s.open = append(s.open, conn)
		s.mu.Unlock()
		_, _ = io.WriteString(conn, greeting)
		s.done.Go(func() { _, _ = io.Copy(conn, conn) })
	}
}

// hangUp closes the connections, not the listeners.
func (s *standIn) hangUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, conn := range s.open {
		_ = conn.Close()
	}
}

// deafen closes the listeners, not the connections. No process that another test starts right now must hold them longer.
func (s *standIn) deafen() {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	for _, listener := range s.listeners {
		_ = listener.Close()
	}
}

func (s *standIn) close() {
	s.deafen()
	s.hangUp()
	s.done.Wait()
}

// dial connects from outside.
func (p *place) dial(to netip.AddrPort, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(p.t.Context(), timeout)
	defer cancel()
	return p.keep(p.outside.Dial(ctx, "tcp", to.String()))
}

// keep closes a connection at the end of the test.
func (p *place) keep(conn net.Conn, err error) (net.Conn, error) {
	if err == nil {
		p.t.Cleanup(func() { _ = conn.Close() })
		_ = conn.SetDeadline(time.Now().Add(limit))
	}
	return conn, err
}

// pair returns both ends of a connection from outside to a listener in the pod.
func (p *place) pair(listener net.Listener, to netip.AddrPort) (client, server net.Conn) {
	p.t.Helper()
	client, err := p.dial(to, limit)
	if err == nil {
		server, err = p.keep(listener.Accept())
	}
	if err != nil {
		p.t.Fatal(err)
	}
	return client, server
}

// greeted returns a connection from outside to the stand-in for the mode that is the default.
func (p *place) greeted(to netip.AddrPort) net.Conn {
	p.t.Helper()
	conn, err := p.dial(to, limit)
	if err == nil {
		err = hear(conn, greeting(schema.IngressMTLSPort))
	}
	if err != nil {
		p.t.Fatal(err)
	}
	return conn
}

// exchange has each end of a connection say something to the other.
func (p *place) exchange(a, b net.Conn) {
	p.t.Helper()
	for _, ends := range [][2]net.Conn{{a, b}, {b, a}} {
		_, err := io.WriteString(ends[0], "hello")
		if err == nil {
			err = hear(ends[1], "hello")
		}
		if err != nil {
			p.t.Fatal(err)
		}
	}
}

// hear reads what is to be heard, and fails where it is something else.
func hear(conn net.Conn, what string) error {
	got := make([]byte, len(what))
	n, err := io.ReadFull(conn, got)
	if err != nil {
		return fmt.Errorf("heard %q: %w", got[:n], err)
	}
	if string(got) != what {
		return fmt.Errorf("heard %q, want %q", got, what)
	}
	return nil
}

// stranger makes its packets by itself, below every kernel: it has an address on the link that no host has, and whatever the
// pod sends there arrives here.
type stranger struct {
	t     testing.TB
	file  *os.File
	raw   syscall.RawConn
	index int              // of outside's eth0
	mac   net.HardwareAddr // the pod's
	addrs [2]netip.Addr    // IPv4, IPv6

	mu     sync.Mutex
	seen   []segment
	pongs  int
	others []netip.Addr // to whom it listens, beside its own
}

// also makes the stranger take note of what is sent to another address.
func (s *stranger) also(addr netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.others = append(s.others, addr)
}

func (p *place) stranger() *stranger {
	p.t.Helper()
	s := &stranger{t: p.t, addrs: [2]netip.Addr{netip.MustParseAddr("198.51.100.66"), netip.MustParseAddr("2001:db8::66")}}
	var own net.HardwareAddr
	err := p.outside.Do(func() error {
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		s.index, own = eth0.Index, eth0.HardwareAddr
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(network16(unix.ETH_P_ALL)))
		if err != nil {
			return err
		}
		s.file = os.NewFile(uintptr(fd), "packets")
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: network16(unix.ETH_P_ALL), Ifindex: s.index})
	})
	if err == nil {
		s.raw, err = s.file.SyscallConn()
	}
	if err != nil {
		p.t.Fatal(err)
	}
	if err := p.pod.Do(func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		s.mac = eth0.Attrs().HardwareAddr
		for _, addr := range s.addrs {
			err = errors.Join(err, netlink.NeighSet(&netlink.Neigh{
				LinkIndex: eth0.Attrs().Index, State: netlink.NUD_PERMANENT, IP: addr.AsSlice(), HardwareAddr: own,
			}))
		}
		return err
	}); err != nil {
		p.t.Fatal(err)
	}
	var done sync.WaitGroup
	done.Go(s.listen)
	p.t.Cleanup(func() {
		_ = s.file.Close()
		done.Wait()
	})
	return s
}

// listen notes what arrives.
func (s *stranger) listen() {
	buffer := make([]byte, 64<<10)
	for {
		n, err := s.file.Read(buffer)
		if err != nil {
			return
		}
		seg, ok := parse(buffer[:n])
		if ok {
			s.note(seg)
		}
	}
}

func (s *stranger) note(seg segment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case !slices.Contains(s.addrs[:], seg.to.Addr()) && !slices.Contains(s.others, seg.to.Addr()):
	case seg.pong:
		s.pongs++
	default:
		s.seen = append(s.seen, seg)
	}
}

// find returns the first segment that fits and forgets it, and those before it.
func (s *stranger) find(fits func(segment) bool) (segment, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, seg := range s.seen {
		if fits(seg) {
			s.seen = s.seen[i+1:]
			return seg, true
		}
	}
	return segment{}, false
}

// await returns the next segment that fits.
func (s *stranger) await(what string, fits func(segment) bool) (seg segment) {
	s.t.Helper()
	until(s.t, "the stranger is sent "+what, func() (ok bool) {
		seg, ok = s.find(fits)
		return ok
	})
	return seg
}

// has tells segments with all of these flags.
func has(flags uint8) func(segment) bool {
	return func(seg segment) bool { return seg.flags&flags == flags }
}

func isSYN(seg segment) bool { return seg.flags&(syn|ack) == syn }

func (s *stranger) ponged() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pongs > 0
}

// at returns the stranger's address in a family, with the port that it always has.
func (s *stranger) at(family int) netip.AddrPort { return netip.AddrPortFrom(s.addrs[family], 5555) }

func (s *stranger) send(seg segment) {
	s.t.Helper()
	s.put(seg.packet())
}

// connect makes a connection and returns the segment that the pod completed it with.
func (s *stranger) connect(to netip.AddrPort) segment {
	s.t.Helper()
	s.send(s.syn(to))
	seg := s.await("a SYN's answer", has(syn|ack))
	s.send(seg.answer(ack, ""))
	return seg
}

// syn returns the first segment of a connection.
func (s *stranger) syn(to netip.AddrPort) segment {
	return segment{from: s.at(family(to.Addr())), to: to, flags: syn, seq: 1000}
}

func family(addr netip.Addr) int {
	if addr.Is4() {
		return 0
	}
	return 1
}

// insist says Marker over a connection whose SYN was sent, as soon as that is answered. No reset keeps it from it.
func (s *stranger) insist() {
	if seg, ok := s.find(has(syn | ack)); ok {
		s.send(seg.answer(ack, ""))
		s.send(seg.answer(ack|psh, lab.Marker))
	}
}

func network16(v uint16) uint16 { return v<<8 | v>>8 }

// put puts an IP packet on the link.
func (s *stranger) put(packet []byte) {
	s.t.Helper()
	protocol := uint16(unix.ETH_P_IP)
	if packet[0]>>4 == 6 {
		protocol = unix.ETH_P_IPV6
	}
	to := &unix.SockaddrLinklayer{Protocol: network16(protocol), Ifindex: s.index, Halen: 6}
	copy(to.Addr[:], s.mac)
	var refused error
	err := s.raw.Write(func(fd uintptr) (done bool) {
		refused = unix.Sendto(int(fd), packet, 0, to)
		return !errors.Is(refused, unix.EAGAIN)
	})
	if err := errors.Join(err, refused); err != nil {
		s.t.Fatal(err)
	}
}

// The flags of the TCP header.
const (
	fin = render.FIN
	syn = render.SYN
	rst = render.RST
	psh = 8
	ack = render.ACK
)

// segment is a TCP segment, a UDP datagram or a ping's answer.
type segment struct {
	from, to netip.AddrPort
	flags    uint8
	seq, ack uint32
	data     string
	udp      bool
	pong     bool
}

// answer returns a segment in the other direction that acknowledges s.
func (s segment) answer(flags uint8, data string) segment {
	next := s.seq + uint32(len(s.data))
	if s.flags&(syn|fin) != 0 {
		next++
	}
	return segment{from: s.to, to: s.from, flags: flags, seq: s.ack, ack: next, data: data}
}

// packet returns the segment as it is on the link.
func (s segment) packet() []byte {
	if s.udp {
		udp := binary.BigEndian.AppendUint16(nil, s.from.Port())
		udp = binary.BigEndian.AppendUint16(udp, s.to.Port())
		udp = binary.BigEndian.AppendUint16(udp, uint16(8+len(s.data)))
		const checksumAt = 6
		return datagram(s.from.Addr(), s.to.Addr(), render.UDP, append(append(udp, 0, 0), s.data...), checksumAt)
	}
	tcp := binary.BigEndian.AppendUint16(nil, s.from.Port())
	tcp = binary.BigEndian.AppendUint16(tcp, s.to.Port())
	tcp = binary.BigEndian.AppendUint32(tcp, s.seq)
	tcp = binary.BigEndian.AppendUint32(tcp, s.ack)
	tcp = append(tcp, 5<<4, s.flags, 0xff, 0xff, 0, 0, 0, 0) // no options; window; checksum; urgent pointer
	tcp = append(tcp, s.data...)
	const checksumAt = 16
	return datagram(s.from.Addr(), s.to.Addr(), render.TCP, tcp, checksumAt)
}

func ping(from, to netip.Addr) []byte {
	const checksumAt = 2
	if from.Is4() {
		return datagram(from, to, render.ICMP, []byte{8, 0, 0, 0, 0, 1, 0, 1}, checksumAt)
	}
	return datagram(from, to, render.ICMPv6, []byte{128, 0, 0, 0, 0, 1, 0, 1}, checksumAt)
}

// datagram puts an IP header before the payload (RFC 791, RFC 8200) and the payload's checksum in its place.
func datagram(from, to netip.Addr, protocol uint8, payload []byte, checksumAt int) []byte {
	pseudo := append(from.AsSlice(), to.AsSlice()...)
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(payload)))
	pseudo = append(pseudo, 0, 0, 0, protocol)
	if protocol == render.ICMP {
		pseudo = nil
	}
	binary.BigEndian.PutUint16(payload[checksumAt:], checksum(append(pseudo, payload...)))
	if from.Is6() {
		header := []byte{6 << 4, 0, 0, 0}
		header = binary.BigEndian.AppendUint16(header, uint16(len(payload)))
		header = append(header, protocol, 64)
		header = append(header, from.AsSlice()...)
		return append(append(header, to.AsSlice()...), payload...)
	}
	header := []byte{4<<4 | 5, 0}
	header = binary.BigEndian.AppendUint16(header, uint16(20+len(payload)))
	header = append(header, 0, 0, 0, 0, 64, protocol, 0, 0)
	header = append(append(header, from.AsSlice()...), to.AsSlice()...)
	binary.BigEndian.PutUint16(header[10:], checksum(header))
	return append(header, payload...)
}

// checksum is RFC 1071's.
func checksum(data []byte) uint16 {
	sum := uint32(0)
	for ; len(data) > 1; data = data[2:] {
		sum += uint32(binary.BigEndian.Uint16(data))
	}
	if len(data) == 1 {
		sum += uint32(data[0]) << 8
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// parse reads a packet without IP extensions.
func parse(packet []byte) (seg segment, ok bool) {
	var (
		from, to netip.Addr
		protocol uint8
	)
	switch {
	case len(packet) >= 40 && packet[0]>>4 == 6:
		from, _ = netip.AddrFromSlice(packet[8:24])
		to, _ = netip.AddrFromSlice(packet[24:40])
		protocol, packet = packet[6], packet[40:]
	case len(packet) >= 20 && packet[0]>>4 == 4:
		from, _ = netip.AddrFromSlice(packet[12:16])
		to, _ = netip.AddrFromSlice(packet[16:20])
		protocol, packet = packet[9], packet[20:binary.BigEndian.Uint16(packet[2:])]
	default:
		return segment{}, false
	}
	switch {
	case protocol == render.TCP && len(packet) >= 20:
		return segment{
			from:  netip.AddrPortFrom(from, binary.BigEndian.Uint16(packet)),
			to:    netip.AddrPortFrom(to, binary.BigEndian.Uint16(packet[2:])),
			seq:   binary.BigEndian.Uint32(packet[4:]),
			ack:   binary.BigEndian.Uint32(packet[8:]),
			flags: packet[13],
			data:  string(packet[packet[12]>>4*4:]),
		}, true
	case protocol == render.UDP && len(packet) >= 8:
		return segment{
			from: netip.AddrPortFrom(from, binary.BigEndian.Uint16(packet)),
			to:   netip.AddrPortFrom(to, binary.BigEndian.Uint16(packet[2:])),
			data: string(packet[8:]),
			udp:  true,
		}, true
	case protocol == render.ICMP && packet[0] == 0, protocol == render.ICMPv6 && packet[0] == 129:
		return segment{to: netip.AddrPortFrom(to, 0), pong: true}, true
	}
	return segment{}, false
}
