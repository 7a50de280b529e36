package nft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"mantlet/render"
)

// live is the table as the kernel tells it, in raw attributes: the library leaves out what it does not know when it reads
// rules, tproxy and socket among it. What changes without anybody's doing is left out: counters, handles, use counts.
type live struct {
	table    []byte            // its flags, dormant and the owner's among them; nil where the table is not there
	chains   map[string][]byte // hook, priority, policy, type, flags
	rules    map[string][]byte // by chain, in order
	elements map[string][]byte // by map
}

// read returns the table, and the number of the last transaction that it shows.
func (t *Table) read() (live, uint32, error) {
	for range attempts {
		before, err := t.generation()
		if err != nil {
			return live{}, 0, err
		}
		l, err := t.dumpTable()
		if err != nil {
			return live{}, 0, err
		}
		after, err := t.generation()
		if err != nil {
			return live{}, 0, err
		}
		if after == before {
			return l, after, nil
		}
	}
	return live{}, 0, errBusy
}

// generation returns the number of the last transaction in this network namespace, whosever.
func (t *Table) generation() (generation uint32, err error) {
	err = t.request(unix.NFT_MSG_GETGEN, netlink.Request, nil, func(a attributes) error {
		generation = binary.BigEndian.Uint32(a[unix.NFTA_GEN_ID])
		return nil
	})
	if errors.Is(err, unix.EINVAL) { // the request has nothing else that could be wrong: nobody took it
		err = fmt.Errorf("%w: the kernel has no nftables (CONFIG_NF_TABLES)", err)
	}
	return generation, err
}

func (t *Table) dumpTable() (live, error) {
	l := live{chains: map[string][]byte{}, rules: map[string][]byte{}, elements: map[string][]byte{}}
	for _, dump := range []struct {
		of   uint16
		name uint16 // the attribute that names the table
		each func(attributes) error
	}{
		{unix.NFT_MSG_GETTABLE, unix.NFTA_TABLE_NAME, l.addTable},
		{unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE, l.addChain},
		{unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE, l.addSet},
		{unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE, l.addRule},
	} {
		if err := t.request(dump.of, netlink.Request|netlink.Dump, []netlink.Attribute{text(dump.name, render.Table)}, func(a attributes) error {
			if a.text(dump.name) != render.Table {
				return nil
			}
			return dump.each(a)
		}); err != nil {
			return live{}, err
		}
	}
	for set := range l.elements {
		request := []netlink.Attribute{
			text(unix.NFTA_SET_ELEM_LIST_TABLE, render.Table), text(unix.NFTA_SET_ELEM_LIST_SET, set),
		}
		if err := t.request(unix.NFT_MSG_GETSETELEM, netlink.Request|netlink.Dump, request, func(a attributes) error {
			l.elements[set] = append(l.elements[set], a[unix.NFTA_SET_ELEM_LIST_ELEMENTS]...)
			return nil
		}); err != nil {
			return live{}, err
		}
	}
	return l, nil
}

// differences names what is not in h as it is in l.
func (l live) differences(h live) []string {
	var names []string
	if h.table == nil {
		return []string{"the table is not there"}
	}
	if !bytes.Equal(l.table, h.table) {
		names = append(names, "the table's flags")
	}
	for kind, pair := range map[string][2]map[string][]byte{
		"chain": {l.chains, h.chains}, "rules of chain": {l.rules, h.rules}, "elements of": {l.elements, h.elements},
	} {
		for name, want := range pair[0] {
			if have, ok := pair[1][name]; !ok || !bytes.Equal(want, have) {
				names = append(names, kind+" "+name)
			}
		}
		for name := range pair[1] {
			if _, ok := pair[0][name]; !ok {
				names = append(names, kind+" "+name)
			}
		}
	}
	slices.Sort(names)
	return names
}

// Check returns nil if the table holds what Replace put there last, and otherwise an error that names what differs.
func (t *Table) Check() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	have, _, err := t.read()
	if err != nil {
		return fmt.Errorf("reading the table inet %s: %w", render.Table, t.explain(err))
	}
	if names := t.applied.differences(have); len(names) > 0 {
		return fmt.Errorf("the table inet %s was changed from outside: %s", render.Table, strings.Join(names, ", "))
	}
	return nil
}

// attributes are those of one object. Flags of the type (nested, byte order) are taken off.
type attributes map[uint16][]byte

func (a attributes) text(kind uint16) string { return string(bytes.TrimRight(a[kind], "\x00")) }

func text(kind uint16, s string) netlink.Attribute {
	return netlink.Attribute{Type: kind, Data: []byte(s + "\x00")}
}

func unpack(data []byte) (attributes, error) {
	list, err := netlink.UnmarshalAttributes(data)
	if err != nil {
		return nil, err
	}
	a := attributes{}
	for _, attribute := range list {
		a[attribute.Type&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER)] = attribute.Data
	}
	return a, nil
}

// request calls each for each object that the kernel tells of. What is not there is no error.
func (t *Table) request(
	of uint16, flags netlink.HeaderFlags, about []netlink.Attribute, each func(attributes) error,
) error {
	data, err := netlink.MarshalAttributes(about)
	if err != nil {
		return err
	}
	replies, err := t.raw.Execute(message(unix.NFNL_SUBSYS_NFTABLES<<8|of, flags, unix.NFPROTO_INET, 0, data))
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	const header = 4 // struct nfgenmsg
	for _, r := range replies {
		a, err := unpack(r.Data[header:])
		if err != nil {
			return err
		}
		if err := each(a); err != nil {
			return err
		}
	}
	return nil
}

func (l *live) addTable(a attributes) error {
	l.table = a[unix.NFTA_TABLE_FLAGS]
	return nil
}

func (l *live) addChain(a attributes) error {
	l.chains[a.text(unix.NFTA_CHAIN_NAME)] = slices.Concat(
		a[unix.NFTA_CHAIN_HOOK], a[unix.NFTA_CHAIN_POLICY], a[unix.NFTA_CHAIN_TYPE], a[chainFlags])
	return nil
}

// chainFlags is NFTA_CHAIN_FLAGS (include/uapi/linux/netfilter/nf_tables.h).
const chainFlags = 10

func (l *live) addSet(a attributes) error {
	l.elements[a.text(unix.NFTA_SET_NAME)] = nil
	return nil
}

// addRule appends a rule's expressions, each as its name, length and data.
func (l *live) addRule(a attributes) error {
	list, err := netlink.UnmarshalAttributes(a[unix.NFTA_RULE_EXPRESSIONS])
	if err != nil {
		return err
	}
	chain := a.text(unix.NFTA_RULE_CHAIN)
	rule := []byte("rule")
	for _, e := range list {
		parts, err := unpack(e.Data)
		if err != nil {
			return err
		}
		name, data := parts.text(unix.NFTA_EXPR_NAME), parts[unix.NFTA_EXPR_DATA]
		if name == "counter" {
			data = nil
		}
		rule = append(rule, name...)
		rule = binary.BigEndian.AppendUint32(rule, uint32(len(data)))
		rule = append(rule, data...)
	}
	l.rules[chain] = append(l.rules[chain], rule...)
	return nil
}
