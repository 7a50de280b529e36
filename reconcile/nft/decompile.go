package nft

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"mantlet/render"
)

// rule is the inverse of batch.expressions. A statement is recognised by this: compiled, it gives these very expressions.
// What no statement gives becomes a render.Other.
func (r *reader) rule(all []expression) render.Rule {
	rule := render.Rule{}
	for len(all) > 0 {
		s, n := r.statement(all)
		rule = append(rule, s)
		all = all[n:]
	}
	return rule
}

// statement returns the statement that the expressions begin with, and how many of them it takes.
func (r *reader) statement(all []expression) (s render.Statement, n int) {
	for _, f := range r.fixed {
		if len(f.expressions) > n && begins(all, f.expressions) {
			s, n = f.statement, len(f.expressions)
		}
	}
	for _, guess := range r.guesses(all) {
		if compiled := r.compile(guess); len(compiled) > n && begins(all, compiled) {
			s, n = guess, len(compiled)
		}
	}
	first := all[0]
	switch {
	case n > 0:
		return s, n
	case first.name == "immediate" && first.data.u32("1") == unix.NFT_REG_VERDICT:
		return first.data.verdict("2.2"), 1
	default:
		return render.Other{Readable: first.readable(), Raw: first.raw()}, 1
	}
}

func begins(all, with []expression) bool {
	return len(all) >= len(with) && slices.EqualFunc(all[:len(with)], with, func(a, b expression) bool {
		return a.name == b.name && maps.EqualFunc(a.data, b.data, slices.Equal)
	})
}

// guesses returns the statements with parameters that the expressions could begin with, by their names alone.
func (r *reader) guesses(all []expression) (s []render.Statement) {
	is := func(names ...string) bool {
		return len(all) >= len(names) && slices.EqualFunc(names, all[:len(names)], func(name string, e expression) bool { return name == e.name })
	}
	op := func(e expression) render.Op { return e.data.u32("2") == uint32(expr.CmpOpNeq) }
	if is("meta", "cmp") {
		s = append(s,
			render.Protocol{Op: op(all[1]), Numbers: all[1].data["3.1"]},
			render.Loopback{Op: op(all[1])}, render.Loopback{Output: true, Op: op(all[1])},
			render.SocketPriority{Priority: all[1].data.native("3.1")}, render.SocketMark{Mark: all[1].data.native("3.1")}, render.SocketUser{Op: op(all[1]), UID: all[1].data.native("3.1")},
		)
	}
	if is("meta", "lookup") {
		s = append(s, render.Protocol{Op: all[1].data.u32("5") != 0, Numbers: r.numbers[all[1].data.text("1")]})
	}
	if is("socket", "cmp") {
		s = append(s, render.MarkedSocket{Op: op(all[1]), Mark: all[1].data.native("3.1")})
	}
	if is("ct", "bitwise", "cmp") {
		s = append(s, render.Marked{Op: op(all[2]), Mark: render.Mark(all[2].data.native("3.1"))})
	}
	if is("ct", "bitwise", "ct") {
		s = append(s, render.SetMark{Mark: render.Mark(all[1].data.native("5.1"))})
	}
	if is("meta", "bitwise", "meta") {
		s = append(s, render.SetPacketMark{Mark: render.Mark(all[1].data.native("5.1"))})
	}
	if is("objref") {
		s = append(s, render.SetTimeouts{Name: all[0].data.text("2")})
	}
	if is("immediate", "meta") {
		s = append(s, render.ClearPriority{})
	}
	if is("meta", "cmp", "payload", "cmp") {
		if port := all[3].data["3.1"]; len(port) == 2 {
			s = append(s, render.DestinationPort{Port: binary.BigEndian.Uint16(port)})
		}
		s = append(s, destinationOf(all[3].data["3.1"], all[1].data["3.1"])...)
	}
	if is("meta", "cmp", "meta", "cmp", "payload", "cmp") {
		s = append(s, render.Redirect{}, render.Redirect{IPv6: true})
	}
	if is("meta", "cmp", "payload", "lookup") {
		s = append(s, render.LookUp{Source: true, Map: all[3].data.text("1")})
	}
	if is("meta", "lookup", "payload", "lookup") {
		s = append(s, render.LookUp{Map: all[3].data.text("1")})
	}
	if is("meta", "cmp", "payload", "payload", "lookup") {
		set := all[4].data.text("1")
		s = append(s, render.OnList{Set: set}, render.OnList{Set: set, IPv6: true})
	}
	if is("meta", "cmp", "meta", "cmp", "payload", "payload", "lookup") {
		set := all[6].data.text("1")
		s = append(s, render.OnList{Set: set, TCP: true}, render.OnList{Set: set, IPv6: true, TCP: true})
	}
	portless := is("meta", "cmp", "payload", "meta", "immediate", "dynset")
	if portless || is("meta", "cmp", "payload", "meta", "payload", "dynset") {
		set := all[5].data.text("1")
		s = append(s, render.Tally{Account: set, Portless: portless}, render.Tally{Account: set, IPv6: true, Portless: portless})
	}
	if is("meta", "cmp", "payload", "bitwise", "cmp") {
		s = append(s, render.TCPFlags{Mask: all[3].data.byte("4.1"), Value: all[4].data.byte("3.1")})
	}
	if is("meta", "cmp", "meta", "cmp", "immediate", "immediate", "tproxy") {
		if addr, ok := netip.AddrFromSlice(all[4].data["2.1"]); ok && len(all[5].data["2.1"]) == 2 {
			s = append(s, render.TProxy{To: netip.AddrPortFrom(addr, binary.BigEndian.Uint16(all[5].data["2.1"]))})
		}
	}
	return s
}

