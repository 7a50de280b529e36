package report

import (
	"bytes"
	_ "embed"
	"fmt"
	"path/filepath"
	"strings"
	"text/template"

	"github.com/google/renameio/v2"

	"mantlet/internal/bench/measured"
)

//go:embed BENCHMARKS.md.tmpl
var text string

// Sections are what was measured, by name.
type Sections map[string]*measured.Section

// Envoy as a sidecar with as many session keys as mantlet gives it, and the same with no verification. They tell where CPU goes and are
// no other proxies.
const (
	Sessions   = "envoy-64-sessions"
	Unverified = "envoy-unverified"
)

// Subjects of the data path, in the order of tables and charts.
func Subjects() []string {
	return []string{Ours, "haproxy", "haproxy-in-pods", "nginx", "nginx-in-pods", "envoy", "envoy-in-pods", Sessions, Unverified, "stunnel", "ghostunnel", "none"}
}

// Write writes the report and its charts into the repository at root.
func Write(root string, sections Sections) error {
	charts := filepath.Join("docs", "benchmarks")
	if err := sections.charts(filepath.Join(root, charts)); err != nil {
		return fmt.Errorf("drawing charts: %w", err)
	}
	t, err := template.New("BENCHMARKS.md").Funcs(template.FuncMap{
		"of":    func(name string) *measured.Section { return sections[name] },
		"head":  sections.head,
		"goals": sections.goals,
		"table": func(section, name string, columns ...string) string {
			return table(sections[section], name, Subjects(), columns...)
		},
		"entries":    func() []int { return []int{1, 100, 1000} },
		"workers":    func() []int { return []int{1, 16, 64} },
		"streams":    func() []int { return []int{1, 8} },
		"directions": func() []string { return []string{"download", "upload"} },
		"control":    sections.controlTable,
		"whole":      func(section, name, subject, unit string) string { return whole(sections[section], name, subject, unit) },
		"sweep":      sections.sweep,
		"amount": func(section, name, subject, unit string) string {
			return amount(sections[section].Of(name, subject, unit), unit)
		},
		"ratio": func(section, name, ours, theirs, unit string) string {
			return ratio(sections[section].Of(name, ours, unit), sections[section].Of(name, theirs, unit))
		},
	}).Parse(text)
	if err != nil {
		return err
	}
	var out bytes.Buffer
	if err := t.Execute(&out, nil); err != nil {
		return err
	}
	return renameio.WriteFile(filepath.Join(root, "BENCHMARKS.md"), append(bytes.TrimSpace(out.Bytes()), '\n'), 0o644)
}

// head says when and where each section was measured.
func (s Sections) head() string {
	var text strings.Builder
	text.WriteString("| section | date | commit | rounds | load average at its start | machine |\n|---|---|---|---:|---:|---|\n")
	for _, name := range []string{"connections", "bulk", "latency", "memory", "rules", "control"} {
		if section := s[name]; section != nil && len(section.Keys()) > 0 {
			fmt.Fprintf(&text, "| %s | %s | %s | %s | %s | %s |\n", name, section.Get("date"), section.Get("commit"), section.Get("rounds"), section.Get("load"), section.Get("machine"))
		}
	}
	return text.String()
}

// sweep renders a table of one unit: a row for each subject, a column for each number of entries.
func (s Sections) sweep(section, pattern, unit string, subjects string, entries []int) string {
	var text strings.Builder
	text.WriteString("| |")
	for _, n := range entries {
		fmt.Fprintf(&text, " %d |", n)
	}
	text.WriteString("\n|---|" + strings.Repeat("---:|", len(entries)) + "\n")
	for subject := range strings.SplitSeq(subjects, ",") {
		row, any := "| "+subject+" |", false
		for _, n := range entries {
			values := s[section].Of(fmt.Sprintf(pattern, n), subject, unit)
			any = any || len(values) > 0
			row += " " + amount(values, unit) + " |"
		}
		if any {
			text.WriteString(row + "\n")
		}
	}
	return text.String()
}
