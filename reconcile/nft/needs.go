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
	options string
	rule    render.Rule
}

// needs are what the kernel is tried for, one expression at a time. NFT_REJECT, NFT_TPROXY and NFT_SOCKET want the rest of
// a rule that fits them: TCP, and for tproxy the prerouting hook, which only a base chain's rules are checked against.
func needs() []need {
	tcp := render.Protocol{Numbers: []uint8{render.TCP}}
	return []need{
		{"CONFIG_NFT_CT", render.Rule{render.Reply(true)}},
		{"CONFIG_NF_CONNTRACK_MARK", render.Rule{render.Marked{}}},
		{"CONFIG_NFT_FIB_INET", render.Rule{render.Forwarded{}}},
		{"CONFIG_NFT_REJECT_INET", render.Rule{tcp, render.Reset{}}},
		{"CONFIG_NFT_SOCKET", render.Rule{render.BoundSocket{}}},
		{"CONFIG_NFT_TPROXY", render.Rule{render.TProxy{To: netip.MustParseAddrPort("127.0.0.1:1")}}},
		{"CONFIG_NFT_TPROXY (with CONFIG_NF_TPROXY_IPV6)", render.Rule{render.TProxy{To: netip.MustParseAddrPort("[::1]:1")}}},
	}
}

// trialTable is never there outside of a transaction: a trial makes it and takes it away in one. So it disturbs no mantlet
// that runs in the network namespace, and needs none.
const trialTable = "mantlet-trial"

// Trial is what came of trying a need.
type Trial struct {
	Options string // that the kernel is built with where it can do it
	Err     error  // why the kernel can't; nil where it can
}

// Try tries everything that the rules ask of the kernel. The error says why nothing could be tried.
func (t *Table) Try() ([]Trial, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.tryAll()
}

func (t *Table) tryAll() ([]Trial, error) {
	if err := t.try(nil); err != nil {
		if errors.Is(err, unix.EOPNOTSUPP) { // nfnetlink's answer where nobody took the transaction
			err = fmt.Errorf("%w: the kernel has no nftables (CONFIG_NF_TABLES)", err)
		}
		return nil, hint(err)
	}
	var trials []Trial
	for _, n := range t.needs {
		err := t.try(n.rule)
		if err != nil {
			err = fmt.Errorf("the kernel lacks %s, tried with %q: %w", n.options, n.rule.Text(), err)
		}
		trials = append(trials, Trial{n.options, err})
	}
	return trials, nil
}

// missing returns an error that names each option which the kernel lacks, or nil.
func (t *Table) missing() error {
	trials, err := t.tryAll()
	for _, trial := range trials {
		err = errors.Join(err, trial.Err)
	}
	return err
}

func (t *Table) try(rule render.Rule) error {
	return t.transaction(func(b *batch) error {
		b.table = t.conn.AddTable(&nftables.Table{Name: trialTable, Family: nftables.TableFamilyINet})
		chain := t.conn.AddChain(&nftables.Chain{Name: "trial", Table: b.table})
		exprs, err := b.expressions(rule)
		if err != nil {
			return err
		}
		t.conn.AddRule(&nftables.Rule{Table: b.table, Chain: chain, Exprs: exprs})
		t.conn.DelTable(b.table)
		return nil
	})
}

// CanOwn reports whether the kernel can keep an owner for a table, see Own. Like Try it leaves nothing behind.
func (t *Table) CanOwn() (bool, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	can, err := t.claim(trialTable, true)
	return can, hint(err)
}
