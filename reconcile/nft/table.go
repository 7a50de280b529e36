package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"mantlet/render"
	"mantlet/schema"
)

// ErrOwned says that another process owns the table: another mantlet runs in this network namespace.
var ErrOwned = errors.New("another mantlet owns this network namespace")

// Table is a connection to the kernel's table inet mantlet. Its methods may be called concurrently.
type Table struct {
	// EnvoyUID is the user whose TCP connections are Envoy's. It is set before the first Replace; Open sets the default of the environment.
	EnvoyUID uint32

	dialogue // by conn's own socket, for messages that the library cannot send

	conn  *nftables.Conn
	table *nftables.Table
	needs []need

	timeouts      tcpTimeouts // the sysctls of the network namespace
	lacksTimeouts bool        // the kernel has no ct timeout objects
	hasTimeouts   bool        // it has been seen to have them

	subscribe func() (subscription, error) // to the kernel's notes; tests have others

	mu      sync.Mutex // the socket holds one conversation at a time
	owned   bool
	holder  holder         // from Own on
	made    uint64         // by whose holder the table was made that was read last; 0 where it does not say
	want    render.Ruleset // what Replace put there last
	refused tally          // what the rules counted
	intact  uint32         // the generation of the kernel's rules at which the table was seen to hold that; 0 for none

	others others
}

// bufferSize holds a transaction's messages, and the kernel's acknowledgement of each. Some 70 messages of rules and the
// maps' elements, at most 65,536 of 40 bytes in each of two maps, are under 8 MiB; acknowledgements repeat no payload.
const bufferSize = 16 << 20

// Open connects to the network namespace of the calling thread. It changes nothing.
func Open() (*Table, error) {
	t := &Table{
		EnvoyUID: schema.DefaultEnvoyUID,
		table:    &nftables.Table{Name: render.Table, Family: nftables.TableFamilyINet},
		needs:    needs(), timeouts: readTCPTimeouts(), subscribe: subscribe,
	}
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		t.raw = c
		// Else an acknowledgement that is an error would repeat its message.
		return errors.Join(c.SetOption(netlink.CapAcknowledge, true), buffers(c))
	}))
	if err != nil {
		return nil, fmt.Errorf("connecting to nftables: %w", hint(err))
	}
	t.conn = conn
	if t.others.raw, err = netlink.Dial(unix.NETLINK_NETFILTER, nil); err != nil {
		return nil, errors.Join(fmt.Errorf("connecting to nftables: %w", hint(err)), conn.CloseLasting())
	}
	return t, nil
}

// buffers enlarges the socket's buffers: as far as net.core allows where the capability to go beyond is lacking, as in
// a user namespace.
func buffers(c *netlink.Conn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(func(fd uintptr) {
		for force, option := range map[int]int{
			unix.SO_SNDBUFFORCE: unix.SO_SNDBUF,
			unix.SO_RCVBUFFORCE: unix.SO_RCVBUF,
		} {
			if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, force, bufferSize) != nil {
				_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, option, bufferSize) // the default has to do
			}
		}
	})
}

// Close ends the connection. The rules stay; a table that was owned waits for its next owner.
func (t *Table) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.holder.release()
	return errors.Join(t.conn.CloseLasting(), t.others.raw.Close())
}

// Flags of a table (include/uapi/linux/netfilter/nf_tables.h), since Linux 5.12 and 6.9.
const (
	tableOwner   = 0x2
	tablePersist = 0x4
)

// Own makes the table this process's, creating it where it is not there and adopting it where a mantlet before this one
// left it. From then on other processes' changes to it, `nft flush ruleset` too, get EPERM or pass it by, until Close. It
// reports false where the kernel can't do that, or where the table that is there was made without it. The error is
// ErrOwned where another process owns it, or, without an owner, where another mantlet that lives made it. Own leaves what is in the
// table as it is. It must be called on a thread in the table's network namespace.
func (t *Table) Own() (bool, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var failed error
	if t.holder.inode == 0 {
		t.holder, failed = hold()
	}
	err := t.other()
	if !errors.Is(err, ErrOwned) {
		failed = errors.Join(failed, err)
		t.owned, err = t.claim(render.Table, false)
	}
	if err == nil && !t.owned {
		err = failed // else the kernel itself keeps the owner
	}
	if err != nil {
		return false, fmt.Errorf("claiming the table inet %s: %w", render.Table, t.explain(err))
	}
	return t.owned, nil
}

