package render_test

import (
	"regexp"
	"strconv"
	"sync"
	"testing"

	xdsmatcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"mantlet/render"
	"mantlet/schema"
)

// TestEachPortHasItsChain asks the matcher as Envoy does, for every port: where its entry has a list of clients, the answer
// is the chain of that list, and else the one for anyone.
func TestEachPortHasItsChain(t *testing.T) {
	mesh := schema.Mesh{Ingress: []schema.Ingress{
		{Ports: schema.Ports{First: 1, Last: 1}, Allow: []string{"a"}},
		{Ports: schema.Ports{First: 80, Last: 80}, Allow: []string{"b"}},
		{Ports: schema.Ports{First: 90, Last: 121}, Allow: []string{"a"}},
		{Ports: schema.Ports{First: 122, Last: 122}, Allow: []string{"a"}}, // with the one before it, more than are mapped
		{Ports: schema.Ports{First: 1000, Last: 9999}, Allow: []string{"a", "b"}},
		{Ports: schema.Ports{First: 10000, Last: 10000}},
		{Ports: schema.Ports{First: 10001, Last: 10001}, Mode: schema.ModeTLS},
		{Ports: schema.Ports{First: 10002, Last: 10033}, Allow: []string{"b"}},
		{Ports: schema.Ports{First: 60000, Last: 65535}, Allow: []string{"b"}},
	}}
	for i := range mesh.Ingress {
		if mesh.Ingress[i].Mode == "" {
			mesh.Ingress[i].Mode = schema.ModeMTLS
		}
	}
	state, err := render.Render(mesh, place)
	if err != nil {
		t.Fatal(err)
	}
	l := state.Bootstrap.StaticResources.Listeners[0]
	chains := map[string]bool{}
	for _, c := range l.FilterChains {
		if chains[c.Name] || c.FilterChainMatch != nil {
			t.Errorf("chain %s is there twice, or has a match of its own", c.Name)
		}
		chains[c.Name] = true
	}
	if len(chains) != 4 || l.DefaultFilterChain != nil {
		t.Errorf("there are chains %v", chains)
	}
	want := map[string]string{"": "ingress-mtls", "a": "ingress-mtls-1", "b": "ingress-mtls-80", "ab": "ingress-mtls-1000"}
	for port := 1; port < 1<<16; port++ {
		names := ""
		for _, name := range schema.PolicyOf(mesh.Ingress, uint16(port)).Allow {
			names += name
		}
		if got := chosen(t, l.FilterChainMatcher, strconv.Itoa(port)); got != want[names] || !chains[got] {
			t.Fatalf("port %d, for %q, has chain %q", port, names, got)
		}
	}
	for _, odd := range []string{"", "http", "-1"} {
		if got := chosen(t, l.FilterChainMatcher, odd); got != "" {
			t.Errorf("what is no port, %q, has chain %q", odd, got)
		}
	}
}

// chosen returns the chain that a matcher has for an input; "" where it has none. It does what the matching API says.
func chosen(t interface{ Fatal(...any) }, m *xdsmatcherv3.Matcher, input string) string {
	on := m.OnNoMatch
	if tree := m.GetMatcherTree(); tree != nil {
		if found := tree.GetExactMatchMap().Map[input]; found != nil {
			on = found
		}
	}
	for _, one := range m.GetMatcherList().GetMatchers() {
		if compiled(one.Predicate.GetSinglePredicate().GetValueMatch().GetSafeRegex().Regex).MatchString(input) {
			on = one.OnMatch
			break
		}
	}
	switch {
	case on == nil:
		return ""
	case on.GetMatcher() != nil:
		return chosen(t, on.GetMatcher(), input)
	}
	var name wrapperspb.StringValue
	if err := on.GetAction().TypedConfig.UnmarshalTo(&name); err != nil {
		t.Fatal(err)
	}
	return name.Value
}

var expressions sync.Map

func compiled(text string) *regexp.Regexp {
	e, ok := expressions.Load(text)
	if !ok {
		e, _ = expressions.LoadOrStore(text, regexp.MustCompile("^(?:"+text+")$"))
	}
	return e.(*regexp.Regexp)
}

// TestSmallFileSmallBootstrap: ranges with a list cost what they say, not what they contain.
func TestSmallFileSmallBootstrap(t *testing.T) {
	size := func(mesh schema.Mesh) int {
		state, err := render.Render(mesh, place)
		if err != nil {
			t.Fatal(err)
		}
		text, err := render.JSON(state.Bootstrap)
		if err != nil {
			t.Fatal(err)
		}
		return len(text)
	}
	var equal, different schema.Mesh
	for first := 16000; first+255 <= 65535; first += 256 {
		in := schema.Ingress{Ports: schema.Ports{First: uint16(first), Last: uint16(first + 254)}, Mode: schema.ModeMTLS, Allow: []string{"a"}}
		equal.Ingress = append(equal.Ingress, in)
		in.Allow = []string{strconv.Itoa(first)}
		different.Ingress = append(different.Ingress, in)
	}
	none, ranges := size(schema.Mesh{}), len(equal.Ingress)
	if got := size(equal) - none; got > 300*ranges {
		t.Errorf("%d ranges with the same list take %d bytes", ranges, got)
	}
	if got := size(different) - none; got > 10_000*ranges {
		t.Errorf("%d ranges with lists of their own take %d bytes", ranges, got)
	}
}

// TestModeKeepsProtocols: a port with a list of protocols changes its mode without a new Envoy, as one without does.
func TestModeKeepsProtocols(t *testing.T) {
	digest := func(mode schema.Mode, alpn ...string) string {
		mesh := schema.Mesh{Ingress: []schema.Ingress{{Ports: schema.Ports{First: 80, Last: 80}, Mode: mode, ALPN: alpn}}}
		state, err := render.Render(mesh, place)
		if err != nil {
			t.Fatal(err)
		}
		return state.Digest
	}
	if digest(schema.ModeTLS, "h2") != digest(schema.ModeMTLS, "h2") {
		t.Error("the mode changes Envoy's state")
	}
	if digest(schema.ModeTLS, "h2") == digest(schema.ModeTLS, "h2", "http/1.1") || digest(schema.ModeTLS, "h2") == digest(schema.ModeTLS) {
		t.Error("the list does not change Envoy's state")
	}
}
