package main

import (
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/testscript"
	yamlv3 "go.yaml.in/yaml/v3"
	"sigs.k8s.io/yaml"

	"mantlet/reconcile"
	"mantlet/schema"
)

var update = flag.Bool("update", false, "rewrite what the scripts of testdata compare with")

// TestScripts runs the commands that need neither kernel nor Envoy. Beside testscript's own, scripts have:
//
//	exits CODE COMMAND...   runs it; it must exit with the code
//	part KEY FROM TO        writes one part of a JSON or YAML object to a file
//	same A B                two files, JSON or YAML, say the same
//	cells FROM TO           writes a table to a file, whatever its columns' widths and the script's directory are
func TestScripts(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	examples, err := filepath.Abs("../../examples")
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:           "testdata",
		UpdateScripts: *update,
		Setup: func(env *testscript.Env) error {
			bin := filepath.Join(env.WorkDir, ".bin")
			env.Setenv("PATH", bin+string(filepath.ListSeparator)+env.Getenv("PATH"))
			env.Setenv("EXAMPLES", examples)
			env.Setenv(asMantlet, "1")
			env.Setenv("GORACE", "atexit_sleep_ms=0")
			return errors.Join(os.Mkdir(bin, 0o755), os.Symlink(self, filepath.Join(bin, "mantlet")))
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits": func(ts *testscript.TestScript, _ bool, args []string) {
				code, err := 0, ts.Exec(args[1], args[2:]...)
				if exit, ok := errors.AsType[*exec.ExitError](err); ok {
					code, err = exit.ExitCode(), nil
				}
				ts.Check(err)
				if want := args[0]; strconv.Itoa(code) != want {
					ts.Fatalf("exit code %d, want %s", code, want)
				}
			},
			"part": func(ts *testscript.TestScript, _ bool, args []string) {
				text, err := yaml.Marshal(parsed(ts, args[1]).(map[string]any)[args[0]])
				ts.Check(errors.Join(err, os.WriteFile(ts.MkAbs(args[2]), text, 0o600)))
			},
			"same": func(ts *testscript.TestScript, _ bool, args []string) {
				if diff := cmp.Diff(parsed(ts, args[0]), parsed(ts, args[1])); diff != "" {
					ts.Fatalf("they differ:\n%s", diff)
				}
			},
			"cells": func(ts *testscript.TestScript, _ bool, args []string) {
				text := strings.ReplaceAll(ts.ReadFile(args[0]), ts.Getenv("WORK"), "")
				text = regexp.MustCompile(` {3,}`).ReplaceAllString(text, " | ")
				ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte(text), 0o600))
			},
		},
	})
}

func parsed(ts *testscript.TestScript, file string) (data any) {
	ts.Check(yaml.Unmarshal([]byte(ts.ReadFile(file)), &data))
	return data
}

