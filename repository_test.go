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

	"mantlet/reconcile"
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
			"Containerfile":       `FROM golang:(\d+\.\d+)\.\d+-`,
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

// TestClaims checks that each row of the README's table of failures names tests, and that every test it names is there.
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
	readme := read(t, "README.md")
	for _, named := range name.FindAllString(readme, -1) {
		if !tests[named] {
			t.Errorf("README.md names %s, and there is no such test", named)
		}
	}
	_, section, found := strings.Cut(readme, "\n## How it fails closed\n")
	section, _, _ = strings.Cut(section, "\n## ")
	rows := regexp.MustCompile(`(?m)^\| .*$`).FindAllString(section, -1)
	if !found || len(rows) < 2 {
		t.Fatal("README.md has no table of failures")
	}
	for _, row := range rows[1:] {
		if !name.MatchString(row) {
			t.Errorf("README.md shows by no test: %s", row)
		}
	}
}

// TestContainerfile checks what can be checked without an engine: every package that the binary is made of is copied, is
// not ignored, and what runs at the end is what was built.
func TestContainerfile(t *testing.T) {
	ignored := strings.Fields(read(t, ".containerignore"))
	var copied []string
	last := map[string]string{} // by instruction
	for line := range strings.Lines(read(t, "Containerfile")) {
		instruction, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		last[instruction] = rest
		if instruction != "COPY" || strings.HasPrefix(rest, "--from=build ") {
			continue
		}
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

	var entrypoint []string
	if err := json.Unmarshal([]byte(last["ENTRYPOINT"]), &entrypoint); err != nil {
		t.Fatalf("ENTRYPOINT in its shell form, and there is no shell: %v", err)
	}
	if want := []string{"/usr/local/bin/mantlet", "run"}; !slices.Equal(entrypoint, want) {
		t.Fatalf("ENTRYPOINT %q, want %q", entrypoint, want)
	}
	if installed := strings.Fields(last["COPY"]); installed[len(installed)-1] != entrypoint[0] {
		t.Errorf("the binary is copied to %s and run as %s", installed[len(installed)-1], entrypoint[0])
	}
	if name, value, _ := strings.Cut(last["ENV"], "="); name != "MANTLET_ENVOY_PATH" || !path.IsAbs(value) {
		t.Errorf("ENV %s=%s does not name Envoy", name, value)
	}
}

// explained returns what the README's table with a header explains: its first column.
func explained(t *testing.T, header string) []string {
	t.Helper()
	_, table, ok := strings.Cut(read(t, "README.md"), header+"\n")
	if !ok {
		t.Fatalf("the README has no table %s", header)
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

// TestReasonsAreExplained holds the README's table of why the sidecar is not ready against the code.
func TestReasonsAreExplained(t *testing.T) {
	if got, want := explained(t, "| not ready, it says | what to do |"), reconcile.Reasons(); !slices.Equal(got, want) {
		t.Errorf("the README explains %q, want %q", got, want)
	}
}

// TestKernelsCodesAreExplained holds the README's table of what the kernel ends against the code.
func TestKernelsCodesAreExplained(t *testing.T) {
	got, want := explained(t, "| the kernel's code | what it ended | what to do |"), render.Refusals()
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("the README explains %q, want %q", got, want)
	}
}
