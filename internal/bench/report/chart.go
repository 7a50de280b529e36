package report

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
	_ "gonum.org/v1/plot/vg/vgsvg" // the format of charts

	"mantlet/internal/bench/measured"
)

// chart is one of bars: groups of them, in which they stand side by side, one for each subject, each the median of a series with its
// interval.
type chart struct {
	file, title, axis string
	scale             float64 // of values, to what the axis has
	subjects          []string
	groups            []group
}

// group is a group of bars: the series of a case.
type group struct {
	label      string
	section    *measured.Section
	name, unit string
}

// charts draws all of them into a directory.
func (s Sections) charts(directory string) error {
	if err := os.MkdirAll(directory, 0o755); err != nil {
		return err
	}
	proxies := []string{Ours, "haproxy", "nginx", "envoy", "stunnel", "ghostunnel"}
	connections := chart{"connections.svg", "CPU of a new connection, both sides together (sessions resumed)", "ms", 1e3, proxies[:5], nil}
	full := chart{"handshakes.svg", "CPU of a new connection, both sides together (full handshakes)", "ms", 1e3, proxies, nil}
	for _, workers := range []int{1, 16, 64} {
		label, name := fmt.Sprintf("%d at a time", workers), fmt.Sprintf("Connect/workers=%d/handshakes=", workers)
		connections.groups = append(connections.groups, group{label, s["connections"], name + "resumed", "cpu-sec/conn"})
		full.groups = append(full.groups, group{label, s["connections"], name + "full", "cpu-sec/conn"})
	}
	bulk := chart{"bulk.svg", "CPU of a GiB, both sides together", "s", 1, proxies, nil}
	for _, streams := range []int{1, 8} {
		for _, direction := range []string{"download", "upload"} {
			name := fmt.Sprintf("Bulk/streams=%d/direction=%s", streams, direction)
			bulk.groups = append(bulk.groups, group{fmt.Sprintf("%s, %d", direction, streams), s["bulk"], name, "cpu-sec/GiB"})
		}
	}
	latency := chart{"latency.svg", "Time of a request of 128 bytes, 1,000 a second", "ms", 1e3, append(slices.Clone(proxies), "none"), nil}
	for _, p := range []string{"p50", "p99", "p99.9"} {
		latency.groups = append(latency.groups, group{p, s["latency"], "Request/connections=4/rate=1000", p + "-sec"})
	}
	memory := chart{"memory.svg", "Memory with 1,000 connections, both sides together", "MiB", 1. / (1 << 20), proxies, nil}
	for _, kind := range []string{"open", "stalled"} {
		memory.groups = append(memory.groups, group{kind, s["memory"], "Memory/connections=1000/" + kind, "held-B"})
	}
	for _, c := range []chart{connections, full, bulk, latency, memory} {
		if err := c.draw(directory); err != nil {
			return fmt.Errorf("drawing %s: %w", c.file, err)
		}
	}
	return nil
}

const (
	width, height = 20 * vg.Centimeter, 9 * vg.Centimeter
	// drawn is how much of the width is between the axes' ends.
	drawn = 0.9
	// filled is how much of its place a group of bars takes.
	filled = 0.8
)

func (c chart) draw(directory string) error {
	p := plot.New()
	p.Title.Text, p.Y.Label.Text, p.Y.Min = c.title, c.axis, 0
	p.Title.Padding = 3 * vg.Millimeter
	p.Legend.Top, p.Legend.Padding = true, vg.Millimeter
	p.Add(plotter.NewGrid())
	var labels []string
	for _, g := range c.groups {
		labels = append(labels, g.label)
	}
	step := filled / float64(len(c.subjects))
	barWidth := width * drawn / vg.Length(len(c.groups)) * vg.Length(step)
	for i, subject := range c.subjects {
		at := (float64(i) - float64(len(c.subjects)-1)/2) * step
		var heights plotter.Values
		intervals := struct {
			plotter.XYs
			plotter.YErrors
		}{}
		for j, g := range c.groups {
			values := g.section.Of(g.name, subject, g.unit)
			if len(values) == 0 {
				heights = append(heights, 0)
				continue
			}
			s := summary(values)
			heights = append(heights, s.Center*c.scale)
			intervals.XYs = append(intervals.XYs, plotter.XY{X: float64(j) + at, Y: s.Center * c.scale})
			intervals.YErrors = append(intervals.YErrors, struct{ Low, High float64 }{(s.Center - s.Lo) * c.scale, (s.Hi - s.Center) * c.scale})
		}
		if len(intervals.XYs) == 0 {
			continue
		}
		bars, err := plotter.NewBarChart(heights, barWidth)
		if err != nil {
			return err
		}
		bars.XMin, bars.Color, bars.LineStyle.Width = at, plotutil.Color(i), 0
		ends, err := plotter.NewYErrorBars(intervals)
		if err != nil {
			return err
		}
		p.Add(bars, ends)
		p.Legend.Add(subject, bars)
	}
	p.NominalX(labels...)
	p.X.Min, p.X.Max = -0.5, float64(len(c.groups))-0.5+0.35 // room for the legend
	return p.Save(width, height, filepath.Join(directory, c.file))
}
