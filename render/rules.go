package render

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"mantlet/schema"
)

// The statements that many rules share.
var (
	accept  = Verdict{Kind: Accept}
	drop    = Verdict{Kind: Drop}
	onlyTCP = Protocol{Numbers: []uint8{TCP}}
	notTCP  = Protocol{Op: NotEqual, Numbers: []uint8{TCP}}
	// No other packet of a connection has SYN alone of these.
	firstSYN    = TCPFlags{Value: SYN, Mask: FIN | SYN | RST | ACK}
	resets      = TCPFlags{Value: RST, Mask: RST}
	setTimeouts = SetTimeouts{tcpTimeouts.Name}
)

func goTo(chain string) Verdict { return Verdict{Kind: Goto, Goto: chain} }

// policy is a mode in one generation: what the ports that have it go through is a pair of chains.
type policy struct {
	mode       schema.Mode
	generation Generation
	moving     bool // see Generations
}

// in and out name the chains: mtls_in and, in generation 3, mtls_in_3.
func (p policy) in() string { return p.chain("_in") }

func (p policy) out() string { return p.chain("_out") }

func (p policy) chain(direction string) string {
	last := p.generation // that connections can have which the chain admits
	if p.moving {
		last = last.Next()
	}
	if last == 0 {
		return string(p.mode) + direction
	}
	return fmt.Sprintf("%s%s_%d", p.mode, direction, last)
}

// mark is none of a generation in mode passthrough, which admits those of all. Its generation is the port's all the same: the
// next mode must not admit what had been let in before.
func (p policy) mark() Mark {
	switch p.mode {
	case schema.ModePassthrough:
		return MarkPassthrough
	case schema.ModeTLS:
		return MarkTLS | Mark(p.generation)<<generationShift
	default:
		return MarkMTLS | Mark(p.generation)<<generationShift
	}
}

// admits returns the policies under which connections were let in that pass, where Envoy stands between: beside its own the
// stricter one, or a port that is loosened would lose what is open.
func (p policy) admits() []policy {
	all := []policy{p}
	if p.mode == schema.ModeTLS {
		all = append(all, policy{mode: schema.ModeMTLS, generation: p.generation})
	}
	if p.moving {
		for _, one := range slices.Clone(all) {
			all = append(all, policy{mode: one.mode, generation: one.generation.Next()})
		}
	}
	return all
}

func (p policy) compare(other policy) int {
	return cmp.Or(strings.Compare(string(p.mode), string(other.mode)), cmp.Compare(p.generation, other.generation))
}

// listenerPort is where Envoy listens for the connections of a mode.
func listenerPort(mode schema.Mode) uint16 {
	if mode == schema.ModeTLS {
		return schema.IngressTLSPort
	}
	return schema.IngressMTLSPort
}

const statusIn = "status_in"

// statusOut is where answers of the status port go, and on to those of statusPolicy: what came in through statusIn is marked as it wants.
const statusOut = "status_out"

var statusPolicy = policy{mode: schema.ModePassthrough}

// DenyAll returns the rules that stand before anything is known: nothing comes in but what answers the pod. Without
// replies it needs no more of the kernel than nf_tables itself, and not even answers come in.
//
// Here packets are dropped rather than reset: connections that a mantlet before this one let in pass again once the
// desired state is in force.
func DenyAll(replies bool) Ruleset {
	in := Chain{Name: ingressChain, Hook: filter("prerouting", Drop), Rules: []Rule{{Loopback{}, accept}, toICMP}}
	out := Chain{Name: egressChain, Hook: filter("output", Accept), Rules: []Rule{workloadLeg, {Loopback{Output: true}, accept}}}
	if !replies {
		in.Rules = append(in.Rules, Rule{Count{}, drop})
		return Ruleset{Chains: []Chain{in, out, icmp()}}
	}
	in.Rules = append(append(in.Rules, answersToThePod(drop)...), Rule{Count{}, drop})
	out.Rules = append(outgoing(), Rule{Count{}, drop})
	return Ruleset{Timeouts: []Timeouts{tcpTimeouts}, Chains: []Chain{in, out, icmp(), inside(beginsInside...)}}
}

