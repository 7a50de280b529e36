package render_test

import (
	"bytes"
	"cmp"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/diff"
	"github.com/rogpeppe/go-internal/txtar"
	"go.uber.org/goleak"

	"mantlet/internal/lab"
	"mantlet/render"
	"mantlet/schema"
)

var update = flag.Bool("update", false, "rewrite what the golden cases expect")

func TestMain(m *testing.M) {
	lab.Enter()
	goleak.VerifyTestMain(m)
}

// A golden case is an archive of testdata. It starts with a comment that says what it shows, and goes on with what is read:
//
//	env            lines NAME=VALUE
//	env/NAME       one variable's value, of any number of lines
//	config.yaml    the override file; MANTLET_CONFIG names it
//	config.quoted  the same as a Go string literal, for what is no text
//	base           the case that differences are told against; mesh-empty where it is left out
//
// and what comes of it: an error, or else rules and bootstrap, each of them whole or as the difference to the base's. An empty
// difference says that all is the same. For the digest of the bootstrap DIGEST stands there, so that a change shows only in
// the cases that it concerns.
type golden struct {
	*txtar.Archive
}

// outputs are the sections that -update writes.
var outputs = []string{"error", "ruleset.nft", "ruleset.diff", "envoy.json", "envoy.diff"}

// configFile is where the override file of the cases is said to be.
const configFile = "/config.yaml"

func goldenCases(t testing.TB) map[string]golden {
	t.Helper()
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("golden cases: %d files, %v", len(files), err)
	}
	all := map[string]golden{}
	for _, file := range files {
		archive, err := txtar.ParseFile(file)
		if err != nil {
			t.Fatal(err)
		}
		all[strings.TrimSuffix(filepath.Base(file), ".txtar")] = golden{archive}
	}
	return all
}

func (g golden) section(name string) (text string, ok bool) {
	i := slices.IndexFunc(g.Files, func(f txtar.File) bool { return f.Name == name })
	if i < 0 {
		return "", false
	}
	return strings.TrimSuffix(string(g.Files[i].Data), "\n"), true
}

// inputs returns the environment and the content of the override file, nil if there is none.
func (g golden) inputs(t testing.TB) (environ []string, file []byte) {
	t.Helper()
	for _, f := range g.Files {
		text, _ := g.section(f.Name)
		variable, isVariable := strings.CutPrefix(f.Name, "env/")
		switch {
		case f.Name == "env":
			environ = append(environ, strings.Split(text, "\n")...)
		case isVariable:
			environ = append(environ, variable+"="+text)
		case f.Name == "config.yaml":
			file = f.Data
		case f.Name == "config.quoted":
			unquoted, err := strconv.Unquote(text)
			if err != nil {
				t.Fatalf("%s: %v", f.Name, err)
			}
			file = []byte(unquoted)
		case f.Name != "base" && !slices.Contains(outputs, f.Name):
			t.Fatalf("a section %q means nothing", f.Name)
		}
	}
	if file != nil {
		environ = append(environ, "MANTLET_CONFIG="+configFile)
	}
	return environ, file
}

// load is what the commands do with an environment and the content of an override file, nil for none.
func load(environ []string, file []byte) (schema.Mesh, error) {
	env, err := schema.ParseEnvironment(environ)
	if err != nil {
		return schema.Mesh{}, err
	}
	config := env.Base()
	if file != nil {
		config, err = env.Merge(file)
	}
	return config.Mesh, err
}

var place = render.Place{RuntimeDirectory: "/run/mantlet"}

// rendered returns a mesh's rules and bootstrap as texts.
func rendered(t testing.TB, mesh schema.Mesh) (rules, bootstrap []byte) {
	t.Helper()
	state, err := render.Render(mesh, place)
	if err != nil {
		t.Fatal(err)
	}
	bootstrap, err = render.JSON(state.Bootstrap)
	if err != nil {
		t.Fatal(err)
	}
	return []byte(state.Ruleset.Text()), bytes.Replace(bootstrap, []byte(state.Digest), []byte("DIGEST"), 1)
}

// outputs returns what must come of a case.
func (g golden) outputs(t testing.TB, name string, all map[string]golden) []txtar.File {
	t.Helper()
	mesh, err := load(g.inputs(t))
	if err != nil {
		return []txtar.File{{Name: "error", Data: []byte(err.Error() + "\n")}}
	}
	base, _ := g.section("base")
	base = cmp.Or(base, "mesh-empty")
	baseMesh, err := load(all[base].inputs(t))
	if err != nil {
		t.Fatalf("base %q: %v", base, err)
	}
	output := func(kind, whole string, from, to []byte) txtar.File {
		if _, ok := g.section(whole); ok {
			return txtar.File{Name: whole, Data: to}
		}
		return txtar.File{Name: kind + ".diff", Data: diff.Diff(base, from, name, to)}
	}
	baseRules, baseBootstrap := rendered(t, baseMesh)
	rules, bootstrap := rendered(t, mesh)
	return []txtar.File{
		output("ruleset", "ruleset.nft", baseRules, rules),
		output("envoy", "envoy.json", baseBootstrap, bootstrap),
	}
}

// TestGolden writes each case anew: it must be what it was, to the byte.
func TestGolden(t *testing.T) {
	all := goldenCases(t)
	for name, g := range all {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if !bytes.HasPrefix(g.Comment, []byte("# ")) {
				t.Error("no comment says what the case shows")
			}
			inputs := slices.DeleteFunc(slices.Clone(g.Files), func(f txtar.File) bool { return slices.Contains(outputs, f.Name) })
			have := txtar.Format(g.Archive)
			want := txtar.Format(&txtar.Archive{Comment: g.Comment, Files: append(inputs, g.outputs(t, name, all)...)})
			if bytes.Equal(have, want) {
				return
			}
			if !*update {
				t.Fatalf("-update would rewrite it:\n%s", diff.Diff("have", have, "want", want))
			}
			if err := os.WriteFile(filepath.Join("testdata", name+".txtar"), want, 0o644); err != nil {
				t.Error(err)
			}
		})
	}
}
