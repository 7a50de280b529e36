// Package mantlet checks what no compiler does: that the repository's own files agree with each other.
package mantlet

import (
	"encoding/json"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"mantlet/internal/status"
	"mantlet/render"
)

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestVersions checks that what the image runs is what the tests run on.
func TestVersions(t *testing.T) {
	for _, c := range []struct {
		what   string
		places map[string]string // file: pattern whose group is the version
	}{
		{"Envoy", map[string]string{
			"Taskfile.yml":  `ENVOY_VERSION: (\S+)`,
			"Containerfile": `FROM envoyproxy/envoy:distroless-v(\S+)`,
			"go.mod":        `github.com/envoyproxy/go-control-plane/envoy v(\S+)`,
		}},
		{"Go", map[string]string{
			"go.mod":              `(?m)^go (\d+\.\d+)`,
			"internal/e2e/go.mod": `(?m)^go (\d+\.\d+)`,
			"Containerfile":       `FROM --platform=\$BUILDPLATFORM golang:(\d+\.\d+)\.\d+-`,
		}},
		{"golangci-lint", map[string]string{
			"Taskfile.yml":  `cmd/golangci-lint@v(\S+)`,
			".golangci.yml": `golangci-lint ([\d.]+)`,
		}},
	} {
		versions := map[string]string{}
		for file, pattern := range c.places {
			match := regexp.MustCompile(pattern).FindStringSubmatch(read(t, file))
			if match == nil {
				t.Fatalf("%s: %s does not match %s", c.what, file, pattern)
			}
			versions[match[1]] = file
		}
		if len(versions) != 1 {
			t.Errorf("%s: different versions: %v", c.what, versions)
		}
	}
}

// TestImportsGoDown checks that no package imports one of its own layer or of a layer above it, directly or by others.
func TestImportsGoDown(t *testing.T) {
	layers := []string{ // from above
		`cmd/mantlet`, `reconcile`, `reconcile/\w+`, `internal/status`, `render`, `schema`,
	}
	layer := func(path string) int {
		return slices.IndexFunc(layers, func(l string) bool { return regexp.MustCompile(`^mantlet/` + l + `$`).MatchString(path) })
	}
	list, err := exec.Command("go", "list", "-f", `{{.ImportPath}} {{join .Deps " "}}`, "./...").Output()
	if err != nil {
		t.Fatalf("listing the packages: %v", err)
	}
	seen := map[int]bool{}
	for line := range strings.Lines(string(list)) {
		path, deps, _ := strings.Cut(strings.TrimSpace(line), " ")
		at := layer(path)
		if at < 0 {
			continue
		}
		seen[at] = true
		for _, dep := range strings.Fields(deps) {
			if other := layer(dep); other >= 0 && other <= at {
				t.Errorf("%s must not depend on %s", path, dep)
			}
		}
	}
	if len(seen) != len(layers) {
		t.Errorf("of %d layers only %v were found", len(layers), seen)
	}
}

// TestClaims checks that each row of the table of failures names tests, and that every test that the documents name is there.
func TestClaims(t *testing.T) {
	name := regexp.MustCompile(`\bTest[A-Z]\w+`)
	const form = `{{$d := .Dir}}{{range .TestGoFiles}}{{$d}}/{{.}} {{end}}{{range .XTestGoFiles}}{{$d}}/{{.}} {{end}}`
	files, err := exec.Command("go", "list", "-f", form, "./...").Output()
	if err != nil {
		t.Fatalf("listing the tests: %v", err)
	}
	e2e, err := filepath.Glob("internal/e2e/*_test.go") // of another module
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]bool{}
	for _, file := range append(strings.Fields(string(files)), e2e...) {
		for _, match := range regexp.MustCompile(`(?m)^func (Test\w+)\(`).FindAllStringSubmatch(read(t, file), -1) {
			tests[match[1]] = true
		}
	}
	for _, file := range documents(t) {
		for _, named := range name.FindAllString(read(t, file), -1) {
			if !tests[named] {
				t.Errorf("%s names %s, and there is no such test", file, named)
			}
		}
	}
	section, _, _ := strings.Cut(read(t, "docs/fail-closed.md"), "\n## ")
	rows := regexp.MustCompile(`(?m)^\| .*$`).FindAllString(section, -1)
	if len(rows) < 2 {
		t.Fatal("docs/fail-closed.md has no table of failures")
	}
	for _, row := range rows[1:] {
		if !name.MatchString(row) {
			t.Errorf("docs/fail-closed.md shows by no test: %s", row)
		}
	}
}

// documents returns the files that are written for people.
func documents(t *testing.T) []string {
	t.Helper()
	top, err := filepath.Glob("*.md")
	if err != nil {
		t.Fatal(err)
	}
	docs, err := filepath.Glob("docs/*.md")
	if err != nil || len(docs) == 0 {
		t.Fatal("no documents", err)
	}
	return append(top, docs...)
}

// TestLinks checks that links between the repository's documents lead somewhere, and that the README stays short.
func TestLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#]*)(?:#([^)]*))?\)`)
	heading := regexp.MustCompile(`(?m)^#+ (.*)$`)
	for _, file := range documents(t) {
		for _, match := range link.FindAllStringSubmatch(read(t, file), -1) {
			target, anchor := match[1], match[2]
			if strings.HasPrefix(target, "http") {
				continue
			}
			to := file
			if target != "" {
				to = filepath.Join(filepath.Dir(file), target)
			}
			if _, err := os.Stat(to); err != nil {
				t.Errorf("%s: %v", file, err)
				continue
			}
			if anchor == "" {
				continue
			}
			found := false
			for _, h := range heading.FindAllStringSubmatch(read(t, to), -1) {
				slug := regexp.MustCompile(`[^a-z0-9 _-]`).ReplaceAllString(strings.ToLower(h[1]), "")
				found = found || strings.ReplaceAll(slug, " ", "-") == anchor
			}
			if !found {
				t.Errorf("%s: %s has no heading #%s", file, to, anchor)
			}
		}
	}
	if lines := strings.Count(read(t, "README.md"), "\n"); lines > 100 {
		t.Errorf("README.md has %d lines, want 100 at most", lines)
	}
}