// claim makes a table this process's, or finds in a transaction that leaves nothing behind whether it could.
func (t *Table) claim(name string, trial bool) (bool, error) {
	data, err := netlink.MarshalAttributes([]netlink.Attribute{
		text(unix.NFTA_TABLE_NAME, name),
		{Type: unix.NFTA_TABLE_FLAGS, Data: binary.BigEndian.AppendUint32(nil, tableOwner|tablePersist)},
	})
	if err != nil {
		return false, fmt.Errorf("marshalling the table's flags: %w", err)
	}
	const tables = unix.NFNL_SUBSYS_NFTABLES << 8
	messages := []netlink.Message{
		message(unix.NFNL_MSG_BATCH_BEGIN, netlink.Request, unix.NFPROTO_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, nil),
		message(tables|unix.NFT_MSG_NEWTABLE, netlink.Request|netlink.Acknowledge|netlink.Create, unix.NFPROTO_INET, 0, data),
		message(unix.NFNL_MSG_BATCH_END, netlink.Request, unix.NFPROTO_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, nil),
	}
	if trial {
		messages = slices.Insert(messages, 2, message(tables|unix.NFT_MSG_DELTABLE, netlink.Request, unix.NFPROTO_INET, 0, data))
	}
	if _, err := t.raw.SendMessages(messages); err != nil {
		return false, err
	}
	_, err = t.raw.Receive()
	if err == nil {
		return true, nil
	}
	t.drain()
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return false, nil
	}
	return false, err
}

// message is one of netfilter's netlink: its header carries family, version 0 and a resource in network byte order.
func message(kind uint16, flags netlink.HeaderFlags, family byte, resource uint16, data []byte) netlink.Message {
	header := binary.BigEndian.AppendUint16([]byte{family, unix.NFNETLINK_V0}, resource)
	return netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(kind), Flags: flags}, Data: append(header, data...)}
}

// privileged reports whether the kernel lets this process speak to nftables at all.
func (t *Table) privileged() bool {
	_, err := t.conn.ListTablesOfFamily(nftables.TableFamilyINet)
	return err == nil
}

// DenyAll puts the rules in place that stand before anything is known, and that remember those of before. What the pod sends is treated as
// those of before do. Where the kernel
// does not take them all, nothing is remembered; where it lacks conntrack, not even answers to the pod's own connections come
// in. It is idempotent.
func (t *Table) DenyAll(before render.Ruleset) error {
	outbound := render.OutboundOf(before)
	all := []render.Ruleset{render.DenyAll(true).WithOutbound(outbound), render.DenyAll(false).WithOutbound(outbound)}
	if remembering := all[0].Remembering(before); len(remembering.Maps) > 0 {
		all = append([]render.Ruleset{remembering}, all...)
	}
	var errs []error
	for _, r := range all {
		err := t.Replace(r)
		if err == nil || errors.Is(err, unix.EPERM) || errors.Is(err, ErrOwned) {
			return err
		}
		errs = append(errs, err)
	}
	return fmt.Errorf("putting the deny-all rules in place: %w", distinct(errors.Join(errs...)))
}

// OnlyStatus is DenyAll, but for the port of mantlet's own status. Where the kernel lacks what that takes, it stays closed too.
func (t *Table) OnlyStatus(port uint16, before render.Ruleset) error {
	return t.Replace(render.OnlyStatus(port).WithOutbound(render.OutboundOf(before)).Remembering(before))
}

// attempts bounds how often a change or a dump is started again because another process changed nftables in the meantime.
const attempts = 10

