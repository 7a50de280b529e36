package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"mantlet/internal/rundir"
	"mantlet/internal/status"
	"mantlet/schema"
)

func statusCommand() *cobra.Command {
	var watch, follow bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Say how the running mantlet is; exit 0 ready and no problems, 1 not so, 2 it does not answer",
		Example: `  kubectl exec POD -c mantlet -- mantlet status
  mantlet status -o json | jq .problems`,
		Args: noArgs(""),
	}
	output := outputFlag(cmd, "how to say it:", "text", "json")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		env, err := schema.ParseEnvironment(os.Environ())
		if err != nil {
			return fmt.Errorf("the configuration is not valid, so no mantlet runs with it: %w", err)
		}
		show := func(ctx context.Context) error {
			return showStatus(ctx, cmd.OutOrStdout(), rundir.Directory(env.Process.RuntimeDirectory).StatusSocket(), *output, os.Environ())
		}
		if follow {
			return followRefusals(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr(), rundir.Directory(env.Process.RuntimeDirectory).StatusSocket(), *output)
		}
		if watch {
			return watchStatus(cmd.Context(), cmd.OutOrStdout(), show)
		}
		return show(cmd.Context())
	}
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "say it again and again, until interrupted")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "say who is refused, as it happens, until interrupted; with -o json a line of JSON each")
	cmd.MarkFlagsMutuallyExclusive("watch", "follow")
	return cmd
}

const (
	// answerLimit is what a mantlet that runs takes to say so, whatever else hangs.
	answerLimit = 1500 * time.Millisecond // so that status says within 2 s that none does
	// statusLimit is more than it takes for its status where Envoy hangs.
	statusLimit = 10 * time.Second
)

// unanswered is that no mantlet answers.
type unanswered struct{ error }

func (u unanswered) Error() string {
	return fmt.Sprintf("mantlet does not answer; `mantlet diff` reads kernel and Envoy without it (%v)", u.error)
}

// answers returns an error if no mantlet answers at a socket in time. One that hangs takes connections and says nothing.
func answers(ctx context.Context, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	_, _, err := probe(ctx, socket, "/livez")
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("nothing came within %s", answerLimit)
	}
	if err != nil {
		return unanswered{err}
	}
	return nil
}

// readStatus asks a mantlet for its status.
func readStatus(ctx context.Context, socket string) (said status.Status, err error) {
	if err := answers(ctx, socket); err != nil {
		return said, err
	}
	ctx, cancel := context.WithTimeout(ctx, statusLimit)
	defer cancel()
	ok, text, err := probe(ctx, socket, "/status")
	if err == nil && !ok {
		err = errors.New(strings.TrimSpace(text))
	}
	if err == nil {
		err = json.Unmarshal([]byte(text), &said)
	}
	if err != nil {
		return said, unanswered{err}
	}
	return said, nil
}

// showStatus prints what mantlet says. The error is errNot where that is not all well; then what mantlet check would find
// comes with it.
func showStatus(ctx context.Context, to io.Writer, socket, output string, environ []string) error {
	said, err := readStatus(ctx, socket)
	if err != nil {
		return err
	}
	var needs []finding
	well := said.Ready && len(said.Problems) == 0
	if !well {
		needs = problems(findings(ctx, environ))
	}
	if output == "json" {
		err = printData(to, struct {
			status.Status
			Findings []finding `json:"findings,omitempty"`
		}{said, needs}, "json")
	} else if err = printStatus(to, said, time.Now()); err == nil {
		err = printFindings(to, needs)
	}
	if err == nil && !well {
		return errNot
	}
	return err
}

// watchPause is what people take in.
const watchPause = 2 * time.Second

