package main

import (
	"fmt"
	"io"
	"regexp"
	"strings"

	"github.com/spf13/cobra"

	"mantlet/schema"
)

func sayVerdicts(cmd *cobra.Command, verdicts []verdict) error {
	var outcome error
	for _, v := range verdicts {
		if len(v.problems) > 0 {
			_, _ = fmt.Fprintln(cmd.ErrOrStderr(), invalid{fmt.Errorf("%s%w", v.of(), schema.Join(v.problems))})
			outcome = errNot
			continue
		}
		_, err := fmt.Fprintf(cmd.OutOrStdout(), "%svalid: %d ingress entries, %d egress entries\n", v.of(), len(v.mesh.Ingress), len(v.mesh.Egress))
		if err != nil {
			return err
		}
	}
	for _, w := range warnings(verdicts) {
		w.say(cmd.ErrOrStderr())
	}
	return outcome
}

// of starts a line that is about one of several subjects.
func (s subject) of() string {
	if s.name == "" {
		return ""
	}
	return s.name + ": "
}

// kindred are warnings that say the same of several places.
type kindred struct {
	object string // of a manifest
	first  schema.Problem
	also   []string // the places of the others
}

func (k kindred) say(to io.Writer) {
	const most = 3 // places that a reader goes through in a line
	object := ""
	if k.object != "" {
		object = k.object + ": "
	}
	text := k.first.Error()
	if n := len(k.also); n > 0 {
		text += fmt.Sprintf(" (%d warnings like this: also %s", n+1, strings.Join(k.also[:min(n, most)], ", "))
		if n > most {
			text += fmt.Sprintf(" and %d more", n-most)
		}
		text += ")"
	}
	_, _ = fmt.Fprintf(to, "%swarning: %s\n", object, text)
}

var inBrackets = regexp.MustCompile(`\[[^\]]*\]+`)

// warnings returns those of all verdicts. Those that have the same reason, and are about the same field of entries or
// containers, are one.
func warnings(verdicts []verdict) []kindred {
	var all []kindred
	index := map[string]int{}
	for _, v := range verdicts {
		for _, w := range v.warnings {
			reason, _, _ := strings.Cut(w.Reason, ":")
			field := inBrackets.ReplaceAllString(w.Path, "")
			key := field[strings.LastIndex(field, ".")+1:] + "\n" + reason
			i, known := index[key]
			if !known {
				index[key] = len(all)
				all = append(all, kindred{object: v.name, first: w})
				continue
			}
			place := w.Origin.String()
			if v.name != all[i].object {
				place = v.of() + place
			}
			all[i].also = append(all[i].also, place)
		}
	}
	return all
}

// found is a problem or a warning, for machines.
type found struct {
	Object string   `json:"object,omitempty"` // of a manifest
	Place  string   `json:"place"`
	Line   int      `json:"line,omitempty"`
	Column int      `json:"column,omitempty"`
	Path   string   `json:"path,omitempty"`
	Value  string   `json:"value,omitempty"`
	Reason string   `json:"reason"`
	Count  int      `json:"count,omitempty"` // where it is of several places: how many
	Also   []string `json:"also,omitempty"`  // and the others
}

func findingOf(object string, p schema.Problem) found {
	return found{
		Object: object, Place: p.Origin.String(), Line: p.Origin.Line, Column: p.Origin.Column, Path: p.Path, Value: p.Value, Reason: p.Reason,
	}
}

func printVerdicts(cmd *cobra.Command, verdicts []verdict) error {
	problems, warned := []found{}, []found{}
	for _, v := range verdicts {
		for _, p := range v.problems {
			problems = append(problems, findingOf(v.name, p))
		}
	}
	for _, w := range warnings(verdicts) {
		f := findingOf(w.object, w.first)
		if len(w.also) > 0 {
			f.Count, f.Also = len(w.also)+1, w.also
		}
		warned = append(warned, f)
	}
	err := printData(cmd.OutOrStdout(), map[string]any{
		"valid": len(problems) == 0, "problems": problems, "warnings": warned,
	}, "json")
	if err == nil && len(problems) > 0 {
		return errNot
	}
	return err
}
