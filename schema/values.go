package schema

import (
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The ports of Envoy's two ingress listeners. Nothing else may use them in the pod.
const (
	IngressMTLSPort = 15006
	IngressTLSPort  = 15007
)

// leaf is a kind of value. Whatever source a value comes from, the one parser of its kind reads it, once, and the JSON Schema of the
// override file is made of the same types.
type leaf interface {
	// parse returns what the text means, or the reason why it is wrong and what would be right. Two texts mean the same where their
	// values have one canonical text.
	parse(text string) (value any, reason string)
	// scalar names the YAML types that may hold it.
	scalar() yamlType
}

// yamlType is what a YAML scalar must be, in words and as tags.
type yamlType struct {
	words string
	tags  []string
}

var (
	yamlString = yamlType{"a string", []string{"!!str"}}
	yamlNumber = yamlType{"a number", []string{"!!int"}}
	yamlBool   = yamlType{"true", []string{"!!bool"}}
	yamlPorts  = yamlType{"a port or a range", []string{"!!int", "!!str"}}
	yamlProbe  = yamlType{"a port, or a string that starts with one", []string{"!!int", "!!str"}}
)

// canonical returns the text of a value that a parser returned.
func canonical(value any) string {
	switch v := value.(type) {
	case string:
		return v
	case fmt.Stringer:
		return v.String()
	default: // numbers, true, and the enumerations
		return fmt.Sprint(v)
	}
}

// parse reads a text by a parser. Where only what surrounds the value is wrong, the reason says so.
func parse[V any](parser func(string) (V, string), text string) (value V, reason string) {
	value, reason = parser(text)
	if reason == "" {
		return value, ""
	}
	var none V
	bare := strings.TrimSpace(text)
	isGood := func(text string) bool {
		_, reason := parser(text)
		return text != "" && reason == ""
	}
	switch unquoted := strings.Trim(bare, `"'`); {
	case bare != text && isGood(bare):
		return none, surrounded(text)
	case unquoted != bare && isGood(unquoted):
		return none, "the quotes are part of the value: remove them"
	}
	return none, reason
}

// surrounded says what blanks are at the ends of a text.
func surrounded(text string) string {
	at, end := "starts", strings.TrimRight(text, " \t\r\n")
	blanks := strings.TrimSuffix(text, strings.TrimLeft(text, " \t\r\n"))
	if end != text {
		at, blanks = "ends", strings.TrimPrefix(text, end)
	}
	what := "white space"
	switch {
	case strings.ContainsAny(blanks, "\r\n"):
		what = "a line break"
	case strings.Trim(blanks, " ") == "":
		what = "a space"
	case strings.Trim(blanks, "\t") == "":
		what = "a tab"
	}
	return at + " with " + what + ": remove it"
}

// Patterns of the JSON Schema, for editors. The parsers decide.
const (
	portPattern  = `([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])`
	octetPattern = `([0-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])`
	labelPattern = `[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?`
	hostPattern  = labelPattern + `(\.` + labelPattern + `)*`
)

// parseNumber reads a number, at least 1, that means the same to every reader: YAML takes 010 for 8 and 0x50 for 80.
func parseNumber(text string) (uint16, bool) {
	n, err := strconv.ParseUint(text, 10, 16)
	return uint16(n), err == nil && text[0] != '0'
}

func parsePort(text string) (uint16, string) {
	port, ok := parseNumber(text)
	if !ok {
		return 0, "must be a port number from 1 to 65535"
	}
	return port, ""
}

// portsText is a port or a range of ports.
type portsText string

func (portsText) scalar() yamlType { return yamlPorts }

func (portsText) parse(text string) (any, string) {
	const right = "must be a port from 1 to 65535 or a range, for example 8000-8099"
	first, last, isRange := strings.Cut(text, "-")
	p, reason := parsePort(first)
	if reason != "" {
		return nil, right
	}
	ports := Ports{p, p}
	if isRange {
		if ports.Last, reason = parsePort(last); reason != "" {
			return nil, right
		}
	}
	if ports.First > ports.Last {
		return nil, "ends before it starts; " + right
	}
	if ports.Contains(IngressMTLSPort) || ports.Contains(IngressTLSPort) {
		return nil, reservedPorts()
	}
	return ports, ""
}

// reservedPorts is the reason against mantlet's own ports.
func reservedPorts() string {
	return fmt.Sprintf("ports %d and %d are mantlet's own listeners; leave them out", IngressMTLSPort, IngressTLSPort)
}

// nameText is any text: informational, never rendered. A # would end it in the environment.
type nameText string

func (nameText) scalar() yamlType { return yamlString }

func (nameText) parse(text string) (any, string) {
	if strings.Contains(text, "#") {
		return nil, "must not contain #"
	}
	return text, ""
}

// listenText is a loopback address and a port.
type listenText string

var loopback4 = netip.MustParsePrefix("127.0.0.0/8")

func (listenText) scalar() yamlType { return yamlString }

func (listenText) parse(text string) (any, string) {
	const right = "must be a loopback address and a port, for example 127.137.0.1:8081 or [::1]:8081"
	host, port, ok := cutPort(text)
	addr, err := netip.ParseAddr(host)
	switch {
	case !ok || err != nil:
		return nil, right
	case !loopback4.Contains(addr) && addr != netip.IPv6Loopback():
		return nil, "is outside 127.0.0.0/8 and [::1], so others than the workload could connect to it; " + right
	case addr == netip.AddrFrom4([4]byte{127, 255, 255, 255}):
		return nil, "is the broadcast address of loopback, which nothing can connect to; " + right
	}
	p, reason := parsePort(port)
	switch {
	case reason != "":
		return nil, right
	case p == IngressMTLSPort || p == IngressTLSPort:
		return nil, reservedPorts()
	}
	return netip.AddrPortFrom(addr, p), ""
}

// upstreamText is a host name or an IP address, and a port.
type upstreamText string

func (upstreamText) scalar() yamlType { return yamlString }

func (upstreamText) parse(text string) (any, string) {
	host, port, ok := cutPort(text)
	if !ok {
		return nil, "must be a host and a port, for example billing-svc:8080, 192.0.2.7:8080 or [2001:db8::7]:8080"
	}
	p, reason := parsePort(port)
	if reason != "" {
		return nil, fmt.Sprintf("the port %s %s", quote(port), reason)
	}
	addr, err := netip.ParseAddr(host)
	switch {
	case err != nil:
		return Upstream{host, p}, hostReason(host)
	case addr.IsUnspecified() || addr.IsMulticast() || addr.Zone() != "":
		return nil, "must be the address of a single host, without a zone"
	default:
		return Upstream{addr.Unmap().String(), p}, ""
	}
}

// label is one part of a host name: RFC 1123, and the underscore that service names outside of Kubernetes have.
var label = regexp.MustCompile("^" + labelPattern + "$")

// maxHostName is the most characters of a name in the DNS (RFC 1035, section 2.3.4) as text, without a final dot.
const maxHostName = 253

// IsHostName reports whether an upstream may have a text as its host's name.
func IsHostName(text string) bool { return text != "" && hostReason(text) == "" }

func hostReason(host string) string {
	name := strings.TrimSuffix(host, ".")
	if len(name) > maxHostName {
		return fmt.Sprintf("the host name is longer than %d characters", maxHostName)
	}
	labels := strings.Split(name, ".")
	for _, l := range labels {
		if !label.MatchString(l) {
			return fmt.Sprintf("%s is not a host name: each part between dots must have 1 to 63 letters, digits, hyphens or underscores, with no hyphen at either end", quote(host))
		}
	}
	if strings.Trim(labels[len(labels)-1], "0123456789") == "" { // what resolvers take for an address, 10.0.0.300 and 10.007 too
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

// sanText is a name in a certificate: a DNS name, with or without a wildcard, or a URI. It is compared as a whole.
type sanText string

// uri matches what can stand in a URI SAN: a scheme, and no character that RFC 3986 excludes.
var uri = regexp.MustCompile("^" + uriPattern + "$")

const uriPattern = `[A-Za-z][A-Za-z0-9+.-]*://[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+`

// IsURI tells a URI SAN from a DNS name.
func IsURI(san string) bool { return strings.Contains(san, "://") }

func (sanText) scalar() yamlType { return yamlString }

func (sanText) parse(text string) (any, string) {
	if IsURI(text) {
		if !uri.MatchString(text) {
			return nil, "is not a valid URI SAN; write it like spiffe://mesh/ns/shop/sa/cart"
		}
		return text, ""
	}
	name := strings.TrimPrefix(text, "*.")
	if text == "*" {
		return text, ""
	}
	if reason := hostReason(name); reason != "" || strings.HasSuffix(name, ".") {
		return nil, "must be a SAN: a DNS name, for example frontend or *.shop.svc, or a URI, for example spiffe://mesh/ns/shop/sa/cart"
	}
	return text, ""
}

// serverNameText is a name that an endpoint's certificate must have. A wildcard would not name an endpoint.
type serverNameText string

func (serverNameText) scalar() yamlType { return yamlString }

func (serverNameText) parse(text string) (any, string) {
	if strings.Contains(text, "*") && !IsURI(text) {
		return nil, "must name one endpoint, without a wildcard; a wildcard in the endpoint's certificate matches it"
	}
	return sanText.parse("", text)
}

// alpnText is a protocol's identifier in ALPN (RFC 7301): any bytes, of which those that IANA has registered are printable.
type alpnText string

// misnamedALPN has what people call protocols whose identifiers are others.
var misnamedALPN = map[string]string{
	"http2": "h2", "http/2": "h2", "http/2.0": "h2", "h2c": "h2", "grpc": "h2", "http": "http/1.1", "http1": "http/1.1", "http1.1": "http/1.1", "http/1": "http/1.1", "h1": "http/1.1",
}

func (alpnText) scalar() yamlType { return yamlString }

func (alpnText) parse(text string) (any, string) {
	const right = "must be a protocol identifier of ALPN, for example h2 or http/1.1"
	if !alpn.MatchString(text) {
		return nil, right
	}
	lower := strings.ToLower(text)
	if id := misnamedALPN[lower]; id != "" {
		return nil, right + "; did you mean " + id + "?"
	}
	if lower != text && (lower == "h2" || lower == "http/1.1") {
		return nil, right + "; did you mean " + lower + "?"
	}
	return text, ""
}

// alpn matches an identifier that fits into its one byte of length. Envoy splits lists of them at commas.
var alpn = regexp.MustCompile("^" + alpnPattern + "$")

const alpnPattern = `[!-+\--~]{1,255}`

// maxALPN keeps a list far below the 65,535 bytes that it may take in TLS.
const maxALPN = 16

// probeName names a probe in a URL.
type probeName string

func (probeName) scalar() yamlType { return yamlString }

func (probeName) parse(text string) (any, string) {
	if len(text) < 1 || len(text) > 63 || !consists(text, lower+digits+"-") || strings.Trim(text, "-") != text {
		return nil, "must be a DNS label: 1 to 63 lower-case letters, digits or hyphens, with no hyphen at either end"
	}
	return text, ""
}

// The targets of probes. They are fixed here, as a whole: nothing of a probe's request goes on to the workload.
const (
	pathPattern    = `/([A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*(\?([A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*)?`
	servicePattern = `/[A-Za-z0-9._-]{1,255}`
	maxPath        = 1024
	maxService     = 255
)

// What they are made of; expressions for it would be compiled at each start.
const (
	lower    = "abcdefghijklmnopqrstuvwxyz"
	digits   = "0123456789"
	alphabet = lower + "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + digits
	inPath   = alphabet + "._~!$&'()*+,;=:@/-%" // RFC 3986, section 3.3
)

// consists reports whether a text has no other characters than these.
func consists(text, chars string) bool { return strings.Trim(text, chars) == "" }

func isPath(text string) bool {
	path, query, _ := strings.Cut(text, "?")
	_, err := url.PathUnescape(text)
	return strings.HasPrefix(path, "/") && consists(path, inPath) && consists(query, inPath+"?") && err == nil
}

// cutTarget splits the value of a probe after its port, and returns the reason against the port, if there is one.
func cutTarget(text string) (port uint16, target, reason string) {
	number, _, _ := strings.Cut(text, "/")
	port, reason = parsePort(number)
	if port == IngressMTLSPort || port == IngressTLSPort {
		reason = reservedPorts()
	}
	return port, text[len(number):], reason
}

// httpProbeText is a port and what to GET there.
type httpProbeText string

func (httpProbeText) scalar() yamlType { return yamlProbe }

func (httpProbeText) parse(text string) (any, string) {
	port, target, reason := cutTarget(text)
	switch {
	case port == 0:
		return nil, "must be a port, or a port and a path, for example 8080/healthz"
	case reason != "":
		return nil, reason
	case target == "":
		target = "/"
	case !isPath(target):
		return nil, "its path has characters that a URL must escape, for example a space as %20"
	case len(target) > maxPath:
		return nil, fmt.Sprintf("its path is longer than %d bytes", maxPath)
	}
	return Probe{Kind: ProbeHTTP, Port: port, Target: target}, ""
}

// portText is one port.
type portText string

func (portText) scalar() yamlType { return yamlProbe }

func (portText) parse(text string) (any, string) {
	port, target, reason := cutTarget(text)
	if target != "" {
		reason = "must be a port and nothing else, for example 5432"
	}
	return Probe{Kind: ProbeTCP, Port: port}, reason
}

// grpcProbeText is a port, and the service to ask after.
type grpcProbeText string

func (grpcProbeText) scalar() yamlType { return yamlProbe }

func (grpcProbeText) parse(text string) (any, string) {
	port, target, reason := cutTarget(text)
	service := strings.TrimPrefix(target, "/")
	switch {
	case reason != "" && port != 0:
		return nil, reason
	case port == 0 || target == "/" || len(service) > maxService || !consists(service, alphabet+"._-"):
		return nil, "must be a port, or a port and a service, for example 9000/my.Service"
	}
	return Probe{Kind: ProbeGRPC, Port: port, Target: service}, ""
}

// threadsText is a number of worker threads.
type threadsText string

// maxThreads is far above the cores that a sidecar is given; Envoy allocates for each worker at start.
const maxThreads = 256

func (threadsText) scalar() yamlType { return yamlNumber }

func (threadsText) parse(text string) (any, string) {
	n, ok := parseNumber(text)
	if !ok || n > maxThreads {
		return nil, fmt.Sprintf("must be a number of worker threads from 1 to %d", maxThreads)
	}
	return int(n), ""
}

// durationText is a duration that Envoy's command line can carry: whole seconds in 32 bits; a day bounds it long before.
type durationText string

const durationPattern = `^([0-9]+[hms])+$`

var wholeSeconds = regexp.MustCompile(durationPattern)

func (durationText) scalar() yamlType { return yamlString }

func (durationText) parse(text string) (any, string) {
	d, err := time.ParseDuration(text)
	if err != nil || d < time.Second || d > 24*time.Hour || !wholeSeconds.MatchString(text) {
		return nil, "must be a duration from 1s to 24h in hours, minutes and seconds, for example 10s or 1h30m"
	}
	return period(d), ""
}

// period is a duration in whole seconds.
type period time.Duration

// String returns the duration without units that are zero at its end.
func (p period) String() string {
	text := time.Duration(p).String() // with all of its units
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}

// ageText is a duration without an end, or noAge.
type ageText string

const noAge = "none"

func (ageText) scalar() yamlType { return yamlString }

func (ageText) parse(text string) (any, string) {
	if text == noAge {
		return age(0), ""
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < time.Minute || !wholeSeconds.MatchString(text) {
		return nil, "must be none, or a duration of 1m at least in hours, minutes and seconds, for example 24h or 1h30m"
	}
	return age(d), ""
}

// age is a duration, or 0 for one without an end.
type age time.Duration

func (a age) String() string {
	if a == 0 {
		return noAge
	}
	return period(a).String()
}

// removeText is the word that takes an entry of an earlier source away.
type removeText string

func (removeText) scalar() yamlType { return yamlBool }

func (removeText) parse(text string) (any, string) {
	if text != "true" {
		return nil, "must be true; to keep the entry, remove this key"
	}
	return true, ""
}

// The enumerations: Mode, TLSVersion, EnvoyLogLevel, OtherProtocols, AccessLog, SourceAddress and OutboundMode.

func oneOf[T ~string](text string, choices []string) (T, string) {
	if slices.Contains(choices, text) {
		return T(text), ""
	}
	return "", "must be one of " + strings.Join(choices, ", ") + didYouMean(text, choices)
}

// choices returns the modes from the strictest to the loosest: see looseness.
func (Mode) choices() []string {
	return []string{string(ModeMTLS), string(ModeTLS), string(ModePassthrough)}
}

// looseness orders the modes: what a looser one lets in, a stricter one may refuse.
func (m Mode) looseness() int { return slices.Index(m.choices(), string(m)) }

func (TLSVersion) choices() []string { return []string{string(TLS12), string(TLS13)} }

// EnvoyLogLevels returns the values of EnvoyLogLevel, the most talkative first.
func EnvoyLogLevels() []string { return EnvoyLogLevel("").choices() }

func (EnvoyLogLevel) choices() []string {
	return []string{"trace", "debug", "info", "warning", "error", "critical", "off"}
}

func (OtherProtocols) choices() []string {
	return []string{string(OtherProtocolsDrop), string(OtherProtocolsAccept)}
}

func (AccessLog) choices() []string {
	return []string{string(AccessLogNone), string(AccessLogRefused), string(AccessLogAll)}
}

func (SourceAddress) choices() []string {
	return []string{string(SourceAddressPod), string(SourceAddressClient)}
}

func (OutboundMode) choices() []string {
	return []string{string(OutboundAccept), string(OutboundObserve), string(OutboundDrop)}
}

func (m Mode) parse(text string) (any, string)         { return oneOf[Mode](text, m.choices()) }
func (m OutboundMode) parse(text string) (any, string) { return oneOf[OutboundMode](text, m.choices()) }

func (l EnvoyLogLevel) parse(text string) (any, string) {
	return oneOf[EnvoyLogLevel](text, l.choices())
}

func (o OtherProtocols) parse(text string) (any, string) {
	return oneOf[OtherProtocols](text, o.choices())
}
func (a AccessLog) parse(text string) (any, string) { return oneOf[AccessLog](text, a.choices()) }
func (s SourceAddress) parse(text string) (any, string) {
	return oneOf[SourceAddress](text, s.choices())
}

func (Mode) scalar() yamlType           { return yamlString }
func (OutboundMode) scalar() yamlType   { return yamlString }
func (TLSVersion) scalar() yamlType     { return yamlString }
func (EnvoyLogLevel) scalar() yamlType  { return yamlString }
func (OtherProtocols) scalar() yamlType { return yamlString }
func (AccessLog) scalar() yamlType      { return yamlString }
func (SourceAddress) scalar() yamlType  { return yamlString }

// parse suggests no other number: a version that does not exist says nothing about which one was meant.
func (v TLSVersion) parse(text string) (any, string) {
	if slices.Contains(v.choices(), text) {
		return TLSVersion(text), ""
	}
	reason := "must be one of " + strings.Join(v.choices(), ", ")
	for _, choice := range v.choices() {
		if spelled := strings.Trim(text, "TLSVtlsv _-"); spelled == choice || strings.NewReplacer("_", "", ".", "", ",", "").Replace(spelled) == strings.ReplaceAll(choice, ".", "") {
			reason += "; did you mean " + choice + "?"
		}
	}
	return nil, reason
}
