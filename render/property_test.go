package render_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protopath"
	"google.golang.org/protobuf/reflect/protorange"
	"google.golang.org/protobuf/reflect/protoreflect"
	"pgregory.net/rapid"

	"mantlet/internal/rundir"
	"mantlet/render"
	"mantlet/schema"
)

// drawMesh draws a valid mesh: one that the schema reads.
func drawMesh(t *rapid.T) schema.Mesh {
	name := rapid.StringMatching(`[^#\x00-\x1f\x7f-\x9f\x{feff}\x{fffe}\x{ffff}]*`) // YAML has no others
	san := rapid.OneOf(
		rapid.StringMatching(`(\*\.)?[a-z]([a-z0-9-]{0,8}[a-z0-9])?(\.[a-z]{1,8}){0,2}`),
		rapid.StringMatching(`[a-z]{1,6}://[A-Za-z0-9._~/?@!$&'()*+,;=%-]{1,12}`),
	)
	serverName := rapid.Custom(func(t *rapid.T) string { return strings.TrimPrefix(san.Draw(t, "SAN"), "*.") })
	protocol := rapid.SampledFrom([]string{"h2", "http/1.1", "acme-tls/1", "x"})
	// A list or none at all; nothing is in between.
	list := func(of *rapid.Generator[string]) []string {
		return rapid.OneOf(rapid.Just[[]string](nil), rapid.SliceOfNDistinct(of, 1, 4, rapid.ID)).Draw(t, "names")
	}

	mesh, err := load(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	mesh.TLS.MinVersion = rapid.SampledFrom([]schema.TLSVersion{schema.TLS12, schema.TLS13}).Draw(t, "TLS")
	mesh.OtherProtocols = rapid.SampledFrom([]schema.OtherProtocols{schema.OtherProtocolsDrop, schema.OtherProtocolsAccept}).Draw(t, "other protocols")
	mesh.AccessLog = rapid.SampledFrom([]schema.AccessLog{schema.AccessLogNone, schema.AccessLogRefused, schema.AccessLogAll}).Draw(t, "access log")
	mesh.SourceAddress = rapid.SampledFrom([]schema.SourceAddress{schema.SourceAddressPod, schema.SourceAddressClient}).Draw(t, "source address")
	mesh.Outbound = drawOutbound(t)
	edges := rapid.SliceOfNDistinct(rapid.Uint16Min(1), 0, 20, rapid.ID).Draw(t, "edges")
	slices.Sort(edges)
	for pair := range slices.Chunk(edges, 2) {
		in := schema.Ingress{
			Name:  name.Draw(t, "name"),
			Ports: schema.Ports{First: pair[0], Last: pair[len(pair)-1]},
			Mode:  rapid.SampledFrom([]schema.Mode{schema.ModeMTLS, schema.ModeTLS, schema.ModePassthrough}).Draw(t, "mode"),
		}
		if in.Mode == schema.ModeMTLS {
			if in.Allow = list(san); in.Allow != nil {
				in.Ports.Last = min(in.Ports.Last, max(in.Ports.First, in.Ports.First+2)) // a chain for each
			}
		}
		if in.Mode != schema.ModePassthrough {
			in.ALPN = list(protocol)
		}
		if !in.Ports.Contains(schema.IngressMTLSPort) && !in.Ports.Contains(schema.IngressTLSPort) {
			mesh.Ingress = append(mesh.Ingress, in)
		}
	}
	for i := range rapid.IntRange(0, 5).Draw(t, "egress") {
		mesh.Egress = append(mesh.Egress, schema.Egress{
			Name:   name.Draw(t, "name"),
			Listen: netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, byte(i), 1}), rapid.Uint16Range(1, 15005).Draw(t, "port")),
			Upstream: schema.Upstream{
				Host: rapid.SampledFrom([]string{"billing-svc", "billing.shop.svc.", "192.0.2.7", "2001:db8::7"}).Draw(t, "host"),
				Port: rapid.Uint16Min(1).Draw(t, "port"),
			},
			ServerNames: list(serverName),
			ALPN:        list(protocol),
		})
	}
	file, err := json.Marshal(mesh)
	if err != nil {
		t.Fatal(err)
	}
	if mesh, err = load(nil, file); err != nil {
		t.Fatalf("%v\n%s", err, file)
	}
	return mesh
}

