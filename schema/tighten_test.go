package schema_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"mantlet/schema"
)

// TestTighten has each field in each direction.
func TestTighten(t *testing.T) {
	const refused = "MANTLET_OVERRIDES=tighten does not let the file "
	for name, c := range map[string]struct {
		environ []string
		inline  string // stands in for an attested policy
		file    string
		want    []string
	}{
		// mode: passthrough > tls > mtls.
		"passthrough to tls":         {environ: []string{ingress + "a#80#true"}, file: "ingress: [{port: 80, mode: tls}]"},
		"passthrough to mtls":        {environ: []string{ingress + "a#80#true"}, file: "ingress: [{port: 80, mode: mtls}]"},
		"passthrough to a list":      {environ: []string{ingress + "a#80#true"}, file: "ingress: [{port: 80, mode: mtls, allow: [x]}]"},
		"passthrough, removed":       {environ: []string{ingress + "a#80#true"}, file: "ingress: [{port: 80, remove: true}]"},
		"tls to mtls":                {environ: []string{ingress + "a#80#false"}, file: "ingress: [{port: 80, mode: mtls}]"},
		"tls, removed":               {environ: []string{ingress + "a#80#false"}, file: "ingress: [{port: 80, remove: true}]"},
		"tls stays":                  {environ: []string{ingress + "a#80#false"}, file: "ingress: [{port: 80, mode: tls}]"},
		"tls to passthrough":         {environ: []string{ingress + "a#80#false"}, file: "ingress: [{port: 80, mode: passthrough}]", want: []string{"1:11: ingress[80]: " + refused + "open port 80 further: it is tls, and would be passthrough"}},
		"a probe, removed":           {inline: "probes: [{name: a, tcp: 80}]", file: "probes: [{name: a, remove: true}]"},
		"a probe stays":              {inline: "probes: [{name: a, tcp: 80}]", file: "probes: [{name: a, tcp: 80}]"},
		"a probe, new":               {file: "probes: [{name: a, tcp: 80}]", want: []string{"1:10: probes[a]: " + refused + "add a probe, or change one"}},
		"a probe of another port":    {inline: "probes: [{name: a, tcp: 80}]", file: "probes: [{name: a, tcp: 81}]", want: []string{"1:10: probes[a]: " + refused + "add a probe, or change one"}},
		"a probe of another path":    {inline: "probes: [{name: a, http: 80/b}]", file: "probes: [{name: a, http: 80/c}]", want: []string{"1:10: probes[a]: " + refused + "add a probe, or change one"}},
		"a probe of another kind":    {inline: "probes: [{name: a, tcp: 80}]", file: "probes: [{name: a, grpc: 80}]", want: []string{"1:10: probes[a]: " + refused + "add a probe, or change one"}},
		"nothing to mtls":            {file: "ingress: [{port: 80}, {port: 81, mode: mtls}]"},
		"nothing to tls":             {file: "ingress: [{port: 80, mode: tls}]", want: []string{"1:11: ingress[80]: " + refused + "open port 80 further: it is mtls, and would be tls"}},
		"nothing to passthrough":     {file: "ingress: [{port: 80, mode: passthrough}]", want: []string{"1:11: ingress[80]: " + refused + "open port 80 further: it is mtls, and would be passthrough"}},
		"mtls to tls":                {inline: "ingress: [{port: 80}]", file: "ingress: [{port: 80, mode: tls}]", want: []string{"1:11: ingress[80]: " + refused + "open port 80 further: it is mtls, and would be tls"}},
		"a name":                     {environ: []string{ingress + "a#80#true"}, file: "ingress: [{port: 80, name: b}]"},
		"to tls and back, by entry":  {inline: "ingress: [{port: 80, mode: tls}]", file: "ingress: [{port: 80, remove: true}, {port: 81, mode: tls}]", want: []string{"1:37: ingress[81]: " + refused + "open port 81 further: it is mtls, and would be tls"}},
		"a part of a range":          {inline: "ingress: [{port: 80-89, mode: tls}]", file: "ingress: [{port: 80-89, remove: true}, {port: 80-84, mode: tls}, {port: 88, mode: tls}]"},
		"more than a range":          {inline: "ingress: [{port: 80-89, mode: tls}]", file: "ingress: [{port: 80-89, remove: true}, {port: 85-90, mode: tls}]", want: []string{"1:40: ingress[85-90]: " + refused + "open port 90 further: it is mtls, and would be tls"}},
		"before a range":             {inline: "ingress: [{port: 80-89, mode: tls}]", file: "ingress: [{port: 80-89, remove: true}, {port: 1-89, mode: tls}]", want: []string{"1:40: ingress[1-89]: " + refused + "open port 1 further: it is mtls, and would be tls"}},
		"a range over a hole":        {inline: "ingress: [{port: 80, mode: tls}, {port: 82, mode: tls}]", file: "ingress: [{port: 80, remove: true}, {port: 82, remove: true}, {port: 80-82, mode: tls}]", want: []string{"1:63: ingress[80-82]: " + refused + "open port 81 further: it is mtls, and would be tls"}},
		"at the last port":           {inline: "ingress: [{port: 65535, mode: tls}]", file: "ingress: [{port: 65535, mode: passthrough}]", want: []string{"1:11: ingress[65535]: " + refused + "open port 65535 further: it is tls, and would be passthrough"}},
		"several, one of them wrong": {environ: []string{ingress + "a#80#true##b#81#true"}, file: "ingress:\n- {port: 80, mode: tls}\n- {port: 81, mode: mtls}\n- {port: 82, mode: tls}\n", want: []string{"4:3: ingress[82]: " + refused + "open port 82 further: it is mtls, and would be tls"}},

		// allow: a list where there was none, or a part of the one there is.
		"a new list":              {inline: "ingress: [{port: 80}]", file: "ingress: [{port: 80, allow: [x]}]"},
		"a list of nothing":       {file: "ingress: [{port: 80, allow: [x]}]"},
		"a list for a tls port":   {inline: "ingress: [{port: 80, mode: tls}]", file: "ingress: [{port: 80, mode: mtls, allow: [x]}]"},
		"a shorter list":          {inline: "ingress: [{port: 80, allow: [x, y]}]", file: "ingress: [{port: 80, allow: [y]}]"},
		"the same list":           {inline: "ingress: [{port: 80, allow: [x, y]}]", file: "ingress: [{port: 80, allow: [y, x, y]}]"},
		"a longer list":           {inline: "ingress: [{port: 80, allow: [x]}]", file: "ingress: [{port: 80, allow: [x, y]}]", want: []string{"1:11: ingress[80]: " + refused + "open port 80 further: it is mtls for [x], and would be mtls for [x, y]"}},
		"another list":            {inline: "ingress: [{port: 80, allow: [x]}]", file: "ingress: [{port: 80, allow: [y]}]", want: []string{"1:11: ingress[80]: " + refused + "open port 80 further: it is mtls for [x], and would be mtls for [y]"}},
		"a part by a wildcard":    {inline: "ingress: [{port: 80, allow: ['*.x']}]", file: "ingress: [{port: 80, allow: [a.x]}]", want: []string{"1:11: ingress[80]: " + refused + "open port 80 further: it is mtls for [*.x], and would be mtls for [a.x]"}}, // names are whole
		"a list, removed":         {inline: "ingress: [{port: 80, allow: [x]}]", file: "ingress: [{port: 80, remove: true}]", want: []string{"1:11: ingress[80]: " + refused + "open port 80 further: it is mtls for [x], and would be mtls"}},
		"a list's port left out":  {inline: "ingress: [{port: 80-89, allow: [x]}]", file: "ingress: [{port: 80-89, remove: true}, {port: 80-88, allow: [x]}]", want: []string{"1:11: ingress[80-89]: " + refused + "open port 89 further: it is mtls for [x], and would be mtls"}},
		"removed and added again": {inline: "ingress: [{port: 80-81, allow: [x]}]", file: "ingress: [{port: 80-81, remove: true}, {port: 80, allow: [x]}, {port: 81, allow: [x]}]"},
		"a list, and a looser mode": {inline: "ingress: [{port: 80-81, allow: [x]}]", file: "ingress: [{port: 80-81, remove: true}, {port: 80, mode: passthrough}, {port: 81, mode: tls}]", want: []string{
			"1:40: ingress[80]: " + refused + "open port 80 further: it is mtls for [x], and would be passthrough",
			"1:71: ingress[81]: " + refused + "open port 81 further: it is mtls for [x], and would be tls",
		}},

		// alpn stays, where mantlet speaks TLS already.
		"alpn stays":             {inline: "ingress: [{port: 80, mode: tls, alpn: [h2, a]}]", file: "ingress: [{port: 80, mode: mtls, alpn: [h2, a]}]"},
		"alpn, not named":        {inline: "ingress: [{port: 80, mode: tls, alpn: [h2]}]", file: "ingress: [{port: 80, mode: mtls}]"},
		"alpn, removed":          {inline: "ingress: [{port: 80, mode: tls, alpn: [h2]}]", file: "ingress: [{port: 80, remove: true}]"},
		"alpn of what was plain": {environ: []string{ingress + "a#80#true"}, file: "ingress: [{port: 80, mode: mtls, alpn: [h2]}]"},
		"alpn, new":              {environ: []string{ingress + "a#80#false"}, file: "ingress: [{port: 80, alpn: [h2]}]", want: []string{"1:11: ingress[80]: " + refused + "change alpn of port 80: it is [], and would be [h2]"}},
		"alpn of nothing":        {file: "ingress: [{port: 80-81, alpn: [h2]}]", want: []string{"1:11: ingress[80-81]: " + refused + "change alpn of port 80: it is [], and would be [h2]"}},
		"alpn, shorter":          {inline: "ingress: [{port: 80, alpn: [h2, a]}]", file: "ingress: [{port: 80, alpn: [a]}]", want: []string{"1:11: ingress[80]: " + refused + "change alpn of port 80: it is [h2, a], and would be [a]"}},
		"alpn, in another order": {inline: "ingress: [{port: 80, alpn: [h2, a]}]", file: "ingress: [{port: 80, alpn: [a, h2]}]", want: []string{"1:11: ingress[80]: " + refused + "change alpn of port 80: it is [h2, a], and would be [a, h2]"}},
		"alpn, and a looser mode": {inline: "ingress: [{port: 80, alpn: [h2]}]", file: "ingress: [{port: 80, mode: tls, alpn: [a]}]", want: []string{
			"1:11: ingress[80]: " + refused + "open port 80 further: it is mtls, and would be tls", "1:11: ingress[80]: " + refused + "change alpn of port 80: it is [h2], and would be [a]",
		}},
		"alpn of egress":        {inline: "egress: [{listen: '127.0.0.1:1', upstream: x:1, alpn: [h2]}]", file: "egress: [{listen: '127.0.0.1:1', alpn: [h2, a]}]", want: []string{"1:10: egress[127.0.0.1:1]: " + refused + "change alpn: it is [h2], and would be [h2, a]"}},
		"alpn of egress, stays": {inline: "egress: [{listen: '127.0.0.1:1', upstream: x:1, alpn: [h2]}]", file: "egress: [{listen: '127.0.0.1:1', alpn: [h2]}]"},

		// egress: names only, and fewer of them.
		"new server names":      {environ: []string{egress + "a#127.0.0.1:1#x:1"}, file: "egress: [{listen: '127.0.0.1:1', name: b, serverNames: [y]}]"},
		"fewer server names":    {inline: "egress: [{listen: '127.0.0.1:1', upstream: x:1, serverNames: [y, z]}]", file: "egress: [{listen: '127.0.0.1:1', serverNames: [z]}]"},
		"server names, ordered": {inline: "egress: [{listen: '127.0.0.1:1', upstream: x:1, serverNames: [y, z]}]", file: "egress: [{listen: '127.0.0.1:1', serverNames: [z, y]}]"},
		"more server names":     {inline: "egress: [{listen: '127.0.0.1:1', upstream: x:1, serverNames: [y]}]", file: "egress: [{listen: '127.0.0.1:1', serverNames: [y, z]}]", want: []string{"1:10: egress[127.0.0.1:1]: " + refused + "add server names: they are [y], and would be [y, z]"}},
		"the same upstream":     {environ: []string{egress + "a#127.0.0.1:1#x:1"}, file: "egress: [{listen: '127.0.0.1:1', upstream: x:1}]"},
		"another upstream":      {environ: []string{egress + "a#127.0.0.1:1#x:1"}, file: "egress: [{listen: '127.0.0.1:1', upstream: x:2}]", want: []string{"1:10: egress[127.0.0.1:1]: " + refused + "change the upstream: it is x:1, and would be x:2"}},
		"an entry removed":      {environ: []string{egress + "a#127.0.0.1:1#x:1"}, file: "egress: [{listen: '127.0.0.1:1', remove: true}]", want: []string{"1:10: egress[127.0.0.1:1]: " + refused + "remove an entry"}},
		"an entry added":        {environ: []string{egress + "a#127.0.0.1:1#x:1"}, file: "egress: [{listen: '127.0.0.1:2', upstream: x:1}]", want: []string{"1:10: egress[127.0.0.1:2]: " + refused + "add an entry"}},
		"nothing removed":       {file: "egress: [{listen: '127.0.0.1:1', remove: true}]"},
		"no names any more":     {inline: "egress: [{listen: '127.0.0.1:1', upstream: x:1, serverNames: [y]}]", file: "egress: [{listen: '127.0.0.1:1', upstream: x:1}]"}, // as they were

		// Scalars: the TLS minimum may rise, all else stays.
		"minVersion up":          {file: "tls: {minVersion: '1.3'}"},
		"minVersion stays":       {environ: []string{"MANTLET_TLS_MIN_VERSION=1.3"}, file: "tls: {minVersion: '1.3'}"},
		"minVersion down":        {environ: []string{"MANTLET_TLS_MIN_VERSION=1.3"}, file: "tls: {minVersion: '1.2'}", want: []string{`1:19: tls.minVersion: "1.2": ` + refused + "change this; it is 1.3 (MANTLET_TLS_MIN_VERSION)"}},
		"all that stays, as is":  {file: "envoy: {concurrency: 2, drainTime: 10s, parentShutdownTime: 600s, logLevel: warning}\notherProtocols: drop\naccessLog: refused\n"},
		"otherProtocols, looser": {file: "otherProtocols: accept", want: []string{`1:17: otherProtocols: "accept": ` + refused + "change this; it is drop (default)"}},
		"otherProtocols":         {environ: []string{"MANTLET_OTHER_PROTOCOLS=accept"}, file: "otherProtocols: drop", want: []string{`1:17: otherProtocols: "drop": ` + refused + "change this; it is accept (MANTLET_OTHER_PROTOCOLS)"}},
		"all that must stay": {file: "envoy: {concurrency: 3, drainTime: 11s, parentShutdownTime: 11m, logLevel: info}\naccessLog: none\n", want: []string{
			`1:22: envoy.concurrency: "3": ` + refused + "change this; it is 2 (default)",
			`1:36: envoy.drainTime: "11s": ` + refused + "change this; it is 10s (default)",
			`1:61: envoy.parentShutdownTime: "11m": ` + refused + "change this; it is 10m (default)",
			`1:76: envoy.logLevel: "info": ` + refused + "change this; it is warning (default)",
			`2:12: accessLog: "none": ` + refused + "change this; it is refused (default)",
		}},

		// Neither is stricter.
		"source address: client": {file: "sourceAddress: client", want: []string{`1:16: sourceAddress: "client": ` + refused + "change this; it is pod (default)"}},
		"source address: pod":    {environ: []string{"MANTLET_SOURCE_ADDRESS=client"}, file: "sourceAddress: pod", want: []string{`1:16: sourceAddress: "pod": ` + refused + "change this; it is client (MANTLET_SOURCE_ADDRESS)"}},
		"source address stays":   {environ: []string{"MANTLET_SOURCE_ADDRESS=client"}, file: "sourceAddress: client"},

		// outbound: accept > observe > drop, and a shorter list.
		"observe":                   {file: "outbound: {mode: observe, allow: [dns]}"},
		"drop":                      {environ: []string{"MANTLET_OUTBOUND=observe"}, file: "outbound: {mode: drop, allow: [dns]}"},
		"outbound stays":            {environ: []string{"MANTLET_OUTBOUND=drop", "MANTLET_OUTBOUND_ALLOW=dns"}, file: "outbound: {mode: drop, allow: [dns]}"},
		"a shorter outbound list":   {environ: []string{"MANTLET_OUTBOUND=drop", "MANTLET_OUTBOUND_ALLOW=dns,10.0.0.0/8:5432,[fd00::1]:443"}, file: "outbound: {allow: ['10.1.0.0/16:5432', '[fd00::1]:443']}"},
		"an empty outbound list":    {environ: []string{"MANTLET_OUTBOUND=drop", "MANTLET_OUTBOUND_ALLOW=dns"}, file: "outbound: {allow: []}"},
		"drop to observe":           {environ: []string{"MANTLET_OUTBOUND=drop"}, file: "outbound: {mode: observe}", want: []string{`1:18: outbound.mode: "observe": ` + refused + "loosen this; it is drop (MANTLET_OUTBOUND)"}},
		"observe to accept":         {environ: []string{"MANTLET_OUTBOUND=observe"}, file: "outbound: {mode: accept}", want: []string{`1:18: outbound.mode: "accept": ` + refused + "loosen this; it is observe (MANTLET_OUTBOUND)"}},
		"a list where nothing goes": {environ: []string{"MANTLET_OUTBOUND=drop"}, file: "outbound: {allow: [dns]}", want: []string{`1:20: outbound.allow: "[dns]": ` + refused + "allow more; [dns] is not in what is allowed, which is [] (default)"}},
		"a longer outbound list":    {environ: []string{"MANTLET_OUTBOUND=observe", "MANTLET_OUTBOUND_ALLOW=dns"}, file: "outbound: {allow: [dns, '10.0.0.1:1', '10.0.0.2:2']}", want: []string{`1:20: outbound.allow: "[dns, 10.0.0.1:1, 10.0.0.2:2]": ` + refused + "allow more; [10.0.0.1:1, 10.0.0.2:2] is not in what is allowed, which is [dns] (MANTLET_OUTBOUND_ALLOW)"}},
		"a wider prefix":            {environ: []string{"MANTLET_OUTBOUND=drop", "MANTLET_OUTBOUND_ALLOW=10.1.0.0/16:5432"}, file: "outbound: {allow: ['10.0.0.0/8:5432']}", want: []string{`1:20: outbound.allow: "[10.0.0.0/8:5432]": ` + refused + "allow more; [10.0.0.0/8:5432] is not in what is allowed, which is [10.1.0.0/16:5432] (MANTLET_OUTBOUND_ALLOW)"}},
		"drop, and a longer list":   {environ: []string{"MANTLET_OUTBOUND_ALLOW=10.0.0.1:1"}, file: "outbound: {mode: drop, allow: [dns]}", want: []string{`1:32: outbound.allow: "[dns]": ` + refused + "allow more; [dns] is not in what is allowed, which is [10.0.0.1:1] (MANTLET_OUTBOUND_ALLOW)"}},
		"nothing":                   {environ: []string{ingress + "a#80#true", egress + "a#127.0.0.1:1#x:1"}},
	} {
		t.Run(name, func(t *testing.T) {
			environ := append(c.environ, "MANTLET_OVERRIDES=tighten")
			if c.inline != "" {
				environ = append(environ, "MANTLET_CONFIG_INLINE="+c.inline)
			}
			config, err := environment(t, environ...).Merge([]byte(c.file))
			if diff := cmp.Diff(c.want, places(err)); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(schema.Mesh{}, config.Mesh, addresses); err != nil && diff != "" {
				t.Errorf("half of it is applied: %s", diff)
			}
		})
	}
}

