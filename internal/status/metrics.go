package status

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/common/expfmt"
)

// WriteMetrics writes a status in Prometheus' text format, with the metrics of Prometheus' own collectors for Go and the process. The
// registry is made for each call, so that metrics cost nothing while nobody scrapes them.
func WriteMetrics(to io.Writer, s Status) error {
	registry := prometheus.NewRegistry()
	for _, c := range []prometheus.Collector{
		metrics{s}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	} {
		if err := registry.Register(c); err != nil {
			return fmt.Errorf("registering the metrics: %w", err)
		}
	}
	families, err := registry.Gather()
	if err != nil {
		return fmt.Errorf("gathering the metrics: %w", err)
	}
	encoder := expfmt.NewEncoder(to, metricsFormat())
	for _, f := range families {
		if err := encoder.Encode(f); err != nil {
			return fmt.Errorf("writing the metrics: %w", err)
		}
	}
	return nil
}

func metricsFormat() expfmt.Format { return expfmt.NewFormat(expfmt.TypeTextPlain) }

func (s *Server) serveMetrics(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", string(metricsFormat()))
	if err := WriteMetrics(w, coalesceCached(s, r, "status", s.Source.Status)); err != nil {
		s.Log.Debug("the metrics were not written", "error", err) // the client is gone
	}
}

