package report

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"golang.org/x/perf/benchmath"

	"mantlet/internal/bench/measured"
)

// change is how the ratio of ours to theirs changed.
type change struct {
	name, unit, beside string
	before, now        benchmath.Summary
	comparison         benchmath.Comparison
}

// worse returns by how much more than the noise the ratio grew, in parts of what it was; 0 if it did not. The noise is that of both:
// their intervals must not overlap, and the test must tell them apart.
func (c change) worse() float64 {
	if c.comparison.P >= c.comparison.Alpha || c.now.Lo <= c.before.Hi {
		return 0
	}
	return (c.now.Lo - c.before.Hi) / c.before.Center
}

// compared are the units of which less is better.
func compared(unit string) bool {
	return strings.HasPrefix(unit, "cpu-sec/") || strings.HasPrefix(unit, "client-cpu-sec/") || strings.HasPrefix(unit, "server-cpu-sec/") ||
		unit == "p50-sec"
}

// Compare writes what became of the ratios of ours to each of theirs, and returns how many are worse than they were. Ratios are compared,
// and not times: the machine may be another one, or busier.
func Compare(out io.Writer, before, now *measured.Section) (worse int, err error) {
	var all []change
	for _, key := range now.Keys() {
		if key.Subject == Ours || key.Subject == "none" || !compared(key.Unit) {
			continue
		}
		was := Ratios(before.Of(key.Case, Ours, key.Unit), before.Of(key.Case, key.Subject, key.Unit))
		is := Ratios(now.Of(key.Case, Ours, key.Unit), now.Of(key.Case, key.Subject, key.Unit))
		if len(was) == 0 || len(is) == 0 {
			continue
		}
		t := &benchmath.DefaultThresholds
		comparison := benchmath.AssumeNothing.Compare(benchmath.NewSample(was, t), benchmath.NewSample(is, t))
		all = append(all, change{key.Case, key.Unit, key.Subject, summary(was), summary(is), comparison})
	}
	slices.SortStableFunc(all, func(a, b change) int { return cmp.Compare(b.worse(), a.worse()) })
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	if _, err := fmt.Fprintln(table, "case\tunit\tmantlet beside\tin BENCHMARKS.md\tnow\tchange\t"); err != nil {
		return 0, err
	}
	for _, c := range all {
		verdict := ""
		if by := c.worse(); by > 0 {
			worse++
			verdict = fmt.Sprintf("WORSE, by %.0f %% beyond the noise", 100*by)
		}
		if _, err := fmt.Fprintf(table, "%s\t%s\t%s\t%.2f%s\t%.2f%s\t%s\t%s\n", c.name, c.unit, c.beside, c.before.Center, spread(c.before),
			c.now.Center, spread(c.now), c.comparison.FormatDelta(c.before.Center, c.now.Center), verdict); err != nil {
			return 0, err
		}
	}
	return worse, table.Flush()
}