// OnlyStatus returns DenyAll's rules but for the port of mantlet's own status: whoever probes must be able to tell a mantlet
// that waits for its inputs from one that hangs.
func OnlyStatus(port uint16) Ruleset {
	ports := schema.Ports{First: port, Last: port}
	r := DenyAll(true)
	r.Maps = []Map{
		{Name: modesMap, Elements: []Element{{ports, goTo(statusIn)}}},
		{Name: answersMap, Elements: []Element{{ports, goTo(statusOut)}}},
	}
	for i, rules := range [][]Rule{append(notForThePod(), Rule{Forwarded{}, drop}, Rule{LookUp{Map: modesMap}}), {{LookUp{Source: true, Map: answersMap}}}} {
		chain := &r.Chains[i]
		chain.Rules = slices.Insert(chain.Rules, len(chain.Rules)-1, rules...)
	}
	r.Chains = append(r.Chains, statusPolicy.egress(), statusIngress(), statusEgress())
	return r
}

// notForThePod drops what is meant for loopback: with net.ipv4.conf.*.route_localnet=1 peers could otherwise reach services
// there, Envoy's among them.
func notForThePod() []Rule {
	return []Rule{
		{Destination{loopback4}, drop},
		{Destination{loopback6}, drop},
	}
}

var loopback4, loopback6 = netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")

// isICMP matches what IPv6 finds neighbours and path MTUs by.
var isICMP = Protocol{Numbers: []uint8{ICMP, ICMPv6}}

// toICMP stands before what lets in answers: conntrack takes an error for one.
var toICMP = Rule{isICMP, goTo(icmpChain)}

// icmp lets in ICMP. A router that redirects forwards all the same, so nothing needs redirects, and forged ones lead what the pod
// sends to whoever forges them. Router advertisements come in: a pod may have its address by them.
func icmp() Chain {
	return Chain{Name: icmpChain, Rules: []Rule{
		{Redirect{}, Count{}, drop},
		{Redirect{IPv6: true}, Count{}, drop},
		{accept},
	}}
}

// workloadLeg drops what is for the workload and would leave the pod. Envoy connects to the address that the client dialled. It
// was the pod's when the client's packets came, and need not be so any more: a router advertisement with a short lifetime is
// enough.
var workloadLeg = Rule{SocketPriority{WorkloadPriority}, Loopback{Output: true, Op: NotEqual}, Count{}, drop}

// inside is where packets over lo go on. Connections that begin there go to begins, as a rule to be marked.
func inside(begins ...Statement) Chain {
	return Chain{Name: insideChain, Rules: []Rule{append(Rule{firstSYN}, begins...), {accept}}}
}

var beginsInside = []Statement{setTimeouts, SetMark{MarkInside}, accept}

// begins refuses connections that lead from Envoy to itself: to the listeners that the kernel hands connections to, by whoever
// dials them, and to others by those that go out to an upstream. A name server decides where the upstream's name leads.
func begins(mesh schema.Mesh) []Chain {
	refuse := func(at netip.AddrPort) Rule {
		return Rule{Destination{netip.PrefixFrom(at.Addr(), at.Addr().BitLen())}, DestinationPort{at.Port()}, Count{}, Reset{}}
	}
	begin, loops := Chain{Name: beginsChain}, Chain{Name: loopsChain}
	for _, mode := range []schema.Mode{schema.ModeMTLS, schema.ModeTLS} {
		to4, to6 := policy{mode: mode}.listeners()
		begin.Rules = append(begin.Rules, refuse(to4.To), refuse(to6.To))
	}
	begin.Rules = append(begin.Rules,
		Rule{SocketPriority{WorkloadPriority}, OwnSource{NotEqual}, goTo(clientsChain)},
		Rule{SocketPriority{EndpointPriority}, goTo(loopsChain)},
		beginsInside,
	)
	for _, list := range listeners(mesh) {
		loops.Rules = append(loops.Rules, Rule{OnList{Set: list.Name, IPv6: list.IPv6, TCP: true}, Count{}, Reset{}})
	}
	if mesh.StatusPort != 0 {
		loops.Rules = append(loops.Rules, Rule{DestinationPort{mesh.StatusPort}, Count{}, Reset{}})
	}
	loops.Rules = append(loops.Rules, beginsInside) // upstreams may be in the pod
	return []Chain{begin, loops, clients()}
}