// connection is one from outside the pod.
type connection struct {
	port      uint16
	udp       bool
	tls       schema.TLSVersion // empty for plaintext
	certified bool              // it shows a certificate of the mesh,
	san       string            // which has this name
}

// accepts says what a mesh means for a connection. It is the meaning of a mesh in its fewest words, and shares nothing with
// what it is to judge.
func accepts(mesh schema.Mesh, c connection) bool {
	entry := schema.Ingress{Mode: schema.ModeMTLS}
	for _, in := range mesh.Ingress {
		if in.Ports.First <= c.port && c.port <= in.Ports.Last {
			entry = in
		}
	}
	switch {
	case entry.Mode == schema.ModePassthrough:
		return true
	case c.udp:
		return mesh.OtherProtocols == schema.OtherProtocolsAccept
	case c.tls < mesh.TLS.MinVersion: // plaintext is less than any
		return false
	case entry.Mode == schema.ModeTLS:
		return true
	default:
		return c.certified && (entry.Allow == nil || slices.Contains(entry.Allow, c.san))
	}
}

// world is small, so that whatever is drawn from it meets.
var world = struct {
	lastPort  uint16
	names     []string // d is nobody's
	listen    []string
	upstreams []string
}{7, []string{"a", "b", "spiffe://c", "d"}, []string{"127.0.0.1:1", "127.0.0.1:2", "[::1]:1"}, []string{"x:1", "x:2", "192.0.2.7:1"}}

