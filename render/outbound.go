package render

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"mantlet/schema"
)

// Names of what mode observe or drop adds to the table. Those of sets get the version of IP at their end.
const (
	outboundChain  = "outbound"
	listedChain    = "outbound_listed"
	portlessChain  = "outbound_portless"
	allowSet       = "outbound_allow"   // what may leave
	allowedAccount = "outbound_allowed" // connections that leave and are on the list
	leftAccount    = "outbound_left"    // connections that leave and are not: mode observe
	refusedAccount = "outbound_refused" // what does not leave: mode drop
)

// ResolverSocket is the mark (SO_MARK) of the sockets by which mantlet asks name servers.
const ResolverSocket uint32 = 0x6d6e7464

// envoyUser is the user that Envoy has unless it is told another one, see ForUsers.
const envoyUser = schema.DefaultEnvoyUID

// What an account holds. A workload that scans a network fills it, and no more memory than this; what does not fit is not accounted, and
// leaves or not as if it were. Destinations that nobody spoke to for the time-out make room; mantlet reads the accounts far more often.
const (
	accountSize    = 1024
	accountTimeout = 10 * time.Minute
)

// List is a set of destinations: type ipv4_addr . inet_service, or of IPv6, with intervals.
type List struct {
	Name         string
	IPv6         bool
	Destinations []schema.Destination // sorted; none is a part of another
}

// isAllowed reports whether the list is one of what may leave.
func (l List) isAllowed() bool { return l.Name == family(allowSet, l.IPv6) }

// Account is a set that rules add destinations to: address, protocol and port, each with a counter of connections. Its content is no part
// of the desired state.
type Account struct {
	Name    string
	IPv6    bool
	Size    uint32 // how many destinations it holds
	Timeout time.Duration
}

// The fates of what the pod sends past the egress entries.
const (
	FateAllowed = "allowed" // it left, and is on the list
	FateLeft    = "left"    // it left, and is not
	FateRefused = "refused" // it did not leave
)

// Fate returns what became of the destinations in an account; "" for a set that is none.
func Fate(account string) string {
	switch account {
	case allowedAccount + "4", allowedAccount + "6":
		return FateAllowed
	case leftAccount + "4", leftAccount + "6":
		return FateLeft
	case refusedAccount + "4", refusedAccount + "6":
		return FateRefused
	}
	return ""
}

// withPorts are the protocols whose headers begin with a source and a destination port.
var withPorts = []uint8{TCP, UDP, DCCP, SCTP, UDPLite}

// ownConnections lets out what Envoy and mantlet's resolver begin, and marks it: whoever has a socket then, the connection is theirs.
func ownConnections() []Rule {
	resolver := []Statement{Reply(false), SocketMark{ResolverSocket}, SocketUser{UID: mantletUser}}
	return []Rule{
		{Reply(false), firstSYN, SocketUser{UID: envoyUser}, setTimeouts, SetMark{MarkOwn}, accept},
		append(slices.Clone(resolver), firstSYN, setTimeouts, SetMark{MarkOwn}, accept),
		append(slices.Clone(resolver), notTCP, SetMark{MarkOwn}, accept),
	}
}

// WithOutbound returns rules of mode accept, which Rules, DenyAll and OnlyStatus begin with, in another mode. Both families have the same.
//
// What the pod begins goes to the chain outbound, in mode drop with each packet: so a change ends what is open. TCP packets that begin
// nothing and are of no connection that was marked are refused whatever the list has: they may be answers of the workload's, and what is
// marked as outbound lets answers in.
func (r Ruleset) WithOutbound(o schema.Outbound) Ruleset {
	i := slices.IndexFunc(r.Chains, func(c Chain) bool { return c.Name == egressChain })
	if i < 0 || o.Mode != schema.OutboundObserve && o.Mode != schema.OutboundDrop {
		return r
	}
	r.Chains = slices.Clone(r.Chains)
	isBare := r.Chains[i].begins() < 0 // DenyAll's without conntrack, where nobody can answer
	switch {
	case isBare && o.Mode == schema.OutboundDrop:
		r.Chains[i].Rules = append(slices.Clone(r.Chains[i].Rules), Rule{isICMP, accept}, Rule{Count{}, drop})
	case isBare:
	case o.Mode == schema.OutboundDrop:
		r.Chains[i].Rules = r.Chains[i].withOutbound(o.Mode)
		r.Chains = append(r.Chains, outboundDrop()...)
	default:
		r.Chains[i].Rules = r.Chains[i].withOutbound(o.Mode)
		r.Chains = append(r.Chains, outboundObserve()...)
	}
	r.Lists, r.Accounts = slices.DeleteFunc(slices.Clone(r.Lists), List.isAllowed), nil
	for _, ipv6 := range []bool{false, true} {
		r.Lists = append(r.Lists, List{Name: family(allowSet, ipv6), IPv6: ipv6, Destinations: minimal(o.Allow, ipv6)})
	}
	second := leftAccount
	if o.Mode == schema.OutboundDrop {
		second = refusedAccount
	}
	for _, name := range []string{allowedAccount, second} {
		for _, ipv6 := range []bool{false, true} {
			r.Accounts = append(r.Accounts, Account{Name: family(name, ipv6), IPv6: ipv6, Size: accountSize, Timeout: accountTimeout})
		}
	}
	return r
}

