// Bench measures mantlet beside what users would take instead of it, and writes BENCHMARKS.md. `go tool task bench` runs it.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"mantlet/internal/bench/load"
	"mantlet/internal/bench/measured"
	"mantlet/internal/bench/meter"
	"mantlet/internal/bench/proxy"
	"mantlet/internal/lab"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) == 3 {
		switch os.Args[1] {
		case "load":
			var job load.Job
			if err := json.Unmarshal([]byte(os.Args[2]), &job); err != nil {
				return err
			}
			return load.Run(job, os.Stdin, os.Stdout)
		case "serve":
			return serve(os.Args[2], nil)
		case "serve-transparently":
			return serve(os.Args[2], proxy.Transparent)
		}
	}
	b := &bench{}
	var only, subjects string
	flag.StringVar(&only, "sections", strings.Join(sectionNames(), ","), "what to measure; the report has the rest as it was measured last")
	flag.StringVar(&subjects, "subjects", "", "proxies to measure beside mantlet; all, if empty")
	flag.StringVar(&b.cases, "cases", "", "measure only cases whose name matches this regular expression, and write nothing")
	smoke := flag.Bool("smoke", false, "measure a few cases, write nothing, and say what is worse than in the report")
	flag.IntVar(&b.rounds, "rounds", 6, "how often each case is measured, by turns")
	flag.DurationVar(&b.during, "during", 600*time.Millisecond, "how long a case is measured in each round")
	flag.StringVar(&b.root, "root", ".", "directory of the repository")
	flag.StringVar(&b.programs.Mantlet, "mantlet", "", "mantlet's binary")
	flag.StringVar(&b.programs.Envoy, "envoy", "", "Envoy's binary")
	flag.StringVar(&b.programs.HAProxy, "haproxy", "haproxy", "haproxy's binary")
	flag.StringVar(&b.programs.Nginx, "nginx", "nginx", "nginx's binary")
	flag.StringVar(&b.programs.NginxModules, "nginx-modules", "/usr/lib/nginx/modules", "directory of nginx's modules")
	flag.StringVar(&b.programs.Stunnel, "stunnel", "stunnel", "stunnel's binary")
	flag.StringVar(&b.programs.Ghostunnel, "ghostunnel", "ghostunnel", "ghostunnel's binary")
	flag.StringVar(&b.programs.IPTables, "iptables", "iptables-legacy", "iptables' binary")
	flag.Parse()
	var err error
	if b.pattern, err = regexp.Compile(b.cases); err != nil {
		return err
	}
	lab.Enter()
	if subjects != "" {
		b.subjects = strings.Split(subjects, ",")
	}
	if err := b.prepare(); err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(b.scratch) }()
	if *smoke {
		return b.smoke()
	}
	for _, name := range strings.FieldsFunc(only, func(r rune) bool { return r == ',' }) {
		if err := b.measure(name); err != nil {
			return err
		}
	}
	if b.cases != "" {
		return nil
	}
	return b.report()
}

// bench is a run of the benchmarks.
type bench struct {
	root     string // of the repository
	cases    string
	pattern  *regexp.Regexp // of cases
	subjects []string
	rounds   int
	during   time.Duration
	programs proxy.Programs
	scratch  string

	completed   func(rounds int) error // keeps the rounds that are complete
	withoutPods bool                   // peers have namespaces of their own only
}

// section is a part of the benchmarks that is measured in one go.
type section struct {
	name string
	run  func(*bench, *measured.Section) error
}

func sections() []section {
	return []section{
		{"connections", func(b *bench, s *measured.Section) error { return b.data(s, "^Connect/") }},
		{"bulk", func(b *bench, s *measured.Section) error { return b.data(s, "^Bulk/") }},
		{"latency", func(b *bench, s *measured.Section) error { return b.data(s, "^Request/") }},
		{"memory", (*bench).memory},
		{"rules", (*bench).rules},
		{"control", (*bench).control},
	}
}

func sectionNames() (all []string) {
	for _, s := range sections() {
		all = append(all, s.name)
	}
	return all
}

// file returns where a section is kept.
func (b *bench) file(name string) string {
	return filepath.Join(b.root, "internal/bench/results", name+".txt")
}

func (b *bench) prepare() (err error) {
	if b.root, err = filepath.Abs(b.root); err != nil {
		return err
	}
	if b.programs.Self, err = os.Executable(); err != nil {
		return err
	}
	for _, program := range b.programs.All() {
		if *program, err = exec.LookPath(*program); err != nil {
			return err
		}
		if *program, err = filepath.Abs(*program); err != nil {
			return err
		}
	}
	// The lab's own memory: what mantlet keeps there is memory-backed in a pod, too.
	b.scratch, err = os.MkdirTemp("/dev/shm", "bench")
	return errors.Join(err, os.Chmod(b.scratch, 0o755))
}

// measure measures a section and keeps it, once it is complete.
func (b *bench) measure(name string) error {
	index := slices.IndexFunc(sections(), func(s section) bool { return s.name == name })
	if index < 0 {
		return fmt.Errorf("no such section: %q; there are %s", name, strings.Join(sectionNames(), ", "))
	}
	s := measured.New(map[string]string{
		"date":    time.Now().UTC().Format(time.DateOnly),
		"machine": fmt.Sprintf("%d cores of %s, Linux %s", runtime.NumCPU(), meter.Processor(), meter.Kernel()),
		"load":    meter.Load(),
		"during":  b.during.String(),
		"rounds":  fmt.Sprint(b.rounds),
	})
	if commit, err := exec.Command("git", "-C", b.root, "rev-parse", "--short", "HEAD").Output(); err == nil {
		s.Set("commit", strings.TrimSpace(string(commit)))
	}
	for program, version := range b.programs.Versions() {
		s.Set(program, version)
	}
	b.completed = func(rounds int) error { // what there is so far; a run can be ended after each round
		if b.cases != "" {
			return nil
		}
		s.Set("rounds", fmt.Sprint(rounds))
		return s.Write(b.file(name))
	}
	began := time.Now()
	if err := sections()[index].run(b, s); err != nil {
		return fmt.Errorf("section %s: %w", name, err)
	}
	fmt.Fprintf(os.Stderr, "section %s took %v\n", name, time.Since(began).Round(time.Second))
	if b.cases != "" {
		return s.Print(os.Stdout)
	}
	return s.Write(b.file(name))
}

// chosen reports whether a case is to be measured.
func (b *bench) chosen(name string) bool { return b.pattern.MatchString(name) }

// directory makes a fresh one.
func (b *bench) directory(name string) (string, error) {
	directory, err := os.MkdirTemp(b.scratch, name)
	return directory, errors.Join(err, os.Chmod(directory, 0o755))
}
