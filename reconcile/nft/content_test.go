package nft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"github.com/mdlayher/netlink/nltest"
	"golang.org/x/sys/unix"

	"mantlet/render"
	"mantlet/schema"
)

// contents are what other processes can put into the table inet mantlet, as commands of nft or by netlink. Many have chains and
// maps by the names that mantlet's own rules have.
func contents() map[string]func(p *place) {
	// Each line is a kind, a name and a definition.
	commands := func(lines ...string) func(*place) {
		return func(p *place) {
			var all strings.Builder
			for _, line := range lines {
				kind, definition, _ := strings.Cut(line, " ")
				fmt.Fprintf(&all, "add %s inet mantlet %s\n", strings.ReplaceAll(kind, "_", " "), definition)
			}
			load(p.t, p.pod, all.String())
		}
	}
	mesh := func(lines ...string) func(*place) {
		return commands(append([]string{"chain mtls_in", "chain ports", "rule ports goto mtls_in"}, lines...)...)
	}
	ports := func(rules ...string) func(*place) {
		lines := []string{"chain ports", "chain other"}
		for _, rule := range rules {
			lines = append(lines, "rule ports "+rule)
		}
		return commands(lines...)
	}
	return map[string]func(p *place){
		"catch-all element":       mesh("map modes { type inet_service : verdict; flags interval; elements = { 80 : goto mtls_in, * : accept }; }"),
		"catch-all element alone": mesh("map modes { type inet_service : verdict; flags interval; elements = { * : drop }; }"),
		"catch-all, remembered":   mesh("map former { type inet_service : verdict; flags interval; elements = { 1-65535 : goto mtls_in, * : accept }; }"),
		"catch-all of protocols":  mesh("set s { type inet_proto; elements = { tcp, * }; }", "rule ports meta l4proto { tcp, udp } accept"),
		"elements with timeouts":  mesh("map modes { type inet_service : verdict; flags interval, timeout; timeout 1h; elements = { 80 timeout 1m : drop }; }"),
		"elements with counters":  mesh("map modes { type inet_service : verdict; flags interval; counter; elements = { 80 counter : drop }; }"),
		"elements with comments":  mesh(`map modes { type inet_service : verdict; flags interval; elements = { 80 comment "x" : goto mtls_in }; }`),
		"port 0 and the last":     mesh("map modes { type inet_service : verdict; flags interval; elements = { 0 : drop, 1-65534 : goto mtls_in, 65535 : accept }; }"),
		"map of addresses":        mesh("map modes { type ipv4_addr : verdict; flags interval; elements = { 192.0.2.0/24 : drop }; }"),
		"map to ports":            mesh("map modes { type inet_service : inet_service; flags interval; elements = { 80 : 8080 }; }"),
		"map without ranges":      mesh("map modes { type inet_service : verdict; elements = { 80 : drop }; }"),
		"concatenated keys":       mesh("map modes { type ipv4_addr . inet_service : verdict; flags interval; elements = { 192.0.2.0/24 . 1-80 : drop }; }"),
		"set by that name":        mesh("set modes { type inet_service; flags interval; elements = { 80-90 }; }"),
		"set that rules fill": commands("set s { type ipv4_addr; size 9; flags dynamic, timeout; timeout 1m; }", "chain ports",
			"rule ports add @s { ip saddr limit rate 1/second }"),
		"anonymous sets and maps": ports("tcp dport vmap { 80 : drop, 90-99 : accept, * : drop }", "ip saddr . tcp dport { 192.0.2.1 . 80 } accept",
			"ct mark set tcp dport map { 80 : 1 }"),
		"anonymous chains":        ports("tcp dport 80 jump { tcp sport 1 accept; }", "tcp dport 81 goto { drop; }"),
		"other verdicts":          ports("continue", "jump other", "tcp dport 1 return", "accept"),
		"rules without a verdict": ports("counter", "meta l4proto tcp", "ct mark set 1"),
		"other expressions": ports("numgen random mod 2 0 accept", "jhash ip saddr mod 2 1 drop", "limit rate 1/second drop", "meta skuid 0 drop",
			"fib saddr . iif oif missing drop", "tcp option maxseg size set 1", "log", "notrack"),
		"objects": commands("counter c", "quota q { over 1 mbytes; }", "limit l { rate 1/second; }", "chain ports",
			`rule ports counter name "c"`, `rule ports quota name "q"`, `rule ports limit name "l" drop`),
		"object in a map": commands("counter c", `map m { type inet_service : counter; elements = { 80 : "c" }; }`, "chain ports",
			"rule ports counter name tcp dport map @m"),
		"objects of connections": commands("synproxy s { mss 1460; wscale 7; }", `ct_timeout t { protocol tcp; l3proto ip; policy = { close_wait: 9 } ; }`,
			"chain ports", `rule ports ct timeout set "t"`),
		"chains at other hooks": commands("chain ports { type filter hook forward priority 5; policy drop; }",
			"chain nat { type nat hook postrouting priority srcnat; }", "rule nat masquerade", "chain route { type route hook output priority 0; }"),
		"chain at a device": commands(`chain ports { type filter hook ingress device "lo" priority 0; policy accept; }`, "rule ports drop"),
		"comments": commands(`chain ports { comment "y"; }`, `rule ports drop comment "z"`,
			`map modes { type inet_service : verdict; flags interval; comment "z"; }`),
		"long names": mesh(fmt.Sprintf("chain %s", strings.Repeat("n", 120)), fmt.Sprintf("set %s { type mark; }", strings.Repeat("n", 120))),
		"odd names": commands("map __set1 { type inet_service : verdict; }", "chain policy_9", "chain mtls_in_99", "chain ports",
			"rule ports goto mtls_in_99"),
		"many rules": ports(slices.Repeat([]string{"tcp dport 1 accept"}, 300)...),
		"nothing":    func(*place) {},

		"rule without expressions": withLibrary(func(c *nftables.Conn, table *nftables.Table) {
			chain := c.AddChain(&nftables.Chain{Name: "ports", Table: table})
			c.AddRule(&nftables.Rule{Table: table, Chain: chain})
			modes := &nftables.Set{ID: 1, Table: table, Name: "modes", KeyType: nftables.TypeInetService, DataType: nftables.TypeVerdict, IsMap: true, Interval: true}
			_ = c.AddSet(modes, nil) // else nobody takes it for rules of a mesh
		}),
		"verdict that nft does not give": withLibrary(func(c *nftables.Conn, table *nftables.Table) {
			chain := c.AddChain(&nftables.Chain{Name: "ports", Table: table})
			c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictBreak}}})
		}),
		"rule with user data": withLibrary(func(c *nftables.Conn, table *nftables.Table) {
			chain := c.AddChain(&nftables.Chain{Name: "ports", Table: table})
			c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{&expr.Counter{}}, UserData: bytes.Repeat([]byte{0xff}, 200)})
		}),
		"names with odd bytes": withLibrary(func(c *nftables.Conn, table *nftables.Table) {
			chain := c.AddChain(&nftables.Chain{Name: "a\n\x1b[31m\xff\"%d", Table: table})
			c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}})
		}),
		"set of an unknown type": rawSet(0xffff),
		"set with user data":     rawSet(servicePort, netlink.Attribute{Type: unix.NFTA_SET_USERDATA, Data: []byte{2, 200, 1}}),
	}
}