// connections are all that there can be.
func connections() []connection {
	var all []connection
	for port := range world.lastPort + 2 {
		all = append(all, connection{port: port, udp: true}, connection{port: port})
		for _, version := range []schema.TLSVersion{"1.0", schema.TLS12, schema.TLS13} {
			all = append(all, connection{port: port, tls: version})
			for _, name := range world.names {
				all = append(all, connection{port: port, tls: version, certified: true, san: name})
			}
		}
	}
	return all
}

// stricter says whether a mesh accepts nothing that another refuses, and sends egress nowhere else.
func stricter(mesh, other schema.Mesh) bool {
	for _, c := range connections() {
		if accepts(mesh, c) && !accepts(other, c) {
			return false
		}
	}
	goes := func(mesh schema.Mesh) map[string]bool { // who may answer, by address
		all := map[string]bool{}
		for _, e := range mesh.Egress {
			for _, name := range world.names {
				if e.ServerNames == nil || slices.Contains(e.ServerNames, name) {
					all[fmt.Sprint(e.Listen, " ", e.Upstream, " ", name)] = true
				}
			}
		}
		return all
	}
	were := goes(other)
	for answer := range goes(mesh) {
		if !were[answer] {
			return false
		}
	}
	return len(mesh.Egress) == len(other.Egress)
}

