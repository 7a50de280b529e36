package render

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"mantlet/internal/rundir"
	"mantlet/schema"
)

// The secrets that Envoy reads from files of the runtime directory, each a file of its own: SDS allows one resource in
// a file.
const (
	IdentitySecret = "identity" // this workload's chain and key
	MeshCASecret   = "mesh-ca"  // the only trust anchor for peers
)

// sessionKeys is how many tickets a cluster keeps for resumption. A P-384 signature is 70 % of a full handshake; Envoy's
// default of 1 resumes a quarter of connections, 64 all (measured).
const sessionKeys = 64

// downstreamTLS is what a listener speaks to clients. A list of allowed SANs is for ModeMTLS only.
func (r *renderer) downstreamTLS(mode schema.Mode, allow, alpn []string) *corev3.TransportSocket {
	c := &tlsv3.DownstreamTlsContext{CommonTlsContext: r.common(alpn)}
	if mode == schema.ModeMTLS {
		c.RequireClientCertificate = wrapperspb.Bool(true)
		trust(c.CommonTlsContext, r.meshCA, r.sanMatchers(allow, wholeString))
		r.err = errors.Join(r.err, demandsClientCertificate(c))
	}
	return r.transportSocket(c)
}

func (r *renderer) upstreamTLS(e schema.Egress) *corev3.TransportSocket {
	c := &tlsv3.UpstreamTlsContext{
		CommonTlsContext: r.common(e.ALPN),
		Sni:              strings.TrimSuffix(e.SNI(), "."), // RFC 6066, section 3: without the dot of an absolute name
		MaxSessionKeys:   wrapperspb.UInt32(sessionKeys),
	}
	trust(c.CommonTlsContext, r.meshCA, r.sanMatchers(e.ServerNames, exact))
	r.err = errors.Join(r.err, verifiesPeer(c.CommonTlsContext))
	return r.transportSocket(c)
}

func (r *renderer) transportSocket(context proto.Message) *corev3.TransportSocket {
	return &corev3.TransportSocket{
		Name:       "envoy.transport_sockets.tls",
		ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: r.pack(context)},
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
	if name := c.GetCombinedValidationContext().GetValidationContextSdsSecretConfig().GetName(); name != MeshCASecret {
		return fmt.Errorf("rendering mTLS: the context trusts %q, not the mesh CA", name)
	}
	return nil
}

// trust makes a CA the only trust anchor for the peer. Where there are matchers, one of the peer's SANs must match.
func trust(c *tlsv3.CommonTlsContext, ca *tlsv3.SdsSecretConfig, sans []*tlsv3.SubjectAltNameMatcher) {
	c.ValidationContextType = &tlsv3.CommonTlsContext_CombinedValidationContext{
		CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
			DefaultValidationContext:         &tlsv3.CertificateValidationContext{MatchTypedSubjectAltNames: sans},
			ValidationContextSdsSecretConfig: ca,
		},
	}
}

// sanMatchers matches any of the names, each as a DNS name or a URI. To Envoy no matcher means anyone, which an empty list
// must never come to mean.
func (r *renderer) sanMatchers(names []string, match func(string) *matcherv3.StringMatcher) []*tlsv3.SubjectAltNameMatcher {
	if names != nil && len(names) == 0 {
		r.err = errors.Join(r.err, errors.New("rendering TLS: a list of names is empty"))
	}
	var all []*tlsv3.SubjectAltNameMatcher
	for _, name := range names {
		kind := tlsv3.SubjectAltNameMatcher_DNS
		if schema.IsURI(name) {
			kind = tlsv3.SubjectAltNameMatcher_URI
		}
		all = append(all, &tlsv3.SubjectAltNameMatcher{SanType: kind, Matcher: match(name)})
	}
	return all
}

// wholeString matches a name as it stands in the certificate: with Envoy's exact match a wildcard in a *client's*
// certificate would be let in as everybody whom it covers.
func wholeString(name string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{
		SafeRegex: &matcherv3.RegexMatcher{Regex: regexp.QuoteMeta(name)},
	}}
}

// exact matches an endpoint's name as clients do: a wildcard in its certificate covers it.
func exact(name string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: name}}
}

// common is what both sides speak. Of its protocols Envoy's server takes the first that the client offers, and it goes on without
// one where the client offers none of them.
func (r *renderer) common(alpn []string) *tlsv3.CommonTlsContext {
	return &tlsv3.CommonTlsContext{
		AlpnProtocols:                  alpn,
		TlsParams:                      r.parameters,
		TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{r.identity},
	}
}

func tlsParameters(minimum schema.TLSVersion) *tlsv3.TlsParameters {
	least := tlsv3.TlsParameters_TLSv1_2
	if minimum == schema.TLS13 {
		least = tlsv3.TlsParameters_TLSv1_3
	}
	return &tlsv3.TlsParameters{
		TlsMinimumProtocolVersion: least,
		TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3, // Envoy's clients stop at 1.2 by default
		// Post-quantum first. Certificates are P-384: without it in a client's list, TLS 1.2 can't use them at all.
		EcdhCurves: []string{"X25519MLKEM768", "X25519", "P-256", "P-384"},
	}
}

func (r *renderer) secret(name string) *tlsv3.SdsSecretConfig {
	return &tlsv3.SdsSecretConfig{
		Name: name,
		SdsConfig: &corev3.ConfigSource{
			ResourceApiVersion: corev3.ApiVersion_V3,
			ConfigSourceSpecifier: &corev3.ConfigSource_PathConfigSource{PathConfigSource: &corev3.PathConfigSource{
				Path: r.sds(rundir.SecretFile(name)),
			}},
		},
	}
}