// withLibrary returns what adds to the table that which nft has no words for.
func withLibrary(add func(*nftables.Conn, *nftables.Table)) func(*place) {
	return func(p *place) {
		p.t.Helper()
		err := p.pod.Do(func() error {
			c, err := nftables.New()
			if err != nil {
				return err
			}
			add(c, &nftables.Table{Name: render.Table, Family: nftables.TableFamilyINet})
			return c.Flush()
		})
		if err != nil {
			p.t.Fatal(err)
		}
	}
}

// rawSet returns what adds a set that neither nft nor the library would make.
func rawSet(keyType uint32, more ...netlink.Attribute) func(*place) {
	return func(p *place) {
		p.t.Helper()
		p.send(unix.NFT_MSG_NEWSET, append([]netlink.Attribute{
			text(unix.NFTA_SET_TABLE, render.Table), text(unix.NFTA_SET_NAME, "modes"),
			number(unix.NFTA_SET_ID, 1), number(unix.NFTA_SET_FLAGS, 0), number(unix.NFTA_SET_KEY_TYPE, keyType), number(unix.NFTA_SET_KEY_LEN, 2),
		}, more...))
	}
}

func number(kind uint16, n uint32) netlink.Attribute {
	return netlink.Attribute{Type: kind, Data: binary.BigEndian.AppendUint32(nil, n)}
}

