package render

import (
	"errors"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	typev3 "github.com/cncf/xds/go/xds/type/v3"
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"mantlet/internal/rundir"
	"mantlet/schema"
)

const (
	// node names this Envoy to itself: files of SDS secrets need an id and a cluster to be set.
	node = "mantlet"
	// workload is the cluster of all that comes in: wherever the client dialled.
	workload = "workload"
	// discoveryCluster is the cluster that mantlet itself is.
	discoveryCluster = "mantlet"
	// bufferLimit bounds what Envoy holds for each side of a connection. Measured in CPU per GiB, both ways: 128 KiB cost no more than
	// 256 KiB or Envoy's default of 1 MiB do, 64 KiB 10 % more, 32 KiB 20 %. See connectionMemory for what a stalled client then takes.
	bufferLimit = 128 << 10
	// maxConnections is as many as conntrack's table (262,144 entries) can hold at all: each takes an entry for the outer
	// and one for the inner leg. Envoy's default of 1024 connections per cluster is far too low for a sidecar.
	maxConnections = 131072
	// connectTimeout is short so that a dead address costs a retry, not the connection: a SYN and its first two
	// retransmissions (RFC 6298: after 1 s and 3 s) would take longer than a client waits for several addresses.
	connectTimeout = 2 * time.Second
	// fetchTimeout is how long an Envoy that starts waits for the addresses of upstreams that were not looked up yet. mantlet tells
	// of the others at once. While no Envoy serves, a client's first retransmission, after a second, shall find this one.
	fetchTimeout = 250 * time.Millisecond
)

// discovery is where Envoy asks for the addresses of upstreams that are named: mantlet resolves names.
func discovery() *corev3.ApiConfigSource {
	return &corev3.ApiConfigSource{
		ApiType:             corev3.ApiConfigSource_GRPC,
		TransportApiVersion: corev3.ApiVersion_V3,
		GrpcServices: []*corev3.GrpcService{{TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{
			EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: discoveryCluster},
		}}},
		SetNodeOnFirstMessageOnly: true, // it is some 100 KB
	}
}

// http2 is HttpProtocolOptions as a structure, which Envoy takes in the place of any extension's message (translateOpaqueConfig in
// source/common/config/utility.cc). The message's package would make the binary 280 KB larger.
func http2() *typev3.TypedStruct {
	return &typev3.TypedStruct{
		TypeUrl: "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
		Value:   object("explicit_http_config", object("http2_protocol_options", &structpb.Struct{})),
	}
}

func object(key string, value *structpb.Struct) *structpb.Struct {
	return &structpb.Struct{Fields: map[string]*structpb.Value{key: structpb.NewStructValue(value)}}
}

// discoveryServer is mantlet.
func (r *renderer) discoveryServer() *clusterv3.Cluster {
	return &clusterv3.Cluster{
		Name:                 discoveryCluster,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       durationpb.New(connectTimeout),
		LoadAssignment:       assignment(discoveryCluster, atPipe(pipe(rundir.Envoy(r.place.RuntimeDirectory).DiscoverySocket(), 0))),
		TypedExtensionProtocolOptions: map[string]*anypb.Any{
			"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": r.pack(http2()),
		},
	}
}

// Admin returns the admin interface of an epoch: a unix socket, never TCP.
func Admin(runtimeDirectory string, epoch int) *bootstrapv3.Admin {
	return &bootstrapv3.Admin{Address: pipe(rundir.Envoy(runtimeDirectory).AdminSocket(epoch), fromMantlet)}
}

