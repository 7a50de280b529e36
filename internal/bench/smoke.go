package main

import (
	"fmt"
	"os"
	"regexp"

	"mantlet/internal/bench/measured"
	"mantlet/internal/bench/proxy"
	"mantlet/internal/bench/report"
)

// smoke measures the most telling cases and compares their ratios with those of the report.
func (b *bench) smoke() error {
	b.pattern = regexp.MustCompile(`^(Connect/workers=16/handshakes=resumed|Bulk/streams=1/|Request/)`)
	b.subjects = []string{proxy.Envoy, proxy.HAProxy, proxy.Nginx}
	b.rounds, b.withoutPods, b.completed = 4, true, func(int) error { return nil }
	before := measured.New(nil)
	for _, name := range []string{"connections", "bulk", "latency"} {
		section, err := measured.Read(b.file(name))
		if err != nil {
			return err
		}
		before.Merge(section)
	}
	now := measured.New(nil)
	if err := b.data(now, ""); err != nil {
		return err
	}
	worse, err := report.Compare(os.Stdout, before, now)
	if err != nil {
		return err
	}
	if worse > 0 {
		return fmt.Errorf("%d ratios are worse than in BENCHMARKS.md", worse)
	}
	return nil
}