func drawOutbound(t *rapid.T) schema.Outbound {
	o := schema.Outbound{
		Mode: rapid.SampledFrom([]schema.OutboundMode{schema.OutboundAccept, schema.OutboundObserve, schema.OutboundDrop}).Draw(t, "outbound"),
		DNS:  rapid.Bool().Draw(t, "dns"),
	}
	destination := rapid.Custom(func(t *rapid.T) schema.Destination {
		addr := rapid.SampledFrom([]string{"10.0.0.0", "10.1.2.3", "192.0.2.128", "255.255.255.255", "fd00::", "fd00::1", "2001:db8::7"}).Draw(t, "address")
		prefix := netip.PrefixFrom(netip.MustParseAddr(addr), 0)
		prefix, err := prefix.Addr().Prefix(rapid.IntRange(1, prefix.Addr().BitLen()).Draw(t, "length"))
		if err != nil {
			t.Fatal(err)
		}
		return schema.Destination{Prefix: prefix, Port: rapid.SampledFrom([]uint16{1, 53, 443, 65535}).Draw(t, "port")}
	})
	o.Allow = rapid.OneOf(rapid.Just[[]schema.Destination](nil), rapid.SliceOfNDistinct(destination, 1, 9, rapid.ID)).Draw(t, "allowed")
	slices.SortFunc(o.Allow, schema.Destination.Compare)
	return o
}

// TestAllowed: the sets of what may leave have the meaning of the list, and nothing in them is a part of something else, which the kernel
// would refuse.
func TestAllowed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		o := drawOutbound(t)
		o.Mode = schema.OutboundDrop
		servers := []netip.Addr{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd00::a"), netip.MustParseAddr("127.0.0.53"), {}}
		r := render.Rules(schema.Mesh{Outbound: o}, render.Generations{}).WithResolvers(servers)
		for _, server := range servers[:2] {
			o.Allow = append(o.Allow, schema.Destination{Prefix: netip.PrefixFrom(server, server.BitLen()), Port: 53})
		}
		inside := func(of []schema.Destination, d schema.Destination) (n int) {
			for _, other := range of {
				if other.Contains(d) {
					n++
				}
			}
			return n
		}
		var all []schema.Destination
		for _, set := range r.Lists {
			for _, d := range set.Destinations {
				if d.Prefix.Addr().Is6() != set.IPv6 || inside(set.Destinations, d) != 1 {
					t.Fatalf("%s in %s, of %v", d, set.Name, set.Destinations)
				}
			}
			all = append(all, set.Destinations...)
		}
		for _, d := range o.Allow {
			if inside(all, d) != 1 {
				t.Fatalf("%s is not in %v", d, all)
			}
		}
		for _, d := range all {
			if !slices.Contains(o.Allow, d) {
				t.Fatalf("%s is in no list: %v", d, o.Allow)
			}
		}
		if got := render.OutboundOf(r); got.Mode != o.Mode || !slices.Equal(got.Allow, all) {
			t.Fatalf("read back as %v", got)
		}
	})
}

// TestSameBytes reads and renders the same over and over, all at once.
func TestSameBytes(t *testing.T) {
	environ, file := manyEntries(12)
	read := func() (schema.Mesh, render.State) {
		mesh, err := load(environ, file)
		if err != nil {
			t.Error(err)
		}
		state, err := render.Render(mesh, place)
		if err != nil {
			t.Error(err)
		}
		return mesh, state
	}
	mesh, want := read()
	rules, bootstrap := rendered(t, mesh)
	var group sync.WaitGroup
	for range 100 {
		group.Go(func() {
			mesh, got := read()
			gotRules, gotBootstrap := rendered(t, mesh)
			if !bytes.Equal(gotRules, rules) || !bytes.Equal(gotBootstrap, bootstrap) || got.Digest != want.Digest {
				t.Error("another time it is something else")
			}
		})
	}
	group.Wait()
}

// TestDigest checks that the digest tells apart what Envoys are started with, and nothing else.
func TestDigest(t *testing.T) {
	starts := map[string]string{}  // by digest
	digests := map[string]string{} // by bootstrap and settings
	for name, g := range goldenCases(t) {
		mesh, err := load(g.inputs(t))
		if err != nil {
			continue
		}
		state, err := render.Render(mesh, place)
		if err != nil {
			t.Fatal(err)
		}
		_, bootstrap := rendered(t, mesh)
		start := fmt.Sprintf("%v %s", mesh.Envoy, bootstrap)
		if other, ok := starts[state.Digest]; ok && other != start {
			t.Errorf("%s: its digest is another start's too", name)
		}
		if other, ok := digests[start]; ok && other != state.Digest {
			t.Errorf("%s: the same start has another digest too", name)
		}
		starts[state.Digest], digests[start] = start, state.Digest
		if got := state.Bootstrap.Node.Metadata.Fields[render.DigestKey].GetStringValue(); got != state.Digest {
			t.Errorf("%s: the bootstrap says that its digest is %q", name, got)
		}
	}
}