func bootstrap(mesh schema.Mesh, place Place) (*bootstrapv3.Bootstrap, error) {
	r := newRenderer(mesh, place)
	b := &bootstrapv3.Bootstrap{
		Node:            &corev3.Node{Id: node, Cluster: node},
		StaticResources: &bootstrapv3.Bootstrap_StaticResources{},
	}
	if !mesh.IngressOff {
		b.StaticResources.Listeners = []*listenerv3.Listener{r.ingress(schema.ModeMTLS), r.ingress(schema.ModeTLS)}
		b.StaticResources.Clusters = []*clusterv3.Cluster{originalDestination(mesh.SourceAddress)}
	}
	for _, e := range mesh.Egress {
		b.StaticResources.Listeners = append(b.StaticResources.Listeners, r.egress(e))
		b.StaticResources.Clusters = append(b.StaticResources.Clusters, r.upstream(e))
	}
	if slices.ContainsFunc(mesh.Egress, func(e schema.Egress) bool { return e.Upstream.IsName() }) {
		b.StaticResources.Clusters = append(b.StaticResources.Clusters, r.discoveryServer())
		b.DynamicResources = &bootstrapv3.Bootstrap_DynamicResources{AdsConfig: discovery()}
	}
	b.StaticResources.Listeners = append(b.StaticResources.Listeners, r.trialListeners()...)
	b.StaticResources.Clusters = append(b.StaticResources.Clusters, r.trialCluster())
	SetEpoch(b, place.RuntimeDirectory, 0)
	if err := errors.Join(r.err, Limit(b, Limits{}.Capacity(CostOf(mesh)))); err != nil {
		return nil, err
	}
	return b, nil
}

// renderer holds what all parts of one bootstrap share, and the first error of any of them.
type renderer struct {
	mesh  schema.Mesh
	place Place
	err   error

	// What is the same for all entries is made once. It ends up packed, so that no two of them share a message.
	ingressLog, egressLog              []*accesslogv3.AccessLog
	connectedClient, connectedEndpoint *accesslogv3.AccessLog
	parameters                         *tlsv3.TlsParameters
	identity, meshCA                   *tlsv3.SdsSecretConfig
}

func newRenderer(mesh schema.Mesh, place Place) *renderer {
	r := &renderer{mesh: mesh, place: place}
	r.ingressLog, r.egressLog = r.accessLog("ingress", client), r.accessLog("egress", endpoint)
	r.connectedClient, r.connectedEndpoint = r.connected(client), r.connected(endpoint)
	r.parameters = tlsParameters(mesh.TLS.MinVersion)
	r.identity, r.meshCA = r.secret(IdentitySecret), r.secret(MeshCASecret)
	return r
}

// pack wraps an extension's configuration: the same bytes every time, which anypb.New does not promise of maps.
func (r *renderer) pack(m proto.Message) *anypb.Any {
	packed := &anypb.Any{}
	r.err = errors.Join(r.err, anypb.MarshalFrom(packed, m, proto.MarshalOptions{Deterministic: true}))
	return packed
}

func (r *renderer) sds(file string) string {
	return filepath.Join(r.place.RuntimeDirectory, file)
}

// originalDestination connects to the address and port that the client dialled.
func originalDestination(source schema.SourceAddress) *clusterv3.Cluster {
	bind := priority("stays in the pod", WorkloadPriority)
	if source == schema.SourceAddressClient {
		bind.SocketOptions = append(bind.SocketOptions, oddPort())
	}
	return &clusterv3.Cluster{
		Name:                          workload,
		ClusterDiscoveryType:          &clusterv3.Cluster_Type{Type: clusterv3.Cluster_ORIGINAL_DST},
		LbPolicy:                      clusterv3.Cluster_CLUSTER_PROVIDED,
		ConnectTimeout:                durationpb.New(connectTimeout),
		PerConnectionBufferLimitBytes: wrapperspb.UInt32(bufferLimit),
		CircuitBreakers:               circuitBreakers(),
		UpstreamConnectionOptions:     &clusterv3.UpstreamConnectionOptions{TcpKeepalive: keepalive()},
		UpstreamBindConfig:            bind,
	}
}

// oddPort has the kernel choose the port when the socket gets its address, where it takes odd ones first (inet_csk_find_open_port,
// net/ipv4/inet_connection_sock.c). Clients' kernels choose theirs as they connect, and take even ones first
// (__inet_hash_connect, net/ipv4/inet_hashtables.c), so that both rarely have the same. The listener filter original_src asks for
// the choice at connect; this comes after it.
func oddPort() *corev3.SocketOption {
	const solIP, ipBindAddressNoPort = 0, 24 // include/uapi/linux/in.h; for IPv6 too
	return &corev3.SocketOption{
		Description: "has an odd port",
		Level:       solIP,
		Name:        ipBindAddressNoPort,
		Value:       &corev3.SocketOption_IntValue{IntValue: 0},
		State:       corev3.SocketOption_STATE_PREBIND,
	}
}

