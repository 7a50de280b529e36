package render

import (
	xdstypev3 "github.com/cncf/xds/go/xds/type/v3"
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	celv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/filters/cel/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"mantlet/schema"
)

// refused lets connections through to the log that came to nothing: the client's TLS handshake failed or took too long,
// all attempts to connect onwards failed, or there was nowhere to connect to. The flag of a failed attempt alone (UF) stays on a
// connection whose next attempt succeeded.
//
// Handshakes with endpoints are attempts to connect. Those of clients set no flag, so an expression has to find them. Once the handshake
// is done Envoy connects onwards: a TLS error after that, as of a client that ends its connection by a reset, is no refusal.
//
// Envoy 1.40 takes 0.1 to 0.2 ms to evaluate an expression, a fifth of what a connection takes in all. So it is asked only about clients
// that said nothing.
func (r *renderer) refused(peer string) *accesslogv3.AccessLogFilter {
	flagged := &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_ResponseFlagFilter{
		ResponseFlagFilter: &accesslogv3.ResponseFlagFilter{Flags: []string{"URX", "UH"}},
	}}
	if peer == endpoint {
		return flagged
	}
	const handshake = `connection.transport_failure_reason != "" && upstream.request_attempt_count == 0 || ` +
		`connection.termination_details != ""`
	failed := &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_ExtensionFilter{
		ExtensionFilter: &accesslogv3.ExtensionFilter{
			Name: "envoy.access_loggers.extension_filters.cel",
			ConfigType: &accesslogv3.ExtensionFilter_TypedConfig{
				TypedConfig: r.pack(&celv3.ExpressionFilter{Expression: handshake}),
			},
		},
	}}
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_OrFilter{
		OrFilter: &accesslogv3.OrFilter{Filters: []*accesslogv3.AccessLogFilter{
			flagged,
			{FilterSpecifier: &accesslogv3.AccessLogFilter_AndFilter{
				AndFilter: &accesslogv3.AndFilter{Filters: []*accesslogv3.AccessLogFilter{onConnected(false), silent(), failed}},
			}},
		}},
	}}
}

// rbac is the network filter that notes what its shadow rules say, in the metadata of the connection.
const rbac = "envoy.filters.network.rbac"

// spoke notes of a connection that its client sent data, which it can do once the handshake is done. It lets all connections through: it
// has shadow rules only, and those enforce nothing.
func (r *renderer) spoke() []*listenerv3.Filter {
	if r.mesh.AccessLog != schema.AccessLogRefused {
		return nil
	}
	anyone := &structpb.Struct{Fields: map[string]*structpb.Value{"any": structpb.NewBoolValue(true)}}
	list := structpb.NewListValue(&structpb.ListValue{Values: []*structpb.Value{structpb.NewStructValue(anyone)}})
	policy := &structpb.Struct{Fields: map[string]*structpb.Value{"permissions": list, "principals": list}}
	config := object("shadow_rules", object("policies", object("spoke", policy)))
	config.Fields["stat_prefix"] = structpb.NewStringValue("spoke")
	return []*listenerv3.Filter{{
		Name: rbac,
		ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: r.pack(&xdstypev3.TypedStruct{ // see http2
			TypeUrl: "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC",
			Value:   config,
		})},
	}}
}

// silent lets connections through that spoke noted nothing of.
func silent() *accesslogv3.AccessLogFilter {
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_MetadataFilter{
		MetadataFilter: &accesslogv3.MetadataFilter{
			Matcher: &matcherv3.MetadataMatcher{
				Filter: rbac,
				Path: []*matcherv3.MetadataMatcher_PathSegment{{
					Segment: &matcherv3.MetadataMatcher_PathSegment_Key{Key: "shadow_engine_result"},
				}},
				Value:  &matcherv3.ValueMatcher{MatchPattern: &matcherv3.ValueMatcher_PresentMatch{PresentMatch: true}},
				Invert: true,
			},
			MatchIfKeyNotFound: wrapperspb.Bool(true),
		},
	}}
}
