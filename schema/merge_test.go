package schema_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"mantlet/schema"
)

// explain is what --explain shows: path, value, where it comes from and what it overrode, the latest first.
func explain(c schema.Config) string {
	var text strings.Builder
	for _, e := range c.Explain() {
		if strings.HasPrefix(e.Origin, "default") && !strings.Contains(e.Path, "[") {
			continue // of nothing that was set
		}
		fmt.Fprintf(&text, "%s = %s (%s)", e.Path, e.Value, e.Origin)
		for _, o := range e.Overrides {
			fmt.Fprintf(&text, " < %s (%s)", o.Value, o.Origin)
		}
		text.WriteByte('\n')
	}
	return strings.ReplaceAll(strings.ReplaceAll(strings.ReplaceAll(text.String(), "EDG_INGRESS_PROXY_CONFIG", "IN"), "EDG_EGRESS_PROXY_CONFIG", "OUT"), "MANTLET_CONFIG_INLINE", "INLINE")
}

// TestMerge lays sources over each other: the environment, what stands inline, the file.
func TestMerge(t *testing.T) {
	for name, c := range map[string]struct {
		environ      []string
		inline, file string
		want         string // explained
	}{
		"by key, not by position": {
			environ: []string{ingress + "a#1#true##b#2#true##c#3#true", egress + "a#127.0.0.1:1#x:1##b#127.0.0.1:2#y:2"},
			file:    "ingress: [{port: 3, mode: tls}, {port: 1, mode: mtls}]\negress: [{listen: '127.0.0.1:2', upstream: z:3}]\n",
			want: `ingress[1].name = a (IN entry 1)
ingress[1].mode = mtls (/config.yaml:1:49) < passthrough (IN entry 1)
ingress[2].name = b (IN entry 2)
ingress[2].mode = passthrough (IN entry 2)
ingress[3].name = c (IN entry 3)
ingress[3].mode = tls (/config.yaml:1:27) < passthrough (IN entry 3)
egress[127.0.0.1:1].name = a (OUT entry 1)
egress[127.0.0.1:1].upstream = x:1 (OUT entry 1)
egress[127.0.0.1:2].name = b (OUT entry 2)
egress[127.0.0.1:2].upstream = z:3 (/config.yaml:2:44) < y:2 (OUT entry 2)
`,
		},
		"the same key in other words": {
			environ: []string{ingress + "a#80#true", egress + "a#[::1]:80#x:1"},
			file:    "ingress: [{port: 80-80, name: b}]\negress: [{listen: '[0:0:0:0:0:0:0:1]:80', name: b}]\n",
			want: `ingress[80].name = b (/config.yaml:1:31) < a (IN entry 1)
ingress[80].mode = passthrough (IN entry 1)
egress[[::1]:80].name = b (/config.yaml:2:49) < a (OUT entry 1)
egress[[::1]:80].upstream = x:1 (OUT entry 1)
`,
		},
		"field by field, through all sources": {
			environ: []string{egress + "a#127.0.0.1:1#x:1", "MANTLET_TLS_MIN_VERSION=1.2", "MANTLET_ACCESS_LOG=all"},
			inline:  "egress: [{listen: '127.0.0.1:1', serverNames: [a, b, a]}]\ntls: {minVersion: '1.3'}\naccessLog: none\n",
			file:    "egress: [{listen: '127.0.0.1:1', name: c, serverNames: [d]}]\naccessLog: refused\n",
			want: `egress[127.0.0.1:1].name = c (/config.yaml:1:40) < a (OUT entry 1)
egress[127.0.0.1:1].upstream = x:1 (OUT entry 1)
egress[127.0.0.1:1].serverNames = [d] (/config.yaml:1:57) < [a, b] (INLINE:1:48)
accessLog = refused (/config.yaml:2:12) < none (INLINE:3:12) < all (MANTLET_ACCESS_LOG) < refused (default)
tls.minVersion = 1.3 (INLINE:2:19) < 1.2 (MANTLET_TLS_MIN_VERSION) < 1.2 (default)
`,
		},
		"lists that say nothing erase nothing": {
			environ: []string{ingress + "a#1#true", egress + "a#127.0.0.1:1#x:1"},
			inline:  "ingress: []\negress: []\ntls: {}\n",
			file:    "{ingress: [], egress: [], envoy: {}}",
			want: `ingress[1].name = a (IN entry 1)
ingress[1].mode = passthrough (IN entry 1)
egress[127.0.0.1:1].name = a (OUT entry 1)
egress[127.0.0.1:1].upstream = x:1 (OUT entry 1)
`,
		},
		"remove": {
			environ: []string{ingress + "a#1#true##b#2#true", egress + "a#127.0.0.1:1#x:1##b#127.0.0.1:2#x:1"},
			file:    "ingress: [{port: 1, remove: true}]\negress: [{listen: '127.0.0.1:1', remove: true}]\n",
			want: `ingress[1].remove = true (/config.yaml:1:29) < name: a (IN entry 1) < mode: passthrough (IN entry 1)
ingress[2].name = b (IN entry 2)
ingress[2].mode = passthrough (IN entry 2)
egress[127.0.0.1:1].remove = true (/config.yaml:2:42) < name: a (OUT entry 1) < upstream: x:1 (OUT entry 1)
egress[127.0.0.1:2].name = b (OUT entry 2)
egress[127.0.0.1:2].upstream = x:1 (OUT entry 2)
`,
		},
		"remove what is not there": {
			inline: "ingress: [{port: 2, remove: true}]\n",
			file:   "ingress: [{port: 1, remove: true}, {port: 2, remove: true}]\n",
			want: `ingress[1].remove = true (/config.yaml:1:29)
ingress[2].remove = true (/config.yaml:1:54) < true (INLINE:1:29)
`,
		},
		"remove and add again": {
			environ: []string{ingress + "a#1#true", egress + "a#127.0.0.1:1#x:1"},
			inline:  "ingress: [{port: 1, remove: true}]\negress: [{listen: '127.0.0.1:1', remove: true}]\n",
			file:    "ingress: [{port: 1, allow: [c]}]\negress: [{listen: '127.0.0.1:1', upstream: y:2}]\n",
			want: `ingress[1].allow = [c] (/config.yaml:1:29) < removed (INLINE:1:29)
ingress[1].mode = mtls (default)
egress[127.0.0.1:1].upstream = y:2 (/config.yaml:2:44) < removed (INLINE:2:42) < x:1 (OUT entry 1)
`,
		},
		"add and remove": {
			inline: "ingress: [{port: 1, mode: tls}]\n",
			file:   "ingress: [{port: 1, remove: true}]\n",
			want:   "ingress[1].remove = true (/config.yaml:1:29) < mode: tls (INLINE:1:27)\n",
		},
		"outbound, its list as a whole": {
			environ: []string{"MANTLET_OUTBOUND=observe", "MANTLET_OUTBOUND_ALLOW=dns, 10.0.0.0/8:5432"},
			inline:  "outbound: {allow: []}\n",
			file:    "outbound: {mode: drop, allow: ['[FD00::0]/8:443', dns]}\n",
			want: `outbound.allow = [[fd00::]/8:443, dns] (/config.yaml:1:32) < [] (INLINE:1:19) < [dns, 10.0.0.0/8:5432] (MANTLET_OUTBOUND_ALLOW) < [] (default)
outbound.mode = drop (/config.yaml:1:18) < observe (MANTLET_OUTBOUND) < accept (default)
`,
		},
		"a range gives way": {
			environ: []string{"MANTLET_CONFIG_INLINE=ingress: [{port: 80-90, mode: tls}]"},
			file:    "ingress: [{port: 80-90, remove: true}, {port: 80-85, mode: tls}, {port: 90}]\n",
			want: `ingress[80-85].mode = tls (/config.yaml:1:60)
ingress[80-90].remove = true (/config.yaml:1:33) < mode: tls (INLINE:1:31)
ingress[90].mode = mtls (default)
`,
		},
		"edges of ranges": {
			file: "ingress: [{port: 15008-65535, mode: tls}, {port: 1-15005, mode: tls}]\n",
			want: "ingress[1-15005].mode = tls (/config.yaml:1:65)\ningress[15008-65535].mode = tls (/config.yaml:1:37)\n",
		},
		"a number is a number": { // and an address no text: 9 before 10
			file: "ingress: [{port: 10}, {port: 9}]\negress: [{listen: '127.0.0.10:1', upstream: x:1}, {listen: '127.0.0.9:1', upstream: x:1}]\n",
			want: `ingress[9].mode = mtls (default)
ingress[10].mode = mtls (default)
egress[127.0.0.9:1].upstream = x:1 (/config.yaml:2:85)
egress[127.0.0.10:1].upstream = x:1 (/config.yaml:2:45)
`,
		},
		"probes, by name and kind": {
			inline: "probes: [{name: web, http: 8080/healthz}, {name: db, tcp: 5432}, {name: api, grpc: 9000}, {name: old, tcp: 1}]\n",
			file:   "probes: [{name: web, grpc: 9000/a.B}, {name: new, http: 80}, {name: db, tcp: 5433}, {name: api}, {name: old, remove: true}]\n",
			want: `probes[api].grpc = 9000 (INLINE:1:84)
probes[db].tcp = 5433 (/config.yaml:1:78) < 5432 (INLINE:1:59)
probes[new].http = 80/ (/config.yaml:1:57)
probes[old].remove = true (/config.yaml:1:118) < tcp: 1 (INLINE:1:108)
probes[web].grpc = 9000/a.B (/config.yaml:1:28) < http: 8080/healthz (INLINE:1:28)
`,
		},
		"a probe, removed and added again": {
			inline: "probes: [{name: web, remove: true}]\n",
			file:   "probes: [{name: web, tcp: 80}]\n",
			want:   "probes[web].tcp = 80 (/config.yaml:1:27) < removed (INLINE:1:30)\n",
		},
		"alpn, as a whole": {
			environ: []string{ingress + "a#80#false", egress + "a#127.0.0.1:1#x:1"},
			inline:  "ingress: [{port: 80, alpn: [h2, http/1.1, h2]}]\negress: [{listen: '127.0.0.1:1', alpn: [h2]}]\n",
			file:    "ingress: [{port: 80, mode: mtls, alpn: [http/1.1]}]\n",
			want: `ingress[80].name = a (IN entry 1)
ingress[80].mode = mtls (/config.yaml:1:28) < tls (IN entry 1)
ingress[80].alpn = [http/1.1] (/config.yaml:1:41) < [h2, http/1.1] (INLINE:1:29)
egress[127.0.0.1:1].name = a (OUT entry 1)
egress[127.0.0.1:1].upstream = x:1 (OUT entry 1)
egress[127.0.0.1:1].alpn = [h2] (INLINE:2:41)
`,
		},
		"times of several sources": {
			environ: []string{"MANTLET_ENVOY_DRAIN_TIME=20m", "MANTLET_CONFIG_INLINE=envoy: {parentShutdownTime: 1h}"},
			file:    "envoy: {drainTime: 59m}\n",
			want: `envoy.drainTime = 59m (/config.yaml:1:20) < 20m (MANTLET_ENVOY_DRAIN_TIME) < 10s (default)
envoy.parentShutdownTime = 1h (INLINE:1:29) < 10m (default)
`,
		},
		"a name of nothing": {
			environ: []string{ingress + "a#1#true"},
			file:    "ingress: [{port: 1, name: ''}]\n",
			want:    "ingress[1].name =  (/config.yaml:1:27) < a (IN entry 1)\ningress[1].mode = passthrough (IN entry 1)\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			environ := c.environ
			if c.inline != "" {
				environ = append(environ, "MANTLET_CONFIG_INLINE="+c.inline)
			}
			config, err := environment(t, environ...).Merge([]byte(c.file))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, explain(config)); diff != "" {
				t.Error(diff)
			}
			entries := 0
			for _, e := range config.Explain() {
				if strings.HasSuffix(e.Path, "].mode") || strings.HasSuffix(e.Path, ".upstream") || strings.HasPrefix(e.Path, "probes") && !strings.HasSuffix(e.Path, ".remove") {
					entries++
				}
			}
			if mesh := config.Mesh; len(mesh.Ingress)+len(mesh.Egress)+len(mesh.Probes) != entries {
				t.Errorf("%d entries are explained; the mesh: %v", entries, mesh)
			}
		})
	}
}