// priority sets SO_PRIORITY, by which the rules know a socket, before it connects. Envoy sends nothing over a socket for which the
// kernel refuses it (TestRefusedSocketOption).
func priority(description string, value uint32) *corev3.BindConfig {
	const solSocket, soPriority = 1, 12 // include/uapi/asm-generic/socket.h
	return &corev3.BindConfig{SocketOptions: []*corev3.SocketOption{{
		Description: description,
		Level:       solSocket,
		Name:        soPriority,
		Value:       &corev3.SocketOption_IntValue{IntValue: int64(value)},
		State:       corev3.SocketOption_STATE_PREBIND,
	}}}
}

func (r *renderer) upstream(e schema.Egress) *clusterv3.Cluster {
	c := &clusterv3.Cluster{
		Name:                          egressName(e),
		ConnectTimeout:                durationpb.New(connectTimeout),
		PerConnectionBufferLimitBytes: wrapperspb.UInt32(bufferLimit),
		CircuitBreakers:               circuitBreakers(),
		UpstreamConnectionOptions:     &clusterv3.UpstreamConnectionOptions{TcpKeepalive: keepalive()},
		UpstreamBindConfig:            priority("connects to no own listener", EndpointPriority),
		TransportSocket:               r.upstreamTLS(e),
	}
	if addr, ok := e.Upstream.Addr(); ok {
		c.ClusterDiscoveryType = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC}
		c.LoadAssignment = assignment(egressName(e), Endpoint(addr, e.Upstream.Port))
		return c
	}
	c.ClusterDiscoveryType = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS}
	c.EdsClusterConfig = &clusterv3.Cluster_EdsClusterConfig{
		ServiceName: ServiceName(e.Upstream),
		EdsConfig: &corev3.ConfigSource{
			ResourceApiVersion:    corev3.ApiVersion_V3,
			ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
			InitialFetchTimeout:   durationpb.New(fetchTimeout),
		},
	}
	c.OutlierDetection = outlierDetection()
	return c
}

// ServiceName is what Envoy asks for the addresses of an upstream by.
func ServiceName(u schema.Upstream) string { return u.String() }

// Endpoint is an address of an upstream.
func Endpoint(addr netip.Addr, port uint16) *endpointv3.LbEndpoint {
	return &endpointv3.LbEndpoint{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
		Address: address(addr.String(), port),
	}}}
}

func assignment(cluster string, endpoint *endpointv3.LbEndpoint) *endpointv3.ClusterLoadAssignment {
	return &endpointv3.ClusterLoadAssignment{
		ClusterName: cluster,
		Endpoints:   []*endpointv3.LocalityLbEndpoints{{LbEndpoints: []*endpointv3.LbEndpoint{endpoint}}},
	}
}

// outlierDetection takes an address that could not be connected to out of the rotation, all but the last.
func outlierDetection() *clusterv3.OutlierDetection {
	return &clusterv3.OutlierDetection{
		Consecutive_5Xx:    wrapperspb.UInt32(2), // failed connects count as such
		BaseEjectionTime:   durationpb.New(10 * time.Second),
		MaxEjectionPercent: wrapperspb.UInt32(90),
	}
}

func circuitBreakers() *clusterv3.CircuitBreakers {
	limit := wrapperspb.UInt32(maxConnections)
	return &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
		MaxConnections: limit, MaxPendingRequests: limit, MaxRequests: limit, MaxRetries: limit,
	}}}
}

// keepalive finds dead peers of connections that may idle for ever: within two minutes, as three probes go unanswered.
func keepalive() *corev3.TcpKeepalive {
	return &corev3.TcpKeepalive{
		KeepaliveTime:     wrapperspb.UInt32(60),
		KeepaliveInterval: wrapperspb.UInt32(20),
		KeepaliveProbes:   wrapperspb.UInt32(3),
	}
}

func address(host string, port uint16) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address:       host,
		PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(port)},
	}}}
}
