package render

import (
	"fmt"
	"net/netip"
	"strings"

	"mantlet/schema"
)

// Names of the table's parts. Nothing else in the kernel is mantlet's.
const (
	Table = "mantlet" // family inet

	ingressChain = "ingress"
	egressChain  = "egress"
	modesMap     = "modes"
	answersMap   = "answers"
)

// Mark is mantlet's part of the connection mark. It tells under which mode a connection was let in, so that its packets
// end when the mode of their port changes. Only the bits of MarkMask are mantlet's; other software in the pod may use
// the rest.
type Mark uint32

// The marks. Bits 20 and 21 hold the mode; bits 22 to 27 are the policy generation's.
const (
	MarkNone        Mark = 0
	MarkMTLS        Mark = 1 << 20
	MarkTLS         Mark = 2 << 20
	MarkPassthrough Mark = 3 << 20
	MarkMask        Mark = 0xff << 20
)

// Ruleset is the whole of the table inet mantlet.
type Ruleset struct {
	Maps   []Map
	Chains []Chain
}

// Map sends ports to chains: type inet_service : verdict, with intervals. Elements are sorted and do not overlap.
type Map struct {
	Name     string
	Elements []Element
}

// Element sends a range of ports to the chain that it is handled in.
type Element struct {
	Ports schema.Ports
	Goto  string
}

// Chain is a list of rules. A chain with a hook is where the kernel starts; others are reached by goto.
type Chain struct {
	Name  string
	Hook  Hook
	Rules []Rule
}

// Hook says where in the kernel's packet path a base chain stands, always with priority mangle (-150): after conntrack
// (-200), before NAT and routing.
type Hook struct {
	Name   string // prerouting, output; "" for a chain that is none
	Policy VerdictKind
}

// Rule is a list of matches, then actions.
type Rule []Statement

// Text returns the rule as nft prints it.
func (r Rule) Text() string {
	var parts []string
	for _, s := range r {
		parts = append(parts, s.Text())
	}
	return strings.Join(parts, " ")
}

// The statements that many rules share.
var (
	accept  = Verdict{Kind: Accept}
	drop    = Verdict{Kind: Drop}
	onlyTCP = Protocol{Numbers: []uint8{TCP}}
	notTCP  = Protocol{Op: NotEqual, Numbers: []uint8{TCP}}

	handshake = FIN | SYN | RST | ACK // the flags that tell a first SYN from all other packets
	firstSYN  = TCPFlags{Value: SYN, Mask: handshake}
	noSYN     = TCPFlags{Op: NotEqual, Value: SYN, Mask: handshake}
)

func goTo(chain string) Verdict { return Verdict{Kind: Goto, Goto: chain} }

// wrapped is a mode in which Envoy stands between the peer and the workload.
type wrapped struct {
	mode     schema.Mode
	mark     Mark
	listener uint16
}

func (w wrapped) in() string  { return string(w.mode) + "_in" }
func (w wrapped) out() string { return string(w.mode) + "_out" }

var (
	mtls = wrapped{schema.ModeMTLS, MarkMTLS, schema.IngressMTLSPort}
	tls  = wrapped{schema.ModeTLS, MarkTLS, schema.IngressTLSPort}
)

const (
	passthroughIn  = "passthrough_in"
	passthroughOut = "passthrough_out"
)

// DenyAll returns the rules that stand before anything is known: nothing comes in but what answers the pod. Without
// replies it needs no more of the kernel than nf_tables itself, and not even answers come in.
//
// Here packets are dropped rather than reset: connections that a mantlet before this one let in pass again once the
// desired state is in force.
func DenyAll(replies bool) Ruleset {
	in := Chain{Name: ingressChain, Hook: Hook{"prerouting", Drop}, Rules: []Rule{{Loopback{}, accept}}}
	out := Chain{Name: egressChain, Hook: Hook{"output", Accept}, Rules: []Rule{{Loopback{Output: true}, accept}}}
	if replies {
		in.Rules = append(in.Rules, answersToThePod()...)
		out.Rules = append(out.Rules,
			Rule{notTCP, accept},
			Rule{StateNew, noSYN, Count{}, drop},
			Rule{Reply(false), accept},
			Rule{Count{}, drop},
		)
	}
	in.Rules = append(in.Rules, neighbours, Rule{Count{}, drop})
	return Ruleset{Chains: []Chain{in, out}}
}

// neighbours lets in ICMP, without which IPv6 finds no neighbour and no path MTU.
var neighbours = Rule{Protocol{Numbers: []uint8{ICMP, ICMPv6}}, accept}

// answersToThePod lets in what answers connections that the pod made. A SYN never does, whatever conntrack says: a peer
// that swallowed the pod's own SYN could otherwise send one over the same conntrack entry. A connection with a mark came
// in from outside.
func answersToThePod() []Rule {
	return []Rule{
		{Reply(true), notTCP, accept},
		{Reply(true), Marked{Marks: []Mark{MarkNone}}, noSYN, accept},
	}
}

