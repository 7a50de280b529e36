package nft

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"mantlet/render"
)

// loopbackIndex is lo's interface index in every network namespace (LOOPBACK_IFINDEX, include/linux/net_namespace.h).
const loopbackIndex = 1

// The registers that rules work in. Those of 16 bytes are numbered 1 to 4; register 0 is the verdict's.
const (
	reg1 = unix.NFT_REG_1
	reg2 = unix.NFT_REG_2
)

// batch compiles the parts of a ruleset and adds them to one transaction.
type batch struct {
	conn       *nftables.Conn
	table      *nftables.Table
	maps       map[string]*nftables.Set
	timeouts   tcpTimeouts // of connections, where the rules set none
	namesKnown bool        // sets and maps are referred to by name; nothing is added to the transaction
	lastSetID  uint32      // the ID of the last set in the transaction. The library would take IDs from a global counter, which is not safe for concurrent use
}

// expressions compiles a rule to what nft would send for the same text. It adds the anonymous sets that the rule needs to the
// transaction.
func (b *batch) expressions(rule render.Rule) ([]expr.Any, error) {
	var all []expr.Any
	for _, s := range rule {
		e, err := b.statement(s)
		if err != nil {
			return nil, fmt.Errorf("compiling rule %q: %w", rule.Text(), err)
		}
		all = append(all, e...)
	}
	return all, nil
}

func (b *batch) statement(s render.Statement) ([]expr.Any, error) {
	switch s := s.(type) {
	case render.Loopback:
		key := expr.MetaKeyIIF
		if s.Output {
			key = expr.MetaKeyOIF
		}
		return []expr.Any{&expr.Meta{Key: key, Register: reg1}, compare(s.Op, native(loopbackIndex))}, nil
	case render.SocketPriority:
		return []expr.Any{&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg1}, compare(render.Equal, native(s.Priority))}, nil
	case render.SocketMark:
		return []expr.Any{&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1}, compare(render.Equal, native(s.Mark))}, nil
	case render.SocketUser:
		return []expr.Any{&expr.Meta{Key: expr.MetaKeySKUID, Register: reg1}, compare(s.Op, native(s.UID))}, nil
	case render.Destination:
		return destination(s.Prefix), nil
	case render.DestinationPort:
		return append(onlyTCP(),
			&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseTransportHeader, Offset: destinationPort, Len: 2},
			compare(render.Equal, port(s.Port)),
		), nil
	case render.ClearPriority:
		return []expr.Any{
			&expr.Immediate{Register: reg1, Data: native(0)},
			&expr.Meta{Key: expr.MetaKeyPRIORITY, Register: reg1, SourceRegister: true},
		}, nil
	case render.Forwarded:
		return []expr.Any{
			&expr.Fib{Register: reg1, FlagDADDR: true, ResultADDRTYPE: true},
			compare(render.Equal, native(unix.RTN_UNICAST)),
		}, nil
	case render.OwnSource:
		return []expr.Any{
			&expr.Fib{Register: reg1, FlagSADDR: true, ResultADDRTYPE: true},
			compare(s.Op, native(unix.RTN_LOCAL)),
		}, nil
	case render.Protocol:
		return b.protocol(s.Op, s.Numbers...)
	case render.Redirect:
		return redirect(s.IPv6), nil
	case render.Reply:
		direction := byte(0)
		if s {
			direction = 1
		}
		return []expr.Any{&expr.Ct{Key: expr.CtKeyDIRECTION, Register: reg1}, compare(render.Equal, []byte{direction})}, nil
	case render.Invalid:
		return hasBit(expr.CtKeySTATE, expr.CtStateBitINVALID), nil
	case render.SourceTranslated:
		return hasBit(expr.CtKeySTATUS, statusSourceNAT), nil
	case render.Marked:
		return []expr.Any{
			&expr.Ct{Key: expr.CtKeyMARK, Register: reg1},
			mask(native(uint32(render.MarkMask)), native(0)),
			compare(s.Op, native(uint32(s.Mark))),
		}, nil
	case render.SetMark:
		return []expr.Any{
			&expr.Ct{Key: expr.CtKeyMARK, Register: reg1},
			mask(native(^uint32(render.MarkMask)), native(uint32(s.Mark))),
			&expr.Ct{Key: expr.CtKeyMARK, Register: reg1, SourceRegister: true},
		}, nil
	case render.SetPacketMark:
		return []expr.Any{
			&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1},
			mask(native(^uint32(render.MarkMask)), native(uint32(s.Mark))),
			&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1, SourceRegister: true},
		}, nil
	case render.SetTimeouts:
		return []expr.Any{&expr.Objref{Type: unix.NFT_OBJECT_CT_TIMEOUT, Name: s.Name + "\x00"}}, nil
	case render.TCPFlags:
		return append(onlyTCP(),
			&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
			&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 1, Mask: []byte{s.Mask}, Xor: []byte{0}},
			compare(render.Equal, []byte{s.Value}),
		), nil
	case render.BoundSocket:
		return []expr.Any{&expr.Socket{Key: expr.SocketKeyWildcard, Register: reg1}, compare(render.Equal, []byte{0})}, nil
	case render.MarkedSocket:
		return []expr.Any{&expr.Socket{Key: expr.SocketKeyMark, Register: reg1}, compare(s.Op, native(s.Mark))}, nil
	case render.TProxy:
		return tproxy(s.To), nil
	case render.LookUp:
		return b.lookUp(s)
	case render.Count:
		return []expr.Any{&expr.Counter{}}, nil
	case render.Reset:
		return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}, nil
	case render.Prohibit:
		return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}}, nil
	case render.OnList:
		return b.onList(s)
	case render.Tally:
		return b.tally(s)
	case render.Verdict:
		return []expr.Any{verdict(s)}, nil
	default:
		return nil, fmt.Errorf("statement %T is not known", s)
	}
}

