package schema

// The types of this file are the override file's form: `mantlet schema` prints the JSON Schema that is made of them, and
// the reader of YAML walks them. Everything is optional, but an entry's key.

type fileForm struct {
	Ingress        []ingressForm  `json:"ingress,omitempty" jsonschema_description:"What happens to connections from outside the pod, by port. Ports without an entry demand mutual TLS."`
	Egress         []egressForm   `json:"egress,omitempty" jsonschema_description:"Loopback addresses that the workload connects to, and the upstreams that they stand for."`
	Probes         []probeForm    `json:"probes,omitempty" jsonschema_description:"Questions to the workload that mantlet asks for a kubelet, whose own probes would meet mutual TLS. The status address answers at /probe/NAME."`
	TLS            *tlsForm       `json:"tls,omitempty" jsonschema_description:"What both sides of the mesh speak."`
	Envoy          *envoyForm     `json:"envoy,omitempty" jsonschema_description:"Settings of the data plane."`
	OtherProtocols OtherProtocols `json:"otherProtocols,omitempty" jsonschema:"default=drop" jsonschema_description:"What happens to inbound UDP, SCTP and so on at ports that are not passthrough."`
	AccessLog      AccessLog      `json:"accessLog,omitempty" jsonschema:"default=refused" jsonschema_description:"Which connections a log line is written for."`
}

type ingressForm struct {
	Port   portsText  `json:"port" jsonschema_description:"A port of the pod, or a range as 8000-8099. It is the entry's key: an entry of an earlier source with the same key is changed field by field."`
	Name   nameText   `json:"name,omitempty" jsonschema_description:"Informational."`
	Mode   Mode       `json:"mode,omitempty" jsonschema:"default=mtls" jsonschema_description:"mtls: TLS, a client certificate of the mesh is required. tls: TLS, no client certificate is asked for. passthrough: not redirected at all."`
	Allow  []sanText  `json:"allow,omitempty" jsonschema:"minItems=1" jsonschema_description:"mtls only: the SANs of the clients that are let in, DNS names or URIs, compared as whole strings. Without a list, anyone whom the mesh CA signed."`
	Remove removeText `json:"remove,omitempty" jsonschema_description:"Takes the entry of an earlier source away; the port then demands mutual TLS."`
}

type egressForm struct {
	Listen      listenText       `json:"listen" jsonschema_description:"A loopback address and a port. It is the entry's key."`
	Name        nameText         `json:"name,omitempty" jsonschema_description:"Informational."`
	Upstream    upstreamText     `json:"upstream,omitempty" jsonschema_description:"A host name or an IP address, and a port. A new entry needs it."`
	ServerNames []serverNameText `json:"serverNames,omitempty" jsonschema:"minItems=1" jsonschema_description:"The SANs of which the endpoint's certificate must have one; the first DNS name is sent as SNI. Without a list, any workload of the mesh."`
	Remove      removeText       `json:"remove,omitempty" jsonschema_description:"Takes the entry of an earlier source away."`
}

type probeForm struct {
	Name   probeName     `json:"name" jsonschema_description:"A DNS label. It is the entry's key. An entry has one of http, tcp and grpc: in place of what an earlier source says."`
	HTTP   httpProbeText `json:"http,omitempty" jsonschema_description:"A port and a path, as 8080/healthz: well if a GET is answered with a status from 200 to 399."`
	TCP    portText      `json:"tcp,omitempty" jsonschema_description:"A port: well if it takes a connection."`
	GRPC   grpcProbeText `json:"grpc,omitempty" jsonschema_description:"A port, or a port and a service, as 9000/my.Service: well if grpc.health.v1 says SERVING."`
	Remove removeText    `json:"remove,omitempty" jsonschema_description:"Takes the entry of an earlier source away."`
}

type tlsForm struct {
	MinVersion TLSVersion `json:"minVersion,omitempty" jsonschema:"default=1.2" jsonschema_description:"The least version of TLS."`
}

type envoyForm struct {
	Concurrency        threadsText   `json:"concurrency,omitempty" jsonschema:"default=2" jsonschema_description:"Worker threads. A smaller number than before loses queued connections at a hot restart."`
	DrainTime          durationText  `json:"drainTime,omitempty" jsonschema:"default=10s" jsonschema_description:"The least time that connections of an old epoch get after a hot restart."`
	ParentShutdownTime durationText  `json:"parentShutdownTime,omitempty" jsonschema:"default=10m" jsonschema_description:"The most time that connections of an old epoch get. Must be more than drainTime."`
	LogLevel           EnvoyLogLevel `json:"logLevel,omitempty" jsonschema:"default=warning" jsonschema_description:"What Envoy logs."`
}

// scalarVariables names the variable of each field that the environment can set as well.
var scalarVariables = map[string]struct {
	path string
	kind leaf
}{
	"MANTLET_TLS_MIN_VERSION":            {"tls.minVersion", TLSVersion("")},
	"MANTLET_ENVOY_CONCURRENCY":          {"envoy.concurrency", threadsText("")},
	"MANTLET_ENVOY_DRAIN_TIME":           {"envoy.drainTime", durationText("")},
	"MANTLET_ENVOY_PARENT_SHUTDOWN_TIME": {"envoy.parentShutdownTime", durationText("")},
	"MANTLET_ENVOY_LOG_LEVEL":            {"envoy.logLevel", EnvoyLogLevel("")},
	"MANTLET_OTHER_PROTOCOLS":            {"otherProtocols", OtherProtocols("")},
	"MANTLET_ACCESS_LOG":                 {"accessLog", AccessLog("")},
}

// defaults are what the scalar fields are where no source sets them.
var defaults = map[string]string{
	"tls.minVersion":           string(TLS12),
	"envoy.concurrency":        "2",
	"envoy.drainTime":          "10s",
	"envoy.parentShutdownTime": "10m",
	"envoy.logLevel":           "warning",
	"otherProtocols":           string(OtherProtocolsDrop),
	"accessLog":                string(AccessLogRefused),
}
