package nft

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables/binaryutil"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"mantlet/render"
	"mantlet/schema"
)

// Read returns the table as it is in the kernel; the zero Ruleset if it does not exist. It leaves out what changes by itself (counters,
// handles, use counts), comments, and the table's owner.
func (t *Table) Read() (render.Ruleset, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r, _, err := t.read()
	if err != nil {
		return render.Ruleset{}, fmt.Errorf("reading the table inet %s: %w", render.Table, t.explain(err))
	}
	t.hasTimeouts = t.hasTimeouts || len(r.Timeouts) > 0
	return rendered(r), nil
}

// rendered returns a live ruleset with the names by which maps and lists are rendered, see otherName.
func rendered(r render.Ruleset) render.Ruleset {
	names := map[string]string{}
	for _, m := range r.Maps {
		names[m.Name] = firstName(m.Name)
	}
	for _, l := range r.Lists {
		names[l.Name] = firstName(l.Name)
	}
	return r.Renamed(names)
}

// Check returns nil if the table holds what Replace put there last, and otherwise an error that says what differs.
func (t *Table) Check() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	found, err := t.differences()
	if err != nil {
		return fmt.Errorf("reading the table inet %s: %w", render.Table, t.explain(err))
	}
	if len(found) > 0 {
		return fmt.Errorf("the table inet %s was changed from outside: %s", render.Table, strings.Join(found, "; "))
	}
	return nil
}

// differences returns how the table differs from what Replace put there last. Content that can't be read is a difference.
//
// The kernel has a revision for the rules of a network namespace, and each transaction of any process increments it. As long as the
// revision is that of the last check, the table is not read again.
func (t *Table) differences() ([]string, error) {
	now, err := t.revision()
	if err != nil || now == t.checkedAt {
		return nil, err
	}
	have, at, err := t.read()
	if odd, ok := errors.AsType[unreadableError](err); ok {
		return []string{odd.Error()}, nil
	}
	if err != nil {
		return nil, err
	}
	found := render.Diff(t.want, have)
	if len(found) == 0 && t.madeBy != 0 && t.madeBy != t.holder.inode {
		found = []string{"another mantlet made the table"}
	}
	if len(found) == 0 {
		t.checkedAt = at
	}
	return found, nil
}

// read returns the table, and the revision that it shows. A dump takes several requests. If the revision changes between them, the dump
// may mix two states, and is repeated.
func (t *Table) read() (render.Ruleset, uint32, error) {
	for range attempts {
		before, err := t.revision()
		if err != nil {
			return render.Ruleset{}, 0, err
		}
		r, err := t.safeDump()
		if err != nil {
			return render.Ruleset{}, 0, err
		}
		after, err := t.revision()
		if err != nil {
			return render.Ruleset{}, 0, err
		}
		if after == before {
			return r, after, nil
		}
	}
	return render.Ruleset{}, 0, errBusy
}

// kernelSocket is a netlink socket to the kernel's nftables. It carries one request at a time.
type kernelSocket struct{ raw *netlink.Conn }

// revision returns the revision of the rules in this network namespace (NFTA_GEN_ID): it increases with each transaction of any process,
// and is never 0.
func (d kernelSocket) revision() (revision uint32, err error) {
	err = d.request(unix.NFT_MSG_GETGEN, netlink.Request, nil, func(a attributes) error {
		revision = a.u32(unix.NFTA_GEN_ID)
		return nil
	})
	if err == nil && revision == 0 {
		err = errors.New("the kernel does not number its transactions")
	}
	if errors.Is(err, unix.EINVAL) { // nothing in the request can be invalid, so nothing in the kernel handles it
		err = fmt.Errorf("%w: the kernel has no nftables (CONFIG_NF_TABLES)", err)
	}
	return revision, err
}

// unreadableError says that the kernel answered, and that Read does not understand the content.
type unreadableError struct{ reason any }

func (u unreadableError) Error() string {
	return fmt.Sprintf("the content is not readable: %v", u.reason)
}

