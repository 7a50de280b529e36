package schema_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"mantlet/schema"
)

// write makes a file of a text and returns its path.
func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "mesh.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLoadFile(t *testing.T) {
	path := write(t, "accessLog: all\n")
	link := path + ".link"
	if err := os.Symlink(filepath.Base(path), link); err != nil {
		t.Fatal(err)
	}
	want := defaults()
	want.AccessLog = schema.AccessLogAll
	for _, path := range []string{path, link} {
		config, err := environment(t, "MANTLET_CONFIG="+path).Load()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, config.Mesh, addresses); diff != "" {
			t.Error(diff)
		}
	}
}

// TestLoadReads checks that each Load reads anew.
func TestLoadReads(t *testing.T) {
	path := write(t, "accessLog: all\n")
	env := environment(t, "MANTLET_CONFIG="+path)
	for _, want := range []schema.AccessLog{schema.AccessLogNone, schema.AccessLogAll} {
		if err := os.WriteFile(path, []byte("accessLog: "+string(want)), 0o600); err != nil {
			t.Fatal(err)
		}
		config, err := env.Load()
		if err != nil {
			t.Fatal(err)
		}
		if got := config.Mesh.AccessLog; got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if config, err := env.Load(); !schema.IsMissing(err) {
		t.Errorf("the file is gone, and Load says %v, %v", config.Mesh, err)
	}
}

func TestLoadProblems(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	for name, target := range map[string]string{"dangling": in("nothing"), "loop": in("loop"), "to-pipe": in("pipe")} {
		if err := os.Symlink(target, in(name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(in("pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	long := write(t, strings.Repeat("#", 4<<20+1))
	bad := write(t, "ingress: {}\n")
	for name, c := range map[string]struct {
		path, reason string
		missing      bool
	}{
		"missing":             {in("nothing"), ": cannot be read: no such file or directory", true},
		"in a missing folder": {in("nothing/mesh.yaml"), ": cannot be read: no such file or directory", true},
		"a dangling link":     {in("dangling"), ": cannot be read: no such file or directory", true},
		"a loop of links":     {in("loop"), ": cannot be read: too many levels of symbolic links", false},
		"a file for a folder": {filepath.Join(bad, "mesh.yaml"), ": cannot be read: not a directory", false},
		"a directory":         {dir, ": cannot be read: it must be a regular file, but is a directory", false},
		"a pipe":              {in("pipe"), ": cannot be read: it must be a regular file, but is a pipe", false}, // nobody writes: reading it would wait
		"a link to a pipe":    {in("to-pipe"), ": cannot be read: it must be a regular file, but is a pipe", false},
		"a device":            {"/dev/zero", ": cannot be read: it must be a regular file, but is something else", false}, // it never ends
		"too long":            {long, ": is longer than 4194304 bytes, which is the limit", false},
		"bad":                 {bad, ":1:10: ingress: must be a list", false},
	} {
		t.Run(name, func(t *testing.T) {
			config, err := environment(t, ingress+"web#80#true", "MANTLET_CONFIG="+c.path).Load()
			if diff := cmp.Diff([]string{c.path + c.reason}, report(err)); diff != "" {
				t.Error(diff)
			}
			if got := schema.IsMissing(err); got != c.missing {
				t.Errorf("IsMissing is %t", got)
			}
			if diff := cmp.Diff(schema.Mesh{}, config.Mesh, addresses); diff != "" {
				t.Error(diff)
			}
			if places := schema.Problems(err); places[0].Origin.Source != c.path {
				t.Errorf("the problem has the place %v", places[0].Origin)
			}
		})
	}
}

// TestLinkElsewhere: a file that became a link to what mantlet reads for other reasons is none, and nothing of it is told.
func TestLinkElsewhere(t *testing.T) {
	base := t.TempDir()
	in := func(name string) string { return filepath.Join(base, name) }
	const secret = "-----BEGIN PRIVATE KEY-----\nMIG2AgEAMBAGByqGSM49AgEGBSuBBAAiBIGeMIGbAgEBBDA\n-----END PRIVATE KEY-----\n"
	for _, directory := range []string{"tls", "run", "config"} {
		if err := os.Mkdir(in(directory), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"tls/key.pem", "run/sds.json", "beside.yaml"} {
		if err := os.WriteFile(in(name), []byte(secret), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(in("tls"), in("link")); err != nil {
		t.Fatal(err)
	}
	env := environment(t, "MANTLET_CONFIG="+in("config/mesh.yaml"), "MANTLET_TLS_DIRECTORY="+in("link"), "MANTLET_RUNTIME_DIRECTORY="+in("run"))
	for target, reason := range map[string]string{
		in("tls/key.pem"): "cannot be read: it is a link to ", in("run/sds.json"): "cannot be read: it is a link to ",
		"/etc/passwd": "cannot be read: it is a link to ", "/proc/self/status": "cannot be read: it is a link to ",
		in("beside.yaml"): ":1:1: is not valid; what is wrong is withheld, since the file is a link out of its volume, to " + in("beside.yaml"),
	} {
		if err := os.Symlink(target, in("config/mesh.yaml")); err != nil {
			t.Fatal(err)
		}
		_, err := env.Load()
		if err == nil || !strings.Contains(err.Error(), reason) || strings.Contains(err.Error(), "MIG2") {
			t.Errorf("a link to %s: %v", target, err)
		}
		if err := os.Remove(in("config/mesh.yaml")); err != nil {
			t.Fatal(err)
		}
	}
}

func TestPin(t *testing.T) {
	const text, crlf = "accessLog: all\n", "accessLog: all\r\n"
	sum := func(text string) string {
		digest := sha256.Sum256([]byte(text))
		return hex.EncodeToString(digest[:])
	}
	for name, c := range map[string]struct {
		pin, text, reason string
	}{
		"the content":           {sum(text), text, ""},
		"in upper case":         {strings.ToUpper(sum(text)), text, ""},
		"an empty file":         {sum(""), "", ""},
		"with CRLF":             {sum(crlf), crlf, ""},
		"CRLF where LF was":     {sum(text), crlf, "its SHA-256 is " + sum(crlf) + ", but MANTLET_CONFIG_SHA256 pins it to " + sum(text)},
		"another content":       {sum(text), "", "its SHA-256 is " + sum("") + ", but MANTLET_CONFIG_SHA256 pins it to " + sum(text)},
		"another, in bad YAML":  {sum(text), "a: &a [", "its SHA-256 is " + sum("a: &a [") + ", but MANTLET_CONFIG_SHA256 pins it to " + sum(text)},
		"too long, as it seems": {sum(strings.Repeat("#", 4<<20)), strings.Repeat("#", 4<<20), ""},
	} {
		t.Run(name, func(t *testing.T) {
			path := write(t, c.text)
			_, err := environment(t, "MANTLET_CONFIG="+path, "MANTLET_CONFIG_SHA256="+c.pin).Load()
			var want []string
			if c.reason != "" {
				want = []string{path + ": " + c.reason}
			}
			if diff := cmp.Diff(want, report(err)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestOverridesNone checks that the file is not even looked at.
func TestOverridesNone(t *testing.T) {
	for name, path := range map[string]string{"bad": write(t, "ingress: {}"), "missing": "/nothing/here", "good": write(t, "ingress: [{port: 80, remove: true}]")} {
		t.Run(name, func(t *testing.T) {
			env := environment(t, ingress+"web#80#true", "MANTLET_CONFIG="+path, "MANTLET_OVERRIDES=none", "MANTLET_CONFIG_SHA256="+strings.Repeat("0", 64))
			loaded, err := env.Load()
			if err != nil {
				t.Fatal(err)
			}
			merged, err := env.Merge([]byte("ingress: {}"))
			if err != nil {
				t.Fatal(err)
			}
			for _, got := range []schema.Config{loaded, merged} {
				if diff := cmp.Diff(env.Base().Mesh, got.Mesh, addresses); diff != "" {
					t.Error(diff)
				}
			}
		})
	}
}

// TestMeshJSON checks that a mesh, written in the form of the override file, makes itself again.
func TestMeshJSON(t *testing.T) {
	config, err := environment(t, ingress+"web \"#8080#false##🦀#7890#true", egress+"a#127.0.0.1:80#[2001:db8::7]:1").Merge([]byte(`
ingress: [{port: 1-9, allow: [b, a], alpn: [h2, http/1.1]}]
egress: [{listen: "[::1]:80", upstream: b:1, serverNames: [z, "spiffe://mesh/a"], alpn: [h2]}]
envoy: {drainTime: 61s, parentShutdownTime: 90m, concurrency: 7, logLevel: "off"}
tls: {minVersion: "1.3"}
otherProtocols: accept
accessLog: none
`))
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(config.Mesh)
	if err != nil {
		t.Fatal(err)
	}
	again, err := environment(t).Merge(text)
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if diff := cmp.Diff(config.Mesh, again.Mesh, addresses); diff != "" {
		t.Error(diff)
	}
}

func TestWarnings(t *testing.T) {
	config, err := environment(t, egress+"a#127.0.0.1:80#b:1##c#127.0.0.1:81#d:1").Merge([]byte(
		"egress:\n  - {listen: 127.0.0.1:80, serverNames: [b]}\n  - {listen: '[::1]:82', upstream: '[2001:db8::7]:1'}\n"))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, w := range config.Warnings() {
		got = append(got, w.Error())
	}
	if diff := cmp.Diff([]string{
		"EDG_EGRESS_PROXY_CONFIG entry 2: egress[127.0.0.1:81].serverNames: is not set: whoever answers as d:1 is accepted, any workload of the mesh",
		"/config.yaml:3:5: egress[[::1]:82].serverNames: is not set: whoever answers as [2001:db8::7]:1 is accepted, any workload of the mesh",
	}, got); diff != "" {
		t.Error(diff)
	}
}

// TestOutboundWarnings: what mode drop takes away from a workload that nobody thought of, and where it can be passed by, is told.
func TestOutboundWarnings(t *testing.T) {
	const (
		names = `outbound.mode: "drop": leaves the workload without name servers: outbound.allow has neither dns nor an item with port 53`
		idle  = `/config.yaml:1:20: outbound.allow: has no effect, since outbound.mode is accept: set that to observe or drop`
		root  = `tells Envoy by its user, and MANTLET_ENVOY_UID is 0: what runs as root in the pod passes for Envoy`
	)
	for _, c := range []struct {
		environ []string
		file    string
		want    []string
	}{
		{environ: []string{"MANTLET_OUTBOUND=drop"}, want: []string{"MANTLET_OUTBOUND: " + names}},
		{file: "outbound: {mode: drop, allow: ['10.0.0.1:443']}", want: []string{"/config.yaml:1:18: " + names}},
		{file: "outbound: {mode: drop, allow: [dns]}"},
		{file: "outbound: {allow: [dns]}", want: []string{idle}},
		{file: "outbound: {mode: drop, allow: ['10.96.0.10:53']}"},
		{environ: []string{"MANTLET_ENVOY_UID=0"}, file: "outbound: {mode: observe}", want: []string{`/config.yaml:1:18: outbound.mode: "observe": ` + root}},
		{environ: []string{"MANTLET_ENVOY_UID=0"}},
	} {
		config, err := environment(t, c.environ...).Merge([]byte(c.file))
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, w := range config.Warnings() {
			got = append(got, w.Error())
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%q, %s: %s", c.environ, c.file, diff)
		}
	}
}

// TestLinkIsNotQuoted: a link out of the file's volume may lead to any secret. What is wrong with it has places and no values,
// wherever it is told.
func TestLinkIsNotQuoted(t *testing.T) {
	base := t.TempDir()
	volume, secret := filepath.Join(base, "volume"), filepath.Join(base, "secret.yaml")
	for _, directory := range []string{volume, filepath.Join(volume, "..data")} {
		if err := os.Mkdir(directory, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	const text = "password: hunter2\nhunter2: x\ningress: [{port: hunter2, mode: hunter2}, {port: 2222, mode: tls, allow: [hunter2]}, {port: 80, mode: passthrough}]\n" +
		"probes: [{name: hunter2}]\negress: [{listen: '127.0.0.1:2222', upstream: 'hunter2:2222'}]\nenvoy: {drainTime: 22m}\n"
	for _, path := range []string{secret, filepath.Join(volume, "..data", "mesh.yaml")} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	told := func(target string, environ ...string) []string {
		t.Helper()
		link := filepath.Join(volume, "mesh.yaml")
		if err := os.Symlink(target, link); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = os.Remove(link) }()
		env, _ := schema.ParseEnvironment(append(environ, "MANTLET_CONFIG="+link))
		_, err := env.Load()
		return report(err)
	}
	for name, environ := range map[string][]string{
		"all": {}, "tighten": {"MANTLET_OVERRIDES=tighten"}, "another pin": {"MANTLET_CONFIG_SHA256=" + strings.Repeat("0", 64)},
		"beside a bad environment": {"MANTLET_OVERRIDES=tighten", ingress + "web#80#no"}, "inline": {"MANTLET_CONFIG_INLINE=ingress: [{port: 2220-2223}]"},
	} {
		for _, line := range told(secret, environ...) {
			for _, value := range []string{"hunter2", "password", "2222", "22m", "mode", "be 22"} {
				if strings.Contains(strings.ReplaceAll(line, base, ""), value) {
					t.Errorf("%s: %q tells %q", name, line, value)
				}
			}
		}
	}
	if lines := told("..data/mesh.yaml"); len(lines) < 6 || !strings.Contains(strings.Join(lines, "\n"), "hunter2") {
		t.Errorf("a link within the volume, as kubelet makes it: %q", lines)
	}
}

// TestAllProblems: one report has all problems, whatever their sources are and whatever kind they are of.
func TestAllProblems(t *testing.T) {
	for name, c := range map[string]struct {
		environ []string
		file    string
		want    []string
	}{
		"of the environment, and of the file": {
			[]string{ingress + "web#80800#false", "EDG_INGRES_PROXY_CONFIG=x"},
			"accessLog: sometimes\nservices: []\n",
			[]string{"EDG_INGRESS_PROXY_CONFIG entry 1: port", "EDG_INGRES_PROXY_CONFIG: ", ":1:12: accessLog: ", `:2:1: "services": `},
		},
		"of the environment, told once": {
			[]string{ingress + "a#80#true", "MANTLET_CONFIG_INLINE=ingress: [{port: 80-90}]", egress + "a#127.0.0.1:1#127.0.0.1:1", "MANTLET_ENVOY_DRAIN_TIME=20m"},
			"ingress: [{port: 0}]\n",
			[]string{"EDG_EGRESS_PROXY_CONFIG entry 1: egress[127.0.0.1:1].upstream", "MANTLET_CONFIG_INLINE:1:11: ingress[80-90]: overlaps", "MANTLET_ENVOY_DRAIN_TIME: ", ":1:18: ingress[item 1].port"},
		},
		"of the environment, and of what the file may do": {
			[]string{ingress + "web#80#no##db#90#false", egress + "a#127.0.0.1:1#x##b#127.0.0.1:2#y:1", "MANTLET_ACCESS_LOG=x", "MANTLET_OVERRIDES=tighten"},
			"ingress: [{port: 80, mode: tls}, {port: 90, mode: passthrough}]\naccessLog: all\n" +
				"egress: [{listen: '127.0.0.1:1', upstream: 'z:1'}, {listen: '127.0.0.1:2', upstream: 'z:1'}]\notherProtocols: accept\n",
			[]string{
				"EDG_EGRESS_PROXY_CONFIG entry 1: upstream", "EDG_INGRESS_PROXY_CONFIG entry 1: disableTLS", "MANTLET_ACCESS_LOG: ",
				":1:34: ingress[90]: MANTLET_OVERRIDES=tighten", ":3:52: egress[127.0.0.1:2]: MANTLET_OVERRIDES=tighten", ":4:17: otherProtocols: ",
			},
		},
		"of merging, and of what the file may do": {
			[]string{ingress + "web#80#false", "MANTLET_OVERRIDES=tighten"},
			"ingress: [{port: 70-75, mode: tls}, {port: 75-79, mode: tls}, {port: 80, mode: passthrough}]\nenvoy: {drainTime: 20m}\naccessLog: x\notherProtocols: accept\n" +
				"egress: [{listen: '127.0.0.1:1'}]\n",
			[]string{
				":1:11: ingress[70-75]: MANTLET_OVERRIDES=tighten", ":1:37: ingress[75-79]: overlaps", ":1:37: ingress[75-79]: MANTLET_OVERRIDES=tighten",
				":1:63: ingress[80]: MANTLET_OVERRIDES=tighten", ":2:20: envoy.drainTime: \"20m\": must be less", ":2:20: envoy.drainTime: \"20m\": MANTLET_OVERRIDES=tighten",
				":3:12: accessLog: \"x\": must", ":4:17: otherProtocols: ", ":5:10: egress[127.0.0.1:1].upstream: ", ":5:10: egress[127.0.0.1:1]: MANTLET_OVERRIDES=tighten",
			},
		},
		"of one entry": {
			nil, "ingress: [{mode: x}, {port: 80, name: 5, mode: tls, allow: [a]}]\negress: [{listen: '127.0.0.1:1', name: 5}]\nprobes: [{name: a, remove: true}, {http: 80}, {name: b}]\n",
			[]string{
				":1:11: ingress: an entry needs", ":1:18: ingress[item 1].mode: ", ":1:39: ingress[80].name: ", ":1:61: ingress[80].allow: ",
				":2:10: egress[127.0.0.1:1].upstream: ", ":2:40: egress[127.0.0.1:1].name: ", ":3:35: probes: an entry needs", ":3:47: probes[b]: needs",
			},
		},
		"of one section":               {nil, "envoy: {concurrency: 0, drainTime: 20m}\n", []string{":1:22: envoy.concurrency", ":1:36: envoy.drainTime: \"20m\": must be less"}},
		"of the first document of two": {nil, "accessLog: x\n---\naccessLog: y\n", []string{":1:12: accessLog: ", ":2:1: "}},
		"of a file that is not there": { // the daemon waits for it
			[]string{ingress + "web", "MANTLET_CONFIG=/nothing/here"}, "", []string{"EDG_INGRESS_PROXY_CONFIG entry 1: "},
		},
		"of a file that cannot be read": {[]string{ingress + "web", "MANTLET_CONFIG=/"}, "", []string{"/: ", "EDG_INGRESS_PROXY_CONFIG entry 1: "}},
	} {
		t.Run(name, func(t *testing.T) {
			path := write(t, c.file)
			env, _ := schema.ParseEnvironment(append([]string{"MANTLET_CONFIG=" + path}, c.environ...))
			config, err := env.Load()
			got := report(err)
			for i, line := range got {
				got[i] = strings.TrimPrefix(line, path)
			}
			slices.Sort(got) // the path of the file is another each time
			slices.Sort(c.want)
			for i, line := range got {
				if i < len(c.want) && strings.HasPrefix(line, c.want[i]) {
					got[i] = c.want[i]
				}
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(schema.Mesh{}, config.Mesh, addresses); diff != "" {
				t.Errorf("a rejected configuration leaves something: %s", diff)
			}
		})
	}
}
