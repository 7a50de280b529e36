package schema

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"time"
)

// Mesh is the desired state: what may come in, where outgoing connections go and how they are protected. A Mesh that a
// function of this package returned without an error is valid: ports do not overlap, addresses are loopback, enums are
// known. Entries are sorted by their keys, so equal meshes are deeply equal.
type Mesh struct {
	Ingress        []Ingress
	Egress         []Egress
	Probes         []Probe
	TLS            TLS
	Envoy          Envoy
	OtherProtocols OtherProtocols
	AccessLog      AccessLog
	SourceAddress  SourceAddress
	Outbound       Outbound

	// MaxConnectionAge is how long a connection through Envoy may last, in whole seconds; 0 for no limit.
	MaxConnectionAge time.Duration
	// StatusPort is where peers may reach mantlet's own status; 0 for nowhere. An entry that contains it is one of ModePassthrough,
	// and lets nobody to a workload there. It is the process's and not a matter of the override file.
	StatusPort uint16
	// IngressOff says that nothing that comes in is redirected or dropped: no port has a mode, there is no entry, and other
	// protocols are accepted. Only the environment can say so.
	IngressOff bool
}

// Ingress says what happens to connections from outside the pod to a range of its ports. Ports that no entry names are
// ModeMTLS.
type Ingress struct {
	Name  string // informational, any text; never rendered
	Ports Ports
	Mode  Mode
	// Allow holds the SANs of the clients that are let in, DNS names and URIs compared as whole strings; nil is anyone whom
	// the mesh CA signed. ModeMTLS only. Sorted.
	Allow []string
	// ALPN holds the protocols that TLS may agree on, the preferred first; nil is none. Not for ModePassthrough.
	ALPN []string
}

// Ports is an inclusive range; First equals Last for a single port.
type Ports struct {
	First, Last uint16
}

func (p Ports) String() string {
	first := strconv.Itoa(int(p.First))
	if p.First == p.Last {
		return first
	}
	return first + "-" + strconv.Itoa(int(p.Last))
}

// Contains reports whether port lies within p.
func (p Ports) Contains(port uint16) bool { return p.First <= port && port <= p.Last }

func (p Ports) compare(other Ports) int {
	return cmp.Or(cmp.Compare(p.First, other.First), cmp.Compare(p.Last, other.Last))
}

// Egress is a loopback address that the workload connects to, and the upstream that it stands for.
type Egress struct {
	Name     string // informational, any text; never rendered
	Listen   netip.AddrPort
	Upstream Upstream
	// ServerNames holds the SANs of which the endpoint's certificate must have one; nil is any workload of the mesh.
	ServerNames []string
	// ALPN holds the protocols that the endpoint is offered, the preferred first; nil is none.
	ALPN []string
}

// SNI returns what the endpoint is told whom it shall be: the first server name that is a DNS name, else the host name
// of the upstream, else nothing.
func (e Egress) SNI() string {
	for _, name := range e.ServerNames {
		if !IsURI(name) {
			return name
		}
	}
	if _, isAddress := e.Upstream.Addr(); isAddress {
		return ""
	}
	return e.Upstream.Host
}

// Upstream is where an egress entry's connections go: a host name or an IP address (without brackets), and a port.
type Upstream struct {
	Host string
	Port uint16
}

// Addr returns the address of an upstream that is named by its IP address, and false for a host name.
func (u Upstream) Addr() (netip.Addr, bool) {
	addr, err := netip.ParseAddr(u.Host)
	return addr, err == nil
}

// IsName reports whether the host is a name.
func (u Upstream) IsName() bool {
	_, isAddress := u.Addr()
	return !isAddress
}

func (u Upstream) String() string {
	if addr, ok := u.Addr(); ok {
		return netip.AddrPortFrom(addr, u.Port).String()
	}
	return u.Host + ":" + strconv.Itoa(int(u.Port))
}

// Probe is a question to the workload that mantlet asks in place of a kubelet, whose own would meet mutual TLS.
type Probe struct {
	Name string // a DNS label
	Kind ProbeKind
	Port uint16
	// Target is what is asked for there: of ProbeHTTP the path, with a query if it has one; of ProbeGRPC the service, where ""
	// is the whole server; of ProbeTCP nothing.
	Target string
}

func (p Probe) String() string {
	target := p.Target
	if p.Kind == ProbeGRPC && target != "" {
		target = "/" + target
	}
	return strconv.Itoa(int(p.Port)) + target
}

// ProbeKind is what a probe speaks: a key of the override file.
type ProbeKind string

// The kinds of probes, as a kubelet has them.
const (
	ProbeHTTP ProbeKind = "http" // an answer from 200 to 399 is good
	ProbeTCP  ProbeKind = "tcp"  // a connection is
	ProbeGRPC ProbeKind = "grpc" // SERVING of grpc.health.v1 is
)

// Mode says how connections to an ingress port are protected.
type Mode string

// The modes. ModeMTLS is the default of every port.
const (
	ModeMTLS        Mode = "mtls"        // TLS; a client certificate that the mesh CA signed is required
	ModeTLS         Mode = "tls"         // TLS; no client certificate is asked for
	ModePassthrough Mode = "passthrough" // not redirected at all
)

// TLS holds what both sides of the mesh speak.
type TLS struct {
	MinVersion TLSVersion
}

// TLSVersion is a version of the protocol, as "1.2".
type TLSVersion string

// The TLS versions that may be asked for as the least.
const (
	TLS12 TLSVersion = "1.2"
	TLS13 TLSVersion = "1.3"
)

// Compare returns a negative number where v is the older version, a positive one where other is, and 0 where they are the same.
func (v TLSVersion) Compare(other TLSVersion) int {
	return cmp.Compare(slices.Index(v.choices(), string(v)), slices.Index(v.choices(), string(other)))
}

// Envoy holds the settings of the data plane that a user has a reason to change.
type Envoy struct {
	Concurrency        int           // worker threads; a smaller number would lose queued connections at a hot restart
	DrainTime          time.Duration // whole seconds: the least that connections of an old epoch get
	ParentShutdownTime time.Duration // whole seconds, more than DrainTime: the most they get
	LogLevel           EnvoyLogLevel
}

// EnvoyLogLevel is a value of Envoy's --log-level.
type EnvoyLogLevel string

// OtherProtocols says what happens to inbound UDP, SCTP and so on, which cannot be wrapped in TLS here.
type OtherProtocols string

// What may happen to other protocols at ports that are not passthrough.
const (
	OtherProtocolsDrop   OtherProtocols = "drop"
	OtherProtocolsAccept OtherProtocols = "accept"
)

// AccessLog says which connections Envoy writes a log line for.
type AccessLog string

// The choices of AccessLog.
const (
	AccessLogNone    AccessLog = "none"
	AccessLogRefused AccessLog = "refused"
	AccessLogAll     AccessLog = "all"
)

// SourceAddress says whose address the workload sees as its peer's, of connections from outside that come through Envoy.
type SourceAddress string

// The choices of SourceAddress. SourceAddressPod is the default.
const (
	SourceAddressPod    SourceAddress = "pod"    // the pod's own
	SourceAddressClient SourceAddress = "client" // the client's, with another port
)

// sourceAddress is its path in the file.
const sourceAddress = "sourceAddress"
