package nft

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"mantlet/render"
)

// tcpTimeouts are conntrack's timeouts of TCP by state, in seconds. An object has one for each state.
type tcpTimeouts = expr.CtStatePolicyTimeout

// readTCPTimeouts returns those of the calling thread's network namespace: what its sysctls say, or else what the kernel comes with
// (tcp_timeouts, net/netfilter/nf_conntrack_proto_tcp.c).
func readTCPTimeouts() tcpTimeouts {
	all := tcpTimeouts{expr.CtStateTCPSYNSENT2: 120} // it has no sysctl
	for state, s := range map[uint16]struct {
		name  string
		usual uint32
	}{
		expr.CtStateTCPSYNSENT:     {"syn_sent", 120},
		expr.CtStateTCPSYNRECV:     {"syn_recv", 60},
		expr.CtStateTCPESTABLISHED: {"established", 432000},
		expr.CtStateTCPFINWAIT:     {"fin_wait", 120},
		expr.CtStateTCPCLOSEWAIT:   {"close_wait", 60},
		expr.CtStateTCPLASTACK:     {"last_ack", 30},
		expr.CtStateTCPTIMEWAIT:    {"time_wait", 120},
		expr.CtStateTCPCLOSE:       {"close", 10},
		expr.CtStateTCPRETRANS:     {"max_retrans", 300},
		expr.CtStateTCPUNACK:       {"unacknowledged", 300},
	} {
		all[state] = s.usual
		text, err := os.ReadFile(filepath.Join("/proc/sys/net/netfilter", "nf_conntrack_tcp_timeout_"+s.name))
		if err != nil {
			continue
		}
		if seconds, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 32); err == nil {
			all[state] = uint32(seconds)
		}
	}
	return all
}

// adding guards a map of the library that AddObject changes, whichever connection it is called on.
var adding sync.Mutex //nolint:gochecknoglobals // as that map is

// addTimeouts adds an object to the transaction. One of that name that is there stays as it is.
func (b *batch) addTimeouts(t render.Timeouts) {
	policy := tcpTimeouts{}
	for state, seconds := range b.timeouts {
		policy[state] = seconds
	}
	policy[expr.CtStateTCPCLOSEWAIT], policy[expr.CtStateTCPTIMEWAIT] = uint32(t.CloseWait/time.Second), uint32(t.TimeWait/time.Second)
	adding.Lock()
	defer adding.Unlock()
	b.conn.AddObject(&nftables.NamedObj{
		Table: b.table, Name: t.Name, Type: nftables.ObjTypeCtTimeout,
		// It holds for IPv6 too: the kernel compares the protocol alone (nft_ct_timeout_obj_eval, net/netfilter/nft_ct.c).
		Obj: &expr.CtTimeout{L3Proto: unix.NFPROTO_IPV4, L4Proto: unix.IPPROTO_TCP, Policy: policy},
	})
}

// asTimeouts reads an object of the kernel's; false where it is no ct timeout object for TCP.
func asTimeouts(a attributes) (t render.Timeouts, ok bool) {
	if a.u32(unix.NFTA_OBJ_TYPE) != unix.NFT_OBJECT_CT_TIMEOUT {
		return t, false
	}
	object, err := unpack(a[unix.NFTA_OBJ_DATA])
	if err != nil || !isTCP(object) {
		return t, false
	}
	policy, err := unpack(object[expr.NFTA_CT_TIMEOUT_DATA])
	if err != nil {
		return t, false
	}
	seconds := func(state uint16) time.Duration { return time.Duration(policy.u32(state+1)) * time.Second } // attributes begin at 1
	return render.Timeouts{
		Name: a.text(unix.NFTA_OBJ_NAME), CloseWait: seconds(expr.CtStateTCPCLOSEWAIT), TimeWait: seconds(expr.CtStateTCPTIMEWAIT),
	}, true
}

func isTCP(object attributes) bool {
	protocol := object[expr.NFTA_CT_TIMEOUT_L4PROTO]
	return len(protocol) == 1 && protocol[0] == unix.IPPROTO_TCP
}

func (r *reader) addObject(a attributes) error {
	if t, ok := asTimeouts(a); ok {
		r.timeouts = append(r.timeouts, t)
		return nil
	}
	r.others = append(r.others, fmt.Sprintf("object %s", a.text(unix.NFTA_OBJ_NAME)))
	return nil
}
