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

// trialChain is never there outside of a transaction.
const trialChain = "trial"

// Missing tries what the rules need of the kernel and returns an error that names each option which is missing, or nil.
// It leaves nothing behind: a trial makes a chain and takes it away in one transaction. The table must be there.
func (t *Table) Missing() error { return t.missing(needs()) }

func (t *Table) missing(needs []need) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	for _, n := range needs {
		err := t.try(n.rule)
		if errors.Is(err, unix.EPERM) {
			return t.explain(err) // nothing was tried
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("the kernel lacks %s, tried with %q: %w", n.options, n.rule.Text(), err))
		}
	}
	return errors.Join(errs...)
}

func (t *Table) try(rule render.Rule) error {
	return t.transaction(func(b *batch) error {
		exprs, err := b.expressions(rule)
		if err != nil {
			return err
		}
		chain := t.conn.AddChain(&nftables.Chain{Name: trialChain, Table: t.table})
		t.conn.AddRule(&nftables.Rule{Table: t.table, Chain: chain, Exprs: exprs})
		t.conn.FlushChain(chain)
		t.conn.DelChain(chain)
		return nil
	})
}
