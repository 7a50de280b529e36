// Package measured keeps what was measured, in the format of Go's benchmarks: a file for each section, a line for each measurement.
package measured

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/google/renameio/v2"
	"golang.org/x/perf/benchfmt"
	"golang.org/x/perf/benchmath"
)

// Key says what a series of values is of.
type Key struct {
	Case    string // what was done, such as Connect/workers=16/sessions=resumed
	Subject string // with what it was done, such as mantlet
	Unit    string
}

// Section is what was measured in one go. All subjects of a case were measured by turns: the nth values of a case are of the
// same round.
type Section struct {
	Config []benchfmt.Config // when, on which machine, and so on
	values map[Key][]float64
	lines  []*benchfmt.Result
}

// New returns a section without values.
func New(config map[string]string) *Section {
	s := &Section{values: map[Key][]float64{}}
	for key, value := range config {
		s.Config = append(s.Config, benchfmt.Config{Key: key, Value: []byte(value), File: true})
	}
	slices.SortFunc(s.Config, func(a, b benchfmt.Config) int { return strings.Compare(a.Key, b.Key) })
	return s
}

// Value is a value with its unit.
type Value struct {
	Unit  string
	Value float64
}

// subjectPart marks the last part of a line's name.
const subjectPart = "/subject="

// Add adds a measurement.
func (s *Section) Add(name, subject string, values ...Value) {
	line := &benchfmt.Result{Config: s.Config, Name: benchfmt.Name(name + subjectPart + subject), Iters: 1}
	for _, v := range values {
		line.Values = append(line.Values, benchfmt.Value{Value: v.Value, Unit: v.Unit})
		key := Key{name, subject, v.Unit}
		s.values[key] = append(s.values[key], v.Value)
	}
	s.lines = append(s.lines, line)
}

// Of returns the values of a series, round by round; none if it was not measured.
func (s *Section) Of(name, subject, unit string) []float64 { return s.values[Key{name, subject, unit}] }

// Set changes the configuration.
func (s *Section) Set(key, value string) {
	for i, c := range s.Config {
		if c.Key == key {
			s.Config[i].Value = []byte(value)
			return
		}
	}
	s.Config = append(s.Config, benchfmt.Config{Key: key, Value: []byte(value), File: true})
}

// Print writes the medians of all series, one a line.
func (s *Section) Print(out io.Writer) error {
	for _, key := range s.Keys() {
		median := benchmath.AssumeNothing.Summary(benchmath.NewSample(s.values[key], &benchmath.DefaultThresholds), Confidence)
		if _, err := fmt.Fprintf(out, "%-50s %-18s %12.6g %s\n", key.Case, key.Subject, median.Center, key.Unit); err != nil {
			return err
		}
	}
	return nil
}

// Confidence is that of all intervals.
const Confidence = 0.95

// Get returns what the configuration has under a key.
func (s *Section) Get(key string) string {
	for _, c := range s.Config {
		if c.Key == key {
			return string(c.Value)
		}
	}
	return ""
}

// Keys returns what there are values of.
func (s *Section) Keys() []Key {
	var all []Key
	for key := range s.values {
		all = append(all, key)
	}
	slices.SortFunc(all, func(a, b Key) int {
		return strings.Compare(a.Case+"\x00"+a.Subject+"\x00"+a.Unit, b.Case+"\x00"+b.Subject+"\x00"+b.Unit)
	})
	return all
}

// Merge adds what another section has.
func (s *Section) Merge(other *Section) {
	for key, values := range other.values {
		s.values[key] = append(s.values[key], values...)
	}
}

// Write writes the section to a file, whole or not at all.
func (s *Section) Write(file string) error {
	var text bytes.Buffer
	writer := benchfmt.NewWriter(&text)
	for _, line := range s.lines {
		if err := writer.Write(line); err != nil {
			return err
		}
	}
	return renameio.WriteFile(file, text.Bytes(), 0o644)
}

// Read reads a section from a file. One that is not there has no values.
func Read(file string) (*Section, error) {
	s := New(nil)
	text, err := os.Open(file)
	if errors.Is(err, os.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	defer text.Close()
	reader := benchfmt.NewReader(text, file)
	for reader.Scan() {
		switch record := reader.Result().(type) {
		case *benchfmt.SyntaxError:
			return nil, record
		case *benchfmt.Result:
			line := record.Clone()
			name, subject, ok := strings.Cut(line.Name.String(), subjectPart)
			if !ok {
				return nil, fmt.Errorf("%s: %s has no subject", file, line.Name)
			}
			if s.Config == nil {
				s.Config = line.Config
			}
			var values []Value
			for _, v := range line.Values {
				values = append(values, Value{v.Unit, v.Value})
			}
			s.Add(name, subject, values...)
		}
	}
	return s, reader.Err()
}
