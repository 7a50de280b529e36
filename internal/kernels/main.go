// Command kernels boots Debian's kernels in qemu and runs the project's tests on each: what mantlet needs of a kernel, the rules, and
// what happens to a pod. It writes the results as a table into docs/kernels.md.
//
// qemu emulates the processor, without KVM. With -icount the guest's clock counts instructions, so that neither the emulation's
// slowness nor the machine's load fails a time limit of a test.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

// kernel is one of Debian's.
type kernel struct {
	name  string
	suite string
}

var kernels = []kernel{
	{"5.10", "bullseye"},
	{"6.1", "bookworm"},
	{"6.12", "trixie"},
	{"newest", "trixie-backports"},
}

// suites are what is run on each kernel: a package's tests, those with these names, or all.
var suites = []suite{
	{"cmd/mantlet", "^(" + strings.Join(walk(), "|") + ")$"},
	{"reconcile/nft", ""},
}

type suite struct{ pkg, run string }

// claim is a column of the table: tests that must pass, one of them at least.
type claim struct {
	title string
	tests []string
}

// claims are what the tests of cmd/mantlet show in a pod.
var claims = []claim{
	{"ready", []string{"TestCertificatesAppear"}},
	{"mTLS, TLS, refusals", []string{"TestIngress", "TestEgress"}},
	{"Envoy killed", []string{"TestEnvoyIsKilled"}},
	{"mantlet killed", []string{"TestMantletIsKilled"}},
	{"mode change, hot restart", []string{"TestReload", "TestHotRestart", "TestTightenings"}},
	{"rules changed from outside", []string{"TestDrift"}},
	{"plaintext from before is cut", []string{"TestConnectionsBeforeTheRules"}},
	{"second mantlet refused", []string{"TestSecondMantlet"}},
}

func walk() []string {
	var all []string
	for _, c := range claims {
		all = append(all, c.tests...)
	}
	return all
}

func main() {
	var l lane
	flag.StringVar(&l.cache, "cache", ".cache/kernels", "the directory for kernels, images and results")
	flag.StringVar(&l.envoy, "envoy", os.Getenv("MANTLET_ENVOY_PATH"), "the Envoy to test with")
	flag.StringVar(&l.document, "document", "docs/kernels.md", "the document with the table")
	flag.DurationVar(&l.limit, "limit", time.Hour, "how long a kernel may take")
	flag.IntVar(&l.at, "at", 1, "how many kernels to run at a time; each takes a processor and up to 4 GiB")
	only := flag.String("only", "", "the kernels to run, by their names, with commas between; all without it")
	flag.StringVar(&l.run, "run", "", "only tests that match this regular expression; no table is written then")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := l.main(ctx, *only); err != nil {
		fmt.Fprintln(os.Stderr, "kernels:", err)
		stop()
		os.Exit(1)
	}
}

// lane is a run over kernels.
type lane struct {
	cache, envoy, document, run string
	limit                       time.Duration
	at                          int
}

func (l *lane) main(ctx context.Context, only string) error {
	var err error
	if l.cache, err = filepath.Abs(l.cache); err != nil {
		return err
	}
	for _, directory := range []string{l.cache, l.path("results")} {
		if err := os.MkdirAll(directory, 0o755); err != nil {
			return err
		}
	}
	fmt.Println("building what runs in the guests")
	base, err := l.image(ctx)
	if err != nil {
		return fmt.Errorf("building the image: %w", err)
	}
	results, err := l.all(ctx, only, base)
	if err != nil {
		return err
	}
	var failed []error
	for _, r := range results {
		for _, test := range r.failed {
			failed = append(failed, fmt.Errorf("kernel %s: %s failed; the console is in %s", r.name, test, l.path("results", r.name+".log")))
		}
	}
	if l.run == "" && only == "" {
		if err := write(l.document, results); err != nil {
			return err
		}
	}
	return errors.Join(failed...)
}

// all tries the kernels that only names, l.at of them at a time, and returns the results in the order of kernels.
func (l *lane) all(ctx context.Context, only, base string) ([]result, error) {
	tried := make([]*result, len(kernels))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(l.at)
	for i, k := range kernels {
		if only != "" && !strings.Contains(","+only+",", ","+k.name+",") {
			continue
		}
		directory, err := l.fetch(ctx, k) // here, since apt-get takes a lock
		if err != nil {
			return nil, errors.Join(fmt.Errorf("kernel %s: fetching it: %w", k.name, err), group.Wait())
		}
		group.Go(func() error {
			r, err := l.try(ctx, k, base, directory)
			if err != nil {
				return fmt.Errorf("kernel %s: %w", k.name, err)
			}
			fmt.Printf("%s (%s): %d tests passed, %d skipped, %d failed, in %s\n", k.name, r.release, r.passed, len(r.skipped), len(r.failed), r.took.Round(time.Second))
			tried[i] = &r
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	var results []result
	for _, r := range tried {
		if r != nil {
			results = append(results, *r)
		}
	}
	return results, nil
}

func (l *lane) path(elements ...string) string {
	return filepath.Join(append([]string{l.cache}, elements...)...)
}

// try boots a kernel that was unpacked into a directory, and runs all suites.
func (l *lane) try(ctx context.Context, k kernel, base, directory string) (result, error) {
	image, modules, err := l.modules(ctx, k, directory)
	if err != nil {
		return result{}, fmt.Errorf("packing its modules: %w", err)
	}
	began := time.Now()
	fmt.Printf("%s: booting %s\n", k.name, filepath.Base(image))
	console, err := l.boot(ctx, k, image, base, modules)
	if err != nil {
		return result{}, err
	}
	r := parse(console)
	r.kernel, r.took = k, time.Since(began)
	if !r.complete {
		r.failed = append(r.failed, "the run, which did not end")
	}
	return r, nil
}
