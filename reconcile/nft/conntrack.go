package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"mantlet/internal/sockdiag"
	"mantlet/internal/status"
	"mantlet/render"
)

// Messages and attributes of conntrack (include/uapi/linux/netfilter/nfnetlink_conntrack.h, nf_conntrack_tcp.h).
const (
	conntrackNew      = unix.NFNL_SUBSYS_CTNETLINK << 8 // changes one that is there, without NLM_F_CREATE
	conntrackGet      = unix.NFNL_SUBSYS_CTNETLINK<<8 | 1
	conntrackDelete   = unix.NFNL_SUBSYS_CTNETLINK<<8 | 2
	conntrackGetStats = unix.NFNL_SUBSYS_CTNETLINK<<8 | 5

	statsEntries, statsMax     = 1, 2
	tupleOriginal              = 1
	tupleIP, tupleProto        = 1, 2
	protoSrcPort, protoDstPort = 2, 3
	protoinfo, protoinfoTCP    = 4, 1
	tcpState, stateEstablished = 1, 3
	connectionMark, markMask   = 8, 21
)

// Inbound returns the connections from outside that are open, and how full conntrack's table is. It must be called on a
// thread in the table's network namespace.
//
// It reads one buffer after another: the table can have 262,144 entries, which would be 50 MB at once.
func (t *Table) Inbound() (open []status.Inbound, entries, most int, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("asking conntrack: %w", err)
		}
	}()
	err = ask(conntrackGetStats, netlink.Request|netlink.Acknowledge, func(d *netlink.AttributeDecoder) error {
		for d.Next() {
			switch d.Type() {
			case statsEntries:
				entries = int(d.Uint32())
			case statsMax:
				most = int(d.Uint32())
			}
		}
		return d.Err()
	})
	if err != nil {
		return nil, 0, 0, err
	}
	counts := map[status.Inbound]int{}
	err = ask(conntrackGet, netlink.Request|netlink.Dump, func(d *netlink.AttributeDecoder) error {
		e, err := readEntry(d)
		if mode, ok := render.ModeOf(e.mark); e.established && ok {
			counts[status.Inbound{Port: e.to.Port(), Mode: mode}]++
		}
		return err
	})
	for in, n := range counts {
		in.Open = n
		open = append(open, in)
	}
	return open, entries, most, err
}

// entry is a TCP connection in conntrack's table.
type entry struct {
	from, to    netip.AddrPort // of its first packet
	mark        render.Mark
	protocol    uint8
	tuple       []byte // of its first packet, as the kernel tells it
	established bool
}

// Open returns the marks of the open connections from outside, by the socket that the client dialled, and Envoy's own connections to the
// workload. It must be called on a thread in the table's network namespace.
func (t *Table) Open() (clients map[sockdiag.Socket]render.Mark, legs map[sockdiag.Socket]sockdiag.Cookie, err error) {
	marks, err := t.marks()
	if err != nil {
		return nil, nil, err
	}
	sockets, err := sockdiag.List()
	if err != nil {
		return nil, nil, err
	}
	clients, legs = map[sockdiag.Socket]render.Mark{}, map[sockdiag.Socket]sockdiag.Cookie{}
	for s, details := range sockets {
		if mark, isClient := marks[s]; isClient {
			clients[s] = mark
		} else if details.Priority == render.WorkloadPriority {
			legs[s] = details.Cookie
		}
	}
	return clients, legs, nil
}

