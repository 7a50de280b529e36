// Package report writes BENCHMARKS.md and its charts from what was measured.
package report

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"golang.org/x/perf/benchmath"
	"golang.org/x/perf/benchunit"

	"mantlet/internal/bench/measured"
)

// Ours is the subject that all others are compared with.
const Ours = "mantlet"

// summary returns the median of a series and the interval that it lies in with measured.Confidence: of fewer than six values, all of
// them.
func summary(values []float64) benchmath.Summary {
	s := benchmath.AssumeNothing.Summary(benchmath.NewSample(values, &benchmath.DefaultThresholds), measured.Confidence)
	if math.IsInf(s.Lo, 0) || math.IsInf(s.Hi, 0) { // there are too few values to tell
		s.Lo, s.Hi = slices.Min(values), slices.Max(values)
	}
	return s
}

// Ratios returns ours : theirs, round by round: the machine is faster and slower by turns, and what is of one round was measured at
// about the same time.
func Ratios(ours, theirs []float64) []float64 {
	var all []float64
	for i := range min(len(ours), len(theirs)) {
		all = append(all, ours[i]/theirs[i])
	}
	return all
}

// amount formats a median with its unit, and its spread: the larger distance to an end of its interval, in percent.
func amount(values []float64, unit string) string {
	if len(values) == 0 {
		return "–"
	}
	s := summary(values)
	if s.Center == 0 {
		return "–"
	}
	return scaled(s.Center, unit) + spread(s)
}

func spread(s benchmath.Summary) string {
	if s.Center == 0 || s.Hi == s.Lo {
		return ""
	}
	most := math.Max(s.Hi-s.Center, s.Center-s.Lo) / math.Abs(s.Center) * 100
	return fmt.Sprintf(" ±%.0f %%", most)
}

// scaled formats a value with a prefix to its unit, which is what stands before a slash and after the last hyphen: client-cpu-sec/conn
// is in seconds.
func scaled(value float64, unit string) string {
	name, per, isRate := strings.Cut(unit, "/")
	name = name[strings.LastIndex(name, "-")+1:]
	class := benchunit.ClassOf(name)
	text := benchunit.Scale(value, class)
	number := strings.TrimRight(text, "µnmkMGTKi")
	prefix := text[len(number):]
	switch name {
	case "sec":
		name = "s"
	case "conn":
		name = ""
	}
	if isRate && per == "s" && name != "" {
		name += "/s"
	}
	return strings.TrimSpace(number + " " + prefix + name)
}

// ratio formats ours : theirs.
func ratio(ours, theirs []float64) string {
	all := Ratios(ours, theirs)
	if len(all) == 0 {
		return "–"
	}
	s := summary(all)
	if math.IsNaN(s.Center) || math.IsInf(s.Center, 0) {
		return "–"
	}
	return fmt.Sprintf("%.2f%s", s.Center, spread(s))
}

// table renders what the subjects of a case came to: a row for each subject, a column for each pair of head and unit. A unit that
// begins with ÷ is a column of ratios, ours by theirs.
func table(s *measured.Section, name string, subjects []string, columns ...string) string {
	var text strings.Builder
	head, rule := "| |", "|---|"
	for i := 0; i < len(columns); i += 2 {
		head += " " + columns[i] + " |"
		rule += "---:|"
	}
	fmt.Fprintf(&text, "%s\n%s\n", head, rule)
	for _, subject := range subjects {
		row, any := "| "+subject+" |", false
		for i := 1; i < len(columns); i += 2 {
			unit, isRatio := strings.CutPrefix(columns[i], "÷")
			values := s.Of(name, subject, unit)
			any = any || len(values) > 0
			switch {
			case !isRatio:
				row += " " + amount(values, unit) + " |"
			case subject == Ours:
				row += " 1 |"
			default:
				row += " " + ratio(s.Of(name, Ours, unit), values) + " |"
			}
		}
		if any {
			text.WriteString(row + "\n")
		}
	}
	return text.String()
}