// stage is a part of the Containerfile from one FROM to the next.
type stage struct {
	base string
	all  map[string][]string // what follows each instruction
}

// stages reads the Containerfile, whose stages have names.
func stages(t *testing.T) map[string]stage {
	t.Helper()
	all, name := map[string]stage{}, ""
	for line := range strings.Lines(read(t, "Containerfile")) {
		instruction, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		if base, called, ok := strings.Cut(rest, " AS "); instruction == "FROM" && ok {
			name = called
			all[name] = stage{base, map[string][]string{}}
			continue
		}
		if s, ok := all[name]; ok {
			s.all[instruction] = append(s.all[instruction], rest)
		}
	}
	return all
}

// TestContainerfile checks what can be checked without an engine: every package that the binary is made of is copied, is
// not ignored, and what runs at the end is what was built, in both flavours.
func TestContainerfile(t *testing.T) {
	ignored, all := strings.Fields(read(t, ".containerignore")), stages(t)
	var copied []string
	for _, rest := range all["build"].all["COPY"] {
		sources := strings.Fields(rest)
		for _, source := range sources[:len(sources)-1] {
			if _, err := os.Stat(source); err != nil {
				t.Error(err)
			}
			if !slices.Contains(ignored, "!"+source) {
				t.Errorf("%s is copied, and .containerignore leaves it out", source)
			}
			copied = append(copied, source)
		}
	}

	const own = "{{with .Module}}{{if .Main}}{{$.ImportPath}}{{end}}{{end}}"
	packages, err := exec.Command("go", "list", "-deps", "-f", own, "./cmd/mantlet").Output()
	if err != nil {
		t.Fatalf("listing the binary's packages: %v", err)
	}
	for _, pkg := range strings.Fields(string(packages)) {
		folder, _, _ := strings.Cut(strings.TrimPrefix(pkg, "mantlet/"), "/")
		if !slices.Contains(copied, folder) {
			t.Errorf("package %s is part of the binary and is not copied", pkg)
		}
	}

	base := all["base"].all
	var entrypoint []string
	if len(base["ENTRYPOINT"]) != 1 || json.Unmarshal([]byte(base["ENTRYPOINT"][0]), &entrypoint) != nil {
		t.Fatalf("ENTRYPOINT %q: one, and not in its shell form, for there is no shell", base["ENTRYPOINT"])
	}
	if want := []string{"/usr/local/bin/mantlet", "run"}; !slices.Equal(entrypoint, want) {
		t.Fatalf("ENTRYPOINT %q, want %q", entrypoint, want)
	}
	if want := []string{"--from=build /mantlet " + entrypoint[0]}; !slices.Equal(base["COPY"], want) {
		t.Errorf("COPY %q, want %q", base["COPY"], want)
	}
	if name, value, _ := strings.Cut(base["ENV"][0], "="); name != "MANTLET_ENVOY_PATH" || !path.IsAbs(value) {
		t.Errorf("ENV %s=%s does not name Envoy", name, value)
	}
	for _, flavour := range []string{"mantlet", "contrast"} {
		if s := all[flavour]; s.base != "base" || len(s.all["ENTRYPOINT"])+len(s.all["USER"]) > 0 {
			t.Errorf("%s is made from %q and has %q", flavour, s.base, s.all)
		}
	}
	contrast := all["contrast"].all
	if want := []string{"MANTLET_READY_FILE=/ready", "MANTLET_LIFT_DEFAULT_DENY=true"}; !slices.Equal(contrast["ENV"], want) {
		t.Errorf("contrast: ENV %q, want %q", contrast["ENV"], want)
	}
	if want := []string{"--from=build /links/ /", "--from=iptables /only/ /"}; !slices.Equal(contrast["COPY"], want) {
		t.Errorf("contrast: COPY %q, want %q", contrast["COPY"], want)
	}
	if text := read(t, "Containerfile"); !strings.HasSuffix(text, "\nFROM base AS mantlet\n") {
		t.Error("the last stage, which is built where none is named, is not the plain image")
	}
}

// explained returns what the table with a header in docs/operations.md explains: its first column.
func explained(t *testing.T, header string) []string {
	t.Helper()
	_, table, ok := strings.Cut(read(t, "docs/operations.md"), header+"\n")
	if !ok {
		t.Fatalf("docs/operations.md has no table %s", header)
	}
	var first []string
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		if len(cells) < 4 {
			break
		}
		first = append(first, strings.Trim(cells[1], " `"))
	}
	return first[1:]
}

// TestReasonsAreExplained holds the documented table of why the sidecar is not ready against the code.
func TestReasonsAreExplained(t *testing.T) {
	if got, want := explained(t, "| not ready, it says | what to do |"), status.Reasons(); !slices.Equal(got, want) {
		t.Errorf("docs/operations.md explains %q, want %q", got, want)
	}
}

// TestKernelsCodesAreExplained holds the documented table of what the kernel ends against the code.
func TestKernelsCodesAreExplained(t *testing.T) {
	got, want := explained(t, "| the kernel's code | what it ended | what to do |"), render.Refusals()
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("docs/operations.md explains %q, want %q", got, want)
	}
}