// watchStatus shows it until it is interrupted: on a terminal always in the same place.
func watchStatus(ctx context.Context, to io.Writer, show func(context.Context) error) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	clear := ""
	if file, ok := to.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
		clear = "\x1b[H\x1b[2J" // ECMA-48: cursor to the top, erase the page
	}
	for {
		if _, err := io.WriteString(to, clear); err != nil {
			return err
		}
		err := show(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil && !errors.Is(err, errNot) { // it may come back
			if _, err := fmt.Fprintln(to, errorLine(err)); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(watchPause):
		}
	}
}

// followRefusals prints refusals as they come, until it is interrupted.
func followRefusals(ctx context.Context, to, notes io.Writer, socket, output string) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := answers(ctx, socket); err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://mantlet"+status.RefusalsPath, nil)
	if err != nil {
		return err
	}
	response, err := status.OverSocket(socket).Do(request)
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		return unanswered{err}
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(response.Body, 4<<10))
		return fmt.Errorf("following refusals: %s: %s", response.Status, printable(strings.TrimSpace(string(text))))
	}
	if output == "text" { // which may have to wait for its first line
		_, _ = fmt.Fprintln(notes, "following who is refused; interrupt to end")
	}
	decoder := json.NewDecoder(response.Body)
	for {
		var refusal status.Followed
		err := decoder.Decode(&refusal)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return unanswered{err}
		}
		if err := printRefusal(to, refusal, output); err != nil {
			return err
		}
	}
}

func printRefusal(to io.Writer, r status.Followed, output string) error {
	if output == "json" {
		encoder := json.NewEncoder(to)
		encoder.SetEscapeHTML(false)
		return encoder.Encode(r)
	}
	line := fmt.Sprintf("%s %s %s -> %s %s: %s", r.Time.Format(time.RFC3339), r.Direction, r.Peer, r.Destination, r.Code, r.Reason)
	if len(r.SANs) > 0 {
		line += "; its SANs: " + names(r.SANs, "")
	}
	if r.LeftOut > 0 {
		line += fmt.Sprintf("; %d were left out before it", r.LeftOut)
	}
	_, err := fmt.Fprintln(to, printable(line))
	return err
}

// printStatus prints a status for people, as of now.
func printStatus(to io.Writer, s status.Status, now time.Time) error {
	p := &page{Writer: tabwriter.NewWriter(to, 0, 0, 3, ' ', 0), now: now}
	verdict := "ready"
	if !s.Ready {
		verdict = "NOT READY"
	}
	p.line("mantlet %s: %s, runs for %s", s.Version, verdict, p.ago(s.Started))
	for _, problem := range s.Problems {
		p.line("  %s", indented(problem, "    "))
	}
	if e := s.LastError; e != nil {
		p.line("last error, %s ago, %s: %s", p.ago(e.Time), e.Place, indented(e.Text, "    "))
	}
	p.state(s)
	p.epochs(s.Epochs)
	p.certificates(s.Certificates)
	p.policy(s)
	p.policyRoutes(s.PolicyRoutes)
	p.probes(s.Probes)
	p.traffic(s)
	p.upstreams(s.Upstreams)
	p.outbound(s)
	p.repairs(s)
	return p.Flush()
}

// printable escapes what a terminal could take for a command, or show as something else.
func printable(text string) string {
	var all strings.Builder
	for _, r := range text {
		if unicode.IsPrint(r) {
			all.WriteRune(r)
			continue
		}
		quoted := strconv.QuoteRuneToASCII(r)
		all.WriteString(quoted[1 : len(quoted)-1])
	}
	return all.String()
}

// indented is a text of some lines, those after the first moved to the right.
func indented(text, by string) string {
	var all []string
	for line := range strings.Lines(text) {
		all = append(all, printable(strings.TrimSuffix(line, "\n")))
	}
	return strings.Join(all, "\n"+by)
}

// page is a status being printed. Errors show at Flush.
type page struct {
	*tabwriter.Writer
	now time.Time
}

func (p *page) line(format string, args ...any) { _, _ = fmt.Fprintf(p, format+"\n", args...) }

