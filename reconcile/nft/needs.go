package nft

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"mantlet/render"
)

// need is something that the rules ask of the kernel, and the options that it is built with.
type need struct {
	options  string
	rule     render.Rule
	timeouts []render.Timeouts // that the rule names; the rules can do without them
}

func (n need) optional() bool { return len(n.timeouts) > 0 }

// needs are what the kernel is tried for, one expression at a time. NFT_REJECT, NFT_TPROXY and NFT_SOCKET want the rest of
// a rule that fits them: TCP, and for tproxy the prerouting hook, which only a base chain's rules are checked against.
func needs() []need {
	tcp := render.Protocol{Numbers: []uint8{render.TCP}}
	return []need{
		{options: "CONFIG_NFT_CT", rule: render.Rule{render.Reply(true)}},
		{options: "CONFIG_NF_CONNTRACK_MARK", rule: render.Rule{render.Marked{}}},
		{options: "CONFIG_NFT_FIB_INET", rule: render.Rule{render.Forwarded{}}},
		{options: "CONFIG_NFT_REJECT_INET", rule: render.Rule{tcp, render.Reset{}}},
		{options: "CONFIG_NFT_SOCKET", rule: render.Rule{render.BoundSocket{}}},
		{options: "CONFIG_NFT_TPROXY", rule: render.Rule{render.TProxy{To: netip.MustParseAddrPort("127.0.0.1:1")}}},
		{options: "CONFIG_NFT_TPROXY (with CONFIG_NF_TPROXY_IPV6)", rule: render.Rule{render.TProxy{To: netip.MustParseAddrPort("[::1]:1")}}},
		timeoutsNeed(render.DenyAll(true).Timeouts),
	}
}

// timeoutsNeed asks for ct timeout objects.
func timeoutsNeed(timeouts []render.Timeouts) need {
	return need{"CONFIG_NF_CONNTRACK_TIMEOUT", render.Rule{render.SetTimeouts{Name: timeouts[0].Name}}, timeouts}
}

// trialTable is never there outside of a transaction: a trial makes it and takes it away in one. So it disturbs no mantlet
// that runs in the network namespace, and needs none.
const trialTable = "mantlet-trial"

// Trial is what came of trying a need.
type Trial struct {
	Options  string // that the kernel is built with where it can do it
	Optional bool   // mantlet works without them
	Err      error  // why the kernel can't; nil where it can
}

// Try tries everything that the rules ask of the kernel. The error says why nothing could be tried.
func (t *Table) Try() ([]Trial, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.tryAll()
}

func (t *Table) tryAll() ([]Trial, error) {
	if err := t.try(need{}); err != nil {
		if errors.Is(err, unix.EOPNOTSUPP) { // nfnetlink's answer where nobody took the transaction
			err = fmt.Errorf("%w: the kernel has no nftables (CONFIG_NF_TABLES)", err)
		}
		return nil, hint(err)
	}
	var trials []Trial
	for _, n := range t.needs {
		err := t.try(n)
		if err != nil {
			err = fmt.Errorf("the kernel lacks %s, tried with %q: %w", n.options, n.rule.Text(), err)
		}
		trials = append(trials, Trial{n.options, n.optional(), err})
	}
	return trials, nil
}

// missing returns an error that names each option which the kernel lacks and the rules can't do without, or nil.
func (t *Table) missing() error {
	trials, err := t.tryAll()
	for _, trial := range trials {
		if !trial.Optional {
			err = errors.Join(err, trial.Err)
		}
	}
	return err
}

func (t *Table) try(n need) error {
	return t.transaction(func(b *batch) error {
		b.table = t.conn.AddTable(&nftables.Table{Name: trialTable, Family: nftables.TableFamilyINet})
		chain := t.conn.AddChain(&nftables.Chain{Name: "trial", Table: b.table})
		for _, timeouts := range n.timeouts {
			b.addTimeouts(timeouts)
		}
		exprs, err := b.expressions(n.rule)
		if err != nil {
			return err
		}
		t.conn.AddRule(&nftables.Rule{Table: b.table, Chain: chain, Exprs: exprs})
		t.conn.DelTable(b.table)
		return nil
	})
}

// LacksTimeouts reports whether the kernel has no ct timeout objects, so that Replace leaves them out. Before the first Replace it
// tries that, unless the table that was read has some, and leaves nothing behind.
func (t *Table) LacksTimeouts() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.want.Chains) > 0 {
		return t.lacksTimeouts
	}
	t.hasTimeouts = t.hasTimeouts || t.try(timeoutsNeed(render.DenyAll(true).Timeouts)) == nil
	return !t.hasTimeouts
}

// CanOwn reports whether the kernel can keep an owner for a table, see Own. Like Try it leaves nothing behind.
func (t *Table) CanOwn() (bool, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	can, err := t.claim(trialTable, true)
	return can, hint(err)
}
