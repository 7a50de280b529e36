package report

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/perf/benchmath"

	"mantlet/internal/bench/measured"
)

// bare is Envoy by itself.
const bare = "bare-envoy"

// scales are the numbers of entries that the control path is measured with.
func scales() []int { return []int{1, 10, 100, 1000} }

func controlCase(entries int) string { return fmt.Sprintf("Control/entries=%d", entries) }

// controlTable renders what the control path takes: a row for each quantity, a column for each number of entries.
func (s Sections) controlTable() string {
	section := s["control"]
	var text strings.Builder
	text.WriteString("| |")
	for _, n := range scales() {
		fmt.Fprintf(&text, " %d |", n)
	}
	text.WriteString("\n|---|" + strings.Repeat("---:|", len(scales())) + "\n")
	for _, row := range []struct {
		label, subject, unit string
		high                 bool // the 99th percentile
	}{
		{"from exec to ready", Ours, "start-sec", false},
		{"— CPU of mantlet and its Envoy", Ours, "start-cpu-sec", false},
		{"— CPU of mantlet without Envoy", Ours, "start-mantlet-cpu-sec", false},
		{"bare Envoy: validate, then exec to LIVE", bare, "restart-sec", false},
		{"bare Envoy: exec to LIVE alone", bare, "live-sec", false},
		{"— its CPU", bare, "live-cpu-sec", false},
		{"change of sets in force", Ours, "sets-sec", false},
		{"— CPU of mantlet", Ours, "sets-mantlet-cpu-sec", false},
		{"change with a hot restart in force", Ours, "restart-sec", false},
		{"— CPU of mantlet without Envoy", Ours, "restart-mantlet-cpu-sec", false},
		{"new certificate shown", Ours, "certificate-sec", false},
		{"foreign change of the rules repaired", Ours, "repair-sec", false},
		{"— 99th percentile", Ours, "repair-sec", true},
		{"forbidden connection ended, once the rules are in force", Ours, "ended-sec", false},
		{"— 99th percentile", Ours, "ended-sec", true},
		{"memory of mantlet without Envoy", Ours, "daemon-B", false},
		{"CPU of mantlet while idle, % of a core", Ours, "idle-%", false},
	} {
		fmt.Fprintf(&text, "| %s |", row.label)
		for _, n := range scales() {
			values := section.Of(controlCase(n), row.subject, row.unit)
			switch {
			case len(values) == 0:
				text.WriteString(" – |")
			case row.high:
				fmt.Fprintf(&text, " %s |", scaled(percentile(values), row.unit))
			case row.unit == "idle-%":
				fmt.Fprintf(&text, " %.2f |", summary(values).Center)
			default:
				fmt.Fprintf(&text, " %s |", amount(values, row.unit))
			}
		}
		text.WriteString("\n")
	}
	return text.String()
}

// percentile returns the 99th.
func percentile(values []float64) float64 {
	return benchmath.NewSample(slices.Clone(values), &benchmath.DefaultThresholds).Values[min(len(values)-1, len(values)*99/100)]
}

// whole formats a count.
func whole(s *measured.Section, name, subject, unit string) string {
	values := s.Of(name, subject, unit)
	if len(values) == 0 {
		return "–"
	}
	return fmt.Sprintf("%.0f", summary(values).Center)
}

// control are the goals of the control path.
func (s Sections) control() []goal {
	section := s["control"]
	const mib = 1 << 20
	all := []goal{{
		text: "change with a hot restart among 1,000 entries", most: 1.3, beside: "bare Envoy's LIVE",
		values: Ratios(section.Of(controlCase(1000), Ours, "restart-sec"), section.Of(controlCase(1000), bare, "live-sec")),
	}}
	for _, g := range []struct{ text, unit string }{{"rules repaired (p99)", "repair-sec"}, {"connection ended (p99)", "ended-sec"}} {
		for _, n := range []int{10, 1000} {
			if values := section.Of(controlCase(n), Ours, g.unit); len(values) > 0 {
				all = append(all, goal{text: fmt.Sprintf("%s, %d entries", g.text, n), most: 0.05, unit: "sec", values: []float64{percentile(values)}})
			}
		}
	}
	for n, most := range map[int]float64{10: 25 * mib, 1000: 40 * mib} {
		all = append(all, goal{
			text: fmt.Sprintf("memory of the daemon, %d entries", n), most: most, unit: "B",
			values: section.Of(controlCase(n), Ours, "daemon-B"),
		})
	}
	slices.SortStableFunc(all[len(all)-2:], func(a, b goal) int { return strings.Compare(a.text, b.text) })
	return all
}
