package examples

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"mantlet/internal/status"
	"mantlet/schema"
)

func read(t *testing.T, file string) []byte {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// promtool runs the real one; `go tool task promtool` finds it.
func promtool(t *testing.T, args ...string) {
	t.Helper()
	if said, err := exec.Command("promtool", args...).CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v: %s", strings.Join(args, " "), err, said)
	}
}

func TestAlerts(t *testing.T) {
	promtool(t, "check", "rules", "alerts.yaml")
	promtool(t, "test", "rules", "alerts_test.yaml")
	text := string(read(t, "alerts.yaml"))
	tests := string(read(t, "alerts_test.yaml"))
	for _, alert := range regexp.MustCompile(`alert: (\S+)`).FindAllStringSubmatch(text, -1) {
		if n := len(regexp.MustCompile(`alertname: `+alert[1]+`\b`).FindAllString(tests, -1)); n != 2 {
			t.Errorf("alert %s is tried %d times, want once where all is well and once where it is not", alert[1], n)
		}
	}
}

// expressions returns the dashboard's, as Prometheus gets them.
func expressions(t *testing.T) (all []string) {
	t.Helper()
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(read(t, "dashboard.json"), &dashboard); err != nil {
		t.Fatal(err)
	}
	for _, panel := range dashboard.Panels {
		if len(panel.Targets) == 0 {
			t.Errorf("panel %q shows nothing", panel.Title)
		}
		for _, target := range panel.Targets {
			all = append(all, strings.NewReplacer("$__rate_interval", "1m", "$pod", ".*").Replace(target.Expr))
		}
	}
	return all
}

func TestDashboard(t *testing.T) {
	type rule struct {
		Record string `json:"record"`
		Expr   string `json:"expr"`
	}
	var rules []rule
	for _, expr := range expressions(t) {
		rules = append(rules, rule{"panel:" + string(rune('a'+len(rules))), expr})
	}
	text, err := yaml.Marshal(map[string]any{"groups": []map[string]any{{"name": "dashboard", "rules": rules}}})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "rules.yaml")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	promtool(t, "check", "rules", file)
}

// exported returns the names of all series that mantlet exports, from a status in which nothing is missing.
func exported(t *testing.T) map[string]bool {
	t.Helper()
	var text bytes.Buffer
	if err := status.WriteMetrics(&text, status.Status{
		Epochs:       []status.Epoch{{Serving: true}},
		Certificates: []status.Certificate{{Role: "leaf", NotAfter: time.Now()}},
		Applies:      []status.Applies{{Kind: "rules", Within: make([]uint64, len(status.ApplySeconds()))}},
		Inbound:      []status.Inbound{{Ports: "8080", Mode: schema.ModeTLS}},
		Upstreams:    []status.Upstream{{Listen: "127.0.0.1:1"}},
		Traffic:      status.Traffic{Ingress: []status.Handshakes{{Mode: schema.ModeTLS}}, Egress: []status.Dialled{{Listen: "127.0.0.1:1"}}},
		Ended:        []status.Ended{{Direction: "ingress", Reasons: []status.EndedReason{{}}}},
		Refused:      []status.Refused{{By: "envoy", Direction: "ingress", Reason: "plaintext"}},
	}); err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for line := range strings.Lines(text.String()) {
		if strings.HasPrefix(line, "mantlet_") {
			names[line[:strings.IndexAny(line, "{ ")]] = true
		}
	}
	return names
}

var aMetric = regexp.MustCompile(`\bmantlet_[a-z_]+`)

// TestMetricsExist holds alerts, their tests, the dashboard and docs/operations.md against what is exported. The latter has all.
func TestMetricsExist(t *testing.T) {
	names := exported(t)
	for _, file := range []string{"alerts.yaml", "alerts_test.yaml", "dashboard.json", "../docs/operations.md"} {
		for _, name := range aMetric.FindAllString(string(read(t, file)), -1) {
			if !names[name] && !names[name+"_bucket"] {
				t.Errorf("%s speaks of %s, which is not exported", file, name)
			}
		}
	}
	document := string(read(t, "../docs/operations.md"))
	for _, code := range status.ProblemCodes() {
		if !strings.Contains(document, "`"+code+"`") {
			t.Errorf("docs/operations.md does not have the problem %s", code)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		name = regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(name, "")
		if !strings.Contains(document, "`"+name) {
			t.Errorf("docs/operations.md does not have %s", name)
		}
	}
}