// marks returns the marks of the connections from outside that conntrack knows, by the socket that the client dialled. It keeps those that
// are closed for a while.
func (t *Table) marks() (map[sockdiag.Socket]render.Mark, error) {
	all := map[sockdiag.Socket]render.Mark{}
	err := ask(conntrackGet, netlink.Request|netlink.Dump, func(d *netlink.AttributeDecoder) error {
		e, err := readEntry(d)
		if _, isInbound := render.ModeOf(e.mark); isInbound && err == nil {
			all[sockdiag.Socket{Local: e.to, Remote: e.from}] = e.mark & render.MarkMask
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("asking conntrack: %w", err)
	}
	return all, nil
}

// End ends open connections at once: of those from outside, and of those of the workload to egress listeners, the ones that judge has
// a reason to end. order gets these, and all open sockets, and returns which ones to end, in which order: those and others of the same
// connections. It must be called on a thread in the table's network namespace.
func (t *Table) End(judge func(sockdiag.Socket, render.Mark) status.EndReason,
	order func(ending map[sockdiag.Socket]status.EndReason, open map[sockdiag.Socket]sockdiag.Details) []sockdiag.Socket,
) (ended map[sockdiag.Socket]status.EndReason, err error) {
	marks, err := t.marks()
	if err != nil {
		return nil, err
	}
	ending := map[sockdiag.Socket]status.EndReason{}
	done, err := sockdiag.Destroy(func(open map[sockdiag.Socket]sockdiag.Details) []sockdiag.Socket {
		for s := range open {
			mark, inbound := marks[s]
			if !inbound && !s.Local.Addr().IsLoopback() {
				continue
			}
			if reason := judge(s, mark); reason != "" {
				ending[s] = reason
			}
		}
		return order(ending, open)
	})
	ended = map[sockdiag.Socket]status.EndReason{}
	for _, s := range done {
		if reason := ending[s]; reason != "" {
			ended[s] = reason
		}
	}
	return ended, err
}

// EndKnown ends Envoy's sockets, in this order, and returns those that it ended. It must be called on a thread in the table's network
// namespace.
func (t *Table) EndKnown(order []sockdiag.Exact) (ended []sockdiag.Socket, err error) {
	return sockdiag.DestroyExactly(order)
}

// readEntry reads an entry of conntrack.
func readEntry(d *netlink.AttributeDecoder) (e entry, err error) {
	var addrs [2]netip.Addr
	var ports [2]uint16
	addresses := func(d *netlink.AttributeDecoder) error {
		for d.Next() { // CTA_IP_V4_SRC, CTA_IP_V4_DST, CTA_IP_V6_SRC, CTA_IP_V6_DST
			if kind := int(d.Type()); kind >= 1 && kind <= 4 {
				addrs[(kind-1)%2], _ = netip.AddrFromSlice(d.Bytes())
			}
		}
		return d.Err()
	}
	transport := func(d *netlink.AttributeDecoder) error {
		for d.Next() {
			switch d.Type() {
			case protoNumber:
				e.protocol = d.Uint8()
			case protoSrcPort:
				ports[0] = d.Uint16()
			case protoDstPort:
				ports[1] = d.Uint16()
			}
		}
		return d.Err()
	}
	original := func(d *netlink.AttributeDecoder) error {
		for d.Next() {
			switch d.Type() {
			case tupleIP:
				d.Nested(addresses)
			case tupleProto:
				d.Nested(transport)
			}
		}
		return d.Err()
	}
	tcp := func(d *netlink.AttributeDecoder) error {
		for d.Next() {
			if d.Type() == tcpState {
				e.established = d.Uint8() == stateEstablished
			}
		}
		return d.Err()
	}
	for d.Next() {
		switch d.Type() {
		case tupleOriginal:
			e.tuple = d.Bytes()
			d.Nested(original)
		case protoinfo:
			d.Nested(within(protoinfoTCP, func(d *netlink.AttributeDecoder) error { d.Nested(tcp); return nil }))
		case connectionMark:
			e.mark = render.Mark(d.Uint32())
		}
	}
	e.from, e.to = netip.AddrPortFrom(addrs[0], ports[0]), netip.AddrPortFrom(addrs[1], ports[1])
	return e, d.Err()
}

// within reads the attribute of one kind among those that are nested in another.
func within(kind uint16, read func(*netlink.AttributeDecoder) error) func(*netlink.AttributeDecoder) error {
	return func(d *netlink.AttributeDecoder) error {
		for d.Next() {
			if d.Type() == kind {
				if err := read(d); err != nil {
					return err
				}
			}
		}
		return d.Err()
	}
}

// ask sends a request on a socket of its own and calls each for each answer.
func ask(kind uint16, flags netlink.HeaderFlags, each func(*netlink.AttributeDecoder) error) error {
	return tell(kind, flags, unix.NFPROTO_UNSPEC, nil, each)
}

// tell is ask about one object of a family.
func tell(kind uint16, flags netlink.HeaderFlags, family byte, about []byte, each func(*netlink.AttributeDecoder) error) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer func() { _ = unix.Close(fd) }()
	const patience = 2 // s; the kernel answers at once
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: patience}); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	request := message(kind, flags, family, 0, about)
	request.Header.Length = uint32(unix.NLMSG_HDRLEN + len(request.Data))
	data, err := request.MarshalBinary()
	if err != nil {
		return err
	}
	if err := unix.Sendto(fd, data, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return os.NewSyscallError("sendto", err)
	}
	buffer := make([]byte, 64<<10) // the kernel fills at most 32 KiB of it
	for {
		n, _, err := unix.Recvfrom(fd, buffer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return os.NewSyscallError("recvfrom", err)
		}
		messages, err := syscall.ParseNetlinkMessage(buffer[:n])
		if err != nil {
			return err
		}
		for _, m := range messages {
			if done, err := last(m); done || err != nil {
				return err
			}
			if err := decode(m.Data, each); err != nil {
				return err
			}
		}
	}
}

// decode calls each for the attributes of a message.
func decode(data []byte, each func(*netlink.AttributeDecoder) error) error {
	const header = 4 // struct nfgenmsg
	if len(data) < header {
		return errTruncated
	}
	d, err := netlink.NewAttributeDecoder(data[header:])
	if err != nil {
		return err
	}
	d.ByteOrder = binary.BigEndian
	return each(d)
}

// last reports whether a message is the end of an answer.
func last(m syscall.NetlinkMessage) (bool, error) {
	if m.Header.Type != unix.NLMSG_ERROR && m.Header.Type != unix.NLMSG_DONE {
		return false, nil
	}
	if len(m.Data) < 4 {
		return true, nil
	}
	if code := int32(binary.NativeEndian.Uint32(m.Data)); code < 0 {
		return true, unix.Errno(-code)
	}
	return true, nil
}