// safeDump is dump, and turns a panic into an unreadableError: whatever another process put into the table, it must not end mantlet,
// which then would not close the pod.
func (t *Table) safeDump() (r render.Ruleset, err error) {
	defer func() {
		if reason := recover(); reason != nil {
			err = unreadableError{reason}
		}
	}()
	return t.dump()
}

// dump reads the table as raw attributes: the library omits expressions that it does not know, among them tproxy and socket.
func (t *Table) dump() (render.Ruleset, error) {
	r := newReader()
	for _, part := range []struct {
		of    uint16
		table uint16 // the attribute that names the table
		each  func(attributes) error
	}{
		{unix.NFT_MSG_GETTABLE, unix.NFTA_TABLE_NAME, r.addTable},
		{unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE, r.addChain},
		{unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE, r.addSet},
		{unix.NFT_MSG_GETOBJ, unix.NFTA_OBJ_TABLE, r.addObject},
		{unix.NFT_MSG_GETFLOWTABLE, flowtableTable, r.addOther("flowtable", flowtableName)},
	} {
		if err := t.list(part.of, part.table, part.each); err != nil {
			return render.Ruleset{}, err
		}
	}
	for _, s := range r.sets {
		if _, ok := s.asAccount(); ok {
			continue // packets change its content
		}
		request := []netlink.Attribute{
			text(unix.NFTA_SET_ELEM_LIST_TABLE, render.Table), text(unix.NFTA_SET_ELEM_LIST_SET, s.name),
		}
		if err := t.request(unix.NFT_MSG_GETSETELEM, netlink.Request|netlink.Dump, request, s.addElements); err != nil {
			return render.Ruleset{}, err
		}
	}
	if err := t.list(unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE, r.addRule); err != nil {
		return render.Ruleset{}, err
	}
	t.madeBy = r.holder
	return r.ruleset(), nil
}

// NFTA_FLOWTABLE_TABLE and NFTA_FLOWTABLE_NAME (include/uapi/linux/netfilter/nf_tables.h).
const (
	flowtableTable = 1
	flowtableName  = 2
)

// list calls each for each object of a kind in the table.
func (d kernelSocket) list(kind, table uint16, each func(attributes) error) error {
	about := []netlink.Attribute{text(table, render.Table)}
	return d.request(kind, netlink.Request|netlink.Dump, about, func(a attributes) error {
		if a.text(table) != render.Table {
			return nil
		}
		return each(a)
	})
}

// attributes are those of one object, by type. The flags in the types (nested, byte order) are removed.
type attributes map[uint16][]byte

func (a attributes) text(kind uint16) string { return string(bytes.TrimRight(a[kind], "\x00")) }

// u32 returns a number in network byte order; 0 if there is none.
func (a attributes) u32(kind uint16) uint32 {
	if len(a[kind]) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(a[kind])
}

func text(kind uint16, s string) netlink.Attribute {
	return netlink.Attribute{Type: kind, Data: []byte(s + "\x00")}
}

func unpack(data []byte) (attributes, error) {
	a := attributes{}
	return a, each(data, func(kind uint16, value []byte) error {
		a[kind] = value
		return nil
	})
}

// each calls do for each attribute (struct nlattr). It does not copy them: a table has some thousand.
func each(data []byte, do func(kind uint16, value []byte) error) error {
	const header, alignment = 4, 4
	for len(data) > 0 {
		if len(data) < header {
			return errTruncated
		}
		size, kind := int(binaryutil.NativeEndian.Uint16(data)), binaryutil.NativeEndian.Uint16(data[2:])
		if size < header || size > len(data) {
			return errTruncated
		}
		if err := do(kind&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), data[header:size]); err != nil {
			return err
		}
		data = data[min((size+alignment-1)&^(alignment-1), len(data)):]
	}
	return nil
}

var errTruncated = errors.New("an attribute is cut off")

// request calls each for each object of the family inet in the answer. It is no error if there are none.
func (d kernelSocket) request(
	of uint16, flags netlink.HeaderFlags, about []netlink.Attribute, each func(attributes) error,
) error {
	return d.ask(of, flags, unix.NFPROTO_INET, about, func(_ byte, a attributes) error { return each(a) })
}

