package status

import (
	"fmt"
	"net/http"
	"slices"
)

// writeChecks answers in the form of Kubernetes' own components: 200 and ok, or 503 and the reasons, a line each; with ?verbose a line for
// each check. Checks in waiting have nothing to look at yet. A check that ?exclude= names does not count. The notes follow an answer that is
// ok, and a verbose one.
func writeChecks(w http.ResponseWriter, r *http.Request, checks, waiting []string, reasons []Reason, notes []Problem) {
	query := r.URL.Query()
	excluded := query["exclude"]
	counts := slices.DeleteFunc(slices.Clone(reasons), func(reason Reason) bool { return slices.Contains(excluded, reason.Check) })
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	verdict := "passed"
	if len(counts) > 0 {
		verdict = "failed"
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	switch {
	case query.Has("verbose"):
		for _, check := range checks {
			_, _ = fmt.Fprintln(w, verboseLine(check, reasons, slices.Contains(waiting, check), slices.Contains(excluded, check)))
		}
		_, _ = fmt.Fprintf(w, "%s check %s\n", r.URL.Path[1:], verdict)
	case len(counts) == 0:
		_, _ = fmt.Fprintln(w, "ok")
	default:
		for _, reason := range counts {
			_, _ = fmt.Fprintln(w, reason.Text)
		}
		return
	}
	for _, note := range notes {
		_, _ = fmt.Fprintln(w, note.Text)
	}
}

// verboseLine returns the line of one check.
func verboseLine(check string, reasons []Reason, waiting, excluded bool) string {
	if excluded {
		return "[+]" + check + " excluded: ok"
	}
	line := "[+]" + check + " ok"
	if waiting {
		line = "[-]" + check + " waiting: nothing is in force yet"
	}
	for i, reason := range slices.DeleteFunc(slices.Clone(reasons), func(r Reason) bool { return r.Check != check }) {
		if i == 0 {
			line = "[-]" + check + " failed: " + reason.Text
		} else {
			line += "; " + reason.Text
		}
	}
	return line
}