// form is the override file's; its JSON is YAML.
type form struct {
	Ingress []map[string]any  `json:"ingress,omitempty"`
	Egress  []map[string]any  `json:"egress,omitempty"`
	TLS     map[string]string `json:"tls,omitempty"`
}

func (f form) String() string {
	text, err := json.Marshal(f)
	if err != nil {
		panic(err)
	}
	return string(text)
}

func drawNames(t *rapid.T) []string {
	return rapid.SliceOfNDistinct(rapid.SampledFrom(world.names[:3]), 1, 3, rapid.ID[string]).Draw(t, "names")
}

// drawPolicy makes base's entries, which do not overlap.
func drawPolicy(t *rapid.T) form {
	var f form
	for first := uint16(1); first <= world.lastPort; {
		last := min(world.lastPort, first+rapid.Uint16Range(0, 2).Draw(t, "ports"))
		entry := map[string]any{"port": schema.Ports{First: first, Last: last}.String()}
		switch rapid.IntRange(0, 4).Draw(t, "entry") {
		case 0:
			entry = nil
		case 1:
			entry["mode"] = "passthrough"
		case 2:
			entry["mode"] = "tls"
		case 3:
			entry["allow"] = drawNames(t)
		}
		if entry != nil {
			f.Ingress = append(f.Ingress, entry)
		}
		first = last + 1
	}
	for _, listen := range rapid.SliceOfNDistinct(rapid.SampledFrom(world.listen), 0, 2, rapid.ID[string]).Draw(t, "egress") {
		entry := map[string]any{"listen": listen, "upstream": rapid.SampledFrom(world.upstreams).Draw(t, "upstream")}
		if rapid.Bool().Draw(t, "with names") {
			entry["serverNames"] = drawNames(t)
		}
		f.Egress = append(f.Egress, entry)
	}
	if rapid.Bool().Draw(t, "with a minimum") {
		f.TLS = map[string]string{"minVersion": drawVersion(t)}
	}
	return f
}

