package schema

import (
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// The ports of Envoy's two ingress listeners. Nothing else may use them in the pod.
const (
	IngressMTLSPort = 15006
	IngressTLSPort  = 15007
)

// The parsers of this file return a value and a reason; the reason is empty where the text is right.

var decimal = regexp.MustCompile(`^(0|[1-9][0-9]*)$`)

func parsePort(text string) (uint16, string) {
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 || !decimal.MatchString(text) {
		return 0, "must be a port: a decimal number from 1 to 65535"
	}
	return uint16(n), ""
}

func reserved(port uint16) string {
	if port == IngressMTLSPort || port == IngressTLSPort {
		return fmt.Sprintf("ports %d and %d are mantlet's own listeners; choose another", IngressMTLSPort, IngressTLSPort)
	}
	return ""
}

var loopback4 = netip.MustParsePrefix("127.0.0.0/8")

func parseListen(text string) (netip.AddrPort, string) {
	const right = "must be a loopback address and a port, as 127.137.0.1:8081 or [::1]:8081"
	host, port, ok := cutPort(text)
	if !ok {
		return netip.AddrPort{}, right
	}
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return netip.AddrPort{}, right
	}
	if !loopback4.Contains(addr) && addr != netip.IPv6Loopback() {
		return netip.AddrPort{}, "lies outside of 127.0.0.0/8 and [::1], so that others than the workload could use it; " + right
	}
	if addr == netip.MustParseAddr("127.255.255.255") {
		return netip.AddrPort{}, "is loopback's broadcast address, which nothing can listen on; choose another of 127.0.0.0/8"
	}
	p, reason := parsePort(port)
	if reason == "" {
		reason = reserved(p)
	}
	return netip.AddrPortFrom(addr, p), reason
}

// label is one part of a host name: RFC 1123, and the underscore that service names outside of Kubernetes have.
var label = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?$`)

func parseUpstream(text string) (Upstream, string) {
	host, port, ok := cutPort(text)
	if !ok {
		return Upstream{}, "must be a host and a port, as billing-svc:8080, 192.0.2.7:8080 or [2001:db8::7]:8080"
	}
	p, reason := parsePort(port)
	if reason != "" {
		return Upstream{}, fmt.Sprintf("port %s %s", quote(port), reason)
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		if addr.IsUnspecified() || addr.IsMulticast() || addr.Zone() != "" {
			return Upstream{}, "must be the address of one host, without a zone"
		}
		return Upstream{Host: addr.Unmap().String(), Port: p}, ""
	}
	return Upstream{Host: host, Port: p}, hostReason(host)
}

func hostReason(host string) string {
	labels := strings.Split(strings.TrimSuffix(host, "."), ".")
	if len(host) > 254 {
		return "the host name is longer than 253 characters"
	}
	for _, l := range labels {
		if !label.MatchString(l) {
			return fmt.Sprintf("%s is no host name: each part between dots has 1 to 63 letters, digits and inner hyphens", quote(host))
		}
	}
	if decimal.MatchString(labels[len(labels)-1]) {
		return fmt.Sprintf("%s is neither an IP address nor a host name", quote(host))
	}
	return ""
}

// cutPort splits host:port; an IPv6 host stands in brackets, and only it.
func cutPort(text string) (host, port string, ok bool) {
	i := strings.LastIndexByte(text, ':')
	if i < 0 {
		return "", "", false
	}
	host, port = text[:i], text[i+1:]
	if inner, isBracketed := strings.CutPrefix(host, "["); isBracketed {
		inner, closed := strings.CutSuffix(inner, "]")
		addr, err := netip.ParseAddr(inner)
		return inner, port, closed && err == nil && addr.Is6()
	}
	return host, port, host != "" && !strings.Contains(host, ":")
}

// oneOf returns a parser that stores text where it is one of the choices.
func oneOf[T ~string](field *T, choices ...T) func(string) string {
	return func(text string) string {
		names := make([]string, len(choices))
		for i, c := range choices {
			names[i] = string(c)
			if text == names[i] {
				*field = c
				return ""
			}
		}
		reason := "must be one of " + strings.Join(names, ", ")
		if near := nearest(text, names); near != "" {
			reason += "; did you mean " + near + "?"
		}
		return reason
	}
}

// maxConcurrency is far above the cores that a sidecar is given; Envoy allocates for each worker at start.
const maxConcurrency = 256

func concurrency(field *int) func(string) string {
	return func(text string) string {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 || n > maxConcurrency || !decimal.MatchString(text) {
			return fmt.Sprintf("must be a number of worker threads from 1 to %d", maxConcurrency)
		}
		*field = n
		return ""
	}
}

// seconds stores a duration that Envoy's command line can carry: whole seconds in 32 bits; a day bounds it long before.
func seconds(field *time.Duration) func(string) string {
	return func(text string) string {
		d, err := time.ParseDuration(text)
		if err != nil || d < time.Second || d > 24*time.Hour || d%time.Second != 0 {
			return "must be a duration in whole seconds from 1s to 24h, as 10s or 5m"
		}
		*field = d
		return ""
	}
}