// Replace makes the table hold r and nothing else, in one transaction. Where it fails, the rules are as they were. A table
// that is not owned is read back; where it has something else already, another process did that, and the change is made
// again. Where the kernel refuses the rules, the error names each option that it lacks. Where it has no ct timeout objects, the
// table goes without them, see LacksTimeouts.
func (t *Table) Replace(r render.Ruleset) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	err := t.put(t.fit(r, t.lacksTimeouts))
	if refuses(err) && !t.lacksTimeouts && len(r.Timeouts) > 0 && t.try(timeoutsNeed(r.Timeouts)) != nil {
		t.lacksTimeouts = true
		err = t.put(t.fit(r, t.lacksTimeouts))
	}
	if !refuses(err) {
		return err
	}
	if missing := t.missing(); missing != nil { // which says all that the kernel's answers to the rules could
		return fmt.Errorf("replacing the table inet %s: %w", render.Table, missing)
	}
	return err
}

// refuses reports whether an error of put says that the kernel does not take the rules.
func refuses(err error) bool {
	return err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, ErrOwned) && !errors.Is(err, errBusy)
}

// Fit returns the rules as Replace puts them in place: for this process's user, and as the kernel takes them.
func (t *Table) Fit(r render.Ruleset) render.Ruleset {
	return t.fit(r, len(r.Timeouts) > 0 && t.LacksTimeouts())
}

func (t *Table) fit(r render.Ruleset, lacksTimeouts bool) render.Ruleset {
	if lacksTimeouts {
		r = r.WithoutTimeouts()
	}
	return r.ForUsers(uint32(os.Geteuid()), t.EnvoyUID)
}

func (t *Table) put(r render.Ruleset) error {
	var found []string
	for n := range attempts {
		_ = t.refused.look(t) // what it can't see is lost to the count, and to nothing else
		whole := n > 0 && !t.owned
		failed := t.transaction(func(b *batch) error { return t.replace(b, r, whole) })
		if failed != nil && n == 0 && !t.owned {
			continue // another process may have deleted meanwhile what clear deletes
		}
		// Where acknowledgements did not fit into the socket's buffer, the commit may have gone well all the same.
		if failed != nil && !errors.Is(failed, unix.ENOBUFS) {
			return fmt.Errorf("replacing the table inet %s: %w", render.Table, t.explain(failed))
		}
		before := t.want
		t.want, t.intact = r, 0
		if t.owned && failed == nil {
			t.refused.fold()
			return nil // nobody else can have changed it; the next Check looks all the same
		}
		var err error
		if found, err = t.differences(); err != nil {
			return fmt.Errorf("reading the table inet %s back: %w", render.Table, t.explain(errors.Join(failed, err)))
		}
		if failed != nil && len(found) > 0 {
			t.want = before
			return fmt.Errorf("replacing the table inet %s: %w", render.Table, failed)
		}
		t.refused.fold()
		if len(found) == 0 {
			return nil
		}
	}
	return fmt.Errorf("replacing the table inet %s: %w; in the end: %s", render.Table, errBusy, strings.Join(found, "; "))
}

// Repair puts back what Replace put there last where the table holds something else, and returns what differed.
func (t *Table) Repair() (found []string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if found, err = t.differences(); err != nil {
		return nil, fmt.Errorf("reading the table inet %s: %w", render.Table, t.explain(err))
	}
	if len(found) == 0 {
		return nil, nil
	}
	return found, t.put(t.want)
}

var errBusy = fmt.Errorf("other processes changed nftables at the same time, %d times in a row", attempts)

// transaction sends what build adds to it, all or nothing.
func (t *Table) transaction(build func(*batch) error) error {
	b := &batch{conn: t.conn, table: t.table, timeouts: t.timeouts, maps: map[string]*nftables.Set{}}
	failed := build(b)
	if failed != nil {
		// The library has no other way to get rid of what it holds than to send it. A chain without a name is never there.
		t.conn.DelChain(&nftables.Chain{Table: t.table})
	}
	err := t.conn.Flush()
	if err != nil {
		t.drain()
	}
	if failed != nil {
		return failed
	}
	return distinct(err)
}