// nest returns an attribute that holds others.
func nest(kind uint16, inner ...netlink.Attribute) netlink.Attribute {
	return netlink.Attribute{Type: kind | unix.NLA_F_NESTED, Data: nltest.MustMarshalAttributes(inner)}
}

// send makes a transaction of one message.
func (p *place) send(kind uint16, attributes []netlink.Attribute) {
	p.t.Helper()
	const tables, flags = unix.NFNL_SUBSYS_NFTABLES << 8, netlink.Request | netlink.Acknowledge | netlink.Create
	err := p.pod.Do(func() error {
		conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
		if err != nil {
			return err
		}
		defer conn.Close()
		if _, err := conn.SendMessages([]netlink.Message{
			message(unix.NFNL_MSG_BATCH_BEGIN, netlink.Request, unix.NFPROTO_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, nil),
			message(tables|kind, flags, unix.NFPROTO_INET, 0, nltest.MustMarshalAttributes(attributes)),
			message(unix.NFNL_MSG_BATCH_END, netlink.Request, unix.NFPROTO_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, nil),
		}); err != nil {
			return err
		}
		_, err = conn.Receive()
		return err
	})
	if err != nil {
		p.t.Fatal(err)
	}
}

// catchesAll reports whether a content has an element for all other keys, which the kernel takes from Linux 5.13 on.
func catchesAll(content string) bool {
	return strings.HasPrefix(content, "catch-all") || content == "anonymous sets and maps"
}

// orphan leaves a table that is nobody's and stays: its owner has ended. It takes Linux 6.9.
func (p *place) orphan() {
	p.t.Helper()
	p.own()
	if err := p.table.Close(); err != nil {
		p.t.Fatal(err)
	}
	p.table = open(p.t, p.pod)
	until(p.t, "the table is nobody's", func() bool { // a process that was being started then may have had the socket too
		_, err := p.pod.Run("nft", "add chain inet mantlet c; delete chain inet mantlet c")
		return err == nil
	})
}

// TestAnyContentIsClosed: whatever another process left in the table, it is read without a panic, the pod is closed, and the rules
// come into force.
func TestAnyContentIsClosed(t *testing.T) {
	t.Parallel()
	for name, fill := range contents() {
		for _, orphaned := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/orphaned=%v", name, orphaned), func(t *testing.T) {
				t.Parallel()
				if catchesAll(name) {
					takesLinux(t, 5, 13, "catch-all elements")
				}
				p := newPlace(t)
				if orphaned {
					p.orphan()
				} else {
					nft(t, p.pod, "add table inet mantlet")
				}
				fill(p)
				if owned, err := p.claim(p.table); err != nil || owned != orphaned {
					t.Fatalf("Own returned %v, %v\n%s", owned, err, nft(t, p.pod, "list", "ruleset"))
				}
				found, err := p.table.Read()
				if err != nil {
					t.Errorf("Read: %v", err)
				}
				want := rules(port1(8080, schema.ModeTLS))
				for _, line := range append(render.Diff(want, found), render.Diff(found, want)...) {
					if strings.HasPrefix(line, ": ") {
						t.Errorf("a difference has no place: %q", line)
					}
				}
				if err := p.table.DenyAll(found); err != nil {
					t.Fatal(err)
				}
				p.check()
				p.replace(want)
				p.check()
				if diff := listing(t, p.pod); diff != want.Text() {
					t.Errorf("the table is\n%s", diff)
				}
			})
		}
	}
}