// TestMergedMesh checks values, beside TestMerge's provenance.
func TestMergedMesh(t *testing.T) {
	config, err := environment(t, ingress+"a#80#true##b#81#true").Merge([]byte(
		"ingress: [{port: 80, mode: mtls, allow: [b, a, b], alpn: [h2, a, h2]}, {port: 82-83}]\negress: [{listen: '127.0.0.1:1', upstream: x:1, serverNames: [b, a, b]}]\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := []schema.Ingress{
		{Name: "a", Ports: schema.Ports{First: 80, Last: 80}, Mode: schema.ModeMTLS, Allow: []string{"a", "b"}, ALPN: []string{"h2", "a"}}, // sorted; in order
		{Name: "b", Ports: schema.Ports{First: 81, Last: 81}, Mode: schema.ModePassthrough},
		{Ports: schema.Ports{First: 82, Last: 83}, Mode: schema.ModeMTLS},
	}
	if diff := cmp.Diff(want, config.Mesh.Ingress); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"b", "a"}, config.Mesh.Egress[0].ServerNames); diff != "" { // in order: the first is the SNI
		t.Error(diff)
	}
	config, err = environment(t).Merge([]byte("probes: [{name: c, grpc: 9000/a.B}, {name: b, tcp: 5432}, {name: d, grpc: 9000}, {name: a, http: '80/a%20b?c=/d'}]\n"))
	if err != nil {
		t.Fatal(err)
	}
	probes := []schema.Probe{
		{Name: "a", Kind: schema.ProbeHTTP, Port: 80, Target: "/a%20b?c=/d"},
		{Name: "b", Kind: schema.ProbeTCP, Port: 5432},
		{Name: "c", Kind: schema.ProbeGRPC, Port: 9000, Target: "a.B"},
		{Name: "d", Kind: schema.ProbeGRPC, Port: 9000},
	}
	if diff := cmp.Diff(probes, config.Mesh.Probes); diff != "" {
		t.Error(diff)
	}
}

