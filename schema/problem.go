package schema

import (
	"cmp"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
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
	source := o.Source
	if quoted := strconv.Quote(source); quoted != `"`+source+`"` || strings.TrimSpace(source) != source {
		source = quoted // what can't be seen is what is wrong, as a rule
	}
	switch {
	case o.Line > 0:
		return fmt.Sprintf("%s:%d:%d", source, o.Line, o.Column)
	case o.Entry > 0:
		return fmt.Sprintf("%s entry %d", source, o.Entry)
	default:
		return source
	}
}

// compare sorts by place. The file comes after the variables, so of two entries the later overrides.
func (o Origin) compare(other Origin) int {
	rank := func(o Origin) int {
		if filepath.IsAbs(o.Source) {
			return 1
		}
		return 0
	}
	return cmp.Or(
		cmp.Compare(rank(o), rank(other)),
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
	value := ""
	if p.Value != "" {
		value = quote(p.Value)
	}
	parts := []string{p.Origin.String(), p.Path, value, p.Reason}
	return strings.Join(slices.DeleteFunc(parts, func(part string) bool { return part == "" }), ": ")
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

// Join returns problems as one error, sorted by place; nil for none.
func Join(problems []Problem) error {
	r := report{problems: slices.Clone(problems)}
	return r.err()
}

// Withhold returns an error with the places of another's problems, and nothing of the text that they are about. It is for a
// text that a link led to, out of its volume: whoever can write to the volume could make mantlet read what they must not
// see. It returns nil for nil.
func Withhold(err error, link string) error {
	r := report{problems: withhold(Problems(err), link)}
	return r.err()
}

func withhold(problems []Problem, link string) []Problem {
	var all []Problem
	for _, p := range problems {
		all = append(all, Problem{Origin: p.Origin, Reason: "is not valid; what is wrong is withheld, " + withheld(link)})
	}
	return slices.Compact(all)
}

func withheld(link string) string {
	return fmt.Sprintf("since the file is a link out of its volume, to %s; put the file itself there", link)
}

// report collects problems and gives them out as one error.
type report struct {
	problems   []Problem
	incomplete map[string]bool // lists some of whose entries are not known, for lack of a valid key
}

func (r *report) add(origin Origin, path, value, reason string) {
	r.problems = append(r.problems, Problem{origin, path, value, reason})
}

// has reports whether there is a problem with a field.
func (r *report) has(path string) bool {
	return slices.ContainsFunc(r.problems, func(p Problem) bool { return p.Path == path })
}

// lose notes that an entry of a list is not known.
func (r *report) lose(list string) {
	if r.incomplete == nil {
		r.incomplete = map[string]bool{}
	}
	r.incomplete[list] = true
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
	const most = 100 // nobody reads more, and a log should not have to hold it; Problems has all
	if len(errs) == 1 {
		return errs[0].Error()
	}
	lines := []string{fmt.Sprintf("%d problems:", len(errs))}
	for i, e := range errs {
		if i == most {
			lines = append(lines, fmt.Sprintf("  and %d more", len(errs)-most))
			break
		}
		lines = append(lines, "  "+e.Error())
	}
	return strings.Join(lines, "\n")
}

// didYouMean ends a reason with the candidate that a misspelt word most likely stands for, if one is near.
func didYouMean(word string, candidates []string) string {
	if near := nearest(word, candidates); near != "" {
		return "; did you mean " + near + "?"
	}
	return ""
}

// nearest returns the candidate that a misspelt word most likely stands for, or nothing.
func nearest(word string, candidates []string) string {
	const longest = 64 // longer words are no misspelling, and comparing them takes long
	if len(word) > longest {
		return ""
	}
	word = strings.ToLower(word)
	best, least := "", min(max(2, len(word)/4), (len(word)+1)/3)+1
	for _, c := range candidates {
		lower := strings.ToLower(c)
		d := distance(word, lower)
		switch {
		case len(word) > 2 && strings.HasPrefix(lower, word):
			d = min(d, 1)
		case len(lower) > 2 && strings.HasPrefix(word, lower):
			d = min(d, 2)
		}
		if d < least {
			best, least = c, d
		}
	}
	return best
}

// distance is the Levenshtein distance of a and b, in bytes, with two neighbours in the wrong order counting as one.
func distance(a, b string) int {
	before, row := make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		next := make([]int, len(b)+1)
		next[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			next[j+1] = min(next[j]+1, row[j+1]+1, row[j]+cost)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				next[j+1] = min(next[j+1], before[j-1]+1)
			}
		}
		before, row = row, next
	}
	return row[len(b)]
}
