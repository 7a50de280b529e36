package nft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"mantlet/internal/sockdiag"
	"mantlet/internal/status"
	"mantlet/render"
	"mantlet/schema"
)

// Attributes of sets and their elements that the library has no names for (include/uapi/linux/netfilter/nf_tables.h).
const (
	setConcat  = 0x80   // NFT_SET_CONCAT
	elementEnd = "10.1" // NFTA_SET_ELEM_KEY_END
)

// The kernel has each part of a key in whole registers of 4 bytes.
const (
	portPadding     = 2
	protocolPadding = 3
)

func addressType(ipv6 bool) nftables.SetDatatype {
	if ipv6 {
		return nftables.TypeIP6Addr
	}
	return nftables.TypeIPAddr
}

func listKey(ipv6 bool) nftables.SetDatatype {
	return nftables.MustConcatSetType(addressType(ipv6), nftables.TypeInetService)
}

func accountKey(ipv6 bool) nftables.SetDatatype {
	return nftables.MustConcatSetType(addressType(ipv6), nftables.TypeInetProto, nftables.TypeInetService)
}

func (b *batch) addList(a render.List) error {
	b.lastSetID++
	set := &nftables.Set{
		ID: b.lastSetID, Table: b.table, Name: a.Name, Interval: true, Concatenation: true, KeyType: listKey(a.IPv6), KeyByteOrder: binaryutil.BigEndian,
	}
	b.maps[a.Name] = set
	if err := b.conn.AddSet(set, nil); err != nil {
		return fmt.Errorf("adding set %s: %w", a.Name, err)
	}
	for some := range slices.Chunk(a.Destinations, maxElements) {
		var elements []nftables.SetElement
		for _, d := range some {
			first, last := interval(d)
			elements = append(elements, nftables.SetElement{Key: first, KeyEnd: last})
		}
		if err := b.conn.SetAddElements(set, elements); err != nil {
			return fmt.Errorf("adding elements to set %s: %w", a.Name, err)
		}
	}
	return nil
}

// interval returns the first key and the last one of a destination.
func interval(d schema.Destination) (first, last []byte) {
	addr := d.Prefix.Addr().AsSlice()
	end := slices.Clone(addr)
	for i := range end {
		bits := min(max(d.Prefix.Bits()-8*i, 0), 8)
		end[i] |= 0xff >> bits
	}
	port := append(port(d.Port), make([]byte, portPadding)...)
	return append(addr, port...), append(end, port...)
}

// addAccount adds a set to the transaction. One like it that is there stays as it is.
func (b *batch) addAccount(a render.Account) error {
	b.lastSetID++
	set := &nftables.Set{
		ID: b.lastSetID, Table: b.table, Name: a.Name, Dynamic: true, HasTimeout: true, Timeout: a.Timeout, Size: a.Size,
		Concatenation: true, KeyType: accountKey(a.IPv6), KeyByteOrder: binaryutil.BigEndian,
	}
	b.maps[a.Name] = set
	if err := b.conn.AddSet(set, nil); err != nil {
		return fmt.Errorf("adding set %s: %w", a.Name, err)
	}
	return nil
}

// asList returns what the set is as a set of destinations, if it is one. What is no destination becomes a line of odd.
func (s *set) asList() (a render.List, odd []string, ok bool) {
	a = render.List{Name: s.name}
	a.IPv6, ok = s.hasKey(listKey)
	if !ok || s.flags&^setConcat != unix.NFT_SET_INTERVAL {
		return a, nil, false
	}
	odd = s.unexpected
	for _, e := range s.elements {
		d, ok := e.destination()
		if !ok {
			odd = append(odd, fmt.Sprintf("%#x-%#x", e.key, e.last))
			continue
		}
		a.Destinations = append(a.Destinations, d)
	}
	slices.SortFunc(a.Destinations, schema.Destination.Compare)
	return a, odd, true
}

// hasKey reports whether the set's keys are of a type, of which family.
func (s *set) hasKey(of func(ipv6 bool) nftables.SetDatatype) (ipv6, ok bool) {
	for _, ipv6 := range []bool{false, true} {
		if kind := of(ipv6); s.keyType == kind.GetNFTMagic() && s.keyLen == kind.Bytes {
			return ipv6, true
		}
	}
	return false, false
}

// destination is the inverse of interval.
func (e element) destination() (d schema.Destination, ok bool) {
	size := len(e.key) - portPadding - 2
	addr, ok := netip.AddrFromSlice(e.key[:size])
	if !ok {
		return d, false
	}
	d.Port = binary.BigEndian.Uint16(e.key[size:])
	for bits := addr.BitLen(); bits >= 0; bits-- {
		d.Prefix = netip.PrefixFrom(addr, bits)
		first, last := interval(d)
		if bytes.Equal(last, e.last) || e.last == nil && bits == addr.BitLen() {
			return d, bytes.Equal(first, e.key) && d.Prefix == d.Prefix.Masked()
		}
	}
	return d, false
}

// asAccount returns what the set is as an account, if it is one.
func (s *set) asAccount() (a render.Account, ok bool) {
	a = render.Account{Name: s.name, Size: s.size, Timeout: s.timeout}
	a.IPv6, ok = s.hasKey(accountKey)
	return a, ok && s.flags&^setConcat == unix.NFT_SET_EVAL|unix.NFT_SET_TIMEOUT
}

