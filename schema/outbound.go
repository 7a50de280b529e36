package schema

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Outbound says what happens to connections that the pod makes past the egress entries: in the clear, as far as mantlet can tell.
type Outbound struct {
	Mode OutboundMode
	// DNS allows UDP and TCP port 53 of the name servers of resolv.conf.
	DNS bool
	// Allow holds what else may leave. Sorted, without duplicates.
	Allow []Destination
}

// OutboundMode is what happens to connections in the clear.
type OutboundMode string

// The modes, from the least strict to the strictest. OutboundAccept is the default.
const (
	OutboundAccept  OutboundMode = "accept"  // they leave, and nobody keeps account
	OutboundObserve OutboundMode = "observe" // they leave, and are accounted
	OutboundDrop    OutboundMode = "drop"    // only those that are allowed leave; all are accounted
)

// Destination is a port of an address, or of all addresses of a prefix, by whatever transport protocol.
type Destination struct {
	Prefix netip.Prefix // masked, never IPv4 in the form of IPv6
	Port   uint16
}

// Contains reports whether other is a part of d.
func (d Destination) Contains(other Destination) bool {
	return d.Port == other.Port && d.Prefix.Bits() <= other.Prefix.Bits() && d.Prefix.Contains(other.Prefix.Addr())
}

func (d Destination) String() string {
	addr := d.Prefix.Addr().String()
	if d.Prefix.Addr().Is6() {
		addr = "[" + addr + "]"
	}
	if !d.Prefix.IsSingleIP() {
		addr += "/" + strconv.Itoa(d.Prefix.Bits())
	}
	return addr + ":" + strconv.Itoa(int(d.Port))
}

// Compare sorts by address; of prefixes that begin alike the wider comes first.
func (d Destination) Compare(other Destination) int {
	return cmp.Or(d.Prefix.Addr().Compare(other.Prefix.Addr()), cmp.Compare(d.Prefix.Bits(), other.Prefix.Bits()), cmp.Compare(d.Port, other.Port))
}

// Within reports whether nothing leaves, or leaves unseen, under o that does not under other. A stricter mode may have any list, unless
// the other one has a list of its own.
func (o Outbound) Within(other Outbound) bool {
	if o.Mode.strictness() < other.Mode.strictness() {
		return false
	}
	hasList := other.DNS || other.Allow != nil
	if o.Mode != other.Mode && other.Mode != OutboundDrop && !hasList || o.Mode == OutboundAccept {
		return true
	}
	return len(o.beyond(other)) == 0
}

// beyond returns what o's list allows and other's does not, as the override file has it.
func (o Outbound) beyond(other Outbound) (all []string) {
	if o.DNS && !other.DNS {
		all = append(all, allowDNS)
	}
	for _, d := range o.Allow {
		if !slices.ContainsFunc(other.Allow, func(of Destination) bool { return of.Contains(d) }) {
			all = append(all, d.String())
		}
	}
	return all
}

func (m OutboundMode) strictness() int { return max(0, slices.Index(m.choices(), string(m))) }

// List returns the items of the override file.
func (o Outbound) List() []string {
	var all []string
	if o.DNS {
		all = append(all, allowDNS)
	}
	for _, d := range o.Allow {
		all = append(all, d.String())
	}
	return all
}

// outbound makes an Outbound of what is merged.
func (c *Config) outbound(r *report) Outbound {
	o := Outbound{Mode: valueOf[OutboundMode](c.merged.scalar(outboundMode))}
	allow := c.merged.scalar(outboundAllow)
	for _, item := range valueOf[[]any](allow) {
		if d, ok := item.(Destination); ok {
			o.Allow = append(o.Allow, d)
		} else {
			o.DNS = true
		}
	}
	slices.SortFunc(o.Allow, Destination.Compare)
	o.Allow = slices.Compact(o.Allow)
	if len(o.Allow) > maxAllowed {
		r.add(allow.origin, outboundAllow, "", fmt.Sprintf("has %d items; there can be at most %d: join addresses to prefixes", len(o.Allow), maxAllowed))
	}
	return o
}

// The paths of the fields.
const (
	outboundMode  = "outbound.mode"
	outboundAllow = "outbound.allow"
)

// maxAllowed keeps the sets within one transaction of the kernel's: an item of IPv6 takes 80 bytes there.
const maxAllowed = 2_000

