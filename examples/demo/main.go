// Command demo shows mantlet at work, on the real Envoy and the real kernel: it tries what mantlet promises of connections and
// prints what happened. Its status is 1 if a promise did not hold.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/term"

	"mantlet/internal/lab"
)

func main() {
	binary := flag.String("mantlet", "bin/mantlet", "the `program` to show")
	stay := flag.Bool("stay", false, "then stay up, with a shell in the pod web")
	flag.Parse()
	// Nothing needs to be cleaned up: however this ends, its processes, namespaces and files end with the lab.
	lab.Enter()
	program, err := prepare(*binary)
	check(err)
	s, t := lay(program), newTranscript()
	perform(s, t)
	if *stay {
		check(s.shell(t))
	}
	if t.failed > 0 {
		os.Exit(1)
	}
}

// check ends the demo where it can't go on.
func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// must is for the lab, where nothing should fail.
func must[T any](value T, err error) T {
	check(err)
	return value
}

// prepare returns mantlet's absolute path and sees to the environment that mantlet is going to have.
func prepare(binary string) (string, error) {
	if _, err := exec.LookPath(binary); err != nil {
		return "", fmt.Errorf("%w: `go tool task build` makes mantlet, -mantlet names another", err)
	}
	envoy := os.Getenv("MANTLET_ENVOY_PATH")
	if envoy == "" {
		return "", errors.New("MANTLET_ENVOY_PATH must name an Envoy: `go tool task demo` fetches one and sets it")
	}
	if _, err := exec.LookPath(envoy); err != nil {
		return "", fmt.Errorf("MANTLET_ENVOY_PATH: %w: `go tool task envoy` fetches one", err)
	}
	for _, variable := range os.Environ() { // a deployment that the caller has in mind is none of the demo's
		name, _, _ := strings.Cut(variable, "=")
		if strings.HasSuffix(name, "GRESS_PROXY_CONFIG") {
			if err := os.Unsetenv(name); err != nil {
				return "", err
			}
		}
	}
	return filepath.Abs(binary)
}

// limit is for all that is tried. It takes a tenth of it as a rule.
const limit = 40 * time.Second

// perform plays the acts, and then tells what became of the plaintext that was spoken all the while.
func perform(s *stage, t *transcript) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	t.say("%s", introduction)
	if err := play(ctx, s, t); err != nil {
		t.broken(err)
	}
	if s.prober != nil {
		t.say("\n%s", t.bold("All the while, client spoke plaintext to the ports 8080 and 9000 of both pods"))
		t.one(s.plaintext())
	}
	if t.failed == 0 {
		t.say("\n%s", t.green(fmt.Sprintf("All %d tries came out as promised.", t.tried)))
		return
	}
	t.say("\n%s", t.red(fmt.Sprintf("%d of %d tries did not come out as promised.", t.failed, t.tried)))
	for _, p := range []*pod{s.web, s.shop} {
		t.say("\n%s\n%s", t.bold("The end of mantlet's log in the pod "+p.Name), p.log.tail(12))
	}
}

// play returns an error if the rest can't be tried.
func play(ctx context.Context, s *stage, t *transcript) error {
	for _, a := range s.acts() {
		t.title(a.title)
		s.moment = time.Now()
		if a.happens != nil {
			if err := a.happens(ctx); err != nil {
				return err
			}
		}
		for _, c := range a.claims {
			over4, over6 := c.try(ctx, ipv4), c.try(ctx, ipv6)
			if ctx.Err() != nil {
				return fmt.Errorf("%s, %s: there is no time left to try more", c.to, c.how)
			}
			t.row(c, over4, over6)
		}
		if a.tells != nil {
			text, err := a.tells(ctx)
			if err != nil {
				return err
			}
			t.say("%s", indent(text))
		}
	}
	return nil
}

// indent sets lines off, as what a program printed.
func indent(text string) string {
	return strings.TrimRight(strings.ReplaceAll("\n"+strings.TrimSpace(text), "\n", "\n      "), " ")
}

// transcript prints, in colour if it is read on a terminal.
type transcript struct {
	coloured      bool
	tried, failed int
}

func newTranscript() *transcript {
	return &transcript{coloured: term.IsTerminal(int(os.Stdout.Fd())) && os.Getenv("NO_COLOR") == ""}
}

func (t *transcript) say(format string, args ...any) { fmt.Printf(format+"\n", args...) }

// title heads an act; its claims' marks stand below the families.
func (t *transcript) title(title string) {
	t.say("\n%s IPv4 IPv6", t.bold(fmt.Sprintf("%-89s", title)))
}

// row prints a claim on one line, or on one per family if they showed different things.
func (t *transcript) row(c claim, over4, over6 seen) {
	held4, held6 := over4.words == c.must, over6.words == c.must
	line := func(s seen, marks string) {
		t.say("  %-17s%-27s→ %-42s%s", c.to, c.how, s, marks)
	}
	if over4.words == over6.words {
		both := slices.Compact(slices.DeleteFunc([]string{over4.detail, over6.detail}, func(s string) bool { return s == "" }))
		line(seen{over4.words, strings.Join(both, ", ")}, " "+t.mark(held4)+"    "+t.mark(held6))
	} else {
		line(over4, " "+t.mark(held4))
		line(over6, "      "+t.mark(held6))
	}
	if !held4 || !held6 {
		t.say("  %46s%s", "", t.red("must be: "+c.must))
	}
}

// one prints what has one outcome, whatever the family.
func (t *transcript) one(ok bool, what string) {
	t.say("  %-88s %s", what, t.mark(ok))
}

// broken prints what kept the rest from being tried.
func (t *transcript) broken(err error) {
	t.say("  %s %s", t.mark(false), strings.ReplaceAll(err.Error(), "\n", "\n    "))
}

func (t *transcript) mark(ok bool) string {
	t.tried++
	if ok {
		return t.green("✓")
	}
	t.failed++
	return t.red("✗")
}

// SGR, ECMA-48 8.3.117.
func (t *transcript) bold(text string) string  { return t.paint("1", text) }
func (t *transcript) red(text string) string   { return t.paint("31", text) }
func (t *transcript) green(text string) string { return t.paint("32", text) }

func (t *transcript) paint(how, text string) string {
	if !t.coloured {
		return text
	}
	return "\x1b[" + how + "m" + text + "\x1b[0m"
}
