package render

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Timeouts say for how long conntrack keeps a TCP connection that is silent: a ct timeout object of nftables. States that are not
// named here keep what the sysctls net.netfilter.nf_conntrack_tcp_timeout_* said when the object was made.
type Timeouts struct {
	Name      string
	CloseWait time.Duration // one side has ended its half, the other has not
	TimeWait  time.Duration // both have
}

// tcpTimeouts are those of every connection that begins: from outside, from the pod, and inside it.
//
// A connection that conntrack has forgotten has lost its mark, so its next packet ends it. The kernel forgets a half-closed one
// after 60 s, which is too short for an answer that takes longer than that. It gets the kernel's 5 days of an open connection.
//
// The kernel keeps a closed connection for 120 s of TIME_WAIT. That only fills the table: the rules let no late segment in. Ten
// seconds cover five retransmissions of a FIN whose ACK got lost (0.2, 0.6, 1.4, 3 and 6.2 s after it, by RFC 6298).
var tcpTimeouts = Timeouts{Name: "tcp_timeouts", CloseWait: 5 * 24 * time.Hour, TimeWait: 10 * time.Second}

// Text returns the object as nft prints it.
func (t Timeouts) Text() string {
	return fmt.Sprintf("protocol tcp\n\t\tl3proto ip\n\t\tpolicy = { close_wait : %d, time_wait : %d }",
		t.CloseWait/time.Second, t.TimeWait/time.Second)
}

func (t Timeouts) onLine() string { return strings.Join(strings.Fields(t.Text()), " ") }

// WithoutTimeouts returns the same rules for a kernel without ct timeout objects. They accept and refuse the same packets.
func (r Ruleset) WithoutTimeouts() Ruleset {
	r.Timeouts = nil
	return r.edit(func(rule Rule) Rule {
		rule = slices.DeleteFunc(rule, func(s Statement) bool { _, is := s.(SetTimeouts); return is })
		if _, is := rule[len(rule)-1].(TCPFlags); is { // a rule that only set timeouts
			return nil
		}
		return rule
	})
}
