package schema

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
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
	text := func(path string) string { return merged.scalar(path).text }
	c.Mesh = Mesh{
		Ingress: c.ingress(r),
		Egress:  c.egress(r),
		Probes:  c.probes(r),
		TLS:     TLS{MinVersion: TLSVersion(text("tls.minVersion"))},
		Envoy: Envoy{
			Concurrency:        number(text("envoy.concurrency")),
			DrainTime:          duration(text("envoy.drainTime")),
			ParentShutdownTime: duration(text("envoy.parentShutdownTime")),
			LogLevel:           EnvoyLogLevel(text("envoy.logLevel")),
		},
		OtherProtocols:   OtherProtocols(text("otherProtocols")),
		AccessLog:        AccessLog(text("accessLog")),
		MaxConnectionAge: age(text("maxConnectionAge")),
		Outbound:         c.outbound(r),
	}
	c.Mesh.StatusPort = process.statusPort(c.Mesh.Ingress)
	if process.IngressOff != "" {
		c.switchOff(process.IngressOff, r)
	}
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
	if other := c.merged.scalar("otherProtocols"); other.overrode != nil && other.text == string(OtherProtocolsDrop) {
		r.add(other.origin, "otherProtocols", other.value(), without)
	}
	c.ingressOff = variable
	c.Mesh.Ingress, c.Mesh.OtherProtocols, c.Mesh.IngressOff = nil, OtherProtocolsAccept, true
}

// timings reports times that do not go together, at the one that is no default.
func timings(merged layer, r *report) {
	const longer, shorter = "envoy.parentShutdownTime", "envoy.drainTime"
	long, short := merged.scalar(longer), merged.scalar(shorter)
	switch {
	case duration(long.text) > duration(short.text) || r.has(longer) || r.has(shorter):
	case long.overrode == nil:
		r.add(short.origin, shorter, short.text, fmt.Sprintf("must be less than %s, which is %s (%s)", longer, long.text, long.origin))
	default:
		r.add(long.origin, longer, long.text, fmt.Sprintf("must be more than %s, which is %s (%s)", shorter, short.text, short.origin))
	}
}

// number, duration and ports read canonical texts, which their parsers made.
func number(text string) int {
	n, err := strconv.Atoi(text)
	return must(n, err)
}

// age is of text that ageText has parsed.
func age(text string) time.Duration {
	if text == noAge || text == "" {
		return 0
	}
	return duration(text)
}

func duration(text string) time.Duration {
	d, err := time.ParseDuration(text)
	return must(d, err)
}

func ports(text string) Ports {
	first, last, isRange := strings.Cut(text, "-")
	p := Ports{First: uint16(number(first))}
	p.Last = p.First
	if isRange {
		p.Last = uint16(number(last))
	}
	return p
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func (c *Config) ingress(r *report) []Ingress {
	all := c.merged.entries("ingress")
	list := slices.Grow([]Ingress(nil), len(all))
	for _, e := range all {
		if e.removed() {
			continue
		}
		in := Ingress{Name: e.text("name"), Ports: ports(e.key), Mode: Mode(e.text("mode")), Allow: sorted(e.list("allow")), ALPN: e.list("alpn")}
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
	for key, e := range all {
		if !e.removed() {
			listen := netip.MustParseAddrPort(key)
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
			Listen:      netip.MustParseAddrPort(e.key),
			ServerNames: e.list("serverNames"),
			ALPN:        e.list("alpn"),
		}
		switch text := e.text("upstream"); {
		case text == "" && e.mayMean("upstream"):
		case text == "":
			r.add(e.origin, "egress["+e.key+"].upstream", "", "is missing: a new entry needs it")
		default:
			host, port, _ := cutPort(text)
			out.Upstream = Upstream{Host: host, Port: uint16(number(port))}
			if to := own.loop(out); to != "" {
				r.add(e.fields["upstream"].origin, "egress["+e.key+"].upstream", text,
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
		p := Probe{Name: e.key}
		for _, kind := range probeKinds {
			if text := e.text(kind); text != "" {
				p.Kind = ProbeKind(kind)
				p.Port, p.Target, _ = cutTarget(text)
			}
		}
		if p.Kind == ProbeGRPC {
			p.Target = strings.TrimPrefix(p.Target, "/")
		}
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
