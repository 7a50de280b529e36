package render

import (
	"fmt"
	"strconv"
	"strings"

	"mantlet/schema"
)

// Names of the table's parts. Nothing else in the kernel is mantlet's.
const (
	Table = "mantlet" // family inet

	ingressChain   = "ingress"
	forwardedChain = "forwarded"
	portsChain     = "ports"
	inputChain     = "input"
	egressChain    = "egress"
	insideChain    = "inside"
	beginsChain    = "begins_inside"
	loopsChain     = "loops"
	loopsList      = "loops" // the listeners that nothing which goes out may lead to
	clientsChain   = "clients"
	leavingChain   = "leaving"
	icmpChain      = "icmp_in"
	modesMap       = "modes"
	answersMap     = "answers"
	formerMap      = "former"
)

// Ruleset is the whole of the table inet mantlet.
type Ruleset struct {
	Timeouts []Timeouts
	Maps     []Map
	Lists    []List
	Accounts []Account
	Chains   []Chain
	Others   []string // what no rendered ruleset has and a live one may: flags of the table, other sets, counters
}

// Map sends ports to chains: type inet_service : verdict, with intervals. Elements are sorted and do not overlap.
type Map struct {
	Name     string
	Elements []Element
}

// Element sends a range of ports to the chain that it is handled in.
type Element struct {
	Ports   schema.Ports
	Verdict Verdict
}

// Chain is a list of rules. A chain with a hook is where the kernel starts; others are reached by goto.
type Chain struct {
	Name  string
	Hook  Hook
	Rules []Rule
}

// Hook says where in the kernel's packet path a base chain stands. The zero Hook is that of a chain which is none.
type Hook struct {
	Type     string // filter, or route: then the kernel looks for another route where the rules changed the packet's mark
	Name     string // prerouting, input, output, postrouting
	Priority int32
	Policy   VerdictKind
}

// mangle is the priority of all base chains here: after conntrack (-200), before NAT and routing.
const mangle = -150

func filter(hook string, policy VerdictKind) Hook { return Hook{"filter", hook, mangle, policy} }

func route(hook string, policy VerdictKind) Hook { return Hook{"route", hook, mangle, policy} }

// Text returns the hook as nft prints it.
func (h Hook) Text() string {
	priority := strconv.Itoa(int(h.Priority))
	if h.Priority == mangle {
		priority = "mangle"
	}
	return fmt.Sprintf("type %s hook %s priority %s; policy %s;", h.Type, h.Name, priority, h.Policy)
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

// Text returns the table as `nft --stateless list table inet mantlet` prints it once applied.
func (r Ruleset) Text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "table inet %s {\n", Table)
	separator := ""
	for _, t := range r.Timeouts {
		fmt.Fprintf(&b, "%s\tct timeout %s {\n\t\t%s\n\t}\n", separator, t.Name, t.Text())
		separator = "\n"
	}
	for _, m := range r.Maps {
		b.WriteString(separator)
		fmt.Fprintf(&b, "\tmap %s {\n\t\ttype inet_service : verdict\n\t\tflags interval\n", m.Name)
		m.elements(&b)
		b.WriteString("\t}\n")
		separator = "\n"
	}
	for _, set := range r.Lists {
		b.WriteString(separator)
		set.text(&b)
		separator = "\n"
	}
	for _, set := range r.Accounts {
		b.WriteString(separator)
		set.text(&b)
		separator = "\n"
	}
	for _, c := range r.Chains {
		b.WriteString(separator)
		fmt.Fprintf(&b, "\tchain %s {\n", c.Name)
		if c.Hook.Name != "" {
			fmt.Fprintf(&b, "\t\t%s\n", c.Hook.Text())
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

func (e Element) text() string { return e.Ports.String() + " : " + e.Verdict.Text() }

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
		b.WriteString(e.text())
	}
	b.WriteString(" }\n")
}
