package render

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	dataaccesslogv3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	streamv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stream/v3"
	originaldstv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	originalsrcv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_src/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"mantlet/schema"
)

const (
	// handshakeTimeout cuts a client that never finishes its TLS handshake: many round trips on any network, and less than
	// the time in which such clients could pile up.
	handshakeTimeout = 10 * time.Second
	// earlyData is what Envoy holds of a client's data until the workload's connection is there.
	earlyData = 16 << 10
	// connectAttempts is how many addresses of an upstream a connection tries before it fails.
	connectAttempts = 3
	// portAttempts is how many ports of a client's address are tried. The rules drop the first one's SYN where the client uses the same
	// port (see clients), which is rare, so that a second one does.
	portAttempts = 2
)

// ListenAddresses returns where the listeners of a bootstrap listen.
func ListenAddresses(b *bootstrapv3.Bootstrap) (all []netip.AddrPort) {
	for _, l := range b.GetStaticResources().GetListeners() {
		all = append(all, AddressesOf(l)...)
	}
	return all
}

// AddressesOf returns where a listener listens; nothing for a unix socket.
func AddressesOf(l *listenerv3.Listener) (all []netip.AddrPort) {
	addresses := []*corev3.Address{l.GetAddress()}
	for _, additional := range l.GetAdditionalAddresses() {
		addresses = append(addresses, additional.GetAddress())
	}
	for _, a := range addresses {
		if ip, err := netip.ParseAddr(a.GetSocketAddress().GetAddress()); err == nil {
			all = append(all, netip.AddrPortFrom(ip, uint16(a.GetSocketAddress().GetPortValue())))
		}
	}
	return all
}

func ingressName(mode schema.Mode) string { return "ingress-" + string(mode) }

// egressName is made of the listen address alone: the name that users give is any text.
func egressName(e schema.Egress) string { return "egress-" + e.Listen.String() }

// ingress is the listener that the kernel hands all connections of a mode to. Both always exist, so that a port can
// change its mode without a new Envoy. They bind to loopback: nobody outside can reach them as such.
func (r *renderer) ingress(mode schema.Mode) *listenerv3.Listener {
	name := ingressName(mode)
	l := &listenerv3.Listener{
		Name:                          name,
		StatPrefix:                    name,
		Address:                       address("127.0.0.1", listenerPort(mode)),
		Transparent:                   wrapperspb.Bool(true),
		PerConnectionBufferLimitBytes: wrapperspb.UInt32(bufferLimit),
		TcpKeepalive:                  keepalive(),
		ListenerFilters: []*listenerv3.ListenerFilter{{
			Name:       "envoy.filters.listener.original_dst",
			ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: r.pack(&originaldstv3.OriginalDst{})},
		}},
		FilterChains: []*listenerv3.FilterChain{r.ingressChain(name, mode, nil, nil)},
	}
	if r.mesh.SourceAddress == schema.SourceAddressClient {
		l.ListenerFilters = append(l.ListenerFilters, &listenerv3.ListenerFilter{
			Name: "envoy.filters.listener.original_src",
			// The rules know these connections by their priority, so they need no mark of their own.
			ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: r.pack(&originalsrcv3.OriginalSrc{})},
		})
	}
	r.listed(l, mode)
	if !r.place.NoIPv6 {
		l.AdditionalAddresses = []*listenerv3.AdditionalAddress{{Address: address("::1", listenerPort(mode))}}
	}
	return l
}

// ingressChain hands connections on to where the client dialled.
func (r *renderer) ingressChain(name string, mode schema.Mode, allow, alpn []string) *listenerv3.FilterChain {
	proxy := &tcpproxyv3.TcpProxy{
		StatPrefix:       name,
		ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: workload},
		// The default connects to the workload before any TLS: every silent client gave it a connection, and one
		// connect to this very port started a storm of connections to itself.
		UpstreamConnectMode: tcpproxyv3.UpstreamConnectMode_ON_DOWNSTREAM_TLS_HANDSHAKE,
		MaxEarlyDataBytes:   wrapperspb.UInt32(earlyData),
	}
	if r.mesh.SourceAddress == schema.SourceAddressClient {
		proxy.MaxConnectAttempts = wrapperspb.UInt32(portAttempts)
	}
	return &listenerv3.FilterChain{
		Name:                          name,
		TransportSocket:               r.downstreamTLS(mode, allow, alpn),
		TransportSocketConnectTimeout: durationpb.New(handshakeTimeout),
		Filters:                       append(r.spoke(), r.telling(allow != nil, r.connectedClient, r.ingressLog, proxy)),
	}
}

func (r *renderer) egress(e schema.Egress) *listenerv3.Listener {
	name := egressName(e)
	return &listenerv3.Listener{
		Name:                          name,
		StatPrefix:                    name,
		IgnoreGlobalConnLimit:         true, // which is that of strangers; this listener has its own, see Limit
		Address:                       address(e.Listen.Addr().String(), e.Listen.Port()),
		PerConnectionBufferLimitBytes: wrapperspb.UInt32(bufferLimit),
		TcpKeepalive:                  keepalive(),
		FilterChains: []*listenerv3.FilterChain{{
			Name: name,
			Filters: []*listenerv3.Filter{r.telling(e.ServerNames != nil, r.connectedEndpoint, r.egressLog, &tcpproxyv3.TcpProxy{
				StatPrefix:         name,
				ClusterSpecifier:   &tcpproxyv3.TcpProxy_Cluster{Cluster: name},
				MaxConnectAttempts: wrapperspb.UInt32(connectAttempts),
			})},
		}},
	}
}