// listeners returns the listeners that loops refuses connections to.
func listeners(mesh schema.Mesh) (lists []List) {
	var all []schema.Destination
	for _, e := range mesh.Egress {
		all = append(all, schema.Destination{Prefix: netip.PrefixFrom(e.Listen.Addr(), e.Listen.Addr().BitLen()), Port: e.Listen.Port()})
	}
	for _, ipv6 := range []bool{false, true} {
		if of := minimal(all, ipv6); len(of) > 0 {
			lists = append(lists, List{Name: family(loopsList, ipv6), IPv6: ipv6, Destinations: of})
		}
	}
	return lists
}

// clients marks Envoy's connections to the workload from a client's address. The kernel chose a port that no other connection of Envoy's
// from this address has. The client may have a connection to the workload's port from the same one: conntrack knows one connection by
// these addresses and ports, and the kernel finds one socket.
func clients() Chain {
	return Chain{Name: clientsChain, Rules: []Rule{
		{Marked{Mark: MarkClient}, accept}, // the SYN comes again
		{Marked{NotEqual, MarkNone}, Count{}, drop},
		{setTimeouts, SetMark{MarkClient}, accept},
	}}
}

// leaving drops what belongs inside the pod and would leave it. A packet gets here with its last route: the one that it had in
// egress may have been changed since, by egress itself or by rules of other tables, while "oif" there goes on naming the first.
func leaving() Chain {
	return Chain{Name: leavingChain, Hook: filter("postrouting", Accept), Rules: []Rule{
		{Loopback{Output: true}, accept},
		{SocketPriority{WorkloadPriority}, Count{}, drop},
		{Marked{Mark: MarkClient}, Count{}, drop},
		{Marked{Mark: MarkInside}, Count{}, drop},
	}}
}

// outgoing are the rules for packets that the pod sends, up to those that answer somebody outside. What stays inside goes over lo.
// What the workload answers to a client's address meets toClients.
func outgoing(toClients ...Rule) []Rule {
	return slices.Concat([]Rule{
		workloadLeg,
		{Loopback{Output: true}, goTo(insideChain)},
		// It is for the rules alone, and not for queues that prefer some priorities.
		{SocketPriority{EndpointPriority}, ClearPriority{}},
		// Whatever sends it: the workload's answers to Envoy, and what no socket sends any more.
		{Marked{Mark: MarkInside}, Count{}, drop},
	}, toClients, []Rule{{Marked{Mark: MarkClient}, Count{}, drop}}, madeByThePod())
}

// backToEnvoy marks the workload's answers to clients' addresses, so that the kernel looks for their route again and finds the one
// that leads to lo. Where that route is missing, they end in leaving.
var backToEnvoy = Rule{Reply(true), Marked{Mark: MarkClient}, SetPacketMark{MarkClient}, accept}

