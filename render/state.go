package render

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/netip"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"mantlet/schema"
)

// State is a mesh, rendered.
type State struct {
	Mesh      schema.Mesh
	Ruleset   Ruleset
	Bootstrap *bootstrapv3.Bootstrap
	Digest    string // of the bootstrap and of Envoy's settings; /server_info shows it under node.metadata, see DigestKey
	Cost      Cost
}

// DigestKey is the field of node.metadata that tells which desired state an Envoy runs.
const DigestKey = "mantlet.digest"

// Place is what rendering needs to know of where it is.
type Place struct {
	RuntimeDirectory string    // Envoy's: holds the SDS files and the admin socket
	NoIPv6           bool      // the kernel has IPv6 switched off: Envoy could not bind to ::1
	Resolvers        Resolvers // of resolv.conf
}

// Resolvers are the addresses of name servers, the zero Addr after the last one. C libraries ask no more than three (resolv.conf(5)).
type Resolvers [3]netip.Addr

// Render returns the desired state of a valid mesh.
func Render(mesh schema.Mesh, place Place) (State, error) {
	b, err := bootstrap(mesh, place)
	if err != nil {
		return State{}, err
	}
	digest, err := digestOf(b, mesh.Envoy)
	if err != nil {
		return State{}, fmt.Errorf("marshalling the bootstrap: %w", err)
	}
	b.Node.Metadata = &structpb.Struct{Fields: map[string]*structpb.Value{DigestKey: structpb.NewStringValue(digest)}}
	return State{Mesh: mesh, Ruleset: RulesIn(place, mesh, Generations{}), Bootstrap: b, Digest: digest, Cost: CostOf(mesh)}, nil
}

// digestOf hashes all that an Envoy is started with. Of the bootstrap it takes the binary form: its text takes longer than all
// other rendering together. It goes entry by entry, since passes over the whole of a large bootstrap find little of it in
// the processor's caches.
func digestOf(b *bootstrapv3.Bootstrap, settings schema.Envoy) (string, error) {
	resources := b.StaticResources
	b.StaticResources = nil
	defer func() { b.StaticResources = resources }()
	parts := []proto.Message{b}
	for _, l := range resources.Listeners {
		parts = append(parts, l)
	}
	for _, c := range resources.Clusters {
		parts = append(parts, c)
	}
	sum := sha256.New()
	_, _ = fmt.Fprintf(sum, "%+v\n", settings) // a hash returns no error
	var wire []byte
	for _, part := range parts {
		var err error
		if wire, err = (proto.MarshalOptions{Deterministic: true}).MarshalAppend(wire[:0], part); err != nil {
			return "", err
		}
		_, _ = fmt.Fprintf(sum, "%T %d\n%s", part, len(wire), wire)
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// JSON returns a bootstrap as Envoy reads it: indented, and the same bytes every time, which protojson alone does not
// promise.
func JSON(b *bootstrapv3.Bootstrap) ([]byte, error) {
	text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(b)
	if err != nil {
		return nil, fmt.Errorf("marshalling the bootstrap: %w", err)
	}
	var indented bytes.Buffer
	if err := json.Indent(&indented, text, "", "  "); err != nil {
		return nil, fmt.Errorf("indenting the bootstrap: %w", err)
	}
	indented.WriteByte('\n')
	return indented.Bytes(), nil
}