// head starts a table; columns of different ones are no matter of each other.
func (p *page) head(columns ...string) {
	_ = p.Flush()
	p.line("")
	p.row(columns...)
}

func (p *page) row(cells ...string) { p.line("%s", strings.Join(cells, "\t")) }

func (p *page) ago(t time.Time) string { return p.now.Sub(t).Round(time.Second).String() }

func (p *page) state(s status.Status) {
	p.head("", "GENERATION", "DIGEST", "INGRESS", "EGRESS", "SOURCE")
	for _, row := range []struct {
		name  string
		state *status.Summary
	}{{"desired", s.Desired}, {"applied", s.Applied}} {
		if row.state == nil {
			p.row(row.name, "none", "", "", "", "")
			continue
		}
		source := printable(row.state.Source)
		if row.state.SourceDigest != "" {
			source += " (SHA-256 " + short(row.state.SourceDigest) + ")"
		}
		ingress := strconv.Itoa(row.state.Ingress)
		if row.state.IngressOff {
			ingress = "off"
		}
		p.row(row.name, strconv.FormatUint(row.state.Generation, 10), short(row.state.Digest),
			ingress, strconv.Itoa(row.state.Egress), source)
	}
	if w := s.Waits; w != nil {
		p.line("desired waits %s for %s", lasts(max(1, w.Until.Sub(p.now).Seconds())), w.Reason)
	}
}

// short is as much of a digest as tells two apart.
func short(digest string) string { return digest[:min(len(digest), 12)] }

func (p *page) epochs(epochs []status.Epoch) {
	p.head("EPOCH", "PID", "STATE", "FOR", "CONNECTIONS", "LEFT")
	for _, e := range epochs {
		state, left, open := "serves", "", "?"
		if !e.Serving {
			state, left = "drains", lasts(e.LeftSeconds)
		}
		if e.Connections != nil {
			open = strconv.Itoa(*e.Connections)
		}
		p.row(strconv.Itoa(e.Epoch), strconv.Itoa(e.PID), state, p.ago(e.Since), open, left)
	}
}

func (p *page) certificates(all []status.Certificate) {
	p.head("CERTIFICATE", "SUBJECT", "SANS", "EXPIRES", "LEFT")
	for _, c := range all {
		p.row(c.Role, onLine(c.Subject), onLine(cmp.Or(strings.Join(c.SANs, ", "), "-")), c.NotAfter.Format(time.RFC3339), lasts(c.LeftSeconds))
	}
}

// upstreams tells where egress entries go; those that are named, and what name servers say.
func (p *page) upstreams(all []status.Upstream) {
	if len(all) > 0 {
		p.head("EGRESS", "UPSTREAM", "ADDRESSES", "ANSWER")
	}
	for _, u := range all {
		addresses := []string{}
		for i, addr := range u.Addresses {
			if i == fewAddresses {
				addresses = append(addresses, fmt.Sprintf("and %d more", len(u.Addresses)-i))
				break
			}
			addresses = append(addresses, addr.String())
		}
		answer := u.Answer
		if u.StaleSince != nil {
			answer = fmt.Sprintf("not confirmed for %s: %s", p.ago(*u.StaleSince), answer)
		}
		p.row(u.Listen, onLine(u.Upstream), cmp.Or(strings.Join(addresses, ", "), "none"), onLine(cmp.Or(answer, "-")))
	}
}

// fewAddresses are as many as fit a line.
const fewAddresses = 4

// mostRows is how many entries of a configuration a screen has room for.
const mostRows = 40