// distinct returns the errors that are joined in one, each once: where the kernel refuses a message of a transaction, it refuses those
// after it that need it, too.
func distinct(err error) error {
	var all []error
	seen := map[string]bool{}
	var add func(error)
	add = func(err error) {
		var several interface{ Unwrap() []error }
		switch {
		case err == nil:
		case errors.As(err, &several):
			for _, err := range several.Unwrap() {
				add(err)
			}
		case !seen[err.Error()]:
			seen[err.Error()] = true
			all = append(all, err)
		}
	}
	add(err)
	return errors.Join(all...)
}

// drain throws away what is left in the socket of a conversation that failed. The kernel answers while a message is sent:
// every message of a transaction, and the transaction itself where its commit failed. The library reads not as many.
func (t *Table) drain() {
	raw, err := t.raw.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		for {
			_, _, err := unix.Recvfrom(int(fd), nil, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
			if err != nil && err != unix.ENOBUFS && err != unix.EINTR {
				return // EAGAIN
			}
		}
	})
}

func (t *Table) replace(b *batch, r render.Ruleset, whole bool) error {
	if err := t.clear(r, whole); err != nil {
		return err
	}
	for _, timeouts := range r.Timeouts {
		b.addTimeouts(timeouts)
	}
	// A goto needs its chain, and a map's element too: chains come first, maps then, rules last.
	for _, c := range r.Chains {
		t.conn.AddChain(b.chain(c))
	}
	for _, m := range r.Maps {
		if err := b.addMap(m); err != nil {
			return err
		}
	}
	for _, a := range r.Allows {
		if err := b.addAllow(a); err != nil {
			return err
		}
	}
	for _, a := range r.Accounts {
		if err := b.addAccount(a); err != nil {
			return err
		}
	}
	holder := t.holder.userData() // of the first rule
	for _, c := range r.Chains {
		for _, rule := range c.Rules {
			exprs, err := b.expressions(rule)
			if err != nil {
				return err
			}
			t.conn.AddRule(&nftables.Rule{
				Table: t.table, Chain: &nftables.Chain{Name: c.Name, Table: t.table}, Exprs: exprs, UserData: holder,
			})
			holder = nil
		}
	}
	return nil
}

// clear adds to the transaction what empties the table, except for timeouts and accounts that are to stay: open connections lose their
// timeouts with the object (nf_ct_untimeout, net/netfilter/nf_conntrack_timeout.c), and accounts what they hold. With whole it deletes the table and makes it again, which
// works for one that is not owned: the library knows no owner.
func (t *Table) clear(keep render.Ruleset, whole bool) error {
	if !t.owned {
		t.conn.AddTable(t.table)
	}
	if whole {
		t.conn.DelTable(t.table)
		t.conn.AddTable(t.table)
		return nil
	}
	t.conn.FlushTable(t.table)
	// In raw attributes: the library fails at types and user data that it does not know. What holds others goes before them.
	for _, part := range []struct {
		of, table uint16
		remove    func(attributes)
	}{
		{unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE, func(a attributes) {
			if account, ok := setOf(a).asAccount(); ok && slices.Contains(keep.Accounts, account) {
				return
			}
			if a.u32(unix.NFTA_SET_FLAGS)&unix.NFT_SET_ANONYMOUS == 0 {
				t.conn.DelSet(&nftables.Set{Table: t.table, Name: a.text(unix.NFTA_SET_NAME)})
			}
		}},
		{unix.NFT_MSG_GETOBJ, unix.NFTA_OBJ_TABLE, func(a attributes) {
			if timeouts, ok := asTimeouts(a); ok && slices.Contains(keep.Timeouts, timeouts) {
				return
			}
			kind := nftables.ObjType(a.u32(unix.NFTA_OBJ_TYPE))
			t.conn.DeleteObject(&nftables.NamedObj{Table: t.table, Name: a.text(unix.NFTA_OBJ_NAME), Type: kind})
		}},
		{unix.NFT_MSG_GETFLOWTABLE, flowtableTable, func(a attributes) {
			t.conn.DelFlowtable(&nftables.Flowtable{Table: t.table, Name: a.text(flowtableName)})
		}},
		{unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE, func(a attributes) {
			if a.u32(chainFlags)&chainBinding == 0 {
				t.conn.DelChain(&nftables.Chain{Table: t.table, Name: a.text(unix.NFTA_CHAIN_NAME)})
			}
		}},
	} {
		if err := t.list(part.of, part.table, func(a attributes) error { part.remove(a); return nil }); err != nil {
			return fmt.Errorf("listing what is in the table: %w", err)
		}
	}
	return nil
}