// destinationOf makes a prefix of its whole bytes.
func destinationOf(prefix, family []byte) []render.Statement {
	size := 4
	if slices.Equal(family, []byte{unix.NFPROTO_IPV6}) {
		size = 16
	}
	if len(prefix) > size {
		return nil
	}
	addr, _ := netip.AddrFromSlice(append(slices.Clone(prefix), make([]byte, size-len(prefix))...))
	return []render.Statement{render.Destination{Prefix: netip.PrefixFrom(addr, 8*len(prefix))}}
}

// compile returns what a statement is in the kernel; nothing where it can't be compiled.
func (r *reader) compile(s render.Statement) []expression {
	exprs, err := r.compiler.statement(s)
	if err != nil {
		return nil
	}
	var all []expression
	for _, e := range exprs {
		wire, err := expr.Marshal(unix.NFPROTO_INET, e)
		if err != nil {
			return nil
		}
		parsed, err := parseExpression(wire)
		if err != nil {
			return nil
		}
		all = append(all, parsed)
	}
	return all
}

// expression is one of a rule's expressions.
type expression struct {
	name string
	data fields
}

// fields are attributes, by the path of their numbers: 3.1 is attribute 1 within attribute 3.
type fields map[string][]byte

func (f fields) text(path string) string { return strings.TrimRight(string(f[path]), "\x00") }

func (f fields) byte(path string) byte {
	if len(f[path]) != 1 {
		return 0
	}
	return f[path][0]
}

func (f fields) u32(path string) uint32 {
	if len(f[path]) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(f[path])
}

// native reads what the packet path has in the machine's byte order.
func (f fields) native(path string) uint32 {
	if len(f[path]) != 4 {
		return 0
	}
	return binaryutil.NativeEndian.Uint32(f[path])
}

// verdict reads struct nft_verdict's attributes.
func (f fields) verdict(path string) render.Verdict {
	return render.Verdict{Kind: verdictKind(int32(f.u32(path + ".1"))), Goto: f.text(path + ".2")}
}

func parseRule(a attributes) (all []expression, err error) {
	err = each(a[unix.NFTA_RULE_EXPRESSIONS], func(_ uint16, data []byte) error {
		e, err := parseExpression(data)
		all = append(all, e)
		return err
	})
	return all, err
}

func parseExpression(data []byte) (expression, error) {
	parts, err := unpack(data)
	if err != nil {
		return expression{}, err
	}
	e := expression{name: parts.text(unix.NFTA_EXPR_NAME)}
	e.data, err = flatten(e.name, parts[unix.NFTA_EXPR_DATA])
	if err != nil {
		return expression{}, err
	}
	for path, value := range e.data {
		if implied[e.name+" "+path] && strings.Trim(string(value), "\x00") == "" {
			delete(e.data, path)
		}
	}
	switch e.name {
	case "counter":
		e.data = fields{} // the numbers are no part of the rule
	case "lookup":
		delete(e.data, "4") // NFTA_LOOKUP_SET_ID: within a transaction only
	case "dynset":
		delete(e.data, "2")   // NFTA_DYNSET_SET_ID
		delete(e.data, "7.2") // what new elements of the set begin to count with
	}
	return e, nil
}

// implied are attributes that mean the same when they are missing and when they are zero: the kernel tells some that the
// library does not send, and the other way round.
var implied = map[string]bool{
	"bitwise 6": true, // NFTA_BITWISE_OP: mask and xor
	"dynset 6":  true, // NFTA_DYNSET_TIMEOUT: the set's
	"lookup 5":  true, // NFTA_LOOKUP_FLAGS
	"reject 2":  true, // NFTA_REJECT_ICMP_CODE
	"socket 3":  true, // NFTA_SOCKET_LEVEL
}

// nested are the attributes that hold attributes.
var nested = map[string]bool{
	"cmp 3": true, "bitwise 4": true, "bitwise 5": true, "bitwise 7": true, "immediate 2": true, "immediate 2.2": true,
	"element 1": true, "element 2": true, "element 2.2": true, "element 10": true, "dynset 7": true,
}

func flatten(name string, data []byte) (fields, error) {
	f := fields{}
	var add func(prefix string, data []byte) error
	add = func(prefix string, data []byte) error {
		return each(data, func(kind uint16, value []byte) error {
			path := prefix + strconv.Itoa(int(kind))
			if nested[name+" "+path] {
				return add(path+".", value)
			}
			f[path] = value
			return nil
		})
	}
	if err := add("", data); err != nil {
		return nil, fmt.Errorf("reading attributes of %s: %w", name, err)
	}
	return f, nil
}

// raw tells expressions apart.
func (e expression) raw() string {
	parts := []string{e.name}
	for _, path := range slices.Sorted(maps.Keys(e.data)) {
		parts = append(parts, fmt.Sprintf("%s=%x", path, e.data[path]))
	}
	return strings.Join(parts, " ")
}

// readable comes close to how nft prints it, where it is of a common kind.
func (e expression) readable() string {
	switch e.name {
	case "cmp":
		op := "=="
		if e.data.u32("2") != uint32(expr.CmpOpEq) {
			op = []string{"==", "!=", "<", "<=", ">", ">="}[min(e.data.u32("2"), 5)]
		}
		return fmt.Sprintf("%s 0x%x", op, e.data["3.1"])
	case "payload":
		base := []string{"@ll", "@nh", "@th", "@ih"}[min(e.data.u32("2"), 3)]
		return fmt.Sprintf("%s,%d,%d", base, 8*e.data.u32("3"), 8*e.data.u32("4"))
	case "lookup":
		return "@" + e.data.text("1")
	case "immediate":
		return fmt.Sprintf("0x%x", e.data["2.1"])
	case "notrack", "masq":
		return e.name
	default:
		return "[" + e.raw() + "]"
	}
}