// serveStatistics answers with Envoy's own statistics. Nothing of the request is passed on to Envoy: its admin interface can change things.
func (s *Server) serveStatistics(w http.ResponseWriter, r *http.Request) {
	type answer struct {
		text []byte
		err  error
	}
	said := coalesceCached(s, r, "statistics", func(ctx context.Context) answer {
		text, err := s.Source.Statistics(ctx)
		return answer{text, err}
	})
	if said.err != nil {
		http.Error(w, said.err.Error(), http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", string(metricsFormat()))
	_, _ = w.Write(said.text) // it fails if the client is gone
}

// metrics collects the metrics of a Status.
type metrics struct{ status Status }

// Describe implements prometheus.Collector. It describes nothing, since the labels depend on the status.
func (metrics) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (m metrics) Collect(to chan<- prometheus.Metric) {
	s, c := m.status, collector{to}
	c.gauge("build_info", "1, with the versions as labels.", 1, "version", s.Version, "goversion", runtime.Version())
	c.gauge("start_time_seconds", "When mantlet started.", stamp(s.Started))
	c.gauge("ready", "Whether the sidecar is ready.", number(s.Ready))
	for _, check := range Checks() {
		failed := s.Applied == nil && slices.Contains(waitingChecks(), check)
		for _, r := range s.Unready {
			failed = failed || r.Check == check
		}
		c.gauge("check_passed", "Whether a check of readiness passes.", number(!failed), "check", check)
	}
	c.gauge("problems", "How many things are not as they should be, whether or not they make the sidecar unready.", float64(len(s.Problems)))
	for _, code := range ProblemCodes() {
		is := slices.ContainsFunc(s.Causes, func(p Problem) bool { return p.Code == code })
		c.gauge("problem", "Whether there is a problem of this kind.", number(is), "problem", code)
	}
	c.gauge("config_last_reload_successful", "Whether the configuration could be taken when it was read last.", number(s.Reload.Succeeded))
	var reloaded float64
	if at := s.Reload.SucceededAt; at != nil {
		reloaded = stamp(*at)
	}
	c.gauge("config_last_reload_success_timestamp_seconds", "When a configuration was read last that could be taken; 0 for never.", reloaded)
	c.gauge("desired_generation", "The number of the configuration that is wanted; 0 for none.", float64(s.Desired.generation()))
	c.gauge("applied_generation", "The number of the configuration that is in force; 0 for none.", float64(s.Applied.generation()))
	c.applies(s.Applies)
	c.counter("rules_repairs_total", "How often rules that somebody had changed were put back.", float64(s.Repaired))
	for _, e := range s.Ended {
		for _, r := range e.Reasons {
			c.counter("connections_ended_total", "Open connections that changes of the configuration, or of the mesh CAs, ended.", float64(r.Count),
				"direction", e.Direction, "reason", string(r.Code))
		}
	}
	c.counter("log_lines_dropped_total", "Lines of the log that were dropped, since nobody read standard error.", float64(s.LogDropped))
	c.envoys(s)
	c.certificates(s.Certificates)
	c.connections(s)
}

// collector sends metrics. Labels are given as names and values in turn.
type collector struct{ to chan<- prometheus.Metric }

func (c collector) gauge(name, help string, value float64, labels ...string) {
	c.send(prometheus.GaugeValue, name, help, value, labels)
}

func (c collector) counter(name, help string, value float64, labels ...string) {
	c.send(prometheus.CounterValue, name, help, value, labels)
}

func (c collector) send(kind prometheus.ValueType, name, help string, value float64, labels []string) {
	desc, values := describe(name, help, labels)
	metric, err := prometheus.NewConstMetric(desc, kind, value, values...)
	c.pass(desc, metric, err)
}

// pass sends a metric. An error makes the scrape fail; the library's Must functions would panic in a goroutine of their own.
func (c collector) pass(desc *prometheus.Desc, metric prometheus.Metric, err error) {
	if err != nil {
		metric = prometheus.NewInvalidMetric(desc, err)
	}
	c.to <- metric
}

func describe(name, help string, labels []string) (desc *prometheus.Desc, values []string) {
	var names []string
	for i, text := range labels {
		if i%2 == 0 {
			names = append(names, text)
		} else {
			values = append(values, text)
		}
	}
	return prometheus.NewDesc("mantlet_"+name, help, names, nil), values
}

func (c collector) applies(all []Applies) {
	for _, a := range all {
		const help = "What was applied to kernel and Envoy, by kind and result."
		c.counter("applies_total", help, float64(a.Succeeded), "kind", a.Kind, "result", "success")
		c.counter("applies_total", help, float64(a.Failed), "kind", a.Kind, "result", "failure")
		buckets := map[float64]uint64{}
		for i, bound := range ApplySeconds() {
			buckets[bound] = a.Within[i]
		}
		desc, values := describe("apply_duration_seconds", "How long applying took.", []string{"kind", a.Kind})
		metric, err := prometheus.NewConstHistogram(desc, a.Succeeded+a.Failed, a.Seconds, buckets, values...)
		c.pass(desc, metric, err)
	}
}

func (c collector) envoys(s Status) {
	c.counter("envoy_epochs_started_total", "Envoys that became live.", float64(s.Envoys.Started))
	c.counter("envoy_epochs_failed_total", "Envoys that did not become live.", float64(s.Envoys.Failed))
	c.counter("envoy_epochs_ended_total", "Envoys that ended although they served.", float64(s.Envoys.Ended))
	c.counter("envoy_epochs_recovered_total", "Envoys that were started because none served any more.", float64(s.Envoys.Recovered))
	states, open := map[string]float64{"serving": 0, "draining": 0}, map[string]float64{"serving": 0, "draining": 0}
	for _, e := range s.Epochs {
		state := "draining"
		if e.Serving {
			state = "serving"
		}
		states[state]++
		if e.Connections != nil {
			open[state] += float64(*e.Connections)
		}
	}
	for state, n := range states {
		c.gauge("envoy_epochs", "Envoys that run.", n, "state", state)
		c.gauge("envoy_connections", "Connections that are open to the workload and to upstreams.", open[state], "state", state)
	}
}

// certificates sends the expiry of the next certificate of each role that expires. A certificate that has expired already counts only if the
// role has no other: a bundle may hold an old mesh CA.
func (c collector) certificates(all []Certificate) {
	all = slices.SortedFunc(slices.Values(all), func(a, b Certificate) int { return a.NotAfter.Compare(b.NotAfter) })
	next := map[string]Certificate{}
	for _, cert := range all {
		if one, ok := next[cert.Role]; !ok || one.LeftSeconds < 0 {
			next[cert.Role] = cert
		}
	}
	for role, cert := range next {
		c.gauge("certificate_expiry_timestamp_seconds", "When the next certificate of a role expires.", stamp(cert.NotAfter), "role", role)
	}
}

func (c collector) connections(s Status) {
	for _, in := range s.Inbound {
		c.gauge("connections", "Connections from outside that are open, by the ports of their entry.", float64(in.Open), "ports", in.Ports, "mode", string(in.Mode))
	}
	for _, h := range s.Traffic.Ingress {
		c.counter("handshakes_total", "TLS handshakes with clients that were finished.", float64(h.Total), "mode", string(h.Mode))
	}
	for _, e := range s.Traffic.Egress {
		c.counter("egress_connections_total", "Connections of the workload to an egress entry.", float64(e.Total), "listen", e.Listen)
		c.counter("egress_connect_failures_total", "Failed attempts to reach an address of an upstream.", float64(e.FailedAttempts), "listen", e.Listen)
		c.counter("egress_connections_failed_total", "Connections of the workload that reached no endpoint.", float64(e.Failed), "listen", e.Listen)
	}
	for _, u := range s.Upstreams {
		stale := 0.0
		if u.StaleSince != nil {
			stale = time.Since(*u.StaleSince).Seconds()
		}
		c.gauge("egress_addresses", "Addresses of an upstream that connections go to.", float64(len(u.Addresses)), "listen", u.Listen)
		c.gauge("egress_stale_seconds", "For how long addresses of an upstream were not confirmed by a name server; 0 where they are.", stale, "listen", u.Listen)
	}
	for _, r := range s.Refused {
		c.counter("refused_total", "Packets that the kernel's rules ended, and connections that Envoy did.", float64(r.Count),
			"by", r.By, "direction", r.Direction, "reason", r.Reason)
	}
	destinations := map[string]float64{OutboundAllowed: 0, OutboundObserved: 0, OutboundRefused: 0}
	for _, o := range s.Outbound {
		destinations[o.Fate()]++
	}
	totals := map[OutboundTotal]uint64{}
	for _, total := range s.OutboundTotals {
		totals[OutboundTotal{Fate: total.Fate, Protocol: total.Protocol}] = total.Connections
	}
	for fate, n := range destinations {
		c.gauge("outbound_destinations", "Destinations that the workload spoke to in the clear, or tried to: those that are remembered.", n, "verdict", fate)
		for _, protocol := range []string{"tcp", "udp", "other"} {
			c.counter("outbound_connections_total", "Connections of the workload past the egress entries, in the clear; of those that are refused, attempts.",
				float64(totals[OutboundTotal{Fate: fate, Protocol: protocol}]), "verdict", fate, "protocol", protocol)
		}
	}
	const limit = "How many connections are open at most; of the workload, at each egress entry."
	c.gauge("connections_limit", limit, float64(s.Capacity.Ingress), "direction", "ingress")
	c.gauge("connections_limit", limit, float64(s.Capacity.Egress), "direction", "egress")
	c.gauge("conntrack_entries", "Entries of the kernel's table of connections.", float64(s.Conntrack.Entries))
	c.gauge("conntrack_entries_limit", "How many entries that table takes; 0 where the kernel does not tell.", float64(s.Conntrack.Max))
}

func (s *Summary) generation() uint64 {
	if s == nil {
		return 0
	}
	return s.Generation
}

func stamp(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }

func number(is bool) float64 {
	if is {
		return 1
	}
	return 0
}
