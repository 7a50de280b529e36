package schema

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/go-multierror"
)

// Origin is a place that a value comes from.
type Origin struct {
	Source string // a variable's name or a file's path
	Entry  int    // of a variable with entries between ##, counted from 1; 0 for the whole
	Line   int    // of a file; 0 where the place is no file's
	Column int
}

func (o Origin) String() string {
	switch {
	case o.Line > 0:
		return fmt.Sprintf("%s:%d:%d", o.Source, o.Line, o.Column)
	case o.Entry > 0:
		return fmt.Sprintf("%s entry %d", o.Source, o.Entry)
	default:
		return o.Source
	}
}

func (o Origin) compare(other Origin) int {
	return cmp.Or(
		strings.Compare(o.Source, other.Source),
		cmp.Compare(o.Entry, other.Entry),
		cmp.Compare(o.Line, other.Line),
		cmp.Compare(o.Column, other.Column),
	)
}

// Problem is one thing that is wrong with the configuration.
type Problem struct {
	Origin Origin
	Path   string // of the field, as "ingress[8080].mode"; empty for the whole
	Value  string // what stands there
	Reason string // why it is wrong and what would be right
}

func (p Problem) Error() string {
	parts := []string{p.Origin.String()}
	if p.Path != "" {
		parts = append(parts, p.Path)
	}
	if p.Value != "" {
		parts = append(parts, quote(p.Value))
	}
	return strings.Join(append(parts, p.Reason), ": ")
}

// quote makes any text fit for one line of a log: quoted as Go does, and cut where it is longer than a reader wants.
func quote(s string) string {
	const most = 120
	if runes := []rune(s); len(runes) > most {
		return fmt.Sprintf("%q… (%d bytes)", string(runes[:most]), len(s))
	}
	return fmt.Sprintf("%q", s)
}

// Problems returns the problems that an error of this package holds, sorted by place; none where err is nil. An error of
// another package is the reason of the only one.
func Problems(err error) []Problem {
	if err == nil {
		return nil
	}
	if merr, ok := errors.AsType[*multierror.Error](err); ok {
		var all []Problem
		for _, e := range merr.Errors {
			all = append(all, Problems(e)...)
		}
		return all
	}
	if p, ok := errors.AsType[Problem](err); ok {
		return []Problem{p}
	}
	return []Problem{{Reason: err.Error()}}
}

// report collects problems and gives them out as one error.
type report struct {
	problems []Problem
}

func (r *report) add(origin Origin, path, value, reason string) {
	r.problems = append(r.problems, Problem{origin, path, value, reason})
}

// err returns nil where nothing was added. Problems are sorted by place.
func (r *report) err() error {
	slices.SortStableFunc(r.problems, func(a, b Problem) int { return a.Origin.compare(b.Origin) })
	merr := &multierror.Error{ErrorFormat: format}
	for _, p := range r.problems {
		merr = multierror.Append(merr, p)
	}
	return merr.ErrorOrNil()
}

func format(errs []error) string {
	if len(errs) == 1 {
		return errs[0].Error()
	}
	lines := []string{fmt.Sprintf("%d problems:", len(errs))}
	for _, e := range errs {
		lines = append(lines, "  "+e.Error())
	}
	return strings.Join(lines, "\n")
}

// didYouMean ends a reason with the candidate that a misspelt word most likely stands for, if one is near.
func didYouMean(word string, candidates []string) string {
	best, least := "", max(2, len(word)/4)+1
	for _, c := range candidates {
		if d := distance(strings.ToLower(word), strings.ToLower(c)); d < least {
			best, least = c, d
		}
	}
	if best == "" {
		return ""
	}
	return "; did you mean " + best + "?"
}

// distance is the Levenshtein distance of a and b, in bytes.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j]+1, row[j+1]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}