// Spoken returns the destinations that the accounts of the rules hold now: which the pod spoke to, or tried to, past the egress entries.
func (t *Table) Spoken() (all []status.Spoken, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, a := range t.want.Accounts {
		request := []netlink.Attribute{text(unix.NFTA_SET_ELEM_LIST_TABLE, render.Table), text(unix.NFTA_SET_ELEM_LIST_SET, a.Name)}
		now := time.Now()
		err := t.request(unix.NFT_MSG_GETSETELEM, netlink.Request|netlink.Dump, request, func(list attributes) error {
			return each(list[unix.NFTA_SET_ELEM_LIST_ELEMENTS], func(_ uint16, data []byte) error {
				s, err := spoken(a, data, now)
				if err == nil {
					all = append(all, s)
				}
				return err
			})
		})
		if err != nil {
			return nil, fmt.Errorf("reading the set %s of the table inet %s: %w", a.Name, render.Table, t.explain(err))
		}
	}
	return all, nil
}

// spoken reads an element of an account.
func spoken(a render.Account, data []byte, now time.Time) (s status.Spoken, err error) {
	fields, err := unpack(data)
	if err != nil {
		return s, err
	}
	key, err := unpack(fields[unix.NFTA_SET_ELEM_KEY])
	if err != nil {
		return s, err
	}
	bytes := key[unix.NFTA_DATA_VALUE]
	size := int(addressType(a.IPv6).Bytes)
	if len(bytes) != size+1+protocolPadding+2+portPadding {
		return s, errors.New("an element of another length")
	}
	addr, _ := netip.AddrFromSlice(bytes[:size])
	s = status.Spoken{
		Fate: render.Fate(a.Name), Protocol: bytes[size], Last: now,
		To: netip.AddrPortFrom(addr, binary.BigEndian.Uint16(bytes[size+1+protocolPadding:])),
	}
	if left := fields[unix.NFTA_SET_ELEM_EXPIRATION]; len(left) == 8 { // ms
		s.Last = now.Add(time.Duration(binary.BigEndian.Uint64(left))*time.Millisecond - a.Timeout)
	}
	if counter := fields[unix.NFTA_SET_ELEM_EXPR]; counter != nil {
		parts, err := unpack(counter)
		if err != nil {
			return s, err
		}
		s.Count, err = counted(parts)
		if err != nil {
			return s, err
		}
	}
	return s, nil
}

// Outbound returns how many connections are open that the pod made past the egress entries, by TCP or not, to what may not leave. It must be
// called on a thread in the table's network namespace.
func (t *Table) Outbound(leaves func(to netip.AddrPort) bool) (forbidden int, err error) {
	sockets, others, err := forbiddenOutbound(leaves)
	if err != nil {
		return 0, err
	}
	open, err := sockdiag.List()
	for s := range open {
		if sockets[s] {
			forbidden++
		}
	}
	return forbidden + len(others), err
}

// forbiddenOutbound returns the connections that the pod made past the egress entries to what may not leave: those by TCP, of which
// conntrack keeps closed ones for a while, and others.
func forbiddenOutbound(leaves func(to netip.AddrPort) bool) (sockets map[sockdiag.Socket]bool, others []entry, err error) {
	sockets = map[sockdiag.Socket]bool{}
	err = ask(conntrackGet, netlink.Request|netlink.Dump, func(d *netlink.AttributeDecoder) error {
		e, err := readEntry(d)
		switch {
		case err != nil || e.mark&render.MarkMask != render.MarkOutbound || e.protocol == render.ICMP || e.protocol == render.ICMPv6 || leaves(e.to):
		case e.protocol == render.TCP:
			sockets[sockdiag.Socket{Local: e.from, Remote: e.to}] = true
		default:
			others = append(others, e)
		}
		return err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("asking conntrack: %w", err)
	}
	return sockets, others, nil
}

// EndOutbound ends open connections that the pod made past the egress entries to what may not leave. Those by TCP are ended at both ends;
// of the others conntrack forgets, so that nothing that comes passes for an answer: with onlyTCP it does not. It must be called on a thread in
// the table's network namespace.
func (t *Table) EndOutbound(leaves func(to netip.AddrPort) bool, onlyTCP bool) (ended map[netip.AddrPort]int, err error) {
	forbidden, forget, err := forbiddenOutbound(leaves)
	if err != nil {
		return nil, err
	}
	if onlyTCP {
		forget = nil
	}
	ended = map[netip.AddrPort]int{}
	if len(forbidden) > 0 {
		var sockets []sockdiag.Socket
		sockets, err = sockdiag.Destroy(func(open map[sockdiag.Socket]sockdiag.Details) []sockdiag.Socket {
			return slices.DeleteFunc(slices.Collect(maps.Keys(open)), func(s sockdiag.Socket) bool { return !forbidden[s] })
		})
		for _, s := range sockets {
			ended[s.Remote]++
		}
	}
	for _, e := range forget {
		about, failed := netlink.MarshalAttributes([]netlink.Attribute{{Type: tupleOriginal | unix.NLA_F_NESTED, Data: e.tuple}})
		if failed == nil {
			family := byte(unix.NFPROTO_IPV4)
			if e.to.Addr().Is6() {
				family = unix.NFPROTO_IPV6
			}
			failed = tell(conntrackDelete, netlink.Request|netlink.Acknowledge, family, about, func(*netlink.AttributeDecoder) error { return nil })
		}
		switch {
		case failed == nil:
			ended[e.to]++
		case !errors.Is(failed, unix.ENOENT):
			err = errors.Join(err, fmt.Errorf("making conntrack forget a connection: %w", failed))
		}
	}
	return ended, err
}