// madeByThePod lets out connections that the pod makes, and marks them as they begin. That conntrack calls a direction
// original is not enough: it is that of the first packet it saw, which may be the workload's answer where the connection is
// older.
func madeByThePod() []Rule {
	return slices.Concat([]Rule{
		{Reply(false), Marked{Mark: MarkOutbound}, accept},
		{Reply(false), Marked{Mark: MarkOwn}, accept},
		// What the workload says to an egress listener, where lo lacks the listener's address.
		{Destination{loopback4}, Count{}, drop},
		{Destination{loopback6}, Count{}, drop},
	}, ownConnections(), []Rule{
		{Reply(false), firstSYN, setTimeouts, SetMark{MarkOutbound}, accept},
		{Reply(false), notTCP, SetMark{MarkOutbound}, accept},
		{notTCP, accept},
	})
}

// answersToThePod lets in what answers connections that the pod made, or forwarded under its own address. A SYN never
// answers, whatever conntrack says: a peer that swallowed the pod's own SYN could otherwise send one over the same
// conntrack entry.
func answersToThePod(syn Verdict) []Rule {
	return []Rule{
		{Reply(true), firstSYN, syn},
		{Reply(true), Marked{Mark: MarkOutbound}, accept},
		{Reply(true), Marked{Mark: MarkOwn}, accept},
		{Reply(true), SourceTranslated{}, accept},
	}
}

// Rules returns the rules of a valid mesh in the generations that are in force. There is a pair of chains for each mode and
// generation in use.
func Rules(mesh schema.Mesh, generations Generations) Ruleset {
	if mesh.IngressOff {
		return onlyEgress(mesh)
	}
	standard, all := policy{schema.ModeMTLS, generations.Default, generations.Moving}, parts(mesh, generations)
	modes, answers := Map{Name: modesMap}, Map{Name: answersMap}
	for _, part := range all {
		in, out := part.in(), part.out()
		if isStatus(mesh, part.ports.First) { // it is the only one of the part
			in, out = statusIn, statusOut
		}
		modes.Elements = append(modes.Elements, Element{part.ports, goTo(in)})
		answers.Elements = append(answers.Elements, Element{part.ports, goTo(out)})
	}
	r := Ruleset{
		Timeouts: []Timeouts{tcpTimeouts},
		Maps:     []Map{modes, answers},
		Lists:    listeners(mesh),
		Chains: []Chain{
			ingress(mesh.OtherProtocols),
			{Name: forwardedChain, Rules: []Rule{
				// What is forged to come from the pod must not become a connection that somebody answers.
				{OwnSource{}, Count{}, drop},
				{accept},
			}},
			{Name: portsChain, Rules: []Rule{
				{LookUp{Map: modesMap}},
				{onlyTCP, goTo(standard.in())},
				{Count{}, drop}, // UDP, SCTP, …
			}},
			icmp(),
			input(mesh.OtherProtocols),
			egress(standard),
			leaving(),
			inside(goTo(beginsChain)),
		},
	}
	r.Chains = append(r.Chains, begins(mesh)...)
	if mesh.StatusPort != 0 {
		r.Chains = append(r.Chains, statusIngress(), statusEgress())
	}
	for _, p := range inUse(standard, all) {
		r.Chains = append(r.Chains, p.ingress(), p.egress())
	}
	return r.WithOutbound(mesh.Outbound)
}

// onlyEgress redirects and drops nothing that comes in. What it drops is meant for loopback: the listeners of egress entries are
// there, and whoever reached one would speak in the workload's name. Connections are marked as in other rulesets, so that those that
// the pod makes outlive a restart of mantlet.
func onlyEgress(mesh schema.Mesh) Ruleset {
	r := Ruleset{Timeouts: []Timeouts{tcpTimeouts}, Lists: listeners(mesh), Chains: []Chain{
		{Name: ingressChain, Hook: filter("prerouting", Accept), Rules: append([]Rule{{Loopback{}, accept}}, notForThePod()...)},
		{Name: egressChain, Hook: filter("output", Accept), Rules: outgoing()},
		inside(goTo(beginsChain)),
	}}
	r.Chains = append(r.Chains, begins(mesh)...)
	return r.WithOutbound(mesh.Outbound)
}