// TestMergeProblems has what only shows once the sources are together.
func TestMergeProblems(t *testing.T) {
	for name, c := range map[string]struct {
		environ []string
		file    string
		want    []string
	}{
		"an overlap with the environment": {
			[]string{ingress + "a#80#true##b#85#true"},
			"ingress: [{port: 80-90}]\n",
			[]string{
				"1:11: ingress[80-90]: overlaps 80 (EDG_INGRESS_PROXY_CONFIG entry 1); ranges must be identical or disjoint",
				"1:11: ingress[80-90]: overlaps 85 (EDG_INGRESS_PROXY_CONFIG entry 2); ranges must be identical or disjoint",
			},
		},
		"an overlap with what stands inline": {
			[]string{"MANTLET_CONFIG_INLINE=ingress: [{port: 80-90}]"},
			"ingress: [{port: 90-91}]\n",
			[]string{"1:11: ingress[90-91]: overlaps 80-90 (MANTLET_CONFIG_INLINE:1:11); ranges must be identical or disjoint"},
		},
		"an overlap with what was changed": {
			[]string{ingress + "a#80#true"},
			"ingress:\n  - {port: 79-80}\n  - {port: 80, mode: tls}\n",
			[]string{"3:5: ingress[80]: overlaps 79-80 (/config.yaml:2:5); ranges must be identical or disjoint"},
		},
		"allow, of a mode that comes from elsewhere": {
			[]string{ingress + "a#80#true"},
			"ingress: [{port: 80, allow: [x]}]\n",
			[]string{`1:30: ingress[80].allow: "[x]": requires mode mtls, but the mode is passthrough (EDG_INGRESS_PROXY_CONFIG entry 1): without client certificates, clients cannot be told apart`},
		},
		"a mode, of an allow that comes from elsewhere": {
			[]string{"MANTLET_CONFIG_INLINE=ingress: [{port: 80, allow: [x]}]"},
			"ingress: [{port: 80, mode: tls}]\n",
			[]string{`MANTLET_CONFIG_INLINE:1:30: ingress[80].allow: "[x]": requires mode mtls, but the mode is tls (/config.yaml:1:28): without client certificates, clients cannot be told apart`},
		},
		"part of an entry that is nowhere": {
			[]string{egress + "a#127.0.0.1:1#x:1"},
			"egress: [{listen: '127.0.0.1:2', serverNames: [x]}]\n",
			[]string{"1:10: egress[127.0.0.1:2].upstream: is missing: a new entry needs it"},
		},
		"part of an entry that was removed": {
			[]string{egress + "a#127.0.0.1:1#x:1", "MANTLET_CONFIG_INLINE=egress: [{listen: '127.0.0.1:1', remove: true}]"},
			"egress: [{listen: '127.0.0.1:1', serverNames: [x]}]\n",
			[]string{"1:10: egress[127.0.0.1:1].upstream: is missing: a new entry needs it"},
		},
		"a circle by two sources": {
			[]string{egress + "a#127.0.0.1:1#x:1"},
			"egress: [{listen: '127.0.0.1:1', upstream: '127.0.0.1:1'}]\n",
			[]string{`1:44: egress[127.0.0.1:1].upstream: "127.0.0.1:1": is the entry's own listen address: connections would loop back to mantlet`},
		},
		"alpn, of a mode that comes from elsewhere": {
			[]string{ingress + "a#80#true"},
			"ingress: [{port: 80, alpn: [h2]}]\n",
			[]string{`1:29: ingress[80].alpn: "[h2]": requires mode mtls or tls, but the mode is passthrough (EDG_INGRESS_PROXY_CONFIG entry 1), where mantlet speaks no TLS`},
		},
		"alpn that differs": {
			nil, "ingress: [{port: 80, alpn: [h2]}, {port: 80, alpn: [a]}]\n",
			[]string{"1:35: ingress[80]: differs from the entry at /config.yaml:1:11; keep only one of them"},
		},
		"times": {
			[]string{"MANTLET_ENVOY_DRAIN_TIME=20m", "MANTLET_ENVOY_PARENT_SHUTDOWN_TIME=1h"},
			"envoy: {parentShutdownTime: 20m}\n",
			[]string{`1:29: envoy.parentShutdownTime: "20m": must be more than envoy.drainTime, which is 20m (MANTLET_ENVOY_DRAIN_TIME)`},
		},
		"a probe of nothing": {
			[]string{"MANTLET_CONFIG_INLINE=probes: [{name: web, tcp: 80}]"},
			"probes:\n  - {name: db}\n  - {name: web}\n",
			[]string{"2:5: probes[db]: needs one of http, tcp and grpc, for example http: 8080/healthz"},
		},
		"both ends of one entry": {
			nil, "ingress: [{port: 80, mode: tls}, {port: 80, remove: true}]\n",
			[]string{"1:34: ingress[80]: differs from the entry at /config.yaml:1:11; keep only one of them"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := environment(t, c.environ...).Merge([]byte(c.file))
			if diff := cmp.Diff(c.want, places(err)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestMergeLeaves checks that a merge changes nothing that the next one starts from.
func TestMergeLeaves(t *testing.T) {
	env := environment(t, ingress+"a#80#true", egress+"a#127.0.0.1:1#x:1")
	base := explain(env.Base())
	for range 2 {
		for _, file := range []string{"ingress: [{port: 80, mode: tls}]\ntls: {minVersion: '1.3'}\n", "egress: [{listen: '127.0.0.1:1', remove: true}]\n", "ingress: [{port: 80, mode: x}]\n"} {
			first, _ := env.Merge([]byte(file))
			again, _ := env.Merge([]byte(file))
			if diff := cmp.Diff(first.Mesh, again.Mesh, addresses); diff != "" {
				t.Error(diff)
			}
		}
	}
	if diff := cmp.Diff(base, explain(env.Base())); diff != "" {
		t.Error(diff)
	}
	config, err := env.Merge(nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(base, explain(config)); diff != "" {
		t.Error(diff)
	}
}