// RulesIn returns the rules of Rules with the name servers of a place where those may be asked in the clear.
func RulesIn(place Place, mesh schema.Mesh, generations Generations) Ruleset {
	r := Rules(mesh, generations)
	if mesh.Outbound.DNS {
		r = r.WithResolvers(place.Resolvers[:])
	}
	return r
}

// WithResolvers returns the rules with port 53 of name servers among what may leave, where they have such a list.
func (r Ruleset) WithResolvers(servers []netip.Addr) Ruleset {
	r.Lists = slices.Clone(r.Lists)
	for i, set := range r.Lists {
		if !set.isAllowed() {
			continue
		}
		all := slices.Clone(set.Destinations)
		for _, addr := range servers {
			if addr = addr.Unmap().WithZone(""); addr.IsValid() && !addr.IsLoopback() && !addr.IsUnspecified() {
				all = append(all, schema.Destination{Prefix: netip.PrefixFrom(addr, addr.BitLen()), Port: 53})
			}
		}
		r.Lists[i].Destinations = minimal(all, set.IPv6)
	}
	return r
}

// OutboundOf returns what a live ruleset does with what the pod sends: the mode, and what may leave, name servers among it.
func OutboundOf(r Ruleset) schema.Outbound {
	o := schema.Outbound{Mode: schema.OutboundAccept}
	for _, a := range r.Accounts {
		switch Fate(a.Name) {
		case FateRefused:
			o.Mode = schema.OutboundDrop
		case FateLeft:
			o.Mode = schema.OutboundObserve
		}
	}
	if o.Mode == schema.OutboundAccept {
		return o
	}
	for _, set := range r.Lists {
		if set.isAllowed() {
			o.Allow = append(o.Allow, set.Destinations...)
		}
	}
	slices.SortFunc(o.Allow, schema.Destination.Compare) // the kernel tells the sets in the order in which they were made
	return o
}

// Allowing returns rules whose OutboundOf is at least as strict as another one, with the name servers of a place where that allows them.
// They are for Remembering and DenyAll; nothing else of them changes.
func (r Ruleset) Allowing(o schema.Outbound, place Place) Ruleset {
	if before := OutboundOf(r); before.Mode == schema.OutboundDrop || before.Mode == o.Mode {
		return r // it was in force until now
	}
	like := RulesIn(place, schema.Mesh{Outbound: o}, Generations{})
	r.Lists = append(slices.DeleteFunc(slices.Clone(r.Lists), List.isAllowed), like.Lists...)
	r.Accounts = like.Accounts
	return r
}

// Leaves reports whether the sets of a ruleset in mode drop let out what goes to an address and port; a ruleset of another mode does.
func (r Ruleset) Leaves(to netip.AddrPort) bool {
	if OutboundOf(r).Mode != schema.OutboundDrop {
		return true
	}
	addr := to.Addr().Unmap()
	single := schema.Destination{Prefix: netip.PrefixFrom(addr, addr.BitLen()), Port: to.Port()}
	return slices.ContainsFunc(r.Lists, func(set List) bool {
		return set.isAllowed() && slices.ContainsFunc(set.Destinations, func(d schema.Destination) bool { return d.Contains(single) })
	})
}