// Closed returns the rules with some ports closed: what comes to them is dropped, also of connections that are open. What the workload
// answers is judged as before. The port of mantlet's own status stays open.
func (r Ruleset) Closed(ports []schema.Ports) Ruleset {
	i := slices.IndexFunc(r.Maps, func(m Map) bool { return m.Name == modesMap })
	if len(ports) == 0 || i < 0 {
		return r
	}
	ranges := slices.Clone(ports)
	for _, e := range r.Maps[i].Elements {
		ranges = append(ranges, e.Ports)
	}
	modes := Map{Name: modesMap}
	for _, part := range schema.Cut(ranges) {
		verdict, _ := r.Maps[i].at(part.First)
		if verdict.Goto != statusIn && slices.ContainsFunc(ports, func(p schema.Ports) bool { return p.Contains(part.First) }) {
			verdict = drop
		}
		modes.Elements = append(modes.Elements, Element{part, verdict})
	}
	r.Maps = slices.Clone(r.Maps)
	r.Maps[i] = modes
	return r
}

// statusIngress lets in who connects to mantlet, and nobody who would reach another listener at the same port: there may be one
// at another address, or where mantlet is gone.
func statusIngress() Chain {
	mantlets := MarkedSocket{Mark: StatusSocket}
	return Chain{Name: statusIn, Rules: []Rule{
		{firstSYN, mantlets, setTimeouts, SetMark{MarkPassthrough}, accept},
		{firstSYN, Count{}, drop}, // the client's own retransmission bridges the time in which mantlet does not listen
		// With SYN cookies the handshake's last packet goes to whoever listens by then.
		{onlyTCP, MarkedSocket{NotEqual, StatusSocket}, Count{}, Reset{}},
		// Here the packet has no socket, one of mantlet's, or one whose mark can't be seen: TIME_WAIT, or still to be accepted.
		{onlyTCP, Marked{Mark: MarkPassthrough}, accept},
		{onlyTCP, Count{}, Reset{}},
		otherwise,
	}}
}

// statusEgress lets out the answers of a socket of mantlet's user alone. The mark of statusIngress is no secret, and with NET_RAW every
// user may set it.
func statusEgress() Chain {
	return Chain{Name: statusOut, Rules: []Rule{
		{SocketUser{NotEqual, mantletUser}, Count{}, drop},
		{goTo(statusPolicy.out())},
	}}
}

// mantletUser is root, whom mantlet is in its container.
const mantletUser = 0

// ForUsers returns the same rules for a mantlet and an Envoy that are other users.
func (r Ruleset) ForUsers(mantlet, envoy uint32) Ruleset {
	return r.edit(func(rule Rule) Rule {
		for i, s := range rule {
			if s, is := s.(SocketUser); is {
				switch s.UID {
				case mantletUser:
					s.UID = mantlet
				case envoyUser:
					s.UID = envoy
				}
				rule[i] = s
			}
		}
		return rule
	})
}

// Renamed returns the ruleset with other names for some maps and lists.
func (r Ruleset) Renamed(names map[string]string) Ruleset {
	name := func(of string) string { return cmp.Or(names[of], of) }
	r.Maps, r.Lists = slices.Clone(r.Maps), slices.Clone(r.Lists)
	for i := range r.Maps {
		r.Maps[i].Name = name(r.Maps[i].Name)
	}
	for i := range r.Lists {
		r.Lists[i].Name = name(r.Lists[i].Name)
	}
	r.Chains = slices.Clone(r.Chains)
	for i, c := range r.Chains {
		r.Chains[i].Rules = slices.Clone(c.Rules)
		for j, rule := range c.Rules {
			rule = slices.Clone(rule)
			for k, s := range rule {
				switch s := s.(type) {
				case LookUp:
					s.Map = name(s.Map)
					rule[k] = s
				case OnList:
					s.Set = name(s.Set)
					rule[k] = s
				}
			}
			r.Chains[i].Rules[j] = rule
		}
	}
	return r
}