func withNames(mesh schema.Mesh, name func() string) schema.Mesh {
	mesh.Ingress, mesh.Egress = slices.Clone(mesh.Ingress), slices.Clone(mesh.Egress)
	for i := range mesh.Ingress {
		mesh.Ingress[i].Name = name()
	}
	for i := range mesh.Egress {
		mesh.Egress[i].Name = name()
	}
	return mesh
}

// TestNamesAreNotRendered gives entries any name at all.
func TestNamesAreNotRendered(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		mesh := drawMesh(t)
		name := rapid.OneOf(rapid.String(), rapid.Just(strings.Repeat("x", 4<<10)), rapid.SampledFrom([]string{
			`"`, `'`, `\`, "}", "{", ";", "#", "\n", "\r\n", "\x00", "%", "$(id)", "`id`", "🦔", "\xff", "} drop table inet mantlet",
		}))
		want, err := render.Render(mesh, place)
		if err != nil {
			t.Fatal(err)
		}
		got, err := render.Render(withNames(mesh, func() string { return name.Draw(t, "name") }), place)
		if err != nil || got.Digest != want.Digest || got.Ruleset.Text() != want.Ruleset.Text() {
			t.Fatalf("names change what is rendered: %v", err)
		}
	})
}

// TestBootstrapIsValid checks each message of a bootstrap, those that are packed in another included, against the rules that Envoy's API
// has for it. mantlet itself does not: Envoy does when it validates the bootstrap, and the code for it would make the binary 4 MB larger.
func TestBootstrapIsValid(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		mesh := drawMesh(t)
		mesh.IngressOff = rapid.Bool().Draw(t, "ingress off")
		state, err := render.Render(mesh, place)
		if err != nil {
			t.Fatal(err)
		}
		checked := map[protoreflect.FullName]bool{}
		err = protorange.Range(state.Bootstrap.ProtoReflect(), func(p protopath.Values) error {
			m, ok := p.Index(-1).Value.Interface().(protoreflect.Message)
			if !ok {
				return nil
			}
			checked[m.Descriptor().FullName()] = true
			if v, ok := m.Interface().(interface{ Validate() error }); ok {
				return v.Validate()
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		for _, m := range []proto.Message{&bootstrapv3.Bootstrap{}, &tcpproxyv3.TcpProxy{}, &tlsv3.DownstreamTlsContext{}} {
			if name := m.ProtoReflect().Descriptor().FullName(); !checked[name] && !mesh.IngressOff {
				t.Errorf("%s was not checked", name)
			}
		}
	})
}

// TestEveryPeerIsVerified looks at each TLS context of random meshes as Envoy does, not as the code that made it.
func TestEveryPeerIsVerified(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		mesh := drawMesh(t)
		state, err := render.Render(mesh, place)
		if err != nil {
			t.Fatal(err)
		}
		resources := state.Bootstrap.StaticResources
		serverNames, protocols := map[string][]string{}, map[string][]string{}
		for _, e := range mesh.Egress {
			protocols["egress-"+e.Listen.String()] = e.ALPN
			serverNames["egress-"+e.Listen.String()] = e.ServerNames
		}

		mutual := resources.Listeners[0]
		if mutual.Name != "ingress-mtls" {
			t.Fatalf("the first listener is %s", mutual.Name)
		}
		for _, chain := range mutual.FilterChains {
			c := unpack[*tlsv3.DownstreamTlsContext](t, chain.TransportSocket)
			if !c.RequireClientCertificate.GetValue() {
				t.Errorf("%s demands no client certificate", chain.Name)
			}
		}
		for _, port := range edgesOf(mesh.Ingress) {
			policy := schema.PolicyOf(mesh.Ingress, port)
			chain := chainOf(t, mutual, port)
			c := unpack[*tlsv3.DownstreamTlsContext](t, chain.TransportSocket)
			trustsMeshAlone(t, chain.Name, c.CommonTlsContext, policy.Allow, func(m *tlsv3.SubjectAltNameMatcher) string {
				return m.Matcher.GetSafeRegex().GetRegex()
			}, regexp.QuoteMeta)
			// A port without a list of clients may get to the other listener without a new Envoy.
			for i, l := range resources.Listeners[:2] {
				c := unpack[*tlsv3.DownstreamTlsContext](t, chainOf(t, l, port).TransportSocket).CommonTlsContext
				if i == 1 && policy.Allow != nil {
					continue
				}
				if !slices.Equal(c.AlpnProtocols, policy.ALPN) {
					t.Errorf("%s agrees on %q at %d, want %q", l.Name, c.AlpnProtocols, port, policy.ALPN)
				}
			}
		}
		listeners, trial := cutTrial(resources.Listeners[1:])
		if len(trial) != 2 {
			t.Errorf("%d listeners are the trial's", len(trial))
		}
		for _, l := range listeners {
			for _, chain := range l.FilterChains {
				switch {
				case l.Name != "ingress-tls":
					if addr := netip.MustParseAddr(l.Address.GetSocketAddress().Address); chain.TransportSocket != nil || !addr.IsLoopback() {
						t.Errorf("%s listens on %s with %v", l.Name, addr, chain.TransportSocket)
					}
				default:
					c := unpack[*tlsv3.DownstreamTlsContext](t, chain.TransportSocket)
					if c.RequireClientCertificate.GetValue() || c.CommonTlsContext.ValidationContextType != nil {
						t.Errorf("%s asks for a client certificate", chain.Name)
					}
				}
			}
		}
		clusters, trialCluster := cutTrial(resources.Clusters)
		dynamic := state.Bootstrap.DynamicResources
		if dynamic != nil { // mantlet itself, which tells addresses and nothing else
			last := clusters[len(clusters)-1]
			path := last.GetLoadAssignment().GetEndpoints()[0].LbEndpoints[0].GetEndpoint().GetAddress().GetPipe().GetPath()
			if path != place.RuntimeDirectory+"/discovery.sock" || dynamic.CdsConfig != nil || dynamic.LdsConfig != nil {
				t.Errorf("Envoy is told what to do by %v, at %q", dynamic, path)
			}
			clusters = clusters[:len(clusters)-1]
		}
		if len(trialCluster) != 1 {
			t.Errorf("%d clusters are the trial's", len(trialCluster))
		}
		if len(clusters) != 1+len(mesh.Egress) || clusters[0].Name != "workload" || clusters[0].TransportSocket != nil {
			t.Errorf("%d clusters for %d egress entries, the first is %v", len(clusters), len(mesh.Egress), clusters[0])
		}
		for _, cluster := range clusters[1:] {
			c := unpack[*tlsv3.UpstreamTlsContext](t, cluster.TransportSocket)
			if !slices.Equal(c.CommonTlsContext.AlpnProtocols, protocols[cluster.Name]) {
				t.Errorf("%s offers %q, want %q", cluster.Name, c.CommonTlsContext.AlpnProtocols, protocols[cluster.Name])
			}
			trustsMeshAlone(t, cluster.Name, c.CommonTlsContext, serverNames[cluster.Name], func(m *tlsv3.SubjectAltNameMatcher) string {
				return m.Matcher.GetExact()
			}, func(name string) string { return name })
		}
	})
}

// chainOf returns the chain of a listener that Envoy chooses for a port.
func chainOf(t *rapid.T, l *listenerv3.Listener, port uint16) *listenerv3.FilterChain {
	t.Helper()
	name := l.Name // Envoy's own choice where nothing else can be chosen
	if l.FilterChainMatcher != nil {
		name = chosen(t, l.FilterChainMatcher, strconv.Itoa(int(port)))
	} else if len(l.FilterChains) != 1 {
		t.Fatalf("nothing chooses among %d chains", len(l.FilterChains))
	}
	i := slices.IndexFunc(l.FilterChains, func(c *listenerv3.FilterChain) bool { return c.Name == name })
	if i < 0 {
		t.Fatalf("port %d has no chain: %q", port, name)
	}
	return l.FilterChains[i]
}

// edgesOf returns the ports at both ends of each entry, and those beside them.
func edgesOf(entries []schema.Ingress) []uint16 {
	ports := []uint16{1, 65535}
	for _, in := range entries {
		ports = append(ports, max(1, in.Ports.First-1), in.Ports.First, in.Ports.Last, max(in.Ports.Last, in.Ports.Last+1))
	}
	return ports
}

// cutTrial sets the parts apart that certificates are tried in. They lead to each other and nowhere else: by sockets of the
// runtime directory, and with secrets of their own.
func cutTrial[T interface {
	GetName() string
	proto.Message
}](all []T,
) (others, trial []T) {
	for _, part := range all {
		if strings.HasPrefix(part.GetName(), "trial-") {
			trial = append(trial, part)
		} else {
			others = append(others, part)
		}
	}
	return others, trial
}

// TestTrialIsClosed: nothing but the trial's own parts leads to it, and it leads nowhere else.
func TestTrialIsClosed(t *testing.T) {
	state, err := render.Render(schema.Mesh{}, place)
	if err != nil {
		t.Fatal(err)
	}
	listeners, ends := cutTrial(state.Bootstrap.StaticResources.Listeners)
	clusters, between := cutTrial(state.Bootstrap.StaticResources.Clusters)
	text := func(parts ...proto.Message) (all string) {
		for _, part := range parts {
			text, err := protojson.Marshal(part)
			if err != nil {
				t.Fatal(err)
			}
			all += string(text)
		}
		return all
	}
	ours, theirs := text(ends[0], ends[1], between[0]), ""
	for _, l := range listeners {
		theirs += text(l)
	}
	for _, c := range clusters {
		theirs += text(c)
	}
	if strings.Contains(theirs, "trial") {
		t.Errorf("another part speaks of the trial: %s", theirs)
	}
	for _, others := range []string{rundir.SecretFile(render.IdentitySecret), rundir.SecretFile(render.MeshCASecret), "socketAddress", `"workload"`} {
		if strings.Contains(ours, others) {
			t.Errorf("the trial speaks of %s: %s", others, ours)
		}
	}
	for _, address := range []string{
		ends[0].Address.GetPipe().GetPath(), ends[1].Address.GetPipe().GetPath(),
		between[0].LoadAssignment.Endpoints[0].LbEndpoints[0].GetEndpoint().Address.GetPipe().GetPath(),
	} {
		if filepath.Dir(address) != place.RuntimeDirectory {
			t.Errorf("an end of the trial is at %q", address)
		}
	}
}

// unpack returns what a transport socket that must be TLS is configured with.
func unpack[M proto.Message](t *rapid.T, socket *corev3.TransportSocket) M {
	t.Helper()
	m, err := socket.GetTypedConfig().UnmarshalNew()
	context, ok := m.(M)
	if err != nil || !ok || socket.Name != "envoy.transport_sockets.tls" {
		t.Fatalf("a transport socket is no TLS: %v, %v", socket, err)
	}
	return context
}

// trustsMeshAlone checks that a peer is verified up to the mesh CA, by nothing weaker than Envoy's defaults, and that it must
// have one of the names, if there are any.
func trustsMeshAlone(t *rapid.T, where string, c *tlsv3.CommonTlsContext, names []string, text func(*tlsv3.SubjectAltNameMatcher) string, pattern func(string) string) {
	t.Helper()
	validation := c.GetCombinedValidationContext()
	anchor := validation.GetValidationContextSdsSecretConfig()
	if anchor.GetName() != render.MeshCASecret || anchor.GetSdsConfig().GetPathConfigSource().GetPath() != place.RuntimeDirectory+"/"+rundir.SecretFile(render.MeshCASecret) {
		t.Errorf("%s trusts %v", where, anchor)
	}
	rest := proto.CloneOf(validation.GetDefaultValidationContext())
	rest.MatchTypedSubjectAltNames = nil
	if !proto.Equal(rest, &tlsv3.CertificateValidationContext{}) {
		t.Errorf("%s verifies with %v", where, rest)
	}
	var got, want []string
	for _, m := range validation.GetDefaultValidationContext().GetMatchTypedSubjectAltNames() {
		got = append(got, m.SanType.String()+" "+text(m))
	}
	for _, name := range names {
		kind := "DNS "
		if strings.Contains(name, "://") {
			kind = "URI "
		}
		want = append(want, kind+pattern(name))
	}
	if !slices.Equal(got, want) {
		t.Errorf("%s lets in %q, want %q", where, got, want)
	}
}

// TestGenerations checks that each port's packets come to chains of its mode and its generation, in both directions.
func TestGenerations(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		mesh, generations := drawMesh(t), drawGenerations(t)
		edges := []uint16{1, 8080, 65535}
		for _, p := range generations.Ports {
			edges = append(edges, p.Ports.First, p.Ports.Last)
		}
		rules := render.Rules(mesh, generations)
		chains := map[string]string{}
		for _, c := range rules.Chains {
			for _, r := range c.Rules {
				chains[c.Name] += r.Text() + "\n"
			}
		}
		for _, port := range edges {
			mode, number := schema.ModeMTLS, generations.Default
			for _, in := range mesh.Ingress {
				if in.Ports.Contains(port) {
					mode = in.Mode
				}
			}
			for _, g := range generations.Ports {
				if g.Ports.Contains(port) {
					number = g.Generation
				}
			}
			kind := map[schema.Mode]render.Mark{schema.ModeMTLS: render.MarkMTLS, schema.ModeTLS: render.MarkTLS, schema.ModePassthrough: render.MarkPassthrough}[mode]
			if mode != schema.ModePassthrough {
				kind |= render.Mark(number) << 23
			}
			in, out := chainFor(rules.Maps[0], port, chains["ports"]), chainFor(rules.Maps[1], port, chains["egress"])
			if mark := fmt.Sprintf("| 0x%08x accept", kind); !strings.Contains(chains[in], mark) {
				t.Errorf("%d is %s in generation %d, and comes to %s, which does not mark %s:\n%s", port, mode, number, in, mark, chains[in])
			}
			const marked = "ct mark & 0x0ff00000 "
			want := fmt.Sprintf(marked+"== 0x%08x accept\n", kind)
			switch mode {
			case schema.ModeMTLS:
			case schema.ModeTLS: // and what was let in by a certificate before
				want += fmt.Sprintf(marked+"== 0x%08x accept\n", render.MarkMTLS|render.Mark(number)<<23)
			case schema.ModePassthrough: // and what was let in at all
				want = fmt.Sprintf(marked+"!= 0x%08x "+marked+"!= 0x%08x "+marked+"!= 0x%08x accept\n", render.MarkNone, render.MarkOutbound, render.MarkOwn)
			}
			if want += "meta l4proto tcp counter reject with tcp reset\n"; chains[out] != want {
				t.Errorf("%d is %s in generation %d, and answers by %s, which is\n%s\nwant\n%s", port, mode, number, out, chains[out], want)
			}
		}
	})
}

// chainFor returns where a map, or else the last goto of the rules that ask it, sends a port.
func chainFor(m render.Map, port uint16, rules string) string {
	for _, e := range m.Elements {
		if e.Ports.Contains(port) {
			return e.Verdict.Goto
		}
	}
	_, name, _ := strings.Cut(rules[strings.LastIndex(rules, "goto "):], " ")
	name, _, _ = strings.Cut(name, "\n")
	return name
}

// TestEmptyListIsRefused gives render what the schema never would: to Envoy, no matcher means anybody.
func TestEmptyListIsRefused(t *testing.T) {
	nobody := []string{}
	for name, mesh := range map[string]schema.Mesh{
		"allow":       {Ingress: []schema.Ingress{{Ports: schema.Ports{First: 1, Last: 1}, Mode: schema.ModeMTLS, Allow: nobody}}},
		"serverNames": {Egress: []schema.Egress{{Listen: netip.MustParseAddrPort("127.0.0.1:1"), Upstream: schema.Upstream{Host: "b", Port: 1}, ServerNames: nobody}}},
	} {
		if _, err := render.Render(mesh, place); err == nil {
			t.Errorf("%s: an empty list is rendered", name)
		}
	}
}

// TestNoIPv6 checks that nothing is bound that can't be.
func TestNoIPv6(t *testing.T) {
	without := place
	without.NoIPv6 = true
	state, err := render.Render(schema.Mesh{}, without)
	if err != nil {
		t.Fatal(err)
	}
	if text, err := render.JSON(state.Bootstrap); err != nil || bytes.Contains(text, []byte("::1")) {
		t.Errorf("it binds to ::1, or %v", err)
	}
}

// FuzzPipeline puts any text through all that stands between people and the kernel. Whatever is let through renders to the
// rules that there always are, with elements that are ports and chains; so does, names taken out, its form as a file. nft
// itself, which takes longer than all else, has a look at one in a hundred; TestAccepted shows it those of the corpus.
func FuzzPipeline(f *testing.F) {
	for _, g := range goldenCases(f) {
		environ, file := g.inputs(f)
		seed := map[string]string{}
		for _, variable := range environ {
			name, value, _ := strings.Cut(variable, "=")
			seed[strings.TrimPrefix(strings.TrimPrefix(name, "EDG_"), "CONTRAST_")] = value
		}
		f.Add(seed["INGRESS_PROXY_CONFIG"], seed["EGRESS_PROXY_CONFIG"], seed["MANTLET_CONFIG_INLINE"], file)
	}
	var count atomic.Int64
	f.Fuzz(func(t *testing.T, ingress, egress, inline string, file []byte) {
		mesh, err := load([]string{
			"EDG_INGRESS_PROXY_CONFIG=" + ingress, "EDG_EGRESS_PROXY_CONFIG=" + egress, "MANTLET_CONFIG_INLINE=" + inline, "MANTLET_CONFIG=" + configFile,
		}, file)
		if err != nil {
			if control := strings.IndexFunc(err.Error(), func(r rune) bool { return r < ' ' && r != '\n' || r == 0x7f }); control >= 0 {
				t.Errorf("a message has a control character: %q", err)
			}
			return
		}
		rules, bootstrap := rendered(t, mesh)
		if err := wellFormed(rules, mesh); err != nil {
			t.Errorf("%v:\n%s", err, rules)
		}
		form, err := json.Marshal(withNames(mesh, func() string { return "" }))
		if err != nil {
			t.Fatal(err)
		}
		var environ []string
		if mesh.IngressOff { // which no file can say
			environ = []string{"EDG_INGRESS_PROXY_CONFIG=DISABLED"}
		}
		again, err := load(environ, form)
		if err != nil {
			t.Fatalf("its own form is not valid: %v\n%s", err, form)
		}
		rulesAgain, bootstrapAgain := rendered(t, again)
		if !bytes.Equal(rules, rulesAgain) || !bytes.Equal(bootstrap, bootstrapAgain) {
			t.Errorf("its own form, without names, renders to something else:\n%s", form)
		}
		const most = 500 // far below where nft 1.0.6 in a user namespace gets EMSGSIZE from the kernel
		if len(mesh.Ingress) < most && count.Add(1)%100 == 1 {
			if got, err := nft(t, rules); err != nil || got != string(rules) {
				t.Errorf("nft: %v\n%s", err, got)
			}
		}
	})
}

var (
	elements = regexp.MustCompile(`\t\telements = \{ ([^}]*) \}\n`)
	element  = regexp.MustCompile(`^(\d+(-\d+)? : goto (mtls|tls|passthrough)_(in|out)|[0-9a-f.:]+(/\d+)? \. \d+)$`)
)

// wellFormed checks that rules are those of a mesh with the same modes and egress entries but for the elements of the maps.
func wellFormed(rules []byte, mesh schema.Mesh) error {
	like := schema.Mesh{
		OtherProtocols: mesh.OtherProtocols, Egress: mesh.Egress, IngressOff: mesh.IngressOff, Outbound: schema.Outbound{Mode: mesh.Outbound.Mode},
	}
	for i, in := range mesh.Ingress {
		port := uint16(i + 1)
		like.Ingress = append(like.Ingress, schema.Ingress{Ports: schema.Ports{First: port, Last: port}, Mode: in.Mode})
	}
	want := render.Rules(like, render.Generations{}).Text()
	if string(elements.ReplaceAll(rules, nil)) != elements.ReplaceAllString(want, "") {
		return errors.New("these are other rules")
	}
	for _, list := range elements.FindAllSubmatch(rules, -1) {
		for _, e := range strings.Split(string(list[1]), ",") {
			if !element.MatchString(strings.TrimSpace(e)) {
				return fmt.Errorf("%q is no element", e)
			}
		}
	}
	return nil
}

// TestNothingIsLeftToThePolicy: every chain that a packet from outside can get to ends with a rule that has a verdict for any packet.
// While the kernel commits a transaction, it accepts what the rules say nothing of, whatever the policy.
func TestNothingIsLeftToThePolicy(t *testing.T) {
	before := render.Rules(schema.Mesh{Ingress: []schema.Ingress{{Ports: schema.Ports{First: 80, Last: 80}, Mode: schema.ModeTLS}}}, render.Generations{})
	check := func(t interface{ Errorf(string, ...any) }, r render.Ruleset) {
		for _, c := range reached(r) {
			ends := len(c.Rules) > 0 && !slices.ContainsFunc(c.Rules[len(c.Rules)-1], func(s render.Statement) bool {
				switch s.(type) {
				case render.Count, render.SetMark, render.Verdict:
					return false
				}
				return true
			})
			if !ends {
				t.Errorf("chain %s ends without a verdict for any packet:\n%s", c.Name, r.Text())
			}
		}
	}
	for _, r := range []render.Ruleset{
		render.DenyAll(true), render.DenyAll(false), render.OnlyStatus(9901), render.DenyAll(true).Remembering(before), render.OnlyStatus(9901).Remembering(before),
	} {
		check(t, r)
	}
	rapid.Check(t, func(t *rapid.T) {
		mesh := drawMesh(t)
		mesh.StatusPort = rapid.SampledFrom([]uint16{0, 9901}).Draw(t, "status port")
		check(t, render.Rules(mesh, render.Generations{Default: 3}))
	})
}

// TestTimeoutsAreThere: every ruleset has the ct timeout objects that its rules name, and no others: the kernel refuses the whole
// ruleset otherwise.
func TestTimeoutsAreThere(t *testing.T) {
	check := func(t interface{ Errorf(string, ...any) }, r render.Ruleset) {
		named, there := map[string]bool{}, map[string]bool{}
		for _, c := range r.Chains {
			for _, rule := range c.Rules {
				for _, s := range rule {
					if s, is := s.(render.SetTimeouts); is {
						named[s.Name] = true
					}
				}
			}
		}
		for _, timeouts := range r.Timeouts {
			there[timeouts.Name] = true
		}
		if !maps.Equal(named, there) {
			t.Errorf("rules name %v, there are %v:\n%s", named, there, r.Text())
		}
	}
	for _, r := range []render.Ruleset{render.DenyAll(true), render.DenyAll(false), render.OnlyStatus(9901)} {
		check(t, r)
	}
	rapid.Check(t, func(t *rapid.T) {
		mesh := drawMesh(t)
		mesh.StatusPort = rapid.SampledFrom([]uint16{0, 9901}).Draw(t, "status port")
		mesh.IngressOff = rapid.Bool().Draw(t, "ingress off")
		r := render.Rules(mesh, render.Generations{})
		check(t, r)
		check(t, r.WithoutTimeouts())
	})
}

// reached returns the chains that packets from outside get to: base chains with a policy of drop, and those that lead on from them.
func reached(r render.Ruleset) (chains []render.Chain) {
	var add func(name string)
	add = func(name string) {
		is := func(c render.Chain) bool { return c.Name == name }
		i := slices.IndexFunc(r.Chains, is)
		if i < 0 || slices.ContainsFunc(chains, is) {
			return
		}
		chains = append(chains, r.Chains[i])
		for _, rule := range r.Chains[i].Rules {
			for _, s := range rule {
				switch s := s.(type) {
				case render.Verdict:
					add(s.Goto)
				case render.LookUp:
					for _, m := range r.Maps {
						for _, e := range m.Elements {
							if m.Name == s.Map {
								add(e.Verdict.Goto)
							}
						}
					}
				}
			}
		}
	}
	for _, c := range r.Chains {
		if c.Hook.Policy == render.Drop {
			add(c.Name)
		}
	}
	return chains
}

// TestRefusalsAreNamed: whatever a rule counts has a name, and every name is some rule's.
func TestRefusalsAreNamed(t *testing.T) {
	mesh, err := load([]string{"MANTLET_STATUS_ADDRESS=:9901"}, []byte("ingress: [{port: 8080, mode: tls}, {port: 7890, mode: passthrough}]"))
	if err != nil {
		t.Fatal(err)
	}
	dropping := schema.Outbound{Mode: schema.OutboundDrop}
	used := map[string]bool{}
	for _, r := range []render.Ruleset{
		render.DenyAll(true), render.DenyAll(false), render.OnlyStatus(9901),
		render.Rules(mesh, render.Generations{Default: 3, Ports: []render.PortsGeneration{{Ports: schema.Ports{First: 8000, Last: 8100}, Generation: 1}}}),
		render.DenyAll(true).WithOutbound(dropping), render.DenyAll(false).WithOutbound(dropping), render.OnlyStatus(9901).WithOutbound(dropping),
		render.Rules(schema.Mesh{Outbound: dropping}, render.Generations{}), render.Rules(schema.Mesh{IngressOff: true, Outbound: dropping}, render.Generations{}),
	} {
		for _, c := range r.Chains {
			for _, rule := range c.Rules {
				name := render.Refusal(c.Name, rule)
				if counts := slices.Contains(rule, render.Statement(render.Count{})); counts != slices.Contains(render.Refusals(), name) || !counts && name != "" {
					t.Errorf("chain %s, %q: %q", c.Name, rule.Text(), name)
				}
				used[name] = true
			}
		}
	}
	for _, name := range render.Refusals() {
		if !used[name] {
			t.Errorf("%s is no rule's", name)
		}
	}
}