// ask is request for any family, or for all.
func (d kernelSocket) ask(
	of uint16, flags netlink.HeaderFlags, family byte, about []netlink.Attribute, each func(family byte, a attributes) error,
) error {
	data, err := netlink.MarshalAttributes(about)
	if err != nil {
		return err
	}
	replies, err := d.raw.Execute(message(unix.NFNL_SUBSYS_NFTABLES<<8|of, flags, family, 0, data))
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	for _, r := range replies {
		family, a, err := unpackMessage(r.Data)
		if err == nil {
			err = each(family, a)
		}
		if err != nil {
			return unreadableError{err}
		}
	}
	return nil
}

// unpackMessage returns the family and the attributes of an nfnetlink message.
func unpackMessage(data []byte) (family byte, a attributes, err error) {
	const header = 4 // struct nfgenmsg
	if len(data) < header {
		return 0, nil, errTruncated
	}
	a, err = unpack(data[header:])
	return data[0], a, err
}

// reader builds a ruleset from the objects of the table.
type reader struct {
	chains   []render.Chain
	sets     []*set
	timeouts []render.Timeouts
	others   []string
	holder   uint64             // inode that identifies who made the table; 0 if unknown
	numbers  map[string][]uint8 // of anonymous sets, by setName
	compiler batch
	fixed    []compiledStatement // statements without parameters
}

// compiledStatement is a statement, and the expressions that it is compiled to.
type compiledStatement struct {
	statement   render.Statement
	expressions []expression
}

func newReader() *reader {
	r := &reader{numbers: map[string][]uint8{}, compiler: batch{namesKnown: true}}
	for _, s := range []render.Statement{
		render.Loopback{},
		render.Loopback{Output: true},
		render.Forwarded{},
		render.OwnSource{},
		render.OwnSource{Op: render.NotEqual},
		render.Reply(false), render.Reply(true),
		render.Invalid{},
		render.SourceTranslated{},
		render.BoundSocket{},
		render.Count{},
		render.Reset{},
		render.Prohibit{},
	} {
		r.fixed = append(r.fixed, compiledStatement{s, r.compile(s)})
	}
	return r
}

// ruleset returns the result.
func (r *reader) ruleset() render.Ruleset {
	rules := render.Ruleset{Timeouts: r.timeouts, Chains: r.chains, Others: r.others}
	for _, s := range r.sets {
		if account, ok := s.asAccount(); ok {
			rules.Accounts = append(rules.Accounts, account)
			continue
		}
		if allow, odd, ok := s.asList(); ok {
			rules.Lists = append(rules.Lists, allow)
			for _, key := range odd {
				rules.Others = append(rules.Others, fmt.Sprintf("set %s, element %s: no destination", s.name, key))
			}
			continue
		}
		switch m, ok := s.asMap(); {
		case ok:
			rules.Maps = append(rules.Maps, m)
			for _, key := range s.unexpected {
				rules.Others = append(rules.Others, fmt.Sprintf("map %s, element %s: more or less than a port and a verdict", s.name, key))
			}
		case s.flags&unix.NFT_SET_ANONYMOUS == 0:
			rules.Others = append(rules.Others, "set "+s.name)
		}
	}
	return rules
}

// addTable ignores the owner's flags: they depend on whether Own succeeded.
func (r *reader) addTable(a attributes) error {
	flags := a.u32(unix.NFTA_TABLE_FLAGS) &^ (tableOwner | tablePersist)
	switch {
	case flags == unix.NFT_TABLE_F_DORMANT:
		r.others = append(r.others, "table flag dormant, which switches every rule off")
	case flags != 0:
		r.others = append(r.others, fmt.Sprintf("table flags %#x", flags))
	}
	return nil
}

func (r *reader) addOther(kind string, name uint16) func(attributes) error {
	return func(a attributes) error {
		r.others = append(r.others, kind+" "+a.text(name))
		return nil
	}
}