// TestAnyContentIsADifference: what another process adds to the table in force is told and taken out, whatever it is.
func TestAnyContentIsADifference(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	want := rules(port1(8080, schema.ModeTLS))
	for name, fill := range contents() {
		if name == "nothing" {
			continue
		}
		if is, release := isLinux(t, 5, 13); !is && catchesAll(name) {
			t.Logf("%s: not tried on %s", name, release)
			continue
		}
		nft(t, p.pod, "flush ruleset; add table inet mantlet")
		fill(p)
		p.table.want, p.table.checkedAt = want, 0
		found, err := p.table.Repair()
		if err != nil || len(found) == 0 {
			t.Errorf("%s: Mend found %q, %v", name, found, err)
		}
		p.check()
	}
}

// TestCatchAllElementIsADifference: a catch-all element beside the wanted ones is told, and taken out.
func TestCatchAllElementIsADifference(t *testing.T) {
	t.Parallel()
	takesLinux(t, 5, 13, "catch-all elements")
	p := newPlace(t)
	p.replace(rules(port1(8080, schema.ModeTLS)))
	const catchAll, accept = 2, 1 // NFT_SET_ELEM_CATCHALL, NF_ACCEPT
	p.send(unix.NFT_MSG_NEWSETELEM, []netlink.Attribute{
		text(unix.NFTA_SET_ELEM_LIST_TABLE, render.Table), text(unix.NFTA_SET_ELEM_LIST_SET, "modes"),
		nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS, nest(unix.NFTA_LIST_ELEM,
			number(unix.NFTA_SET_ELEM_FLAGS, catchAll),
			nest(unix.NFTA_SET_ELEM_DATA, nest(unix.NFTA_DATA_VERDICT, number(unix.NFTA_VERDICT_CODE, accept))))),
	})
	if found, err := p.table.Repair(); err != nil || len(found) != 1 || !strings.HasPrefix(found[0], "map modes, element *: ") {
		t.Errorf("Mend found %q, %v", found, err)
	}
	p.check()
}

// TestUnreadableContentIsADifference: what cannot be read is not what is wanted. It is replaced, and does not end the process.
func TestUnreadableContentIsADifference(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	p.replace(rules())
	for name, answer := range map[string][]byte{"cut": {1}, "cut off attribute": {0, 0, 0, 0, 9, 0, 1, 0}} {
		table := answered(func(kind uint16) [][]byte {
			if kind == unix.NFT_MSG_GETGEN {
				return [][]byte{generation(7)}
			}
			return [][]byte{answer}
		})
		if found, err := table.differences(); err != nil || len(found) != 1 || !strings.Contains(found[0], "is not readable") {
			t.Errorf("%s: differences returned %q, %v", name, found, err)
		}
		if _, err := table.Read(); !errors.As(err, new(unreadableError)) {
			t.Errorf("%s: Read returned %v", name, err)
		}
	}
}

// answered returns a table whose kernel gives these answers to requests of a kind.
func answered(answers func(kind uint16) [][]byte) *Table {
	return &Table{kernelSocket: kernelSocket{nltest.Dial(func(requests []netlink.Message) (replies []netlink.Message, err error) {
		if len(requests) == 0 {
			return nil, nil
		}
		header := requests[0].Header
		for _, data := range answers(uint16(header.Type) & 0xff) {
			replies = append(replies, netlink.Message{
				Header: netlink.Header{Type: header.Type + 1, Sequence: header.Sequence, PID: header.PID, Flags: netlink.Multi}, Data: data,
			})
		}
		done := netlink.Message{Header: netlink.Header{Type: netlink.Done, Sequence: header.Sequence, PID: header.PID, Flags: netlink.Multi}}
		return append(replies, done), nil
	})}}
}

// generation is the kernel's answer to NFT_MSG_GETGEN.
func generation(n byte) []byte { return []byte{0, 0, 0, 0, 8, 0, 1, 0, 0, 0, 0, n} }

