package nft

import (
	"fmt"
	"slices"
	"sync"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"mantlet/render"
)

// others reads other tables by a socket of its own: they may have many rules, and mantlet's own table must not have to wait.
type others struct {
	kernelSocket

	mu        sync.Mutex
	checkedAt uint32   // the kernel's revision at which they were read last; 0 for none
	found     []string // rules of theirs that undermine mantlet's table
}

// Conflicts returns the rules of other tables that undermine this one, a line each, sorted. Chains that only accept or drop do not,
// whatever their priority: they take nothing away from mantlet's rules. It changes nothing. The tables are not read again while the
// kernel's revision stays the same. Other methods do not wait for it.
func (t *Table) Conflicts() ([]string, error) {
	o := &t.others
	o.mu.Lock()
	defer o.mu.Unlock()
	now, err := o.revision()
	if err == nil && now != o.checkedAt {
		o.found, err = o.survey()
		o.checkedAt = now // a change in between increases the revision
	}
	if err != nil {
		o.checkedAt = 0
		return nil, fmt.Errorf("reading other tables of nftables: %w", hint(err))
	}
	return o.found, nil
}

func (o *others) survey() ([]string, error) {
	s := survey{hooks: map[site][]render.Hook{}}
	for _, part := range []struct {
		of   uint16
		each func(family byte, a attributes) error
	}{
		{unix.NFT_MSG_GETCHAIN, s.addChain},
		{unix.NFT_MSG_GETFLOWTABLE, s.addFlowtable},
		{unix.NFT_MSG_GETRULE, s.addRule},
	} {
		if err := o.ask(part.of, netlink.Request|netlink.Dump, unix.NFPROTO_UNSPEC, nil, part.each); err != nil {
			return nil, err
		}
	}
	slices.Sort(s.lines)
	return slices.Compact(s.lines), nil
}

// survey looks at all tables but mantlet's.
type survey struct {
	hooks map[site][]render.Hook // where the kernel starts in a chain, and for chains that others go on to, in its table
	lines []string
}

// site is a chain, or, without its name, a table.
type site struct {
	family       byte
	table, chain string
}

func (p site) own() bool { return p.family == unix.NFPROTO_INET && p.table == render.Table }

func (p site) String() string {
	families := map[byte]string{
		unix.NFPROTO_INET: "inet", unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6",
		unix.NFPROTO_ARP: "arp", unix.NFPROTO_BRIDGE: "bridge", unix.NFPROTO_NETDEV: "netdev",
	}
	text := fmt.Sprintf("table %s %s", families[p.family], p.table)
	if p.chain != "" {
		text += ", chain " + p.chain
	}
	return text
}

func (s *survey) addChain(family byte, a attributes) error {
	p := site{family, a.text(unix.NFTA_CHAIN_TABLE), a.text(unix.NFTA_CHAIN_NAME)}
	hook, err := readHook(a)
	if err != nil || p.own() || a[unix.NFTA_CHAIN_HOOK] == nil {
		return err
	}
	s.hooks[p] = []render.Hook{hook}
	p.chain = ""
	s.hooks[p] = append(s.hooks[p], hook)
	const offload = 2 // NFT_CHAIN_HW_OFFLOAD
	if a.u32(chainFlags)&offload != 0 {
		s.lines = append(s.lines, fmt.Sprintf("%s: its rules are offloaded to hardware, where packets pass by mantlet's", p))
	}
	return nil
}

func (s *survey) addFlowtable(family byte, a attributes) error {
	if p := (site{family, a.text(flowtableTable), ""}); !p.own() {
		s.lines = append(s.lines, fmt.Sprintf("%s, flowtable %s: connections that are offloaded to it pass by mantlet's rules", p, a.text(flowtableName)))
	}
	return nil
}

func (s *survey) addRule(family byte, a attributes) error {
	p := site{family, a.text(unix.NFTA_RULE_TABLE), a.text(unix.NFTA_RULE_CHAIN)}
	if p.own() {
		return nil
	}
	all, err := parseRule(a)
	if err != nil {
		return err
	}
	for _, e := range all {
		if line := s.effect(p, e); line != "" {
			s.lines = append(s.lines, fmt.Sprintf("%s: %s", p, line))
		}
	}
	return nil
}

// conntrack is the priority at which packets get their connection: from then on nothing is untracked.
const conntrack = -200

// effect says what an expression does to mantlet's rules; "" for nothing. iptables' targets are the same by other names.
func (s *survey) effect(p site, e expression) string {
	what := e.name
	switch {
	case e.name == "target":
		what = e.data.text("1")
	case e.name == "nat" && e.data.u32("1") == unix.NFT_NAT_DNAT:
		what = "dnat"
	}
	switch what {
	case "notrack", "NOTRACK", "CT":
		if s.isAt(p, func(h render.Hook) bool {
			return h.Priority < conntrack && (h.Name == "prerouting" || h.Name == "output")
		}) {
			return what + " leaves packets without a connection, and mantlet's rules let none of them in"
		}
	case "redir", "dnat", "REDIRECT", "DNAT":
		if s.isAt(p, func(h render.Hook) bool { return h.Name == "prerouting" }) {
			return what + " can send connections to another port than the one whose policy let them in"
		}
	case "tproxy", "TPROXY":
		return what + " can take connections away from Envoy"
	case "flow_offload":
		return "connections that are offloaded pass by mantlet's rules"
	}
	return ""
}

// isAt reports whether the kernel starts at such a hook in the chain, or, in a chain that others go on to, in its table.
func (s *survey) isAt(p site, hook func(render.Hook) bool) bool {
	hooks, ok := s.hooks[p]
	if !ok {
		hooks = s.hooks[site{p.family, p.table, ""}]
	}
	return slices.ContainsFunc(hooks, hook)
}
