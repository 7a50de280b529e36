package schema_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
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
		if diff := cmp.Diff(want, config.Mesh); diff != "" {
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
		"missing":             {in("nothing"), ": can't be read: no such file or directory", true},
		"in a missing folder": {in("nothing/mesh.yaml"), ": can't be read: no such file or directory", true},
		"a dangling link":     {in("dangling"), ": can't be read: no such file or directory", true},
		"a loop of links":     {in("loop"), ": can't be read: too many levels of symbolic links", false},
		"a file for a folder": {filepath.Join(bad, "mesh.yaml"), ": can't be read: not a directory", false},
		"a directory":         {dir, ": can't be read: it must be a file, and is a directory", false},
		"a pipe":              {in("pipe"), ": can't be read: it must be a file, and is a pipe", false}, // nobody writes: reading it would wait
		"a link to a pipe":    {in("to-pipe"), ": can't be read: it must be a file, and is a pipe", false},
		"a device":            {"/dev/zero", ": can't be read: it must be a file, and is something else", false}, // it never ends
		"too long":            {long, ": is longer than 4194304 bytes; no more is read", false},
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
			if diff := cmp.Diff(schema.Mesh{}, config.Mesh); diff != "" {
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
		in("tls/key.pem"): "can't be read: it leads to ", in("run/sds.json"): "can't be read: it leads to ",
		"/etc/passwd": "can't be read: it leads to ", "/proc/self/status": "can't be read: it leads to ",
		in("beside.yaml"): ":1:1: must be an object: keys and values", // here it may be
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
				if diff := cmp.Diff(env.Base().Mesh, got.Mesh); diff != "" {
					t.Error(diff)
				}
			}
		})
	}
}

// TestMeshJSON checks that a mesh, written in the form of the override file, makes itself again.
func TestMeshJSON(t *testing.T) {
	config, err := environment(t, ingress+"web \"#8080#false##🦀#7890#true", egress+"a#127.0.0.1:80#[2001:db8::7]:1").Merge([]byte(`
ingress: [{port: 1-9, allow: [b, a]}]
egress: [{listen: "[::1]:80", upstream: b:1, serverNames: [z, "spiffe://mesh/a"]}]
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