// allowDNS is the item that stands for the name servers.
const allowDNS = "dns"

// allowText is an item of outbound.allow: dns, or an address or a prefix with a port.
type allowText string

func (allowText) scalar() yamlType { return yamlString }

func (allowText) parse(text string) (any, string) {
	if text == allowDNS {
		return allowDNS, ""
	}
	if strings.EqualFold(text, allowDNS) {
		return nil, "must be in lower case; did you mean dns?"
	}
	return parseDestination(text)
}

// parseDestination reads what Destination.String writes.
func parseDestination(text string) (Destination, string) {
	const right = "must be dns, or an address or a prefix with a port, for example 10.96.0.1:443, 10.0.0.0/8:5432 or [fd00::]/8:443"
	i := strings.LastIndexByte(text, ':')
	addr, notAddr := netip.ParseAddr(text)
	_, notPrefix := netip.ParsePrefix(strings.NewReplacer("[", "", "]", "").Replace(text))
	switch {
	case notAddr == nil && addr.Is6():
		return Destination{}, "an IPv6 address must be in brackets, and a port must follow; " + right
	case notAddr == nil || notPrefix == nil:
		return Destination{}, "has no port; " + right
	case i < 0:
		return Destination{}, right
	}
	host, length, hasLength := strings.Cut(text[:i], "/")
	port, reason := parsePort(text[i+1:])
	if reason != "" {
		return Destination{}, fmt.Sprintf("the port %s %s; %s", quote(text[i+1:]), reason, right)
	}
	inner, isBracketed := strings.CutPrefix(host, "[")
	inner, closed := strings.CutSuffix(inner, "]")
	addr, err := netip.ParseAddr(inner)
	switch {
	case err != nil && hostReason(host) == "" && !hasLength:
		return Destination{}, "is a host name, and the kernel knows addresses alone: give its address, or make it an egress entry; " + right
	case err != nil || isBracketed != closed || isBracketed != addr.Is6() || addr.Zone() != "":
		return Destination{}, right
	}
	bits := addr.BitLen()
	if hasLength {
		n, err := strconv.ParseUint(length, 10, 8)
		if err != nil || int(n) > bits || length != strconv.FormatUint(n, 10) {
			return Destination{}, fmt.Sprintf("the length of the prefix must be a number from 0 to %d; %s", bits, right)
		}
		bits = int(n)
	}
	const mapped = 96 // bits before an IPv4 address in the form of IPv6 (RFC 4291, section 2.5.5.2)
	if addr.Is4In6() && bits >= mapped {
		addr, bits = addr.Unmap(), bits-mapped
	}
	prefix := netip.PrefixFrom(addr, bits).Masked()
	d := Destination{prefix, port}
	switch {
	case prefix.Addr() != addr:
		return Destination{}, fmt.Sprintf("the address has bits beyond the length of the prefix; did you mean %s?", d)
	case addr.IsLoopback():
		return Destination{}, "is loopback, which does not leave the pod and needs no item: remove it"
	case prefix.IsSingleIP() && addr.IsUnspecified():
		return Destination{}, right
	}
	return d, ""
}

// outboundWarnings returns what a workload would not expect of mode drop, and what lets it pass by it.
func (c Config) outboundWarnings() (all []Problem) {
	o := c.Mesh.Outbound
	mode := c.merged.scalar(outboundMode)
	if o.Mode == OutboundAccept && (o.DNS || len(o.Allow) > 0) {
		all = append(all, Problem{
			Origin: c.merged.scalar(outboundAllow).origin, Path: outboundAllow, Reason: "has no effect, since outbound.mode is accept: set that to observe or drop",
		})
	}
	asks := o.DNS || slices.ContainsFunc(o.Allow, func(d Destination) bool { return d.Port == 53 })
	if o.Mode == OutboundDrop && !asks {
		all = append(all, Problem{mode.origin, outboundMode, mode.text, "leaves the workload without name servers: outbound.allow has neither dns nor an item with port 53"})
	}
	if o.Mode != OutboundAccept && c.envoyIsRoot {
		all = append(all, Problem{mode.origin, outboundMode, mode.text, "tells Envoy by its user, and MANTLET_ENVOY_UID is 0: what runs as root in the pod passes for Envoy"})
	}
	return all
}
