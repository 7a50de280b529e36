package render

import (
	"testing"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"mantlet/schema"
)

// TestLastLook gives the last look at a context what no other code makes: it must see it.
func TestLastLook(t *testing.T) {
	for name, fault := range map[string]func(*tlsv3.DownstreamTlsContext){
		"nothing":                           nil,
		"no client certificate is required": func(c *tlsv3.DownstreamTlsContext) { c.RequireClientCertificate = wrapperspb.Bool(false) },
		"it isn't said whether one is":      func(c *tlsv3.DownstreamTlsContext) { c.RequireClientCertificate = nil },
		"nobody verifies":                   func(c *tlsv3.DownstreamTlsContext) { c.CommonTlsContext.ValidationContextType = nil },
		"there is no context at all":        func(c *tlsv3.DownstreamTlsContext) { c.CommonTlsContext = nil },
		"no anchor":                         func(c *tlsv3.DownstreamTlsContext) { combined(c).ValidationContextSdsSecretConfig = nil },
		"the anchor is the workload's own": func(c *tlsv3.DownstreamTlsContext) {
			combined(c).ValidationContextSdsSecretConfig.Name = IdentitySecret
		},
		"a context that is not the mesh CA's": func(c *tlsv3.DownstreamTlsContext) { c.CommonTlsContext.ValidationContextType = withoutAnchor },
	} {
		r := newRenderer(schema.Mesh{}, Place{})
		socket := r.downstreamTLS(schema.ModeMTLS, nil, nil)
		if r.err != nil {
			t.Fatal(r.err)
		}
		var c tlsv3.DownstreamTlsContext
		if err := socket.GetTypedConfig().UnmarshalTo(&c); err != nil {
			t.Fatal(err)
		}
		if fault == nil {
			if err := demandsClientCertificate(&c); err != nil {
				t.Errorf("%s is wrong: %v", name, err)
			}
			continue
		}
		fault(&c)
		if err := demandsClientCertificate(&c); err == nil {
			t.Errorf("%s, and it passes", name)
		}
	}
}

func combined(c *tlsv3.DownstreamTlsContext) *tlsv3.CommonTlsContext_CombinedCertificateValidationContext {
	return c.CommonTlsContext.GetCombinedValidationContext()
}

var withoutAnchor = &tlsv3.CommonTlsContext_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{}}