// chainFlags is NFTA_CHAIN_FLAGS (include/uapi/linux/netfilter/nf_tables.h). chainBase is set on every chain with a hook, and chainBinding on
// a chain that is deleted together with the one rule that jumps to it.
const (
	chainFlags   = 10
	chainBase    = 1
	chainBinding = 4
)

func (r *reader) addChain(a attributes) error {
	hook, err := readHook(a)
	if err != nil {
		return err
	}
	r.chains = append(r.chains, render.Chain{Name: a.text(unix.NFTA_CHAIN_NAME), Hook: hook})
	return nil
}

func readHook(a attributes) (render.Hook, error) {
	flags := a.u32(chainFlags) &^ chainBase
	if a[unix.NFTA_CHAIN_HOOK] == nil {
		if flags != 0 {
			return render.Hook{Name: fmt.Sprintf("none, flags %#x", flags)}, nil
		}
		return render.Hook{}, nil
	}
	hook, err := unpack(a[unix.NFTA_CHAIN_HOOK])
	if err != nil {
		return render.Hook{}, err
	}
	h := render.Hook{
		Type:     a.text(unix.NFTA_CHAIN_TYPE),
		Name:     hookName(hook.u32(unix.NFTA_HOOK_HOOKNUM)),
		Priority: int32(hook.u32(unix.NFTA_HOOK_PRIORITY)),
		Policy:   verdictKind(int32(a.u32(unix.NFTA_CHAIN_POLICY))),
	}
	if device := hook.text(unix.NFTA_HOOK_DEV); device != "" {
		h.Name += " device " + device
	}
	if flags != 0 {
		h.Name += fmt.Sprintf(" flags %#x", flags)
	}
	return h, nil
}

// hookName returns the name of a hook of the families ip, ip6 and inet.
func hookName(number uint32) string {
	names := []string{"prerouting", "input", "forward", "output", "postrouting", "ingress"}
	if int(number) < len(names) {
		return names[number]
	}
	return fmt.Sprint(number)
}

// verdictKind returns the name of a verdict (include/uapi/linux/netfilter.h, netfilter/nf_tables.h).
func verdictKind(code int32) render.VerdictKind {
	names := map[int32]render.VerdictKind{
		0: render.Drop, 1: render.Accept, unix.NFT_CONTINUE: "continue", unix.NFT_BREAK: "break",
		unix.NFT_JUMP: "jump", unix.NFT_GOTO: render.Goto, unix.NFT_RETURN: "return",
	}
	if name, ok := names[code]; ok {
		return name
	}
	return render.VerdictKind(fmt.Sprintf("verdict %d", code))
}

// set is a map, a set or an anonymous set.
type set struct {
	name               string
	flags, keyLen      uint32
	keyType, valueType uint32
	size               uint32 // 0 for any
	timeout            time.Duration
	elements           []element
	unexpected         []string // keys of elements unlike rendered ones: catch-all elements, or ones with a timeout or a limit
}

type element struct {
	key     []byte // as long as the set's keys are
	last    []byte // key of a range of concatenated keys; nil for a single key
	isEnd   bool   // of an interval: the key is the first one after it
	verdict render.Verdict
}

func (r *reader) addSet(a attributes) error {
	r.sets = append(r.sets, setOf(a))
	return nil
}

// setOf reads a set without its elements.
func setOf(a attributes) *set {
	s := &set{
		name: a.text(unix.NFTA_SET_NAME), flags: a.u32(unix.NFTA_SET_FLAGS), keyLen: a.u32(unix.NFTA_SET_KEY_LEN),
		keyType: a.u32(unix.NFTA_SET_KEY_TYPE), valueType: a.u32(unix.NFTA_SET_DATA_TYPE),
	}
	if desc, err := unpack(a[unix.NFTA_SET_DESC]); err == nil {
		s.size = desc.u32(unix.NFTA_SET_DESC_SIZE)
	}
	if timeout := a[unix.NFTA_SET_TIMEOUT]; len(timeout) == 8 { // ms
		s.timeout = time.Duration(binary.BigEndian.Uint64(timeout)) * time.Millisecond
	}
	return s
}

