package schema

import "time"

// The types of this file are the form of the override file: `mantlet schema` prints the JSON Schema that is generated from
// them, and the YAML reader walks them. Everything is optional except the key of an entry.

type fileForm struct {
	Ingress          []ingressForm  `json:"ingress,omitempty" jsonschema_description:"What happens to connections from outside the pod, by port. A port without an entry requires mutual TLS."`
	Egress           []egressForm   `json:"egress,omitempty" jsonschema_description:"Loopback addresses that the workload connects to, each with the upstream that its connections go to."`
	Probes           []probeForm    `json:"probes,omitempty" jsonschema_description:"Probes of the workload that mantlet makes on behalf of the kubelet, whose own would fail on mutual TLS. The result is served at the status address, at /probe/NAME."`
	TLS              *tlsForm       `json:"tls,omitempty" jsonschema_description:"TLS settings of both sides of the mesh."`
	Envoy            *envoyForm     `json:"envoy,omitempty" jsonschema_description:"Settings of the data plane."`
	OtherProtocols   OtherProtocols `json:"otherProtocols,omitempty" jsonschema:"default=drop" jsonschema_description:"What happens to inbound UDP, SCTP and so on at ports that are not passthrough."`
	AccessLog        AccessLog      `json:"accessLog,omitempty" jsonschema:"default=refused" jsonschema_description:"Which connections are logged."`
	SourceAddress    SourceAddress  `json:"sourceAddress,omitempty" jsonschema:"default=pod" jsonschema_description:"Whose address the workload sees as its peer's, of connections from outside through mantlet. pod: the pod's own. client: the client's; the port is another one than the client's."`
	Outbound         *outboundForm  `json:"outbound,omitempty" jsonschema_description:"What happens to connections that the pod makes past the egress entries, in the clear."`
	MaxConnectionAge ageText        `json:"maxConnectionAge,omitempty" jsonschema:"default=none" jsonschema_description:"How long a connection through mantlet may last, at least 1m. The two sides are closed then, or up to a tenth later, and what dials again shows and verifies the certificates of today."`
}

type ingressForm struct {
	Port   portsText  `json:"port" jsonschema_description:"A port of the pod, or a range, for example 8000-8099. It is the key of the entry: an entry of an earlier source with the same key is changed field by field."`
	Name   nameText   `json:"name,omitempty" jsonschema_description:"Informational."`
	Mode   Mode       `json:"mode,omitempty" jsonschema:"default=mtls" jsonschema_description:"mtls: TLS, and a client certificate of the mesh is required. tls: TLS without client certificates. passthrough: not redirected to mantlet at all."`
	Allow  []sanText  `json:"allow,omitempty" jsonschema:"minItems=1" jsonschema_description:"mtls only: the SANs of the clients that are admitted, DNS names or URIs, compared as whole strings. Without a list, every client with a certificate of the mesh CA is admitted."`
	ALPN   []alpnText `json:"alpn,omitempty" jsonschema:"minItems=1,maxItems=16" jsonschema_description:"mtls and tls only: the protocols that TLS may agree on with the client (RFC 7301), the preferred first, for example h2 and http/1.1. The workload has to speak each of them in plaintext. Without a list, none is agreed on, and gRPC clients refuse the server."`
	Remove removeText `json:"remove,omitempty" jsonschema_description:"Removes the entry of an earlier source; the port then requires mutual TLS."`
}

type egressForm struct {
	Listen      listenText       `json:"listen" jsonschema_description:"A loopback address and a port. It is the key of the entry."`
	Name        nameText         `json:"name,omitempty" jsonschema_description:"Informational."`
	Upstream    upstreamText     `json:"upstream,omitempty" jsonschema_description:"A host name or an IP address, and a port. A new entry must have it."`
	ServerNames []serverNameText `json:"serverNames,omitempty" jsonschema:"minItems=1" jsonschema_description:"SANs, one of which the endpoint's certificate must have; the first DNS name is sent as SNI. Without a list, every workload of the mesh is accepted."`
	ALPN        []alpnText       `json:"alpn,omitempty" jsonschema:"minItems=1,maxItems=16" jsonschema_description:"The protocols that the endpoint is offered by TLS (RFC 7301), the preferred first. The workload speaks the one that it speaks, whatever the endpoint chooses: name that one alone, as a rule. Without a list, none is offered."`
	Remove      removeText       `json:"remove,omitempty" jsonschema_description:"Removes the entry of an earlier source."`
}