// telling completes a TCP proxy that writes a line to the access log when it has made a connection, if who is connected matters.
func (r *renderer) telling(matters bool, connected *accesslogv3.AccessLog, log []*accesslogv3.AccessLog, p *tcpproxyv3.TcpProxy) *listenerv3.Filter {
	if !matters {
		return r.proxy(log, p)
	}
	p.AccessLogOptions = &tcpproxyv3.TcpProxy_TcpAccessLogOptions{FlushAccessLogOnConnected: true}
	return r.proxy(append(slices.Clip(log), connected), p)
}

// ageJitter is how much later than its age a connection may end, in percent.
const ageJitter = 10

// proxy completes a TCP proxy: Envoy's default would cut connections that idle for an hour, as pools to databases do.
func (r *renderer) proxy(log []*accesslogv3.AccessLog, p *tcpproxyv3.TcpProxy) *listenerv3.Filter {
	p.IdleTimeout = durationpb.New(0)
	p.AccessLog = log
	if age := r.mesh.MaxConnectionAge; age > 0 {
		p.MaxDownstreamConnectionDuration = durationpb.New(age)
		// So that what was opened together does not end together.
		p.MaxDownstreamConnectionDurationJitterPercentage = &typev3.Percent{Value: ageJitter}
	}
	return &listenerv3.Filter{
		Name:       "envoy.filters.network.tcp_proxy",
		ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: r.pack(p)},
	}
}

// The sides of Envoy that speak TLS, as its command operators call them.
const (
	client   = "DOWNSTREAM" // of ingress
	endpoint = "UPSTREAM"   // of egress
)

// accessLog writes lines of JSON to Envoy's standard output. Whoever starts Envoy reads them, see package envoy. The peer is
// the side that mutual TLS is spoken with.
func (r *renderer) accessLog(direction, peer string) []*accesslogv3.AccessLog {
	if r.mesh.AccessLog == schema.AccessLogNone {
		return nil
	}
	filter := onConnected(false)
	if r.mesh.AccessLog == schema.AccessLogRefused {
		filter = r.refused(peer)
	}
	return r.logTo(map[string]string{
		"log":         string(r.mesh.AccessLog),
		"direction":   direction,
		"peer":        "%DOWNSTREAM_REMOTE_ADDRESS%",
		"destination": "%DOWNSTREAM_LOCAL_ADDRESS%",
		"upstream":    "%UPSTREAM_HOST%",
		"attempts":    "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
		"certificate": "%" + peer + "_PEER_CERT%",
		"dns_sans":    "%" + peer + "_PEER_DNS_SAN%",
		"uri_sans":    "%" + peer + "_PEER_URI_SAN%",
		"tls_version": "%" + peer + "_TLS_VERSION%",
		"curve":       "%" + peer + "_TLS_GROUP%",
		"refused":     "%DOWNSTREAM_TRANSPORT_FAILURE_REASON%",
		"failed":      "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
		"ended":       "%CONNECTION_TERMINATION_DETAILS%",
		"flags":       "%RESPONSE_FLAGS%",
		"bytes_in":    "%BYTES_RECEIVED%",
		"bytes_out":   "%BYTES_SENT%",
		"duration_ms": "%DURATION%",
	}, filter)
}

// Connected begins the lines of the access log that tell of a connection when it is made. ConnectedFields are what follows, each
// behind a tab, in this order: the client and what it dialled, Envoy's own address towards the upstream and the upstream's, the TLS
// version of the side that mutual TLS is spoken with, and the peer's certificate there, as PEM in URL encoding. None of them can contain
// a tab or a line break.
const (
	Connected       = "connected"
	ConnectedFields = 6
)

// connected tells of connections when they are made. Text costs Envoy less than JSON.
func (r *renderer) connected(peer string) *accesslogv3.AccessLog {
	line := strings.Join([]string{
		Connected, "%DOWNSTREAM_REMOTE_ADDRESS%", "%DOWNSTREAM_LOCAL_ADDRESS%", "%UPSTREAM_LOCAL_ADDRESS%", "%UPSTREAM_REMOTE_ADDRESS%",
		"%" + peer + "_TLS_VERSION%", "%" + peer + "_PEER_CERT%",
	}, "\t") + "\n"
	return r.stdout(&corev3.SubstitutionFormatString{Format: &corev3.SubstitutionFormatString_TextFormatSource{
		TextFormatSource: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: line}},
	}}, onConnected(true))
}

// onConnected lets through what is written when a connection is made, or else all other lines.
func onConnected(is bool) *accesslogv3.AccessLogFilter {
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_LogTypeFilter{LogTypeFilter: &accesslogv3.LogTypeFilter{
		Types: []dataaccesslogv3.AccessLogType{dataaccesslogv3.AccessLogType_TcpUpstreamConnected}, Exclude: !is,
	}}}
}

// logTo writes a line of JSON, with these fields, for each connection that a filter lets through, if there is one.
func (r *renderer) logTo(operators map[string]string, filter *accesslogv3.AccessLogFilter) []*accesslogv3.AccessLog {
	fields := &structpb.Struct{Fields: map[string]*structpb.Value{}}
	for name, operator := range operators {
		fields.Fields[name] = structpb.NewStringValue(operator)
	}
	return []*accesslogv3.AccessLog{r.stdout(&corev3.SubstitutionFormatString{
		Format: &corev3.SubstitutionFormatString_JsonFormat{JsonFormat: fields},
	}, filter)}
}

func (r *renderer) stdout(format *corev3.SubstitutionFormatString, filter *accesslogv3.AccessLogFilter) *accesslogv3.AccessLog {
	return &accesslogv3.AccessLog{
		Name:   "envoy.access_loggers.stdout",
		Filter: filter,
		ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: r.pack(&streamv3.StdoutAccessLog{
			AccessLogFormat: &streamv3.StdoutAccessLog_LogFormat{LogFormat: format},
		})},
	}
}
