package schema_test

import (
	"encoding/json"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"mantlet/schema"
)

// FuzzEnvironment gives both variables of entries, and the scalars, any text.
func FuzzEnvironment(f *testing.F) {
	for _, c := range environmentProblems() {
		values := map[string]string{}
		for _, e := range c.environ {
			name, value, _ := strings.Cut(e, "=")
			values[name] = value
		}
		for _, scalar := range []string{"MANTLET_ENVOY_DRAIN_TIME", "MANTLET_ENVOY_CONCURRENCY", "MANTLET_CONFIG_SHA256", "MANTLET_X"} {
			f.Add(values["EDG_INGRESS_PROXY_CONFIG"], values["EDG_EGRESS_PROXY_CONFIG"], values["CONTRAST_EGRESS_PROXY_CONFIG"], values[scalar])
		}
	}
	f.Add("web#8080#false##metrics#7890#true", "billing#127.137.0.1:8081#billing-svc:8080##cart#[::1]:8081#[2001:db8::7]:8080", "", "1h30m")
	f.Fuzz(func(t *testing.T, in, out, newer, scalar string) {
		environ := []string{ingress + in, egress + out, "CONTRAST_EGRESS_PROXY_CONFIG=" + newer}
		for _, name := range []string{
			"ENVOY_DRAIN_TIME", "ENVOY_PARENT_SHUTDOWN_TIME", "ENVOY_CONCURRENCY", "TLS_MIN_VERSION", "ACCESS_LOG", "CONFIG", "CONFIG_SHA256", "OVERRIDES", "TLS_DIRECTORY",
		} {
			checkParse(t, append(environ, "MANTLET_"+name+"="+scalar))
		}
		checkParse(t, environ)
	})
}

func checkParse(t *testing.T, environ []string) {
	t.Helper()
	env, err := schema.ParseEnvironment(environ)
	again, errAgain := schema.ParseEnvironment(environ)
	if diff := cmp.Diff(report(err), report(errAgain)); diff != "" {
		t.Fatalf("parsed again, it is something else: %s", diff)
	}
	if diff := cmp.Diff(env.Process, again.Process); diff != "" {
		t.Fatalf("parsed again, it is something else: %s", diff)
	}
	checkConfig(t, env.Base(), again.Base(), err)
}

// FuzzYAML gives an override file any text, over an environment and inline.
func FuzzYAML(f *testing.F) {
	for _, c := range yamlProblems() {
		if len(c.text) < 10_000 {
			f.Add([]byte(c.text))
		}
	}
	files, err := filepath.Glob(filepath.Join("testdata", "*", "*.yaml"))
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range append(files, "../examples/reference.yaml") {
		content, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(content)
	}
	environ := []string{ingress + "web#80#false##metrics#8080#true", egress + "a#127.0.0.1:80#x:1##b#127.0.0.9:9#y:1"}
	free, strict := environment(f, environ...), environment(f, append(environ, "MANTLET_OVERRIDES=tighten")...)
	f.Fuzz(func(t *testing.T, content []byte) {
		config, err := free.Merge(content)
		again, errAgain := free.Merge(content)
		if diff := cmp.Diff(report(err), report(errAgain)); diff != "" {
			t.Fatalf("merged again, it is something else: %s", diff)
		}
		checkConfig(t, config, again, err)

		tighter, err2 := strict.Merge(content)
		checkConfig(t, tighter, tighter, err2)
		if err2 == nil && (err != nil || !cmp.Equal(config.Mesh, tighter.Mesh, addresses)) {
			t.Fatalf("tighten accepts something else: %v", tighter.Mesh)
		}
		if strings.IndexByte(string(content), 0) < 0 {
			checkParse(t, append(environ, "MANTLET_CONFIG_INLINE="+string(content)))
		}
	})
}

