package render

import (
	"encoding/json"
	"fmt"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"mantlet/schema"
)

// meshKey is the field of node.metadata that holds the mesh that a bootstrap was made from.
const meshKey = "mantlet.mesh"

// fields is a mesh whose JSON is field by field: schema.Mesh's own is a file's, which only merging makes a mesh of again.
type fields schema.Mesh

// MarshalMesh returns a mesh as JSON for another mantlet process. UnmarshalMesh is its inverse.
func MarshalMesh(mesh schema.Mesh) ([]byte, error) { return json.Marshal(fields(mesh)) }

// UnmarshalMesh is the inverse of MarshalMesh.
func UnmarshalMesh(text []byte) (schema.Mesh, error) {
	var mesh fields
	err := json.Unmarshal(text, &mesh)
	return schema.Mesh(mesh), err
}

// AddMesh notes in a bootstrap which mesh it was made from, so that whoever asks a running Envoy for its bootstrap can tell in the
// words of the configuration what is in force. It is no part of the digest: names alone make no other state.
func AddMesh(b *bootstrapv3.Bootstrap, mesh schema.Mesh) error {
	text, err := json.Marshal(fields(mesh))
	if err != nil {
		return fmt.Errorf("marshalling the mesh: %w", err)
	}
	if b.Node.Metadata == nil {
		b.Node.Metadata = &structpb.Struct{}
	}
	if b.Node.Metadata.Fields == nil {
		b.Node.Metadata.Fields = map[string]*structpb.Value{}
	}
	b.Node.Metadata.Fields[meshKey] = structpb.NewStringValue(string(text))
	return nil
}

// MeshOf returns the mesh that a bootstrap was made from. It reports false where the bootstrap does not say, or where a mesh like that
// makes another bootstrap in the place.
func MeshOf(b *bootstrapv3.Bootstrap, digest string, place Place) (mesh schema.Mesh, ok bool) {
	text := b.GetNode().GetMetadata().GetFields()[meshKey].GetStringValue()
	var found fields
	if text == "" || json.Unmarshal([]byte(text), &found) != nil {
		return schema.Mesh{}, false
	}
	mesh = schema.Mesh(found)
	state, err := Render(mesh, place)
	if err != nil || state.Digest != digest {
		return schema.Mesh{}, false
	}
	return mesh, len(DiffBootstraps(state.Bootstrap, b)) == 0
}
