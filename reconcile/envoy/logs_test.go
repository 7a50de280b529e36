package envoy

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// relayed returns what becomes of a stream in mantlet's log, the time left out.
func relayed(t *testing.T, relay func(*logs)) (lines []map[string]any, l *logs) {
	t.Helper()
	var text bytes.Buffer
	l = &logs{to: slog.New(slog.NewJSONHandler(&text, &slog.HandlerOptions{Level: slog.LevelDebug}))}
	relay(l)
	for line := range strings.Lines(text.String()) {
		var fields map[string]any
		if err := json.Unmarshal([]byte(line), &fields); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		delete(fields, "time")
		lines = append(lines, fields)
	}
	return lines, l
}

func TestMessages(t *testing.T) {
	long := strings.Repeat("x", 200<<10)
	said := strings.Join([]string{
		`trace|main|a`, `debug|main|b`, `info|main|c`, `warning|config|d`, `error|upstream|e`, `critical|main|f|g`,
		`critical|main|can\'t bind \"x\":\n  \\\'y\\\' \303\244`, `no format at all`, ``, `info|main|` + long, `info|main|last, without an end`,
	}, "\n")
	got, l := relayed(t, func(l *logs) { l.messages(strings.NewReader(said)) })
	message := func(level, component, text string) map[string]any {
		return map[string]any{"level": level, "msg": "Envoy says", "component": component, "text": text}
	}
	const buffer = 64 << 10
	want := []map[string]any{
		message("DEBUG", "main", "a"), message("DEBUG", "main", "b"), message("INFO", "main", "c"), message("WARN", "config", "d"),
		message("ERROR", "upstream", "e"), message("ERROR", "main", "f|g"), message("ERROR", "main", `can't bind "x": \'y\' ä`),
		message("INFO", "", "no format at all"),
		message("INFO", "main", long[:buffer-len("info|main|")]), // in parts: a line has no end that must be waited for
	}
	for rest := long[buffer-len("info|main|"):]; rest != ""; rest = rest[min(buffer, len(rest)):] {
		want = append(want, message("INFO", "", rest[:min(buffer, len(rest))]))
	}
	want = append(want, message("INFO", "main", "last, without an end"))
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if got := l.lastError(); got != `can't bind "x": \'y\' ä` {
		t.Errorf("the last error is %q", got)
	}
}

func TestAccessLog(t *testing.T) {
	got, _ := relayed(t, func(l *logs) { l.access(strings.NewReader("{\"peer\": \"192.0.2.1:1\", \"bytes_in\": 0}\nno JSON\n")) })
	want := []map[string]any{
		{"level": "INFO", "msg": "connection", "fields": map[string]any{"peer": "192.0.2.1:1", "bytes_in": 0.0}},
		{"level": "INFO", "msg": "Envoy says", "text": "no JSON"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestRefusals(t *testing.T) {
	const refusal = `{"peer": "192.0.2.1:1", "destination": "192.0.2.2:9000", "refused": "TLS_error:|PEER_DID_NOT_RETURN_A_CERTIFICATE:TLS_error_end"}` + "\n"
	got, _ := relayed(t, func(l *logs) { l.access(strings.NewReader(strings.Repeat(refusal, 10*refusalsAtOnce))) })
	if len(got) < refusalsAtOnce || len(got) > 2*refusalsAtOnce {
		t.Errorf("%d refusals gave %d lines; want about %d", 10*refusalsAtOnce, len(got), refusalsAtOnce)
	}
	want := map[string]any{
		"level": "WARN", "msg": "connection refused", "peer": "192.0.2.1:1", "destination": "192.0.2.2:9000",
		"reason": "no client certificate", "detail": "TLS_error:|PEER_DID_NOT_RETURN_A_CERTIFICATE:TLS_error_end",
		"peer_dns_sans": nil, "peer_uri_sans": nil, "left_out_before": 0.0,
	}
	if diff := cmp.Diff(want, got[0]); diff != "" {
		t.Error(diff)
	}
}