// destinationPort is the offset of the destination port in the headers of TCP and UDP (RFC 9293, RFC 768).
const destinationPort = 2

func native(v uint32) []byte { return binaryutil.NativeEndian.PutUint32(v) }

func compare(op render.Op, data []byte) expr.Any {
	e := &expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: data}
	if op == render.NotEqual {
		e.Op = expr.CmpOpNeq
	}
	return e
}

// mask computes reg1 = reg1 & and ^ xor.
func mask(and, xor []byte) expr.Any {
	return &expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: and, Xor: xor}
}

// statusSourceNAT is IPS_SRC_NAT (include/uapi/linux/netfilter/nf_conntrack_common.h).
const statusSourceNAT = 1 << 4

// hasBit tests a bit of conntrack's state or status.
func hasBit(key expr.CtKey, bit uint32) []expr.Any {
	return []expr.Any{&expr.Ct{Key: key, Register: reg1}, mask(native(bit), native(0)), compare(render.NotEqual, native(0))}
}

func onlyFamily(family byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg1}, compare(render.Equal, []byte{family})}
}

func onlyTCP() []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg1}, compare(render.Equal, []byte{render.TCP})}
}

// daddr loads the destination address, if it is of the family, and returns the registers after it.
func daddr(ipv6 bool) (all []expr.Any, next, afterNext uint32) {
	family, offset, size := byte(unix.NFPROTO_IPV4), uint32(16), uint32(4) // RFC 791
	next, afterNext = unix.NFT_REG32_01, unix.NFT_REG32_02
	if ipv6 {
		family, offset, size = unix.NFPROTO_IPV6, 24, 16 // RFC 8200
		next, afterNext = reg2, unix.NFT_REG32_05        // register 2 is NFT_REG32_04 to the kernel
	}
	return append(onlyFamily(family),
		&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size}), next, afterNext
}

func (b *batch) onList(o render.OnList) ([]expr.Any, error) {
	set, err := b.set(o.Set)
	if err != nil {
		return nil, err
	}
	all, next, _ := daddr(o.IPv6)
	if o.TCP {
		all = slices.Insert(all, len(onlyFamily(0)), onlyTCP()...)
	}
	return append(all,
		&expr.Payload{DestRegister: next, Base: expr.PayloadBaseTransportHeader, Offset: destinationPort, Len: 2},
		&expr.Lookup{SourceRegister: reg1, SetName: set.Name, SetID: set.ID},
	), nil
}

func (b *batch) tally(t render.Tally) ([]expr.Any, error) {
	set, err := b.set(t.Account)
	if err != nil {
		return nil, err
	}
	all, next, afterNext := daddr(t.IPv6)
	all = append(all, &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: next})
	if t.Portless {
		all = append(all, &expr.Immediate{Register: afterNext, Data: make([]byte, 2)})
	} else {
		all = append(all, &expr.Payload{DestRegister: afterNext, Base: expr.PayloadBaseTransportHeader, Offset: destinationPort, Len: 2})
	}
	return append(all, &expr.Dynset{
		SrcRegKey: reg1, SetName: set.Name, SetID: set.ID, Operation: unix.NFT_DYNSET_OP_UPDATE, Exprs: []expr.Any{&expr.Counter{}},
	}), nil
}

