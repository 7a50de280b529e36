package render

import (
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	echov3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/echo/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"mantlet/internal/rundir"
)

// The trial is a loop in Envoy that certificates are tried in before they are published. What comes to the socket of its
// client end goes through Envoy's TLS client, to the socket of its server end, through Envoy's TLS server, and is echoed.
// So Envoy's own TLS judges a certificate at both ends. Both sockets lie in the private runtime directory.
const (
	trialClient = "trial-client"
	trialServer = "trial-server"
)

// The trial's secrets. The ends have a trust anchor each, so that one of them can be told to accept any certificate: then
// the handshake tells of the other end alone.
const (
	TrialIdentitySecret = "trial-identity"
	TrialClientCASecret = "trial-client-ca" // what the client end verifies the server's certificate with
	TrialServerCASecret = "trial-server-ca" // what the server end verifies the client's certificate with
)

// TrialDirection is what the trial's lines of the access log have as their direction. Their destination is the end that
// they tell of: client or server.
const TrialDirection = "trial"

// TrialSocket returns the path of the socket that leads into an epoch's trial.
func TrialSocket(runtimeDirectory string, epoch int) string {
	return rundir.Envoy(runtimeDirectory).TrialSocket(trialClient, epoch)
}

// SetEpoch gives a bootstrap the sockets of an epoch: those of the admin interface and of the trial. An epoch that starts
// removes a socket that is in its way, which must not be its parent's.
func SetEpoch(b *bootstrapv3.Bootstrap, runtimeDirectory string, epoch int) {
	b.Admin = Admin(runtimeDirectory, epoch)
	for _, l := range b.GetStaticResources().GetListeners() {
		switch l.Name {
		case trialClient:
			l.Address = pipe(TrialSocket(runtimeDirectory, epoch), fromMantlet)
		case trialServer:
			l.Address = pipe(rundir.Envoy(runtimeDirectory).TrialSocket(trialServer, epoch), fromEnvoy)
		}
	}
	for _, c := range b.GetStaticResources().GetClusters() {
		if c.Name == trialServer {
			c.LoadAssignment = assignment(trialServer, atPipe(pipe(rundir.Envoy(runtimeDirectory).TrialSocket(trialServer, epoch), 0)))
		}
	}
}

// Modes of sockets. They lie in a directory that mantlet and Envoy alone get into, two users.
const (
	fromMantlet = 0o666
	fromEnvoy   = 0o600
)

func pipe(path string, mode uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: path, Mode: mode}}}
}

func atPipe(address *corev3.Address) *endpointv3.LbEndpoint {
	return &endpointv3.LbEndpoint{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: address}}}
}

// trialListeners are the ends of the trial. However many connections there are, they take one: a trial that fails must
// be the certificates' fault. There are no addresses yet, see SetEpoch.
func (r *renderer) trialListeners() []*listenerv3.Listener {
	server := &tlsv3.DownstreamTlsContext{
		CommonTlsContext:         r.trialContext(TrialServerCASecret),
		RequireClientCertificate: wrapperspb.Bool(true),
		SessionTicketKeysType:    &tlsv3.DownstreamTlsContext_DisableStatelessSessionResumption{DisableStatelessSessionResumption: true},
	}
	return []*listenerv3.Listener{
		{
			Name:                  trialClient,
			StatPrefix:            trialClient,
			IgnoreGlobalConnLimit: true,
			FilterChains: []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{r.proxy(r.trialLog("client"), &tcpproxyv3.TcpProxy{
				StatPrefix:       trialClient,
				ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: trialServer},
			})}}},
		},
		{
			Name:                  trialServer,
			StatPrefix:            trialServer,
			IgnoreGlobalConnLimit: true,
			AccessLog:             r.trialLog("server"),
			FilterChains: []*listenerv3.FilterChain{{
				TransportSocket:               r.transportSocket(server),
				TransportSocketConnectTimeout: durationpb.New(handshakeTimeout),
				Filters: []*listenerv3.Filter{{
					Name:       "envoy.filters.network.echo",
					ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: r.pack(&echov3.Echo{})},
				}},
			}},
		},
	}
}

func (r *renderer) trialCluster() *clusterv3.Cluster {
	client := &tlsv3.UpstreamTlsContext{
		CommonTlsContext: r.trialContext(TrialClientCASecret),
		MaxSessionKeys:   wrapperspb.UInt32(0), // a session that is resumed verifies nothing
	}
	return &clusterv3.Cluster{
		Name:                 trialServer,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       durationpb.New(handshakeTimeout),
		TransportSocket:      r.transportSocket(client),
	}
}

func (r *renderer) trialContext(ca string) *tlsv3.CommonTlsContext {
	c := &tlsv3.CommonTlsContext{
		TlsParams:                      r.parameters,
		TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{r.secret(TrialIdentitySecret)},
	}
	trust(c, r.secret(ca), nil)
	return c
}

// trialLog has a line for each connection, whatever else is logged: it says how TLS failed at this end.
func (r *renderer) trialLog(end string) []*accesslogv3.AccessLog {
	return r.logTo(map[string]string{
		"direction":   TrialDirection,
		"destination": end,
		"refused":     "%DOWNSTREAM_TRANSPORT_FAILURE_REASON%",
		"failed":      "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
	}, nil)
}
