package main

import (
	"mantlet/internal/bench/measured"
	"mantlet/internal/bench/report"
)

// report writes the report from what was measured last.
func (b *bench) report() error {
	sections := report.Sections{}
	for _, name := range sectionNames() {
		section, err := measured.Read(b.file(name))
		if err != nil {
			return err
		}
		sections[name] = section
	}
	return report.Write(b.root, sections)
}