func drawVersion(t *rapid.T) string {
	return rapid.SampledFrom([]string{"1.2", "1.3", "1.3"}).Draw(t, "minimum")
}

// drawFile makes a file that says something of what is there, now and then something else. Most of it is stricter, so that
// whole files are.
func drawFile(t *rapid.T, base form) form {
	var f form
	rarely := func() bool { return rapid.IntRange(0, 11).Draw(t, "rarely") == 0 }
	for _, was := range base.Ingress {
		entry := map[string]any{"port": was["port"]}
		switch rapid.IntRange(0, 5).Draw(t, "change") {
		case 0:
			entry["remove"] = true
		case 1:
			entry["mode"] = "mtls"
		case 2:
			entry["mode"] = "mtls"
			entry["allow"] = drawNames(t)
			if names, ok := was["allow"].([]string); ok && !rarely() {
				entry["allow"] = names[:rapid.IntRange(1, len(names)).Draw(t, "left")]
			}
		case 3:
			entry["name"] = "other"
		case 4:
			if was["mode"] == "passthrough" || rarely() {
				entry["mode"] = rapid.SampledFrom([]string{"tls", "tls", "passthrough"}).Draw(t, "mode")
			}
		default:
			continue
		}
		if was["allow"] != nil && entry["remove"] != nil && rapid.Bool().Draw(t, "keep") {
			continue
		}
		f.Ingress = append(f.Ingress, entry)
		if entry["remove"] != nil && rapid.Bool().Draw(t, "again") {
			if again := drawPart(t, was); again["port"] != was["port"] { // else it is the entry that is removed
				f.Ingress = append(f.Ingress, again)
			}
		}
	}
	if rarely() {
		f.Ingress = append(f.Ingress, map[string]any{
			"port": rapid.IntRange(1, int(world.lastPort)).Draw(t, "new"), "mode": rapid.SampledFrom([]string{"mtls", "tls", "passthrough"}).Draw(t, "mode"),
		})
	}
	for _, was := range base.Egress {
		entry := map[string]any{"listen": was["listen"]}
		switch rapid.IntRange(0, 3).Draw(t, "change") {
		case 0:
			entry["serverNames"] = drawNames(t)
			if names, ok := was["serverNames"].([]string); ok && !rarely() {
				entry["serverNames"] = names[:rapid.IntRange(1, len(names)).Draw(t, "left")]
			}
		case 1:
			entry["upstream"] = was["upstream"]
			if rarely() {
				entry["upstream"] = rapid.SampledFrom(world.upstreams).Draw(t, "upstream")
			}
		case 2:
			if rarely() {
				entry["remove"] = true
			}
		default:
			continue
		}
		f.Egress = append(f.Egress, entry)
	}
	if rarely() {
		f.Egress = append(f.Egress, map[string]any{"listen": rapid.SampledFrom(world.listen).Draw(t, "listen"), "upstream": rapid.SampledFrom(world.upstreams).Draw(t, "upstream")})
	}
	if rapid.IntRange(0, 3).Draw(t, "with a minimum") == 0 {
		f.TLS = map[string]string{"minVersion": drawVersion(t)}
	}
	return f
}