// withOutbound returns the rules of the egress chain for a mode beside accept.
func (c Chain) withOutbound(mode schema.OutboundMode) []Rule {
	first, begins := c.begins(), madeByThePod()
	rules := slices.Clone(c.Rules[:first])
	for _, rule := range begins {
		last := rule[len(rule)-1]
		marks := slices.Contains(rule, Statement(SetMark{MarkOutbound}))
		switch {
		case marks && mode == schema.OutboundDrop: // the chain marks what it lets out
			rule = append(slices.DeleteFunc(slices.Clone(rule[:len(rule)-1]), isEffect), goTo(outboundChain))
		case marks:
			rule = append(slices.Clone(rule[:len(rule)-1]), goTo(outboundChain))
		case last == accept && mode == schema.OutboundDrop && slices.Contains(rule, Statement(Marked{Mark: MarkOutbound})):
			rule = append(slices.Clone(rule[:len(rule)-1]), goTo(outboundChain))
		}
		rules = append(rules, rule)
	}
	rest := c.Rules[first+len(begins):]
	if mode == schema.OutboundObserve {
		return append(rules, rest...)
	}
	rules = rules[:len(rules)-1] // which accepts all that is not TCP
	rules = append(rules,
		Rule{Reply(true), notTCP, accept},
		Rule{notTCP, goTo(outboundChain)},
		Rule{Reply(false), onlyTCP, Marked{Mark: MarkNone}, Count{}, Reset{}},
	)
	for _, rule := range rest {
		if rule[0] == Statement(resets) { // a reset that answers nothing could carry data to anybody
			rule = append(Rule{Reply(true)}, rule...)
		}
		rules = append(rules, rule)
	}
	if len(rest) == 0 { // ingress is off, and the policy accepts
		rules = append(rules, Rule{Reply(true), accept}, Rule{Count{}, Prohibit{}})
	}
	return rules
}

// begins returns where the rules of madeByThePod begin in the egress chain; -1 where it has none.
func (c Chain) begins() int {
	first := madeByThePod()[0]
	return slices.IndexFunc(c.Rules, func(rule Rule) bool { return reflect.DeepEqual(rule, first) })
}

// isEffect reports whether a statement does something to the connection.
func isEffect(s Statement) bool {
	return s == Statement(SetMark{MarkOutbound}) || s == Statement(setTimeouts)
}

// outboundObserve is where packets that begin a connection go in mode observe. They are marked already.
func outboundObserve() []Chain {
	return []Chain{
		{Name: outboundChain, Rules: slices.Concat(
			[]Rule{{isICMP, accept}, {Protocol{NotEqual, withPorts}, goTo(portlessChain)}},
			onAllowed(goTo(listedChain)), tally(leftAccount, false), []Rule{{accept}},
		)},
		{Name: portlessChain, Rules: append(tally(leftAccount, true), Rule{accept})},
		{Name: listedChain, Rules: append(tally(allowedAccount, false), Rule{accept})},
	}
}

// outboundDrop is where every packet goes that does not answer in mode drop. A reset goes on where the connection was let out once: it
// tells the peer that it has ended.
func outboundDrop() []Chain {
	return []Chain{
		{Name: outboundChain, Rules: slices.Concat(
			[]Rule{{isICMP, accept}, {Protocol{NotEqual, withPorts}, goTo(portlessChain)}},
			onAllowed(goTo(listedChain)),
			[]Rule{{Marked{Mark: MarkOutbound}, resets, accept}},
			tally(refusedAccount, false),
			[]Rule{{onlyTCP, Count{}, Reset{}}, {Count{}, Prohibit{}}},
		)},
		{Name: portlessChain, Rules: append(tally(refusedAccount, true), Rule{Count{}, Prohibit{}})},
		{Name: listedChain, Rules: slices.Concat(
			[]Rule{{Marked{Mark: MarkOutbound}, accept}, {firstSYN, setTimeouts}},
			tally(allowedAccount, false),
			[]Rule{{SetMark{MarkOutbound}, accept}, {accept}}, // conntrack does not see all of it
		)},
	}
}

// onAllowed are the rules for packets to what may leave.
func onAllowed(verdict Verdict) []Rule {
	return []Rule{{OnList{Set: family(allowSet, false)}, verdict}, {OnList{Set: family(allowSet, true), IPv6: true}, verdict}}
}

