package render

import (
	"errors"
	"fmt"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"mantlet/schema"
)

// The secrets that Envoy reads from files of the runtime directory, each a file of its own: SDS allows one resource in
// a file.
const (
	IdentitySecret = "identity" // this workload's chain and key
	MeshCASecret   = "mesh-ca"  // the only trust anchor for peers
)

// SecretFile returns the name of the file, within the runtime directory, that holds a secret.
func SecretFile(secret string) string { return "sds-" + secret + ".json" }

const transportSocketTLS = "envoy.transport_sockets.tls"

// sessionKeys is how many tickets a cluster keeps for resumption. A P-384 signature is 70 % of a full handshake; Envoy's
// default of 1 resumes a quarter of connections, 64 all (measured).
const sessionKeys = 64

func (r *renderer) downstreamTLS(mode schema.Mode) *corev3.TransportSocket {
	c := &tlsv3.DownstreamTlsContext{CommonTlsContext: r.common()}
	if mode == schema.ModeMTLS {
		c.RequireClientCertificate = wrapperspb.Bool(true)
		r.trustMeshCA(c.CommonTlsContext)
		r.err = errors.Join(r.err, demandsClientCertificate(c))
	}
	return &corev3.TransportSocket{
		Name:       transportSocketTLS,
		ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: r.pack(c)},
	}
}

func (r *renderer) upstreamTLS(e schema.Egress) *corev3.TransportSocket {
	c := &tlsv3.UpstreamTlsContext{CommonTlsContext: r.common(), MaxSessionKeys: wrapperspb.UInt32(sessionKeys)}
	r.trustMeshCA(c.CommonTlsContext)
	if _, isAddress := e.Upstream.Addr(); !isAddress {
		c.Sni = e.Upstream.Host
	}
	r.err = errors.Join(r.err, verifiesPeer(c.CommonTlsContext))
	return &corev3.TransportSocket{
		Name:       transportSocketTLS,
		ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: r.pack(c)},
	}
}

// demandsClientCertificate is the last look at an mTLS context: Envoy asks for no certificate without the one field and
// verifies nothing without the other.
func demandsClientCertificate(c *tlsv3.DownstreamTlsContext) error {
	if !c.GetRequireClientCertificate().GetValue() {
		return errors.New("rendering mTLS: the context does not require a client certificate")
	}
	return verifiesPeer(c.CommonTlsContext)
}

func verifiesPeer(c *tlsv3.CommonTlsContext) error {
	if name := c.GetValidationContextSdsSecretConfig().GetName(); name != MeshCASecret {
		return fmt.Errorf("rendering mTLS: the context trusts %q, not the mesh CA", name)
	}
	return nil
}

func (r *renderer) common() *tlsv3.CommonTlsContext {
	least := tlsv3.TlsParameters_TLSv1_2
	if r.mesh.TLS.MinVersion == schema.TLS13 {
		least = tlsv3.TlsParameters_TLSv1_3
	}
	return &tlsv3.CommonTlsContext{
		TlsParams: &tlsv3.TlsParameters{
			TlsMinimumProtocolVersion: least,
			TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3, // Envoy's clients stop at 1.2 by default
			// Post-quantum first. Certificates are P-384: without it in a client's list, TLS 1.2 can't use them at all.
			EcdhCurves: []string{"X25519MLKEM768", "X25519", "P-256", "P-384"},
		},
		TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{r.secret(IdentitySecret)},
	}
}

func (r *renderer) trustMeshCA(c *tlsv3.CommonTlsContext) {
	c.ValidationContextType = &tlsv3.CommonTlsContext_ValidationContextSdsSecretConfig{
		ValidationContextSdsSecretConfig: r.secret(MeshCASecret),
	}
}

func (r *renderer) secret(name string) *tlsv3.SdsSecretConfig {
	return &tlsv3.SdsSecretConfig{
		Name: name,
		SdsConfig: &corev3.ConfigSource{
			ResourceApiVersion: corev3.ApiVersion_V3,
			ConfigSourceSpecifier: &corev3.ConfigSource_PathConfigSource{PathConfigSource: &corev3.PathConfigSource{
				Path: r.sds(SecretFile(name)),
			}},
		},
	}
}