func (b *batch) chain(c render.Chain) *nftables.Chain {
	chain := &nftables.Chain{Name: c.Name, Table: b.table}
	if c.Hook.Name == "" {
		return chain
	}
	chain.Type = nftables.ChainType(c.Hook.Type)
	chain.Priority = nftables.ChainPriorityRef(nftables.ChainPriority(c.Hook.Priority))
	chain.Hooknum = map[string]*nftables.ChainHook{
		"prerouting": nftables.ChainHookPrerouting, "input": nftables.ChainHookInput, "output": nftables.ChainHookOutput,
		"postrouting": nftables.ChainHookPostrouting,
	}[c.Hook.Name]
	policy := nftables.ChainPolicyDrop
	if c.Hook.Policy == render.Accept {
		policy = nftables.ChainPolicyAccept
	}
	chain.Policy = &policy
	return chain
}

// maxElements bounds one message: the attribute that holds a message's elements has a length of 16 bits, and the library
// cuts what does not fit in silence. An element with its end takes under 60 bytes.
const maxElements = 500

func (b *batch) addMap(m render.Map) error {
	b.sets++
	set := &nftables.Set{
		ID: b.sets, Table: b.table, Name: m.Name, IsMap: true, Interval: true,
		KeyType: nftables.TypeInetService, DataType: nftables.TypeVerdict, KeyByteOrder: binaryutil.BigEndian,
	}
	b.maps[m.Name] = set
	if err := b.conn.AddSet(set, nil); err != nil {
		return fmt.Errorf("adding map %s: %w", m.Name, err)
	}
	for rest := m.Elements; len(rest) > 0; {
		n := min(len(rest), maxElements)
		var elements []nftables.SetElement
		for _, e := range rest[:n] {
			elements = append(elements, span(e)...)
		}
		if err := b.conn.SetAddElements(set, elements); err != nil {
			return fmt.Errorf("adding elements to map %s: %w", m.Name, err)
		}
		rest = rest[n:]
	}
	return nil
}

// span gives the start of a range and the first port after it. A range up to the last port has no end.
func span(e render.Element) []nftables.SetElement {
	start := nftables.SetElement{Key: port(e.Ports.First), VerdictData: verdict(e.Verdict)}
	if e.Ports.Last == maxPort {
		return []nftables.SetElement{start}
	}
	return []nftables.SetElement{start, {Key: port(e.Ports.Last + 1), IntervalEnd: true}}
}

const maxPort = 65535

func port(p uint16) []byte { return binary.BigEndian.AppendUint16(nil, p) }

// explain tells one EPERM from the other, and adds what to do to errors of the kernel that users meet.
func (t *Table) explain(err error) error {
	if errors.Is(err, unix.EPERM) && t.privileged() {
		if other := t.other(); errors.Is(other, ErrOwned) { // which says who it is
			return other
		}
		return ErrOwned
	}
	return hint(err)
}

func hint(err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: the capability CAP_NET_ADMIN is missing in the network namespace's user namespace", err)
	case errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EAFNOSUPPORT):
		return fmt.Errorf("%w: the kernel has no nftables (CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET)", err)
	case errors.Is(err, unix.EMSGSIZE):
		return fmt.Errorf("%w: the rules do not fit into one transaction: raise net.core.wmem_max on the node, or join ranges of ports", err)
	default:
		return err
	}
}