// drawPart makes an entry of some of the ports of another.
func drawPart(t *rapid.T, of map[string]any) map[string]any {
	var ports schema.Ports
	if n, _ := fmt.Sscanf(of["port"].(string), "%d-%d", &ports.First, &ports.Last); n == 1 {
		ports.Last = ports.First
	}
	ports.First = rapid.Uint16Range(ports.First, ports.Last).Draw(t, "first")
	ports.Last = rapid.Uint16Range(ports.First, ports.Last).Draw(t, "last")
	part := maps.Clone(of)
	part["port"] = ports.String()
	return part
}

// TestTightenProperty checks, by an oracle that knows nothing of how it is done, that tighten accepts exactly the files that
// are stricter. Issue 4 asks for one direction; the other keeps it of use.
func TestTightenProperty(t *testing.T) {
	var invalid, accepted, refused, changed int
	rapid.Check(t, func(t *rapid.T) {
		policy := drawPolicy(t)
		environ := []string{"MANTLET_CONFIG=" + configFile, "MANTLET_CONFIG_INLINE=" + policy.String()}
		free, err := schema.ParseEnvironment(environ)
		if err != nil {
			t.Fatal(err)
		}
		strict, err := schema.ParseEnvironment(append(environ, "MANTLET_OVERRIDES=tighten"))
		if err != nil {
			t.Fatal(err)
		}
		for range 20 {
			file := drawFile(t, policy).String()
			all, err := free.Merge([]byte(file))
			if err != nil {
				invalid++
				continue
			}
			config, err := strict.Merge([]byte(file))
			if want := stricter(all.Mesh, free.Base().Mesh); want != (err == nil) {
				t.Fatalf("stricter: %t; tighten says: %v\npolicy %s\nfile   %s", want, err, policy, file)
			}
			if err != nil {
				refused++
				continue
			}
			accepted++
			if diff := cmp.Diff(all.Mesh, config.Mesh, addresses); diff != "" {
				t.Fatal(diff)
			}
			if !cmp.Equal(all.Mesh, free.Base().Mesh, addresses) {
				changed++
			}
		}
	})
	t.Logf("%d accepted, %d of them with a change; %d refused; %d invalid", accepted, changed, refused, invalid)
	if total := accepted + refused + invalid; !t.Failed() && (changed < total/5 || refused < total/10 || invalid > total/4) {
		t.Error("what is drawn shows little")
	}
}

