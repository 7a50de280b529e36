package iptables

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"
	"unsafe"

	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"mantlet/internal/status"
)

// Tables are those of IPv4 in the calling thread's network namespace.
type Tables struct {
	LockFile string // that iptables-legacy is to use, for its own is outside of where mantlet may write
}

// names lists the tables that there are. A table is made when somebody asks for it by a socket option, so none is asked for that is not
// listed.
const names = "/proc/thread-self/net/ip_tables_names"

// Read returns the rules. It makes no table. A kernel without iptables-legacy has none.
func (Tables) Read() (status.LegacyRules, error) {
	var all status.LegacyRules
	list, err := os.ReadFile(names)
	if errors.Is(err, os.ErrNotExist) {
		return all, nil
	}
	if err != nil {
		return all, fmt.Errorf("reading which tables iptables-legacy has: %w", err)
	}
	for _, name := range strings.Fields(string(list)) {
		t, err := readTable(name)
		if err != nil {
			return all, fmt.Errorf("reading table %s of iptables-legacy: %w", name, err)
		}
		if err := t.judge(&all); err != nil {
			return all, fmt.Errorf("reading table %s of iptables-legacy: %w", name, err)
		}
	}
	return all, nil
}

// The socket options, of ip_tables.h.
const (
	getInfo    = 64 // IPT_SO_GET_INFO
	getEntries = 65 // IPT_SO_GET_ENTRIES
)

// Sizes of struct ipt_getinfo, and of struct ipt_get_entries up to its entries, which have the alignment of a 64-bit number.
const (
	maxName    = 32
	infoSize   = 84
	headerSize = 40
)

// info is struct ipt_getinfo.
type info struct {
	Name                  [maxName]byte
	ValidHooks            uint32
	HookEntry, Underflow  [5]uint32
	NumberOfEntries, Size uint32
}

// table is what the kernel says of one.
type table struct {
	name string
	info
	entries []byte
}

// readTable reads a table that there is. Somebody may change it between the two questions; then both are asked again.
func readTable(name string) (table, error) {
	t := table{name: name}
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return t, err
	}
	defer func() { _ = unix.Close(socket) }()
	const attempts = 5
	for range attempts {
		answer := make([]byte, infoSize)
		copy(answer[:maxName-1], name)
		if err := getsockopt(socket, getInfo, answer); err != nil {
			return t, err
		}
		if err := binary.Read(bytes.NewReader(answer), binary.NativeEndian, &t.info); err != nil {
			return t, err
		}
		answer = make([]byte, headerSize+t.Size)
		copy(answer[:maxName-1], name)
		binary.NativeEndian.PutUint32(answer[maxName:], t.Size)
		err := getsockopt(socket, getEntries, answer)
		if errors.Is(err, unix.EAGAIN) {
			continue
		}
		t.entries = answer[headerSize:]
		return t, err
	}
	return t, errors.New("it changes all the time")
}

func getsockopt(socket, option int, answer []byte) error {
	size := uint32(len(answer))
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(socket), unix.SOL_IP, uintptr(option),
		uintptr(unsafe.Pointer(&answer[0])), uintptr(unsafe.Pointer(&size)), 0); errno != 0 {
		return errno
	}
	return nil
}

// entry is struct ipt_entry, cut into what it applies to, its matches and its target.
type entry struct {
	applies []byte // struct ipt_ip: addresses, interfaces, protocol
	matches []extension
	target  extension
}

// extension is struct xt_entry_match or xt_entry_target.
type extension struct {
	name     string
	revision uint8
	data     []byte
}

// Sizes of struct ipt_ip, of struct ipt_entry, and of what stands before an extension's data.
const (
	appliesSize   = 84
	entrySize     = 112
	extensionSize = 32
)

var errShape = errors.New("the kernel's answer has another shape than ip_tables.h says")

// parseEntry reads the entry that some bytes start with, and returns its size, too.
func parseEntry(text []byte) (e entry, size int, err error) {
	if len(text) < entrySize {
		return e, 0, errShape
	}
	target, next := int(binary.NativeEndian.Uint16(text[appliesSize+4:])), int(binary.NativeEndian.Uint16(text[appliesSize+6:]))
	if target < entrySize || next < target+extensionSize || next > len(text) {
		return e, 0, errShape
	}
	e.applies = text[:appliesSize]
	for at := entrySize; at < target; {
		match, size, err := parseExtension(text[at:target])
		if err != nil {
			return e, 0, err
		}
		e.matches = append(e.matches, match)
		at += size
	}
	e.target, _, err = parseExtension(text[target:next])
	return e, next, err
}

func parseExtension(text []byte) (x extension, size int, err error) {
	if len(text) < extensionSize {
		return x, 0, errShape
	}
	size = int(binary.NativeEndian.Uint16(text))
	if size < extensionSize || size > len(text) {
		return x, 0, errShape
	}
	name, _, _ := bytes.Cut(text[2:extensionSize-1], []byte{0})
	return extension{string(name), text[extensionSize-1], text[extensionSize:size]}, size, nil
}

// localIn is NF_INET_LOCAL_IN: where the chain INPUT begins.
const localIn = 1

// Verdicts of the standard target, whose name is empty: those of linux/netfilter.h, negative and less 1.
const (
	verdictDrop   = -0 - 1 // NF_DROP
	verdictReturn = -4 - 1 // XT_RETURN, which is NF_REPEAT's
)

