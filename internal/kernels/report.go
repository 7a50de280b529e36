package main

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"
)

// result is what a kernel's console tells.
type result struct {
	kernel
	release         string            // as uname -r
	outcomes        map[string]string // of tests without a parent: PASS, SKIP or FAIL
	passed          int
	skipped, failed []string
	complete        bool
	took            time.Duration
}

var (
	release = regexp.MustCompile(`(?m)^guest: kernel (\S+)`)
	outcome = regexp.MustCompile(`(?m)^--- (PASS|SKIP|FAIL): (\S+) `)
)

func parse(console []byte) result {
	r := result{outcomes: map[string]string{}}
	text := strings.ReplaceAll(string(console), "\r", "")
	if match := release.FindStringSubmatch(text); match != nil {
		r.release = match[1]
	}
	for _, match := range outcome.FindAllStringSubmatch(text, -1) {
		r.outcomes[match[2]] = match[1]
		switch match[1] {
		case "PASS":
			r.passed++
		case "SKIP":
			r.skipped = append(r.skipped, match[2])
		default:
			r.failed = append(r.failed, match[2])
		}
	}
	r.complete = strings.Contains(text, "\nguest: done\n") && !strings.Contains(text, "\npanic: ")
	slices.Sort(r.skipped)
	return r
}

// shows says what became of a claim.
func (r result) shows(c claim) string {
	said := "–"
	for _, test := range c.tests {
		switch r.outcomes[test] {
		case "PASS":
			if said == "–" {
				said = "yes"
			}
		case "FAIL":
			said = "no: `" + test + "`"
		}
	}
	return said
}

const (
	tableBegins = "<!-- written by `go tool task kernels` -->\n"
	tableEnds   = "<!-- end of what is written -->\n"
)

// write puts the table of results into the document.
func write(document string, results []result) error {
	text, err := os.ReadFile(document)
	if err != nil {
		return err
	}
	before, rest, begins := strings.Cut(string(text), tableBegins)
	_, after, ends := strings.Cut(rest, tableEnds)
	if !begins || !ends {
		return fmt.Errorf("%s has no place for the table", document)
	}
	return os.WriteFile(document, []byte(before+tableBegins+table(results)+tableEnds+after), 0o644)
}

func table(results []result) string {
	var b strings.Builder
	b.WriteString("| kernel | rules (`reconcile/nft`) |")
	for _, c := range claims {
		fmt.Fprintf(&b, " %s |", c.title)
	}
	b.WriteString(" skipped |\n|---|---|" + strings.Repeat("---|", len(claims)) + "---|\n")
	for _, r := range results {
		passed, failed := 0, []string{}
		for test, came := range r.outcomes {
			switch {
			case slices.Contains(walk(), test):
			case came == "PASS":
				passed++
			case came == "FAIL":
				failed = append(failed, "`"+test+"`")
			}
		}
		slices.Sort(failed)
		rules := fmt.Sprintf("%d tests passed", passed)
		if len(failed) > 0 {
			rules += ", failed: " + strings.Join(failed, ", ")
		}
		if !r.complete {
			rules += ", then the run was ended"
		}
		fmt.Fprintf(&b, "| %s | %s |", r.release, rules)
		for _, c := range claims {
			fmt.Fprintf(&b, " %s |", r.shows(c))
		}
		skipped := "–"
		if len(r.skipped) > 0 {
			skipped = "`" + strings.Join(r.skipped, "`, `") + "`"
		}
		fmt.Fprintf(&b, " %s |\n", skipped)
	}
	return b.String()
}