// TestCut checks by each single port that the parts cover what the ranges cover, and that no range starts or ends within one.
func TestCut(t *testing.T) {
	const last = 65535
	rapid.Check(t, func(t *rapid.T) {
		port := rapid.OneOf(rapid.Uint16Range(0, 12), rapid.Uint16Range(last-5, last))
		ranges := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) schema.Ports {
			a, b := port.Draw(t, "a"), port.Draw(t, "b")
			return schema.Ports{First: min(a, b), Last: max(a, b)}
		}), 0, 5).Draw(t, "ranges")
		parts := schema.Cut(slices.Clone(ranges))
		for i := 1; i < len(parts); i++ {
			if parts[i-1].Last >= parts[i].First {
				t.Fatalf("not sorted and apart: %v", parts)
			}
		}
		for _, port := range []uint16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 100, last - 6, last - 5, last - 4, last - 3, last - 2, last - 1, last} {
			contains := func(p schema.Ports) bool { return p.Contains(port) }
			i := slices.IndexFunc(parts, contains)
			if slices.ContainsFunc(ranges, contains) != (i >= 0) {
				t.Fatalf("port %d of %v in %v", port, ranges, parts)
			}
			for _, r := range ranges {
				if i >= 0 && r.Contains(port) && (!r.Contains(parts[i].First) || !r.Contains(parts[i].Last)) {
					t.Fatalf("%v ends within %v", r, parts[i])
				}
			}
		}
	})
}