// verdict returns that of a standard target; false for another target.
func (e entry) verdict() (verdict int32, ok bool) {
	if e.target.name != "" || len(e.target.data) < 4 {
		return 0, false
	}
	return int32(binary.NativeEndian.Uint32(e.target.data)), true
}

// defaultDeny returns how iptables writes the rule that drops whatever does not belong to a connection, or "" for another one.
func (e entry) defaultDeny() string {
	verdict, ok := e.verdict()
	toAll := len(bytes.Trim(e.applies, "\x00")) == 0
	if !ok || verdict != verdictDrop || !toAll || len(e.matches) != 1 || e.matches[0].name != "conntrack" {
		return ""
	}
	match := e.matches[0]
	parsed, err := xt.Unmarshal(match.name, xt.TableFamily(unix.NFPROTO_IPV4), uint32(match.revision), match.data)
	if err != nil {
		return ""
	}
	var base xt.ConntrackMtinfoBase
	var states uint16
	switch m := parsed.(type) {
	case *xt.ConntrackMtinfo1:
		base, states = m.ConntrackMtinfoBase, uint16(m.StateMask)
	case *xt.ConntrackMtinfo2:
		base, states = m.ConntrackMtinfoBase, m.StateMask
	case *xt.ConntrackMtinfo3:
		base, states = m.ConntrackMtinfoBase, m.StateMask
	}
	const established, related = 1 << 1, 1 << 2 // XT_CONNTRACK_STATE_BIT
	inverted := xt.ConntrackFlags(base.InvertFlags) == xt.ConntrackState
	if !inverted || states != established|related {
		return ""
	}
	if flags := xt.ConntrackFlags(base.MatchFlags); flags == xt.ConntrackState {
		return "-A INPUT -m conntrack ! --ctstate RELATED,ESTABLISHED -j DROP"
	} else if flags == xt.ConntrackState|xt.ConntrackStateAlias {
		return "-A INPUT -m state ! --state RELATED,ESTABLISHED -j DROP"
	}
	return ""
}

// judge adds what is to be said of a table.
func (t table) judge(all *status.LegacyRules) error {
	rules, afterChain := 0, false
	var dropping []string
	for at := 0; at < len(t.entries); {
		e, size, err := parseEntry(t.entries[at:])
		if err != nil {
			return err
		}
		verdict, standard := e.verdict()
		hook := t.policyOf(uint32(at))
		at += size
		if e.target.name == "ERROR" { // the head of a user's chain, or the end of the table
			afterChain = true
			continue
		}
		if hook >= 0 {
			if verdict == verdictDrop {
				dropping = append(dropping, hooks[hook])
			}
			continue
		}
		if afterChain && standard && verdict == verdictReturn && len(e.matches) == 0 && t.endsChain(at) {
			continue
		}
		if deny := e.defaultDeny(); deny != "" && t.name == "filter" && t.inInput(uint32(at-size)) {
			all.Denies = append(all.Denies, deny)
			continue
		}
		rules++
	}
	if rules > 0 || len(dropping) > 0 {
		line := fmt.Sprintf("table %s of iptables-legacy has %d rules", t.name, rules)
		if rules == 1 {
			line = strings.TrimSuffix(line, "s")
		}
		for _, chain := range dropping {
			line += ", and -P " + chain + " DROP"
		}
		all.Others = append(all.Others, line+": they apply beside mantlet's")
	}
	return nil
}

// hooks are the chains by their numbers.
var hooks = [5]string{"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"}

// policyOf returns the number of the hook whose policy an entry is; -1 for another entry.
func (t table) policyOf(at uint32) int {
	for hook, underflow := range t.Underflow {
		if t.ValidHooks&(1<<hook) != 0 && underflow == at {
			return hook
		}
	}
	return -1
}

func (t table) inInput(at uint32) bool {
	return t.ValidHooks&(1<<localIn) != 0 && t.HookEntry[localIn] <= at && at < t.Underflow[localIn]
}

// endsChain reports whether no rule of the same chain is at or after an offset.
func (t table) endsChain(at int) bool {
	next, _, err := parseEntry(t.entries[min(at, len(t.entries)):])
	return err != nil || next.target.name == "ERROR"
}

// The program, and how long it may take: it waits for its lock, and is done within milliseconds.
const (
	program   = "iptables-legacy"
	liftLimit = 5 * time.Second
)

// Lift has iptables-legacy remove a rule, one of Read's Denies. Where several are the same it removes the first.
func (t Tables) Lift(ctx context.Context, rule string) error {
	ctx, cancel := context.WithTimeout(ctx, liftLimit)
	defer cancel()
	args := append([]string{"-w", "2"}, strings.Fields(strings.Replace(rule, "-A ", "-D ", 1))...)
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(cmd.Environ(), "XTABLES_LOCKFILE="+t.LockFile)
	said, err := cmd.CombinedOutput()
	if text := strings.Join(strings.Fields(string(said)), " "); err != nil && text != "" {
		err = fmt.Errorf("%w: %.200s", err, text)
	}
	if err != nil {
		return fmt.Errorf("removing it with %s: %w", program, err)
	}
	return nil
}

// Installed returns the path of the iptables-legacy that Lift would execute.
func Installed() (string, error) { return exec.LookPath(program) }