// tally are the rules that account a destination. A set that is full ends its rule, and the next one goes on.
func tally(account string, portless bool) []Rule {
	return []Rule{
		{Tally{Account: family(account, false), Portless: portless}},
		{Tally{Account: family(account, true), IPv6: true, Portless: portless}},
	}
}

func family(set string, ipv6 bool) string {
	if ipv6 {
		return set + "6"
	}
	return set + "4"
}

// minimal returns the destinations of a family without those that are parts of others: the kernel takes no ranges that overlap.
func minimal(all []schema.Destination, ipv6 bool) (rest []schema.Destination) {
	all = slices.DeleteFunc(slices.Clone(all), func(d schema.Destination) bool { return d.Prefix.Addr().Is6() != ipv6 })
	slices.SortFunc(all, schema.Destination.Compare)
	wide := map[schema.Destination]bool{}
	lengths := map[int]bool{} // of prefixes so far
	for _, d := range all {   // the wider come first among those that begin alike
		covered := false
		for bits := range lengths {
			if prefix, err := d.Prefix.Addr().Prefix(bits); err == nil && bits <= d.Prefix.Bits() {
				covered = covered || wide[schema.Destination{Prefix: prefix, Port: d.Port}]
			}
		}
		if !covered {
			wide[d], lengths[d.Prefix.Bits()] = true, true
			rest = append(rest, d)
		}
	}
	return rest
}

// OnList matches packets of one IP family whose destination and port a List has: those of TCP, or of any protocol, which must have ports.
type OnList struct {
	Set  string
	IPv6 bool
	TCP  bool
}

// Text implements Statement.
func (o OnList) Text() string {
	header := "th"
	if o.TCP {
		header = "tcp"
	}
	return fmt.Sprintf("%s . %s dport @%s", daddr(o.IPv6), header, o.Set)
}

// Tally adds the destination of packets of one IP family to a set of Account, or counts it there. Where the set is full, the rule ends.
type Tally struct {
	Account  string
	IPv6     bool
	Portless bool // 0 stands for the port
}

// Text implements Statement.
func (t Tally) Text() string {
	port := "th dport"
	if t.Portless {
		port = "0"
	}
	return fmt.Sprintf("update @%s { %s . meta l4proto . %s counter }", t.Account, daddr(t.IPv6), port)
}

func daddr(ipv6 bool) string {
	if ipv6 {
		return "ip6 daddr"
	}
	return "ip daddr"
}

// SocketMark matches packets that the pod sends by the mark (SO_MARK) of their socket.
type SocketMark struct{ Mark uint32 }

// Text implements Statement.
func (s SocketMark) Text() string { return fmt.Sprintf("meta mark 0x%08x", s.Mark) }

// Prohibit drops the packet and tells the sender by ICMP that it is administratively prohibited (RFC 1812, section 5.2.7.1; RFC 4443,
// section 3.1).
type Prohibit struct{}

// Text implements Statement.
func (Prohibit) Text() string { return "reject with icmpx admin-prohibited" }

func (a List) text(b *strings.Builder) {
	kind := "ipv4_addr"
	if a.IPv6 {
		kind = "ipv6_addr"
	}
	fmt.Fprintf(b, "\tset %s {\n\t\ttype %s . inet_service\n\t\tflags interval\n", a.Name, kind)
	for i, d := range a.Destinations {
		before := ",\n\t\t\t     "
		if i == 0 {
			before = "\t\telements = { "
		}
		prefix := d.Prefix.String()
		if d.Prefix.IsSingleIP() {
			prefix = d.Prefix.Addr().String()
		}
		fmt.Fprintf(b, "%s%s . %d", before, prefix, d.Port)
	}
	if len(a.Destinations) > 0 {
		b.WriteString(" }\n")
	}
	b.WriteString("\t}\n")
}

func (a Account) text(b *strings.Builder) {
	kind := "ipv4_addr"
	if a.IPv6 {
		kind = "ipv6_addr"
	}
	fmt.Fprintf(b, "\tset %s {\n\t\ttype %s . inet_proto . inet_service\n\t\tsize %d\n\t\tflags dynamic,timeout\n\t\ttimeout %s\n\t}\n",
		a.Name, kind, a.Size, strings.TrimSuffix(a.Timeout.String(), "0s"))
}