// destination compares as many whole bytes of the destination address as the prefix has. Rules have only such prefixes.
func destination(prefix netip.Prefix) []expr.Any {
	family, offset := byte(unix.NFPROTO_IPV4), uint32(16) // RFC 791: destination address
	if prefix.Addr().Is6() {
		family, offset = unix.NFPROTO_IPV6, 24 // RFC 8200
	}
	data := prefix.Addr().AsSlice()[:prefix.Bits()/8]
	return append(onlyFamily(family),
		&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(len(data))},
		compare(render.Equal, data),
	)
}

// redirect matches ICMP redirects by their type (RFC 792, RFC 4861).
func redirect(ipv6 bool) []expr.Any {
	family, protocol, kind := byte(unix.NFPROTO_IPV4), render.ICMP, byte(5)
	if ipv6 {
		family, protocol, kind = unix.NFPROTO_IPV6, render.ICMPv6, 137
	}
	return append(onlyFamily(family),
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg1}, compare(render.Equal, []byte{protocol}),
		&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1}, compare(render.Equal, []byte{kind}),
	)
}

// protocol compares the packet's protocol with one number, or looks it up in an anonymous set of several.
func (b *batch) protocol(op render.Op, numbers ...uint8) ([]expr.Any, error) {
	load := &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg1}
	if len(numbers) == 1 {
		return []expr.Any{load, compare(op, numbers)}, nil
	}
	if b.namesKnown {
		return []expr.Any{load, &expr.Lookup{SourceRegister: reg1, SetName: setName(numbers), Invert: op == render.NotEqual}}, nil
	}
	b.lastSetID++
	set := &nftables.Set{
		ID: b.lastSetID, Name: "__set%d", // the kernel puts a number there
		Table: b.table, Anonymous: true, Constant: true, KeyType: nftables.TypeInetProto, Size: uint32(len(numbers)),
	}
	var elements []nftables.SetElement
	for _, n := range numbers {
		elements = append(elements, nftables.SetElement{Key: []byte{n}})
	}
	if err := b.conn.AddSet(set, elements); err != nil {
		return nil, fmt.Errorf("adding an anonymous set: %w", err)
	}
	return []expr.Any{
		load, &expr.Lookup{SourceRegister: reg1, SetID: set.ID, SetName: set.Name, Invert: op == render.NotEqual},
	}, nil
}

// setName returns a name for the content of an anonymous set. Its own name is a number that the kernel chose.
func setName(numbers []uint8) string { return fmt.Sprintf("{%x}", numbers) }

// tproxy restricts the rule to the listener's family and to TCP. The kernel refuses the expression otherwise.
func tproxy(to netip.AddrPort) []expr.Any {
	family := byte(unix.NFPROTO_IPV4)
	if to.Addr().Is6() {
		family = unix.NFPROTO_IPV6
	}
	all := append(onlyFamily(family), onlyTCP()...)
	return append(all,
		&expr.Immediate{Register: reg1, Data: to.Addr().AsSlice()},
		&expr.Immediate{Register: reg2, Data: binary.BigEndian.AppendUint16(nil, to.Port())},
		&expr.TProxy{Family: family, TableFamily: byte(nftables.TableFamilyINet), RegAddr: reg1, RegPort: reg2},
	)
}

func (b *batch) lookUp(l render.LookUp) ([]expr.Any, error) {
	set, err := b.set(l.Map)
	if err != nil {
		return nil, err
	}
	all, offset := onlyTCP(), uint32(0) // RFC 9293: source port
	if !l.Source {
		if all, err = b.protocol(render.Equal, render.TCP, render.UDP); err != nil {
			return nil, err
		}
		offset = destinationPort
	}
	return append(all,
		&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2},
		&expr.Lookup{SourceRegister: reg1, DestRegister: 0, IsDestRegSet: true, SetName: set.Name, SetID: set.ID},
	), nil
}

// set returns a map or set of the transaction by its name.
func (b *batch) set(name string) (*nftables.Set, error) {
	if b.namesKnown {
		return &nftables.Set{Name: name}, nil
	}
	set, ok := b.maps[name]
	if !ok {
		return nil, fmt.Errorf("there is no map or set %q", name)
	}
	return set, nil
}

func verdict(v render.Verdict) *expr.Verdict {
	switch v.Kind {
	case render.Goto:
		return &expr.Verdict{Kind: expr.VerdictGoto, Chain: v.Goto}
	case render.Accept:
		return &expr.Verdict{Kind: expr.VerdictAccept}
	case render.Drop:
		return &expr.Verdict{Kind: expr.VerdictDrop}
	default:
		panic("nft: verdict " + string(v.Kind) + " is not known")
	}
}