func (p *page) policy(s status.Status) {
	open := map[status.Inbound]int{}
	for _, in := range s.Inbound {
		open[status.Inbound{Ports: in.Ports, Mode: in.Mode}] = in.Open
	}
	p.head("PORTS", "MODE", "MAY CALL", "OPEN", "NAME")
	for i, row := range s.Policy {
		key := status.Inbound{Ports: row.Ports, Mode: row.Mode}
		n := open[key]
		delete(open, key)
		if i < mostRows || i == len(s.Policy)-1 {
			p.row(row.Ports, string(row.Mode), mayCall(row), strconv.Itoa(n), optional(row.Name))
		}
	}
	p.more(len(s.Policy) - 1)
	for _, in := range s.Inbound {
		if n, before := open[status.Inbound{Ports: in.Ports, Mode: in.Mode}]; before {
			p.row(in.Ports, string(in.Mode), "nobody any more: let in before", strconv.Itoa(n), "")
		}
	}
	if len(s.Routes) == 0 {
		return
	}
	counts := map[string]status.Dialled{}
	for _, e := range s.Traffic.Egress {
		counts[e.Listen] = e
	}
	p.head("EGRESS", "UPSTREAM", "ENDPOINT", "CONNECTIONS", "FAILED", "NAME")
	for _, r := range s.Routes[:min(len(s.Routes), mostRows)] {
		n := counts[r.Listen]
		p.row(r.Listen, r.Upstream, names(r.ServerNames, "anyone of the mesh"), strconv.FormatUint(n.Total, 10), strconv.FormatUint(n.Failed, 10), optional(r.Name))
	}
	p.more(len(s.Routes))
}

// more tells what is left out of a table.
func (p *page) more(rows int) {
	if rows > mostRows {
		p.row(fmt.Sprintf("… %d more: -o json has all", rows-mostRows))
	}
}

// mayCall says who may call ports.
func mayCall(row status.Policy) string {
	switch {
	case row.Ports == "status":
		return "anyone, mantlet itself"
	case row.Mode == schema.ModeMTLS:
		return names(row.Allow, "anyone of the mesh")
	case row.Mode == schema.ModeTLS:
		return "anyone, by TLS"
	default:
		return "anyone, unprotected"
	}
}

// names prints a list of names, or what it means that there is none.
func names(all []string, none string) string {
	if all == nil {
		return none
	}
	const most = 10
	var printed []string
	for _, name := range all[:min(len(all), most)] {
		printed = append(printed, onLine(name))
	}
	if more := len(all) - most; more > 0 {
		printed = append(printed, fmt.Sprintf("… %d more", more))
	}
	return strings.Join(printed, ", ")
}

func optional(text string) string {
	if text == "" {
		return ""
	}
	return onLine(text)
}

func (p *page) probes(all []status.ProbeStatus) {
	if len(all) == 0 {
		return
	}
	p.head("PROBE", "ASKS", "LAST")
	for _, probe := range all[:min(len(all), mostRows)] {
		last := "not asked yet"
		switch {
		case probe.Asked == nil || probe.OK == nil:
		case *probe.OK:
			last = "well, " + p.ago(*probe.Asked) + " ago"
		default:
			last = "failed, " + p.ago(*probe.Asked) + " ago: " + printable(probe.Error)
		}
		p.row(probe.Name, printable(probe.Asks), last)
	}
	p.more(len(all))
}

func (p *page) traffic(s status.Status) {
	p.head("SINCE THE START", "")
	for _, h := range s.Traffic.Ingress {
		p.row(string(h.Mode), fmt.Sprintf("%d TLS handshakes with clients", h.Total))
	}
	if c := s.Capacity; c.Ingress > 0 {
		p.row("limit", "", fmt.Sprintf("%d from outside at a time, %s; %d at each egress entry", c.Ingress, limitedBy(c.By, c.Memory, c.Descriptors), c.Egress))
	}
	if s.Conntrack.Max > 0 {
		p.row("conntrack", fmt.Sprintf("%d of %d entries now", s.Conntrack.Entries, s.Conntrack.Max))
	}
	p.head("REFUSED", "BY", "DIRECTION", "COUNT")
	for _, r := range s.Refused {
		if r.Count > 0 {
			p.row(r.Reason, r.By, r.Direction, strconv.FormatUint(r.Count, 10))
		}
	}
	p.head("LAST REFUSED", "PEER", "ITS SANS", "DESTINATION", "WHY")
	for _, r := range lastOf(s.Refusals) {
		p.row(p.ago(r.Time)+" ago", printable(r.Peer), names(r.SANs, "-"), printable(r.Destination), onLine(r.Reason)+" ("+r.Code+")")
	}
	if len(s.Endings) == 0 {
		return
	}
	p.head("LAST ENDED BY A CHANGE", "COUNT", "PEER'S SANS", "DESTINATION", "WHY")
	for _, e := range lastOf(s.Endings) {
		to := printable(e.Destination)
		if e.Peer != "" {
			to += " (" + printable(e.Peer) + ")"
		}
		p.row(p.ago(e.Time)+" ago", strconv.Itoa(e.Count), names(e.SANs, "-"), to, onLine(e.Reason)+" ("+string(e.Code)+")")
	}
}