// edit returns the ruleset with other rules in its chains: with gets a copy of each, and returns nil to leave it out.
func (r Ruleset) edit(with func(Rule) Rule) Ruleset {
	r.Chains = slices.Clone(r.Chains)
	for i, c := range r.Chains {
		var rules []Rule
		for _, rule := range c.Rules {
			if rule = with(slices.Clone(rule)); rule != nil {
				rules = append(rules, rule)
			}
		}
		r.Chains[i].Rules = rules
	}
	return r
}

// part is a range of ports that are handled alike.
type part struct {
	ports schema.Ports
	policy
}

// parts cuts the ports that have an entry or a generation of their own where one of these starts or ends.
func parts(mesh schema.Mesh, generations Generations) []part {
	var ranges []schema.Ports
	for _, in := range mesh.Ingress {
		ranges = append(ranges, in.Ports)
	}
	for _, g := range generations.Ports {
		ranges = append(ranges, g.Ports)
	}
	if mesh.StatusPort != 0 {
		ranges = append(ranges, schema.Ports{First: mesh.StatusPort, Last: mesh.StatusPort})
	}
	var all []part
	for _, ports := range schema.Cut(ranges) {
		p := policy{schema.PolicyOf(mesh.Ingress, ports.First).Mode, generations.At(ports.First), generations.Moving}
		if isStatus(mesh, ports.First) {
			p = statusPolicy // by the time that it is the first, it is the only one
		}
		all = append(all, part{ports, p})
	}
	return all
}

// isStatus reports whether a port is the one of mantlet's own status. Where it has none, no port is, nor is 0, at which ranges of all ports begin.
func isStatus(mesh schema.Mesh, port uint16) bool {
	return mesh.StatusPort != 0 && port == mesh.StatusPort
}

// inUse returns the policies that need their chains: the one of ports without a part, and those of the parts.
func inUse(standard policy, all []part) []policy {
	used := map[policy]bool{standard: true}
	for _, p := range all {
		used[p.policy] = true
	}
	return slices.SortedFunc(maps.Keys(used), policy.compare)
}

// ingress sees every packet that arrives in the pod's network namespace.
func ingress(other schema.OtherProtocols) Chain {
	rules := append([]Rule{{Loopback{}, accept}}, notForThePod()...)
	// Envoy's connections from clients' addresses are over lo: what comes from outside is forged, or the client uses the same port.
	rules = append(rules, Rule{Marked{Mark: MarkClient}, Count{}, drop})
	rules = append(rules, Rule{Forwarded{}, goTo(forwardedChain)}, toICMP) // to nested containers, or from them: not for the pod
	rules = append(rules, answersToThePod(goTo(portsChain))...)
	// IPv6 has no reverse path filter: what comes from outside could pass for a part of a connection within the pod.
	rules = append(rules,
		Rule{Marked{Mark: MarkInside}, Count{}, drop},
		// With route_localnet also for one on loopback, whom workloads may trust. No other segment of TCP begins anything.
		Rule{firstSYN, OwnSource{}, Count{}, drop},
		Rule{notTCP, OwnSource{}, Count{}, drop},
	)
	if other == schema.OtherProtocolsAccept {
		rules = append(rules, Rule{notTCP, accept})
	}
	return Chain{Name: ingressChain, Hook: filter("prerouting", Drop), Rules: append(rules, Rule{goTo(portsChain)})}
}

// input is the second look at what comes in. The kernel looks for a packet's route after ingress saw it: what ingress took for
// somebody else's is the pod's if the pod gets the address in between. Whatever ingress lets in has a mark, save ICMP and what
// belongs to no connection.
func input(other schema.OtherProtocols) Chain {
	rules := []Rule{{Loopback{}, accept}, {isICMP, accept}}
	if other == schema.OtherProtocolsAccept {
		rules = append(rules, Rule{notTCP, accept})
	}
	return Chain{Name: inputChain, Hook: filter("input", Accept), Rules: append(rules, Rule{Marked{Mark: MarkNone}, Count{}, drop})}
}

