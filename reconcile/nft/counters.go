package nft

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"mantlet/render"
)

// Refused returns how many packets the rules ended, by render.Refusal's names. The numbers only grow: the kernel's own are
// lost whenever the table is replaced.
func (t *Table) Refused() (map[string]uint64, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.refused.look(t); err != nil {
		return nil, fmt.Errorf("reading the counters of the table inet %s: %w", render.Table, t.explain(err))
	}
	total := map[string]uint64{}
	for _, name := range render.Refusals() {
		total[name] = t.refused.before[name] + t.refused.now[name]
	}
	return total, nil
}

// tally adds up what a table counts that is replaced from time to time.
type tally struct {
	before, now map[string]uint64 // in tables that are gone, and in the one that is there
}

// look reads the counters of the rules that Replace put there last. A chain that somebody changed is passed by.
func (y *tally) look(t *Table) error {
	if len(t.want.Chains) == 0 {
		return nil
	}
	counted := map[string][]uint64{} // by chain, of each rule
	err := t.list(unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE, func(a attributes) error {
		packets, err := packets(a[unix.NFTA_RULE_EXPRESSIONS])
		chain := a.text(unix.NFTA_RULE_CHAIN)
		counted[chain] = append(counted[chain], packets)
		return err
	})
	if err != nil {
		return err
	}
	now := map[string]uint64{}
	for _, c := range t.want.Chains {
		if len(counted[c.Name]) != len(c.Rules) {
			continue
		}
		for i, rule := range c.Rules {
			if name := render.Refusal(c.Name, rule); name != "" {
				now[name] += counted[c.Name][i]
			}
		}
	}
	for name, was := range y.now {
		if now[name] < was { // somebody reset it
			y.add(name, was)
		}
	}
	y.now = now
	return nil
}

// fold takes note that the table which was looked at last is gone.
func (y *tally) fold() {
	for name, n := range y.now {
		y.add(name, n)
	}
	y.now = nil
}

func (y *tally) add(name string, n uint64) {
	if y.before == nil {
		y.before = map[string]uint64{}
	}
	y.before[name] += n
}

// packets returns what the counter among a rule's expressions says; 0 where there is none.
func packets(expressions []byte) (uint64, error) {
	list, err := netlink.UnmarshalAttributes(expressions)
	if err != nil {
		return 0, err
	}
	for _, e := range list {
		parts, err := unpack(e.Data)
		if err != nil {
			return 0, err
		}
		if parts.text(unix.NFTA_EXPR_NAME) != "counter" {
			continue
		}
		return counted(parts)
	}
	return 0, nil
}

// counted returns the packets that a counter expression counted.
func counted(expression attributes) (uint64, error) {
	counter, err := unpack(expression[unix.NFTA_EXPR_DATA])
	if err != nil || len(counter[unix.NFTA_COUNTER_PACKETS]) != 8 {
		return 0, errors.Join(err, errors.New("a counter without a number"))
	}
	return binary.BigEndian.Uint64(counter[unix.NFTA_COUNTER_PACKETS]), nil
}
