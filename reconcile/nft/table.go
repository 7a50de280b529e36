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

	kernelSocket // conn's own socket, for messages that the library can't send

	conn  *nftables.Conn
	table *nftables.Table
	needs []need

	timeouts      tcpTimeouts // the sysctls of the network namespace
	lacksTimeouts bool        // the kernel has no ct timeout objects
	hasTimeouts   bool        // the kernel has been seen to have them

	subscribe func() (subscription, error) // to the kernel's notifications; tests replace it

	mu        sync.Mutex // the socket carries one request at a time
	owned     bool
	holder    holder         // set by Own
	madeBy    uint64         // the holder of the mantlet that made the table, at the last read; 0 if unknown
	want      render.Ruleset // what Replace put there last
	refused   tally          // packets that the rules counted
	checkedAt uint32         // the kernel's revision at which the table was seen to hold that; 0 for none
	unsure    bool           // whether it holds that
	keeps     kept           // what stays in the transaction that is being built

	others others
}

// bufferSize holds a transaction's messages, and the kernel's acknowledgement of each. Some 70 messages of rules, and at most 65,536
// elements of 40 bytes in each of two maps, are less than 8 MiB. Acknowledgements do not repeat the messages.
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
		// Without it, an acknowledgement that is an error repeats the message.
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

// buffers enlarges the socket's buffers. Without the capability to exceed net.core's limits, as in a user namespace, they are as large as
// these allow.
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
				_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, option, bufferSize) // the default size has to do
			}
		}
	})
}

// Close closes the connection. The rules stay, and a table that was owned can get another owner.
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

// claim makes a table this process's. With trial, it only finds out whether it could, in a transaction that leaves nothing behind.
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

// message returns an nfnetlink message. Its header has the family, version 0, and a resource in network byte order.
func message(kind uint16, flags netlink.HeaderFlags, family byte, resource uint16, data []byte) netlink.Message {
	header := binary.BigEndian.AppendUint16([]byte{family, unix.NFNETLINK_V0}, resource)
	return netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(kind), Flags: flags}, Data: append(header, data...)}
}

// privileged reports whether the kernel lets this process use nftables at all.
func (t *Table) privileged() bool {
	_, err := t.conn.ListTablesOfFamily(nftables.TableFamilyINet)
	return err == nil
}

// DenyAll puts in force the rules for the time before the configuration is known. They keep the marks of the connections of the rules
// before, and treat what the pod sends as those did. If the kernel does not accept all of them, no marks are kept; if it lacks conntrack,
// not even answers to the pod's own connections come in. It is idempotent.
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

// OnlyStatus is DenyAll, except that the port of mantlet's own status is open. If the kernel lacks what that needs, it stays closed.
func (t *Table) OnlyStatus(port uint16, before render.Ruleset) error {
	return t.Replace(render.OnlyStatus(port).WithOutbound(render.OutboundOf(before)).Remembering(before))
}

// attempts is how often a change or a dump is tried if other processes keep changing nftables meanwhile.
const attempts = 10

// Replace makes the table hold r and nothing else, in one transaction. If it fails, the rules are unchanged. A table that is not owned is
// read back; if it already holds something else, another process changed it, and the change is made again. If the kernel refuses the
// rules, the error names each option that it lacks. If it has no ct timeout objects, the table is made without them, see LacksTimeouts.
func (t *Table) Replace(r render.Ruleset) error { return t.change(r, false) }

// Exchange is Replace for a table with connections that must not notice: see kept. Chains that are new stand behind those that were there.
func (t *Table) Exchange(r render.Ruleset) error { return t.change(r, true) }

func (t *Table) change(r render.Ruleset, gently bool) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	err := t.put(t.fit(r, t.lacksTimeouts), gently)
	if refuses(err) && !t.lacksTimeouts && len(r.Timeouts) > 0 && t.try(timeoutsNeed(r.Timeouts)) != nil {
		t.lacksTimeouts = true
		err = t.put(t.fit(r, t.lacksTimeouts), gently)
	}
	if !refuses(err) {
		return err
	}
	if missing := t.missing(); missing != nil { // this says more than the kernel's errors do
		return fmt.Errorf("replacing the table inet %s: %w", render.Table, missing)
	}
	return err
}

// refuses reports whether an error of put says that the kernel refuses the rules.
func refuses(err error) bool {
	return err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, ErrOwned) && !errors.Is(err, errBusy)
}

// Fit returns the rules as Replace puts them in force: for this process's user, and without what the kernel lacks.
func (t *Table) Fit(r render.Ruleset) render.Ruleset {
	return t.fit(r, len(r.Timeouts) > 0 && t.LacksTimeouts())
}

func (t *Table) fit(r render.Ruleset, lacksTimeouts bool) render.Ruleset {
	if lacksTimeouts {
		r = r.WithoutTimeouts()
	}
	return r.ForUsers(uint32(os.Geteuid()), t.EnvoyUID)
}

