package status

import (
	"fmt"
	"net/http"
	"slices"
)

// writeChecks writes what Kubernetes' own components writeChecks at these paths: ok, or the reasons, one a line; with ?verbose every
// check, of which some may have to wait. Those that ?exclude= names do not count. What is worth a look although it is ok follows it.
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

// verboseLine is the line of one check.
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
