package report

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// goal is what mantlet is to reach.
type goal struct {
	text   string
	most   float64
	unit   string    // of the limit; "" for a ratio
	values []float64 // what was reached, in rounds
	beside string    // what it is compared with
}

// best returns the other proxy that has the lowest median, of those in namespaces of their own or of those in pods, and the ratios of ours
// to it.
func (s Sections) best(section, name, unit string, pods bool) (beside string, ratios []float64) {
	least := math.Inf(1)
	ours := s[section].Of(name, Ours, unit)
	for _, subject := range Subjects() {
		values := s[section].Of(name, subject, unit)
		if subject == Ours || subject == "none" || subject == Sessions || subject == Unverified || len(values) == 0 || strings.HasSuffix(subject, "-in-pods") != pods {
			continue
		}
		if median := summary(values).Center; median < least {
			least, beside, ratios = median, subject, Ratios(ours, values)
		}
	}
	return beside, ratios
}

// targets are the goals that what was measured can be held to.
func (s Sections) targets() []goal {
	var all []goal
	beside := func(section, text string, most float64, name, unit string) {
		for _, pods := range []bool{false, true} {
			subject, ratios := s.best(section, name, unit, pods)
			all = append(all, goal{text: text, most: most, values: ratios, beside: subject})
		}
	}
	for _, workers := range []int{1, 16, 64} {
		name := fmt.Sprintf("Connect/workers=%d/handshakes=resumed", workers)
		beside("connections", fmt.Sprintf("CPU of a connection, %d at a time", workers), 0.8, name, "cpu-sec/conn")
		beside("connections", "— the client's side by itself", 1, name, "client-cpu-sec/conn")
		beside("connections", "— the server's side by itself", 1, name, "server-cpu-sec/conn")
	}
	for _, streams := range []int{1, 8} {
		for _, direction := range []string{"download", "upload"} {
			beside("bulk", fmt.Sprintf("CPU of a GiB, %s, %d at a time", direction, streams), 0.9,
				fmt.Sprintf("Bulk/streams=%d/direction=%s", streams, direction), "cpu-sec/GiB")
		}
	}
	const request = "Request/connections=4/rate=1000"
	all = append(all, goal{
		text: "p50 of a request", most: 1, beside: "nginx",
		values: Ratios(s["latency"].Of(request, Ours, "p50-sec"), s["latency"].Of(request, "nginx", "p50-sec")),
	}, goal{
		text: "memory of both sides with 1,000 stalled connections", most: 500 << 20, unit: "B",
		values: s["memory"].Of("Memory/connections=1000/stalled", Ours, "held-B"),
	})
	return append(all, s.control()...)
}

// goals renders the goals, and how far they are reached.
func (s Sections) goals() string {
	var text strings.Builder
	text.WriteString("| goal | at most | beside | measured | reached |\n|---|---:|---|---:|---|\n")
	for _, g := range s.targets() {
		if len(g.values) == 0 || slices.ContainsFunc(g.values, math.IsNaN) {
			continue
		}
		median := summary(g.values)
		reached := "yes"
		switch {
		case median.Center > g.most:
			reached = "no"
		case median.Hi > g.most:
			reached = "yes, within the noise"
		}
		limit, value := fmt.Sprintf("%.1f ×", g.most), fmt.Sprintf("%.2f ×%s", median.Center, spread(median))
		if g.unit != "" {
			limit, value = scaled(g.most, g.unit), scaled(median.Center, g.unit)+spread(median)
		}
		fmt.Fprintf(&text, "| %s | %s | %s | %s | %s |\n", g.text, limit, g.beside, value, reached)
	}
	return text.String()
}