// policyRoutes tells of the policy routes, where there shall be some.
func (p *page) policyRoutes(routes status.PolicyRoutes) {
	if len(routes.Families) == 0 {
		return
	}
	p.head("POLICY ROUTES", "STATE")
	state := "in place: the workload sees its clients' addresses"
	if routes.Error != "" {
		state = onLine(routes.Error)
	}
	p.row(strings.Join(routes.Families, ", "), state)
}

// outbound tells what is spoken to in the clear: first what nobody allowed.
func (p *page) outbound(s status.Status) {
	if s.OutboundPolicy.Mode == "" || s.OutboundPolicy.Mode == string(schema.OutboundAccept) && len(s.Outbound) == 0 {
		return
	}
	p.head("IN THE CLEAR", "PROTOCOL", "COUNT", "FIRST", "LAST", "VERDICT", "NAME")
	rows := slices.SortedStableFunc(slices.Values(s.Outbound), func(a, b status.Outbound) int {
		switch {
		case a.Listed == b.Listed:
			return 0
		case b.Listed:
			return -1
		default:
			return 1
		}
	})
	suggestions := []string{}
	for _, o := range rows[:min(len(rows), mostRows)] {
		p.row(o.Destination, o.Protocol, strconv.FormatUint(o.Count, 10), p.ago(o.FirstSeen)+" ago", p.ago(o.LastSeen)+" ago", o.Fate(), optional(o.Name))
		if o.Suggestion != "" && !o.Listed && !slices.Contains(suggestions, o.Suggestion) {
			suggestions = append(suggestions, o.Suggestion)
		}
	}
	p.more(len(rows))
	if s.OutboundPolicy.Incomplete {
		p.row("There were more destinations than are kept; those that were spoken to last are here.")
	}
	if len(suggestions) > 0 {
		_ = p.Flush()
		p.line("")
		p.line("egress entries that would cover them, where the peer is of the mesh; the workload then dials the listen address:")
		for _, line := range suggestions {
			p.line("  - %s", onLine(line))
		}
	}
}

func (p *page) repairs(s status.Status) {
	if s.Repaired == 0 && len(s.Repairs) == 0 {
		return
	}
	p.head("RULES REPAIRED", "BY", "WHAT DIFFERED")
	for _, r := range lastOf(s.Repairs) {
		what := onLine(strings.Join(r.Found, "; "))
		if r.Error != "" {
			what += "; not put back: " + onLine(r.Error)
		}
		p.row(p.ago(r.Time)+" ago", printable(cmp.Or(r.By, "?")), what)
	}
}

// lastOf returns as many of the last as fit a screen.
func lastOf[T any](all []T) []T { return all[max(0, len(all)-5):] }

// lasts prints seconds as a duration, in days where it is many.
func lasts(seconds float64) string {
	d := time.Duration(seconds * float64(time.Second)).Round(time.Second)
	if days := d / (24 * time.Hour); days > 2 {
		return fmt.Sprintf("%dd", days)
	}
	return d.String()
}
