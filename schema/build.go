package schema

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// build merges layers into a mesh, as far as they are right, and reports what shows only once they are together, or beside
// the settings of the process. The error is of koanf.
func build(r *report, process Process, layers ...layer) (Config, error) {
	merged, err := merge(layers...)
	if err != nil {
		return Config{}, err
	}
	c := Config{merged: merged}
	at := merged.scalar
	c.Mesh = Mesh{
		Ingress: c.ingress(r),
		Egress:  c.egress(r),
		Probes:  c.probes(r),
		TLS:     TLS{MinVersion: valueOf[TLSVersion](at("tls.minVersion"))},
		Envoy: Envoy{
			Concurrency:        valueOf[int](at("envoy.concurrency")),
			DrainTime:          time.Duration(valueOf[period](at("envoy.drainTime"))),
			ParentShutdownTime: time.Duration(valueOf[period](at("envoy.parentShutdownTime"))),
			LogLevel:           valueOf[EnvoyLogLevel](at("envoy.logLevel")),
		},
		OtherProtocols:   valueOf[OtherProtocols](at("otherProtocols")),
		AccessLog:        valueOf[AccessLog](at("accessLog")),
		SourceAddress:    valueOf[SourceAddress](at(sourceAddress)),
		MaxConnectionAge: time.Duration(valueOf[age](at("maxConnectionAge"))),
		Outbound:         c.outbound(r),
	}
	c.Mesh.StatusPort = process.statusPort(c.Mesh.Ingress)
	if process.IngressOff != "" {
		c.switchOff(process.IngressOff, r)
	}
	c.envoyIsRoot = process.EnvoyUID == 0
	timings(merged, r)
	process.checkStatus(c, r)
	c.limits(r)
	return c, nil
}

// switchOff leaves alone what comes in, as a variable says. What would say otherwise is reported: it would have no effect.
func (c *Config) switchOff(variable string, r *report) {
	without := fmt.Sprintf("has no effect, since %s is %s, which only the environment can change", variable, ingressDisabled)
	for key, e := range c.merged.entries("ingress") {
		r.add(e.origin, "ingress["+key+"]", "", without)
	}
	if other := c.merged.scalar("otherProtocols"); other.overrode != nil && valueOf[OtherProtocols](other) == OtherProtocolsDrop {
		r.add(other.origin, "otherProtocols", other.value(), without)
	}
	if source := c.merged.scalar(sourceAddress); valueOf[SourceAddress](source) == SourceAddressClient {
		r.add(source.origin, sourceAddress, source.value(), without)
	}
	c.ingressOff = variable
	c.Mesh.Ingress, c.Mesh.OtherProtocols, c.Mesh.IngressOff = nil, OtherProtocolsAccept, true
}

// timings reports times that do not go together, at the one that is no default.
func timings(merged layer, r *report) {
	const longer, shorter = "envoy.parentShutdownTime", "envoy.drainTime"
	long, short := merged.scalar(longer), merged.scalar(shorter)
	switch {
	case valueOf[period](long) > valueOf[period](short) || r.has(longer) || r.has(shorter):
	case long.overrode == nil:
		r.add(short.origin, shorter, short.text, fmt.Sprintf("must be less than %s, which is %s (%s)", longer, long.text, long.origin))
	default:
		r.add(long.origin, longer, long.text, fmt.Sprintf("must be more than %s, which is %s (%s)", shorter, short.text, short.origin))
	}
}

func (c *Config) ingress(r *report) []Ingress {
	all := c.merged.entries("ingress")
	list := slices.Grow([]Ingress(nil), len(all))
	for _, e := range all {
		if e.removed() {
			continue
		}
		in := Ingress{Name: e.text("name"), Ports: keyOf[Ports]("ingress", e), Mode: valueOf[Mode](e.fields["mode"]), Allow: sorted(e.list("allow")), ALPN: e.list("alpn")}
		if in.Mode == "" {
			in.Mode = ModeMTLS
		}
		if in.Allow != nil && !e.unknown && !e.bad["mode"] {
			in.checkAllow(e, r)
		}
		if in.ALPN != nil && in.Mode == ModePassthrough && !e.unknown && !e.bad["mode"] {
			s := e.fields["alpn"]
			r.add(s.origin, "ingress["+e.key+"].alpn", s.value(), fmt.Sprintf(
				"requires mode mtls or tls, but the mode is passthrough (%s), where mantlet speaks no TLS", e.fields["mode"].origin))
		}
		list = append(list, in)
	}
	slices.SortFunc(list, func(a, b Ingress) int { return a.Ports.compare(b.Ports) })
	apart := list[:0]
	for i, widest := 0, (Ingress{}); i < len(list); i++ { // widest is the entry before that ends last
		in := list[i]
		if i == 0 || in.Ports.First > widest.Ports.Last {
			apart, widest = append(apart, in), in
			continue
		}
		a, b := all[widest.Ports.String()], all[in.Ports.String()]
		if a.origin.compare(b.origin) > 0 {
			a, b = b, a
		}
		r.add(b.origin, "ingress["+b.key+"]", "", fmt.Sprintf("overlaps %s (%s); ranges must be identical or disjoint", a.key, a.origin))
		c.overlapping = append(c.overlapping, in)
		if in.Ports.Last > widest.Ports.Last {
			widest = in
		}
	}
	return apart
}

