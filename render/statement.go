package render

import (
	"cmp"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Statement is one part of a rule: a match or an action. The types of this file are all there are. Text returns it as
// nft prints it.
type Statement interface {
	Text() string
}

// Op compares what a match loads with its value.
type Op bool

// The comparisons.
const (
	Equal    Op = false
	NotEqual Op = true
)

func (o Op) infix() string {
	if o == NotEqual {
		return "!= "
	}
	return ""
}

// Loopback matches packets that come in through lo (Output false) or leave through it.
type Loopback struct {
	Output bool
	Op     Op
}

// Text implements Statement.
func (l Loopback) Text() string {
	if l.Output {
		return "oif " + l.Op.infix() + `"lo"`
	}
	return "iif " + l.Op.infix() + `"lo"`
}

// SocketPriority matches packets that the pod sends by the priority (SO_PRIORITY) of their socket. The kernel copies it to each
// packet of the socket (ip_queue_xmit, ip6_xmit), also to what a socket in TIME_WAIT sends.
type SocketPriority struct{ Priority uint32 }

// Text implements Statement. nft prints a priority as it prints a class of traffic control.
func (s SocketPriority) Text() string {
	return fmt.Sprintf("meta priority %x:%x", s.Priority>>16, s.Priority&0xffff)
}

// SocketUser matches packets that the pod sends by the user who made their socket; a listener's answers to a SYN by the listener's. It never
// matches packets whose socket nobody has: one that is closed, or that is to be accepted yet (nft_meta_get_eval_skugid,
// net/netfilter/nft_meta.c).
type SocketUser struct {
	Op  Op
	UID uint32
}

// Text implements Statement.
func (s SocketUser) Text() string { return fmt.Sprintf("meta skuid %s%d", s.Op.infix(), s.UID) }

// Destination matches the destination address of one IP family.
type Destination struct{ Prefix netip.Prefix }

// Text implements Statement.
func (d Destination) Text() string {
	family, address := "ip", d.Prefix.String()
	if d.Prefix.Addr().Is6() {
		family = "ip6"
	}
	if d.Prefix.IsSingleIP() {
		address = d.Prefix.Addr().String()
	}
	return family + " daddr " + address
}

// DestinationPort matches TCP packets by their destination port.
type DestinationPort struct{ Port uint16 }

// Text implements Statement.
func (d DestinationPort) Text() string { return fmt.Sprintf("tcp dport %d", d.Port) }

// Forwarded matches packets for another host: the FIB calls their destination unicast, not local.
type Forwarded struct{}

// Text implements Statement.
func (Forwarded) Text() string { return "fib daddr type unicast" }

// OwnSource matches packets whose source is an address of the pod's (Equal), or is not.
type OwnSource struct{ Op Op }

// Text implements Statement.
func (o OwnSource) Text() string { return "fib saddr type " + o.Op.infix() + "local" }

// Protocol matches the transport protocol: any of Numbers (IANA's, ascending), or none of them.
type Protocol struct {
	Op      Op
	Numbers []uint8
}

// The transport protocols that rules speak of, by their IANA numbers.
const (
	ICMP    uint8 = 1
	TCP     uint8 = 6
	UDP     uint8 = 17
	DCCP    uint8 = 33
	ICMPv6  uint8 = 58
	SCTP    uint8 = 132
	UDPLite uint8 = 136
)

var protocolNames = map[uint8]string{
	ICMP: "icmp", TCP: "tcp", UDP: "udp", DCCP: "dccp", ICMPv6: "ipv6-icmp", SCTP: "sctp", UDPLite: "udplite",
}

// Text implements Statement.
func (p Protocol) Text() string {
	var names []string
	for _, n := range p.Numbers {
		names = append(names, cmp.Or(protocolNames[n], strconv.Itoa(int(n)))) // a live rule may have any
	}
	return "meta l4proto " + p.Op.infix() + oneOrSet(names)
}

func oneOrSet(values []string) string {
	if len(values) == 1 {
		return values[0]
	}
	return "{ " + strings.Join(values, ", ") + " }"
}

// ClearPriority gives packets the priority of those whose socket has none.
type ClearPriority struct{}

// Text implements Statement.
func (ClearPriority) Text() string { return "meta priority set none" }

// Redirect matches the messages by which routers name another router, of one IP family.
type Redirect struct{ IPv6 bool }

// Text implements Statement.
func (r Redirect) Text() string {
	if r.IPv6 {
		return "icmpv6 type nd-redirect"
	}
	return "icmp type redirect"
}

// Reply matches packets against (true) or along (false) the direction in which their connection was made.
type Reply bool

// Text implements Statement.
func (r Reply) Text() string {
	if r {
		return "ct direction reply"
	}
	return "ct direction original"
}

// Invalid matches packets that conntrack assigns to no connection: a segment out of the window, say.
type Invalid struct{}

// Text implements Statement.
func (Invalid) Text() string { return "ct state invalid" }

// SourceTranslated matches packets of connections whose source address was translated on their way out. What answers them
// is translated back and goes on to whom it is for.
type SourceTranslated struct{}

// Text implements Statement.
func (SourceTranslated) Text() string { return "ct status snat" }

// Marked matches mantlet's bits of the connection mark. It never matches packets that belong to no connection.
type Marked struct {
	Op   Op
	Mark Mark
}

// Text implements Statement.
func (m Marked) Text() string {
	op := "=="
	if m.Op == NotEqual {
		op = "!="
	}
	return fmt.Sprintf("ct mark & 0x%08x %s 0x%08x", uint32(MarkMask), op, uint32(m.Mark))
}

// SetMark sets mantlet's bits of the connection mark and leaves the others alone.
type SetMark struct{ Mark Mark }

// Text implements Statement. nft prints the mask with the bits that are set anyway.
func (s SetMark) Text() string {
	return fmt.Sprintf("ct mark set ct mark & 0x%08x | 0x%08x", ^uint32(MarkMask)|uint32(s.Mark), uint32(s.Mark))
}

// SetPacketMark sets the same bits of the packet's own mark, by which the kernel chooses a route, and leaves the others alone.
type SetPacketMark struct{ Mark Mark }

// Text implements Statement.
func (s SetPacketMark) Text() string {
	return fmt.Sprintf("meta mark set meta mark & 0x%08x | 0x%08x", ^uint32(MarkMask)|uint32(s.Mark), uint32(s.Mark))
}

// SetTimeouts gives a connection that the packet begins the timeouts of this name. On later packets it has no effect.
type SetTimeouts struct{ Name string }

// Text implements Statement.
func (s SetTimeouts) Text() string { return fmt.Sprintf("ct timeout set %q", s.Name) }

// TCPFlags matches TCP packets by the Value of the flags in Mask; it never matches other protocols.
type TCPFlags struct{ Value, Mask uint8 }

// The flags of the TCP header (RFC 9293, section 3.1).
const (
	FIN uint8 = 1 << iota
	SYN
	RST
	_
	ACK
)

// Text implements Statement.
func (f TCPFlags) Text() string {
	if f.Value == f.Mask {
		return fmt.Sprintf("tcp flags & %s == %s", flagNames(f.Mask, "|"), flagNames(f.Value, "|"))
	}
	return fmt.Sprintf("tcp flags %s / %s", flagNames(f.Value, ","), flagNames(f.Mask, ","))
}

func flagNames(flags uint8, separator string) string {
	var names []string
	for i, name := range []string{"fin", "syn", "rst", "psh", "ack"} {
		if flags&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	return strings.Join(names, separator)
}

// BoundSocket matches packets that are for a listener or a connection with a local address of its own. A socket in
// TIME_WAIT, or one that is still to be accepted, is neither. After TProxy it speaks of the socket that TProxy chose.
type BoundSocket struct{}

// Text implements Statement.
func (BoundSocket) Text() string { return "socket wildcard 0" }

// MarkedSocket matches packets that are for a listener or a connection by the socket's own mark. It never matches those that
// no socket takes, nor those for one in TIME_WAIT, or for one that is still to be accepted.
type MarkedSocket struct {
	Op   Op
	Mark uint32
}

// Text implements Statement.
func (m MarkedSocket) Text() string { return fmt.Sprintf("socket mark %s0x%08x", m.Op.infix(), m.Mark) }

// TProxy gives TCP packets of To's family, without a change to them, to the socket of their connection or else to the one
// that listens at To. It must be a transparent socket; where there is none, the rule ends, and the next one sees the packet.
type TProxy struct{ To netip.AddrPort }

// Text implements Statement.
func (t TProxy) Text() string {
	if t.To.Addr().Is4() {
		return "meta nfproto ipv4 meta l4proto tcp tproxy ip to " + t.To.String()
	}
	return "meta nfproto ipv6 meta l4proto tcp tproxy ip6 to " + t.To.String()
}

// LookUp takes the verdict that a map has for the packet's TCP or UDP destination port or, where Source is set, for its
// TCP source port. A port that the map lacks goes on to the next rule.
type LookUp struct {
	Source bool
	Map    string
}

// Text implements Statement.
func (l LookUp) Text() string {
	if l.Source {
		return "tcp sport vmap @" + l.Map
	}
	return "meta l4proto { tcp, udp } th dport vmap @" + l.Map
}

// Count counts the packets that come this far.
type Count struct{}

// Text implements Statement. The numbers are no part of the desired state.
func (Count) Text() string { return "counter" }

// Reset ends the TCP connection with a reset to the sender.
type Reset struct{}

// Text implements Statement.
func (Reset) Text() string { return "reject with tcp reset" }

// Verdict ends the evaluation of a packet, or goes on in a chain from which there is no return.
type Verdict struct {
	Kind VerdictKind
	Goto string // a chain, for Goto, and for jump in a live rule
}

// VerdictKind is accept, drop or goto. Live rules may have others: jump, continue, return.
type VerdictKind string

// The verdicts.
const (
	Accept VerdictKind = "accept"
	Drop   VerdictKind = "drop"
	Goto   VerdictKind = "goto"
)

// Text implements Statement.
func (v Verdict) Text() string {
	if v.Goto != "" {
		return string(v.Kind) + " " + v.Goto
	}
	return string(v.Kind)
}

// Other is what a live rule has and no rendered one: an expression of the kernel's.
type Other struct {
	Readable string // for people
	Raw      string // all of it
}

// Text implements Statement.
func (o Other) Text() string { return o.Readable }