// checkConfig checks what must hold of any configuration that was read twice, or of the problems in its place.
func checkConfig(t *testing.T, config, again schema.Config, err error) {
	t.Helper()
	if diff := cmp.Diff(config.Mesh, again.Mesh, addresses); diff != "" {
		t.Fatalf("read again, it is something else: %s", diff)
	}
	if err != nil {
		checkProblems(t, err)
		if diff := cmp.Diff(schema.Mesh{}, config.Mesh, addresses); diff != "" {
			t.Fatalf("half of it is left: %s", diff)
		}
		return
	}
	if diff := cmp.Diff(config.Explain(), again.Explain()); diff != "" {
		t.Fatalf("explained again, it is something else: %s", diff)
	}
	mesh := config.Mesh
	for i := 1; i < len(mesh.Ingress); i++ {
		if mesh.Ingress[i-1].Ports.Last >= mesh.Ingress[i].Ports.First {
			t.Fatalf("not sorted and apart: %v", mesh.Ingress)
		}
	}
	for _, in := range mesh.Ingress {
		if in.Ports.First == 0 || in.Ports.First > in.Ports.Last || in.Ports.Contains(schema.IngressMTLSPort) || in.Ports.Contains(schema.IngressTLSPort) {
			t.Fatalf("ports %v", in.Ports)
		}
		if in.Allow != nil && (in.Mode != schema.ModeMTLS || len(in.Allow) == 0 || !slices.IsSorted(in.Allow)) {
			t.Fatalf("mode %s allows %q", in.Mode, in.Allow)
		}
	}
	for i, e := range mesh.Egress {
		if i > 0 && mesh.Egress[i-1].Listen.Compare(e.Listen) >= 0 {
			t.Fatalf("not sorted: %v", mesh.Egress)
		}
		if !e.Listen.Addr().IsLoopback() || e.Listen.Port() == 0 || e.Upstream.Host == "" || e.Upstream.Port == 0 || (e.ServerNames != nil && len(e.ServerNames) == 0) {
			t.Fatalf("egress %v", e)
		}
	}
	for i, p := range mesh.Probes {
		if i > 0 && mesh.Probes[i-1].Name >= p.Name {
			t.Fatalf("not sorted: %v", mesh.Probes)
		}
		if p.Name == "" || p.Kind == "" || p.Port == 0 || p.Port == schema.IngressMTLSPort || p.Port == schema.IngressTLSPort {
			t.Fatalf("probe %v", p)
		}
		if u, err := url.Parse("http://127.0.0.1:1" + p.Target); p.Kind == schema.ProbeHTTP && (err != nil || u.Host != "127.0.0.1:1" || u.RequestURI() != p.Target) {
			t.Fatalf("probe %v asks for %v: %v", p, u, err)
		}
	}
	checkJSON(t, mesh)
}

// checkJSON checks that a mesh, written in the form of the override file, makes itself again; where names are such that YAML
// can hold them.
func checkJSON(t *testing.T, mesh schema.Mesh) {
	t.Helper()
	for _, e := range mesh.Ingress {
		if !isText(e.Name) {
			return
		}
	}
	for _, e := range mesh.Egress {
		if !isText(e.Name) {
			return
		}
	}
	text, err := json.Marshal(mesh)
	if err != nil {
		t.Fatal(err)
	}
	again, err := environment(t).Merge(text)
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if diff := cmp.Diff(mesh, again.Mesh, addresses); diff != "" {
		t.Fatal(diff)
	}
}

func isText(name string) bool {
	return utf8.ValidString(name) && strings.IndexFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }) < 0
}

// checkProblems checks that each has a place and a reason, that they are in order, and that each is one line, whatever the
// text is that they are about.
func checkProblems(t *testing.T, err error) {
	t.Helper()
	all := schema.Problems(err)
	if len(all) == 0 {
		t.Fatalf("no problems, and an error: %v", err)
	}
	for i, p := range all {
		if p.Origin.Source == "" || p.Reason == "" {
			t.Fatalf("no place or no reason: %#v", p)
		}
		if line := p.Error(); strings.ContainsFunc(line, unicode.IsControl) || !utf8.ValidString(line) || len(line) > 5_000 {
			t.Fatalf("not fit for a line: %q", line)
		}
		if i > 0 && all[i-1].Origin.Source == p.Origin.Source {
			was, is := all[i-1].Origin, p.Origin
			if slices.Compare([]int{was.Entry, was.Line, was.Column}, []int{is.Entry, is.Line, is.Column}) > 0 {
				t.Fatalf("%v before %v", was, is)
			}
		}
	}
	if errors.Is(err, os.ErrNotExist) {
		t.Fatal("nothing was to be read")
	}
}