// answersOf undoes recording: each answer has the kind of its request and its length before it.
func answersOf(data []byte) map[uint16][][]byte {
	all := map[uint16][][]byte{}
	for len(data) >= 3 {
		kind, size := uint16(data[0]), int(binary.BigEndian.Uint16(data[1:]))
		data = data[3:]
		size = min(size, len(data))
		all[kind] = append(all[kind], data[:size])
		data = data[size:]
	}
	return all
}

// kinds are the requests that a table makes to read.
var kinds = []uint16{
	unix.NFT_MSG_GETTABLE, unix.NFT_MSG_GETCHAIN, unix.NFT_MSG_GETSET, unix.NFT_MSG_GETOBJ, unix.NFT_MSG_GETFLOWTABLE, unix.NFT_MSG_GETRULE,
	unix.NFT_MSG_GETSETELEM,
}

// recording returns what the kernel answers now.
func (p *place) recording() (data []byte) {
	p.t.Helper()
	note := func(kind uint16, about []netlink.Attribute) (names []string) {
		packed, err := netlink.MarshalAttributes(about)
		if err != nil {
			p.t.Fatal(err)
		}
		replies, err := p.table.raw.Execute(message(unix.NFNL_SUBSYS_NFTABLES<<8|kind, netlink.Request|netlink.Dump, unix.NFPROTO_INET, 0, packed))
		if err != nil {
			p.t.Fatal(err)
		}
		for _, r := range replies {
			data = append(append(data, byte(kind)), binary.BigEndian.AppendUint16(nil, uint16(len(r.Data)))...)
			data = append(data, r.Data...)
			if _, a, err := unpackMessage(r.Data); err == nil {
				names = append(names, a.text(unix.NFTA_SET_NAME))
			}
		}
		return names
	}
	var sets []string
	for _, kind := range kinds[:len(kinds)-1] {
		if names := note(kind, nil); kind == unix.NFT_MSG_GETSET {
			sets = names
		}
	}
	for _, name := range sets {
		note(unix.NFT_MSG_GETSETELEM, []netlink.Attribute{
			text(unix.NFTA_SET_ELEM_LIST_TABLE, render.Table), text(unix.NFTA_SET_ELEM_LIST_SET, name),
		})
	}
	return data
}

// FuzzAnswers: whatever the kernel answers, reading panics nowhere, nor does what is done with what was read.
func FuzzAnswers(f *testing.F) {
	p := newPlace(f)
	want := rules(port1(8080, schema.ModeTLS), port1(7890, schema.ModePassthrough))
	p.replace(want)
	f.Add(p.recording())
	for _, name := range slices.Sorted(maps.Keys(contents())) {
		if name == "many rules" {
			continue
		}
		if is, _ := isLinux(f, 5, 13); !is && catchesAll(name) {
			continue
		}
		nft(f, p.pod, "flush ruleset; add table inet mantlet")
		contents()[name](p)
		f.Add(p.recording())
	}
	f.Fuzz(func(_ *testing.T, data []byte) {
		answers := answersOf(data)
		table := answered(func(kind uint16) [][]byte { return answers[kind] })
		table.want = want
		if have, err := table.dump(); err == nil {
			_, _, _ = have.Text(), render.Diff(want, have), render.Diff(have, want)
			_, _, _ = render.ReadBack(have)
			again := render.DenyAll(true).Remembering(have)
			_, _ = again.Text(), render.Diff(again, have)
		}
		_, _ = table.revision()
		_, _ = (&others{kernelSocket: table.kernelSocket}).survey()
		_ = table.refused.look(table)
		m := monitor{notes: make(chan string, 1)}
		for _, kind := range kinds {
			for _, answer := range answers[kind] {
				m.take([]netlink.Message{{Header: netlink.Header{Type: netlink.HeaderType(kind)}, Data: answer}})
				m.take([]netlink.Message{{Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWGEN}, Data: answer}})
				_ = decode(answer, func(d *netlink.AttributeDecoder) error { _, err := readEntry(d); return err })
			}
		}
	})
}