// ingress hands TCP connections to Envoy's listener of the mode. They are marked once it took their SYN, and without the
// mark no other packet passes: it would be of a connection that is older than the rules.
func (p policy) ingress() Chain {
	if p.mode == schema.ModePassthrough {
		return Chain{Name: p.in(), Rules: []Rule{
			// Whatever was let in from outside before passes.
			{onlyTCP, Marked{Mark: MarkOutbound}, Count{}, Reset{}},
			{onlyTCP, Marked{Mark: MarkOwn}, Count{}, Reset{}},
			{Marked{Mark: MarkInside}, Count{}, drop},
			{firstSYN, setTimeouts},
			{SetMark{p.mark()}, accept},
		}}
	}
	over := Rule{onlyTCP, Marked{NotEqual, MarkNone}} // under another mode
	var admitted []Rule
	for _, admits := range p.admits() {
		over = append(over, Marked{NotEqual, admits.mark()})
		to4, to6 := admits.listeners()
		admitted = append(admitted, Rule{Marked{Mark: admits.mark()}, to4, accept}, Rule{Marked{Mark: admits.mark()}, to6, accept})
	}
	to4, to6 := p.listeners()
	return Chain{Name: p.in(), Rules: slices.Concat(
		[]Rule{
			// Before any reset: one segment out of the window must not end a healthy connection.
			{Invalid{}, Count{}, drop},
			append(over, Count{}, Reset{}),
			// TIME_WAIT is no BoundSocket. While Envoy does not listen, TProxy gives a SYN to what its former connection left
			// there, and that would hand it on to the workload's listener.
			{firstSYN, to4, BoundSocket{}, setTimeouts, SetMark{p.mark()}, accept},
			{firstSYN, to6, BoundSocket{}, setTimeouts, SetMark{p.mark()}, accept},
			// Dropped and not refused: the client's own retransmission bridges the time in which Envoy does not listen.
			{firstSYN, Count{}, drop},
		},
		// TProxy again, for what has no socket yet: with SYN cookies the handshake's last packet would go to the workload.
		admitted,
		[]Rule{{onlyTCP, Count{}, Reset{}}, otherwise},
	)}
}

// otherwise ends a chain that packets of any protocol get to. It does not leave them to the policy of the base chain: the kernel
// sets a policy of drop only once the rules of a transaction are in force (nft_chain_commit_drop_policy, nf_tables_api.c), and in
// between accepts what the rules say nothing of.
var otherwise = Rule{Count{}, drop}

func (p policy) listeners() (to4, to6 TProxy) {
	return TProxy{netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), listenerPort(p.mode))},
		TProxy{netip.AddrPortFrom(netip.IPv6Loopback(), listenerPort(p.mode))}
}

// egress lets answers out that belong to connections which the mode admits.
func (p policy) egress() Chain {
	var rules []Rule
	for _, admits := range p.admits() {
		rules = append(rules, Rule{Marked{Mark: admits.mark()}, accept})
	}
	if p.mode == schema.ModePassthrough {
		rules = []Rule{{Marked{NotEqual, MarkNone}, Marked{NotEqual, MarkOutbound}, Marked{NotEqual, MarkOwn}, accept}}
	}
	return Chain{Name: p.out(), Rules: append(rules, Rule{onlyTCP, Count{}, Reset{}})}
}

// egress is the second line: it ends connections that are older than the rules, and whatever answers on a protected port
// without having come through Envoy.
func egress(standard policy) Chain {
	return Chain{Name: egressChain, Hook: route("output", Accept), Rules: append(
		outgoing(backToEnvoy),
		Rule{resets, accept},
		Rule{Invalid{}, Count{}, drop},
		Rule{LookUp{Source: true, Map: answersMap}},
		Rule{goTo(standard.out())},
	)}
}