// TestMeshGivenBack gives names that no YAML likes to the environment, and the mesh that is printed of it back as a file.
func TestMeshGivenBack(t *testing.T) {
	t.Parallel()
	mantlet := func(env []string, args ...string) string {
		t.Helper()
		cmd := exec.Command("/proc/self/exe", args...)
		cmd.Env = append([]string{asMantlet + "=1", "GORACE=atexit_sleep_ms=0"}, env...)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		text, err := cmd.Output()
		if err != nil {
			t.Fatalf("%q: %v: %s", args, err, &stderr)
		}
		return string(text)
	}
	var ingress, egress []string
	for i, name := range []string{
		"", " ", "null", "~", "true", "8080", "0x1f", "- a: b", "{}", "'", `"`, `\`, "a: b", "&a", "*a", "!a", "%a", "\t", "\n", "\r\n", "a\n\nb\n",
		"\x01\x1b[31m", "\x7f", "\u0085", "\u009b", "\u2028", "\ufeff", "\ufffe", "\xff", "🦔", "é", "e\u0301", strings.Repeat("x", 4<<10),
	} {
		ingress = append(ingress, fmt.Sprintf("%s#%d#false", name, i+1))
		egress = append(egress, fmt.Sprintf("%s#127.137.0.%d:8081#billing-svc:8080", name, i+1))
	}
	env := []string{
		"EDG_INGRESS_PROXY_CONFIG=" + strings.Join(ingress, "##"), "EDG_EGRESS_PROXY_CONFIG=" + strings.Join(egress, "##"),
	}
	want := mantlet(env, "render")
	for _, form := range []string{"json", "yaml"} {
		var all struct{ Mesh yamlv3.Node }
		if err := yamlv3.Unmarshal([]byte(mantlet(env, "render", "-o", form)), &all); err != nil {
			t.Fatal(err)
		}
		mesh, err := yamlv3.Marshal(&all.Mesh)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "mesh.yaml")
		if err := os.WriteFile(file, mesh, 0o600); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, mantlet([]string{"MANTLET_CONFIG=" + file}, "render")); diff != "" {
			t.Errorf("as %s: another state:\n%s", form, diff)
		}
	}
}

// TestHelpHasExamples: help shows by example how a command is used, where its name alone does not.
func TestHelpHasExamples(t *testing.T) {
	for _, cmd := range rootCommand().Commands() {
		if cmd.Example == "" && !slices.Contains([]string{"schema", "version"}, cmd.Name()) {
			t.Errorf("mantlet %s --help has no example", cmd.Name())
		}
	}
}

// TestCompareKnowsEveryField changes each field of a mesh: no change of what a mesh does may be silent.
func TestCompareKnowsEveryField(t *testing.T) {
	const file = `
ingress: [{port: 8080-8089, allow: [a], alpn: [h2]}, {port: 9000-9009, allow: [a, b], alpn: [h2, http/1.1]}]
egress: [{listen: "127.0.0.1:1", upstream: "a:1", serverNames: [a, b], alpn: [h2, a]}]
probes: [{name: a, http: 80/b}, {name: b, grpc: 1/c}]
outbound: {mode: drop, allow: [dns, "10.0.0.0/8:443"]}
`
	env, err := schema.ParseEnvironment(nil)
	if err != nil {
		t.Fatal(err)
	}
	mesh := func() schema.Mesh {
		config, err := env.Merge([]byte(file))
		if err != nil {
			t.Fatal(err)
		}
		return config.Mesh
	}
	if steps := reconcile.Compare(mesh(), mesh()); len(steps) > 0 {
		t.Fatalf("the same differs from itself: %v", steps)
	}
	var walk func(path string, at func(*schema.Mesh) reflect.Value)
	check := func(path string, at func(*schema.Mesh) reflect.Value, change func(reflect.Value)) {
		t.Helper()
		changed := mesh()
		change(at(&changed))
		steps := append(reconcile.Compare(mesh(), changed), reconcile.Compare(changed, mesh())...)
		isName := strings.HasSuffix(path, ".Name") && !strings.Contains(path, ".Probes")
		isProcess := path == "Mesh.StatusPort" // which stays while it runs
		if silent := isName || isProcess; silent != (len(steps) == 0) {
			t.Errorf("%s: %v", path, steps)
		}
	}
	walk = func(path string, at func(*schema.Mesh) reflect.Value) {
		now := mesh()
		v := at(&now)
		switch {
		case v.Type() == reflect.TypeFor[netip.AddrPort](), v.Type() == reflect.TypeFor[netip.Prefix]():
			check(path, at, func(v reflect.Value) { v.Set(reflect.Zero(v.Type())) })
		case v.Kind() == reflect.Struct:
			for i := range v.NumField() {
				walk(path+"."+v.Type().Field(i).Name, func(m *schema.Mesh) reflect.Value { return at(m).Field(i) })
			}
		case v.Kind() == reflect.Slice:
			check(path+" without its last", at, func(v reflect.Value) { v.Set(v.Slice(0, v.Len()-1)) })
			for i := range v.Len() {
				walk(fmt.Sprintf("%s[%d]", path, i), func(m *schema.Mesh) reflect.Value { return at(m).Index(i) })
			}
		case v.Kind() == reflect.String:
			check(path, at, func(v reflect.Value) { v.SetString(v.String() + "x") })
		case v.Kind() == reflect.Bool:
			check(path, at, func(v reflect.Value) { v.SetBool(!v.Bool()) })
		case v.CanInt():
			check(path, at, func(v reflect.Value) { v.SetInt(v.Int() + 1) })
		case v.CanUint():
			check(path, at, func(v reflect.Value) { v.SetUint(v.Uint() + 1) })
		default:
			t.Errorf("%s: nothing is known of %s", path, v.Type())
		}
	}
	walk("Mesh", func(m *schema.Mesh) reflect.Value { return reflect.ValueOf(m).Elem() })
}