func (t *Table) put(r render.Ruleset, gently bool) error {
	var found []string
	for n := range attempts {
		_ = t.refused.look(t) // if it fails, only counts are lost
		whole := n > 0 && !t.owned
		if t.keeps = (kept{}); gently && n == 0 {
			t.keeps, r = t.keep(r)
			t.prepare(r)
		}
		failed := t.transaction(func(b *batch) error { return t.replace(b, r, whole) })
		gentle := len(t.keeps.sets) > 0
		if failed == nil && gentle {
			failed = t.sweep(r)
		}
		t.unsure = failed != nil
		if failed != nil && n == 0 && (!t.owned || gentle) {
			continue // another process may have deleted what clear deletes
		}
		// If acknowledgements did not fit into the socket's buffer, the commit may have succeeded all the same.
		if failed != nil && !errors.Is(failed, unix.ENOBUFS) {
			return fmt.Errorf("replacing the table inet %s: %w", render.Table, t.explain(failed))
		}
		before := t.want
		t.want, t.checkedAt = r, 0
		if t.owned && failed == nil {
			t.refused.fold()
			return nil // nobody else can have changed it; the next Check reads it in any case
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

// Repair puts back what Replace put there last if the table holds something else, and returns what differed.
func (t *Table) Repair() (found []string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if found, err = t.differences(); err != nil {
		return nil, fmt.Errorf("reading the table inet %s: %w", render.Table, t.explain(err))
	}
	if len(found) == 0 {
		return nil, nil
	}
	return found, t.put(t.want, false)
}

var errBusy = fmt.Errorf("other processes changed nftables at the same time, %d times in a row", attempts)

// transaction sends what build adds to it as one transaction.
func (t *Table) transaction(build func(*batch) error) error {
	b := &batch{conn: t.conn, table: t.table, timeouts: t.timeouts, maps: map[string]*nftables.Set{}}
	failed := build(b)
	if failed != nil {
		// The library can only discard pending messages by sending them. The transaction is made to fail: no chain has an empty name.
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

// distinct returns the errors that are joined in one, each of them once. If the kernel refuses a message of a transaction, it also
// refuses later messages that depend on it.
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

// drain discards what is left in the socket after a request that failed. The kernel answers each message of a transaction while the
// transaction is sent, and the transaction itself if its commit failed. The library does not read all of these answers.
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
	return t.add(b, r, t.holder.userData())
}

// add adds what r has and the table does not keep, and the rules of r's chains. The first one says who holds the table.
func (t *Table) add(b *batch, r render.Ruleset, holder []byte) error {
	for _, timeouts := range r.Timeouts {
		b.addTimeouts(timeouts)
	}
	// Rules and the elements of maps refer to chains, and rules to maps: so chains come first, then maps, then rules.
	for _, c := range r.Chains {
		if !t.keeps.chains[c.Name] {
			t.conn.AddChain(b.chain(c))
		}
	}
	for name := range t.keeps.sets {
		b.maps[name] = &nftables.Set{Table: b.table, Name: name}
	}
	for _, m := range r.Maps {
		if t.keeps.sets[m.Name] {
			continue
		}
		if err := b.addMap(m); err != nil {
			return err
		}
	}
	for _, l := range r.Lists {
		if t.keeps.sets[l.Name] {
			continue
		}
		if err := b.addList(l); err != nil {
			return err
		}
	}
	for _, a := range r.Accounts {
		if err := b.addAccount(a); err != nil {
			return err
		}
	}
	return t.addRules(b, r.Chains, holder)
}

// clear adds to the transaction what empties the table, except for timeouts and accounts that are kept: open connections lose their
// timeouts with the object (nf_ct_untimeout, net/netfilter/nf_conntrack_timeout.c), and accounts their content. With whole it deletes the
// table and creates it again. That works only for a table that is not owned: the library does not know owners.
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
	// Raw attributes are used since the library fails on types and user data that it does not know. What refers to others is deleted before them.
	for _, part := range []struct {
		of, table uint16
		remove    func(attributes)
	}{
		{unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE, func(a attributes) {
			if account, ok := setOf(a).asAccount(); ok && slices.Contains(keep.Accounts, account) {
				return
			}
			name := a.text(unix.NFTA_SET_NAME)
			if !t.keeps.sets[name] && a.u32(unix.NFTA_SET_FLAGS)&unix.NFT_SET_ANONYMOUS == 0 {
				t.conn.DelSet(&nftables.Set{Table: t.table, Name: name})
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
			if name := a.text(unix.NFTA_CHAIN_NAME); !t.keeps.chains[name] && a.u32(chainFlags)&chainBinding == 0 {
				t.conn.DelChain(&nftables.Chain{Table: t.table, Name: name})
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

// maxElements is how many elements one message has at most. The attribute with a message's elements has a 16-bit length, and the library
// truncates longer ones silently. An element with its end takes less than 60 bytes.
const maxElements = 500

func (b *batch) addMap(m render.Map) error {
	b.lastSetID++
	set := &nftables.Set{
		ID: b.lastSetID, Table: b.table, Name: m.Name, IsMap: true, Interval: true,
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

// span returns the start of a range of ports, and its end, the first port after it. A range up to the last port has no end.
func span(e render.Element) []nftables.SetElement {
	start := nftables.SetElement{Key: port(e.Ports.First), VerdictData: verdict(e.Verdict)}
	if e.Ports.Last == maxPort {
		return []nftables.SetElement{start}
	}
	return []nftables.SetElement{start, {Key: port(e.Ports.Last + 1), IntervalEnd: true}}
}

const maxPort = 65535

func port(p uint16) []byte { return binary.BigEndian.AppendUint16(nil, p) }

// explain distinguishes the two causes of EPERM, and adds advice to errors of the kernel that users meet.
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