func (s *set) addElements(a attributes) error {
	return each(a[unix.NFTA_SET_ELEM_LIST_ELEMENTS], func(_ uint16, data []byte) error {
		fields, err := flatten("element", data)
		if err != nil {
			return err
		}
		key, flags := fields["1.1"], fields.u32("3")
		plain := len(key) == int(s.keyLen) && flags&^unix.NFT_SET_ELEM_INTERVAL_END == 0
		for path := range fields {
			plain = plain && slices.Contains([]string{"1.1", "2.2.1", "2.2.2", "3", elementComment, elementEnd}, path)
		}
		switch {
		case plain:
		case key == nil:
			s.unexpected = append(s.unexpected, "*")
		default:
			s.unexpected = append(s.unexpected, fmt.Sprintf("%#x", key))
		}
		if len(key) == int(s.keyLen) {
			s.elements = append(s.elements, element{key, fields[elementEnd], flags&unix.NFT_SET_ELEM_INTERVAL_END != 0, fields.verdict("2.2")})
		}
		return nil
	})
}

// elementComment is NFTA_SET_ELEM_USERDATA.
const elementComment = "6"

// asMap returns the set as a map from ports to verdicts, if it is one.
func (s *set) asMap() (render.Map, bool) {
	m := render.Map{Name: s.name}
	const verdictType = 0xffffff00 // NFT_DATA_VERDICT
	if s.flags != unix.NFT_SET_MAP|unix.NFT_SET_INTERVAL || s.keyType != servicePort || s.keyLen != 2 || s.valueType != verdictType {
		return m, false
	}
	slices.SortFunc(s.elements, func(a, b element) int {
		return cmp.Or(bytes.Compare(a.key, b.key), cmp.Compare(startsAfter(a), startsAfter(b)))
	})
	for i, e := range s.elements {
		if e.isEnd {
			continue
		}
		ports := schema.Ports{First: binary.BigEndian.Uint16(e.key), Last: maxPort}
		if i+1 < len(s.elements) {
			ports.Last = binary.BigEndian.Uint16(s.elements[i+1].key) - 1
		}
		m.Elements = append(m.Elements, render.Element{Ports: ports, Verdict: e.verdict})
	}
	return m, true
}

// servicePort is nft's number for the type inet_service.
const servicePort = 13

// startsAfter orders the start of an interval after the end of another one with the same key.
func startsAfter(e element) int {
	if e.isEnd {
		return 0
	}
	return 1
}

// protocols returns the content of an anonymous set of transport protocols, sorted.
func (r *reader) protocols(name string) []uint8 {
	i := slices.IndexFunc(r.sets, func(s *set) bool { return s.name == name })
	if i < 0 || r.sets[i].flags != unix.NFT_SET_ANONYMOUS|unix.NFT_SET_CONSTANT || r.sets[i].keyLen != 1 || len(r.sets[i].unexpected) > 0 {
		return nil
	}
	var numbers []uint8
	for _, e := range r.sets[i].elements {
		numbers = append(numbers, e.key...)
	}
	slices.Sort(numbers)
	return numbers
}

func (r *reader) addRule(a attributes) error {
	all, err := parseRule(a)
	if err != nil {
		return err
	}
	for _, e := range all {
		if e.name == "lookup" {
			if numbers := r.protocols(e.data.text("1")); numbers != nil {
				r.numbers[setName(numbers)] = numbers
				e.data["1"] = []byte(setName(numbers) + "\x00")
			}
		}
	}
	r.holder = max(r.holder, holderOf(a[unix.NFTA_RULE_USERDATA]))
	name := a.text(unix.NFTA_RULE_CHAIN)
	for i := range r.chains {
		if r.chains[i].Name == name {
			r.chains[i].Rules = append(r.chains[i].Rules, r.rule(all))
		}
	}
	return nil
}
