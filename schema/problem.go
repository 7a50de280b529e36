package schema

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/go-multierror"
)

// Problem is one thing that is wrong with the configuration.
type Problem struct {
	Where  string // the variable
	Path   string // the part of it, as "entry 2 (web#0#false): port"; empty for the whole
	Value  string // what stands there
	Reason string // why it is wrong and what would be right
}

func (p Problem) Error() string {
	var b strings.Builder
	b.WriteString(p.Where)
	if p.Path != "" {
		b.WriteString(": " + p.Path)
	}
	fmt.Fprintf(&b, ": %s: %s", quote(p.Value), p.Reason)
	return b.String()
}

// quote makes any text fit for one line of a log: quoted as Go does, and cut where it is longer than a reader wants.
func quote(s string) string {
	const most = 120
	if runes := []rune(s); len(runes) > most {
		return fmt.Sprintf("%q… (%d bytes)", string(runes[:most]), len(s))
	}
	return fmt.Sprintf("%q", s)
}

// Problems returns the problems that err holds, sorted by place; none where err is nil, and err's own text as the only
// one where err is not of this package.
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

func (r *report) add(p Problem) { r.problems = append(r.problems, p) }

// err returns nil where nothing was added. Problems keep the order of their sources' text, which is the order in which a
// reader mends them; those of different sources are grouped.
func (r *report) err() error {
	slices.SortStableFunc(r.problems, func(a, b Problem) int { return strings.Compare(a.Where, b.Where) })
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

// nearest returns the candidate that a misspelt word most likely means, or "" where none is near.
func nearest(word string, candidates []string) string {
	best, least := "", max(2, len(word)/4)+1
	for _, c := range candidates {
		if d := distance(strings.ToLower(word), strings.ToLower(c)); d < least {
			best, least = c, d
		}
	}
	return best
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