func (in Ingress) checkAllow(e *entry, r *report) {
	if s := e.fields["allow"]; in.Mode != ModeMTLS {
		r.add(s.origin, "ingress["+e.key+"].allow", s.value(), fmt.Sprintf(
			"requires mode mtls, but the mode is %s (%s): without client certificates, clients cannot be told apart",
			in.Mode, e.fields["mode"].origin))
	}
}

func (c *Config) egress(r *report) []Egress {
	all := c.merged.entries("egress")
	own := listeners{}
	for _, e := range all {
		if !e.removed() {
			listen := keyOf[netip.AddrPort]("egress", e)
			own[listen.Port()] = append(own[listen.Port()], listen)
		}
	}
	list := slices.Grow([]Egress(nil), len(all))
	for _, e := range all {
		if e.removed() {
			continue
		}
		out := Egress{
			Name:        e.text("name"),
			Listen:      keyOf[netip.AddrPort]("egress", e),
			ServerNames: e.list("serverNames"),
			ALPN:        e.list("alpn"),
		}
		switch s := e.fields["upstream"]; {
		case s == nil && e.mayMean("upstream"):
		case s == nil:
			r.add(e.origin, "egress["+e.key+"].upstream", "", "is missing: a new entry needs it")
		default:
			out.Upstream = valueOf[Upstream](s)
			if to := own.loop(out); to != "" {
				r.add(s.origin, "egress["+e.key+"].upstream", s.text,
					fmt.Sprintf("is %s: connections would loop back to mantlet", to))
			}
		}
		list = append(list, out)
	}
	slices.SortFunc(list, func(a, b Egress) int { return a.Listen.Compare(b.Listen) })
	return list
}

func (c *Config) probes(r *report) []Probe {
	var list []Probe
	for _, e := range c.merged.entries("probes") {
		if e.removed() {
			continue
		}
		var p Probe
		for _, kind := range probeKinds {
			if s := e.fields[kind]; s != nil {
				p = valueOf[Probe](s)
			}
		}
		p.Name = e.key
		if p.Kind == "" && !e.mayMean(probeKinds...) {
			r.add(e.origin, "probes["+e.key+"]", "", "needs one of http, tcp and grpc, for example http: 8080/healthz")
		}
		list = append(list, p)
	}
	slices.SortFunc(list, func(a, b Probe) int { return strings.Compare(a.Name, b.Name) })
	return list
}

// listeners are the listen addresses of a mesh's egress entries by their ports.
type listeners map[uint16][]netip.AddrPort

// loop returns which of Envoy's own listeners an entry's upstream is, if it is one. By a name of loopback it may be.
func (l listeners) loop(from Egress) string {
	u := from.Upstream
	addr, isAddress := u.Addr()
	host := strings.ToLower(strings.TrimSuffix(u.Host, "."))
	isLoopback := isAddress && addr.IsLoopback() || host == "localhost" || strings.HasSuffix(host, ".localhost")
	if !isLoopback {
		return ""
	}
	if u.Port == IngressMTLSPort || u.Port == IngressTLSPort {
		return "mantlet's own listener"
	}
	for _, listen := range slices.SortedFunc(slices.Values(l[u.Port]), netip.AddrPort.Compare) {
		switch {
		case isAddress && listen.Addr() != addr:
		case isAddress && listen == from.Listen:
			return "the entry's own listen address"
		default:
			return "the listen address of egress[" + listen.String() + "]"
		}
	}
	return ""
}

func sorted(list []string) []string {
	if list == nil {
		return nil
	}
	return slices.Sorted(slices.Values(list))
}