type probeForm struct {
	Name   probeName     `json:"name" jsonschema_description:"A DNS label. It is the key of the entry. An entry has one of http, tcp and grpc, which replaces that of an earlier source."`
	HTTP   httpProbeText `json:"http,omitempty" jsonschema_description:"A port and a path, for example 8080/healthz. Succeeds if a GET is answered with a status from 200 to 399."`
	TCP    portText      `json:"tcp,omitempty" jsonschema_description:"A port. Succeeds if it accepts a connection."`
	GRPC   grpcProbeText `json:"grpc,omitempty" jsonschema_description:"A port, or a port and a service, for example 9000/my.Service. Succeeds if grpc.health.v1 answers SERVING."`
	Remove removeText    `json:"remove,omitempty" jsonschema_description:"Removes the entry of an earlier source."`
}

type outboundForm struct {
	Mode  OutboundMode `json:"mode,omitempty" jsonschema:"default=accept" jsonschema_description:"accept: they leave, and nobody keeps account. observe: they leave, and the status lists where they go. drop: those that are not allowed are refused. Loopback, ICMP, answers to connections from outside, Envoy's connections to upstreams and mantlet's own look-ups go on in every mode."`
	Allow []allowText  `json:"allow,omitempty" jsonschema_description:"What may leave in the clear: dns, which is UDP and TCP port 53 of the name servers of resolv.conf, or an address or a prefix with a port, by whatever transport protocol, for example 10.96.0.1:443, 10.0.0.0/8:5432 or [fd00::]/8:443. Mode observe tells of all the others. The list of a later source replaces that of an earlier one."`
}

type tlsForm struct {
	MinVersion TLSVersion `json:"minVersion,omitempty" jsonschema:"default=1.2" jsonschema_description:"The lowest TLS version."`
}

type envoyForm struct {
	Concurrency        threadsText   `json:"concurrency,omitempty" jsonschema:"default=2" jsonschema_description:"Worker threads. Lowering the number loses queued connections at a hot restart."`
	DrainTime          durationText  `json:"drainTime,omitempty" jsonschema:"default=10s" jsonschema_description:"How long connections of the old Envoy get to end after a hot restart, at least."`
	ParentShutdownTime durationText  `json:"parentShutdownTime,omitempty" jsonschema:"default=10m" jsonschema_description:"How long connections of the old Envoy may last after a hot restart, at most. Must be more than drainTime."`
	LogLevel           EnvoyLogLevel `json:"logLevel,omitempty" jsonschema:"default=warning" jsonschema_description:"The log level of Envoy."`
}

// fields are the fields of the override file outside of the lists of entries: the kind of their values, or of the items of one that is a
// list, the variable that sets them in the environment, where commas separate items, and the value where no source sets them. A list is
// empty then.
var fields = []struct {
	path, variable string
	kind           leaf
	isList         bool
	preset         any
}{
	{path: "tls.minVersion", variable: "MANTLET_TLS_MIN_VERSION", kind: TLSVersion(""), preset: TLS12},
	{path: "envoy.concurrency", variable: "MANTLET_ENVOY_CONCURRENCY", kind: threadsText(""), preset: 2},
	{path: "envoy.drainTime", variable: "MANTLET_ENVOY_DRAIN_TIME", kind: durationText(""), preset: period(10 * time.Second)},
	{path: "envoy.parentShutdownTime", variable: "MANTLET_ENVOY_PARENT_SHUTDOWN_TIME", kind: durationText(""), preset: period(10 * time.Minute)},
	{path: "envoy.logLevel", variable: LogLevelVariable, kind: EnvoyLogLevel(""), preset: EnvoyLogLevel("warning")},
	{path: "otherProtocols", variable: "MANTLET_OTHER_PROTOCOLS", kind: OtherProtocols(""), preset: OtherProtocolsDrop},
	{path: "accessLog", variable: "MANTLET_ACCESS_LOG", kind: AccessLog(""), preset: AccessLogRefused},
	{path: sourceAddress, variable: "MANTLET_SOURCE_ADDRESS", kind: SourceAddress(""), preset: SourceAddressPod},
	{path: "maxConnectionAge", variable: "MANTLET_MAX_CONNECTION_AGE", kind: ageText(""), preset: age(0)},
	{path: outboundMode, variable: "MANTLET_OUTBOUND", kind: OutboundMode(""), preset: OutboundAccept},
	{path: outboundAllow, variable: "MANTLET_OUTBOUND_ALLOW", kind: allowText(""), isList: true},
}