// ruleset returns the rules of a mesh.
func ruleset(mesh schema.Mesh) Ruleset {
	modes := Map{Name: modesMap}
	answers := Map{Name: answersMap}
	for _, in := range mesh.Ingress {
		modes.Elements = append(modes.Elements, Element{in.Ports, string(in.Mode) + "_in"})
		answers.Elements = append(answers.Elements, Element{in.Ports, string(in.Mode) + "_out"})
	}
	return Ruleset{
		Maps: []Map{modes, answers},
		Chains: []Chain{
			ingress(mesh.OtherProtocols),
			{Name: passthroughIn, Rules: []Rule{
				{Marked{Marks: []Mark{MarkNone, MarkPassthrough}}, SetMark{MarkPassthrough}, accept},
				{onlyTCP, Count{}, Reset{}},
			}},
			mtls.ingress(),
			tls.ingress(),
			egress(),
			{Name: passthroughOut, Rules: answered(MarkPassthrough)},
			{Name: mtls.out(), Rules: answered(MarkMTLS)},
			{Name: tls.out(), Rules: answered(MarkTLS)},
		},
	}
}

// ingress sees every packet that arrives in the pod's network namespace.
func ingress(other schema.OtherProtocols) Chain {
	rules := []Rule{
		{Loopback{}, accept},
		// With net.ipv4.conf.*.route_localnet=1 peers could otherwise reach services on loopback, Envoy's among them.
		{Destination{netip.MustParsePrefix("127.0.0.0/8")}, drop},
		{Destination{netip.MustParsePrefix("::1/128")}, drop},
		{Forwarded{}, accept},
	}
	rules = append(rules, answersToThePod()...)
	rules = append(rules, neighbours)
	if other == schema.OtherProtocolsAccept {
		rules = append(rules, Rule{notTCP, accept})
	}
	rules = append(rules,
		Rule{LookUp{Map: modesMap}},
		Rule{onlyTCP, goTo(mtls.in())},
		Rule{Count{}, drop},
	)
	return Chain{Name: ingressChain, Hook: Hook{"prerouting", Drop}, Rules: rules}
}

// ingress hands TCP connections to Envoy's listener of the mode. They are marked only once it took them. What belongs to
// no such connection is refused, except a bare SYN: dropped, so that the client's own retransmission bridges the time in
// which Envoy does not listen.
func (w wrapped) ingress() Chain {
	to4 := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), w.listener)
	to6 := netip.AddrPortFrom(netip.IPv6Loopback(), w.listener)
	return Chain{Name: w.in(), Rules: []Rule{
		// Made under another mode: over.
		{onlyTCP, Marked{NotEqual, []Mark{MarkNone, w.mark}}, Count{}, Reset{}},
		// A transparent socket alone could be any process's; a mark alone outlives its connection in TIME_WAIT, where a new
		// dial from the same port inherits it, hence no SYN.
		{Marked{Marks: []Mark{w.mark}}, noSYN, TransparentSocket{}, accept},
		// One packet out of the window must not reset a healthy connection: this stands before the refusal.
		{StateInvalid, Count{}, drop},
		{TProxy{to4}, SetMark{w.mark}, accept},
		{TProxy{to6}, SetMark{w.mark}, accept},
		{firstSYN, Count{}, drop},
		{onlyTCP, Count{}, Reset{}},
	}}
}

// egress is the second line: it ends connections that are older than the rules (where the workload speaks first,
// conntrack takes them for its own), and whatever answers on a protected port without having come through Envoy.
func egress() Chain {
	return Chain{Name: egressChain, Hook: Hook{"output", Accept}, Rules: []Rule{
		{Loopback{Output: true}, accept},
		{notTCP, accept},
		{StateNew, noSYN, Count{}, Reset{}},
		{Reply(false), accept},
		{TCPFlags{Value: RST, Mask: RST}, accept},
		{LookUp{Source: true, Map: answersMap}},
		{goTo(mtls.out())},
	}}
}

// answered lets answers out that belong to a connection of the mode which the mark stands for.
func answered(mark Mark) []Rule {
	return []Rule{
		{Marked{Marks: []Mark{mark}}, accept},
		{onlyTCP, Count{}, Reset{}},
	}
}

// Text returns the table as `nft --stateless list table inet mantlet` prints it once applied.
func (r Ruleset) Text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "table inet %s {\n", Table)
	separator := ""
	for _, m := range r.Maps {
		b.WriteString(separator)
		fmt.Fprintf(&b, "\tmap %s {\n\t\ttype inet_service : verdict\n\t\tflags interval\n", m.Name)
		m.elements(&b)
		b.WriteString("\t}\n")
		separator = "\n"
	}
	for _, c := range r.Chains {
		b.WriteString(separator)
		fmt.Fprintf(&b, "\tchain %s {\n", c.Name)
		if c.Hook.Name != "" {
			fmt.Fprintf(&b, "\t\ttype filter hook %s priority mangle; policy %s;\n", c.Hook.Name, c.Hook.Policy)
		}
		for _, rule := range c.Rules {
			fmt.Fprintf(&b, "\t\t%s\n", rule.Text())
		}
		b.WriteString("\t}\n")
		separator = "\n"
	}
	b.WriteString("}\n")
	return b.String()
}

// elements breaks the lines where nft does: after every fifth element of a map with inet_service keys.
func (m Map) elements(b *strings.Builder) {
	if len(m.Elements) == 0 {
		return
	}
	b.WriteString("\t\telements = { ")
	for i, e := range m.Elements {
		switch {
		case i == 0:
		case i%5 == 0:
			b.WriteString(",\n\t\t\t     ")
		default:
			b.WriteString(", ")
		}
		fmt.Fprintf(b, "%s : goto %s", e.Ports, e.Goto)
	}
	b.WriteString(" }\n")
}
