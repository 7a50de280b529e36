package render

import (
	"reflect"
	"testing"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"mantlet/schema"
)

// TestDigestOfEverything takes from a bootstrap whatever it has, one thing at a time: each is part of the digest, which
// changes nothing itself.
func TestDigestOfEverything(t *testing.T) {
	whole, err := bootstrap(schema.Mesh{}, Place{})
	if err != nil {
		t.Fatal(err)
	}
	settings := schema.Envoy{Concurrency: 1, DrainTime: 2, ParentShutdownTime: 3, LogLevel: "4"}
	digest := func(b *bootstrapv3.Bootstrap) string {
		before := proto.Clone(b)
		text, err := digestOf(b, settings)
		if err != nil || !proto.Equal(b, before) {
			t.Errorf("it changes: %v", err)
		}
		return text
	}
	want := digest(whole)
	for i := range reflect.TypeFor[schema.Envoy]().NumField() {
		before := settings
		reflect.ValueOf(&settings).Elem().Field(i).SetZero()
		if digest(whole) == want {
			t.Errorf("of %+v all that %+v has is part of it", before, settings)
		}
		settings = before
	}
	without := func(of func(*bootstrapv3.Bootstrap) proto.Message) {
		of(whole).ProtoReflect().Range(func(field protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
			b := proto.CloneOf(whole)
			if m := of(b).ProtoReflect(); field.IsList() {
				m.Mutable(field).List().Truncate(m.Get(field).List().Len() - 1)
			} else if field.FullName() != "envoy.config.bootstrap.v3.Bootstrap.static_resources" {
				m.Clear(field)
			} else {
				return true // looked at by itself
			}
			if digest(b) == want {
				t.Errorf("%s is no part of it", field.FullName())
			}
			return true
		})
	}
	without(func(b *bootstrapv3.Bootstrap) proto.Message { return b })
	without(func(b *bootstrapv3.Bootstrap) proto.Message { return b.StaticResources })
}
