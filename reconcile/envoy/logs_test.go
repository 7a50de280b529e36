package envoy

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"mantlet/internal/lab"
	"mantlet/internal/status"
)

// relayed returns what becomes of a stream in mantlet's log, the time left out.
func relayed(t *testing.T, relay func(*logs)) (lines []map[string]any, l *logs) {
	t.Helper()
	var text bytes.Buffer
	l = &logs{refused: &refusals{}, to: slog.New(slog.NewJSONHandler(&text, &slog.HandlerOptions{Level: slog.LevelDebug}))}
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
		`trace|main|a`, `debug|main|b`, `info|main|c`, `warning|config|d`, `warning|main|caught ENVOY_SIGTERM`, `warning|main|shutting down admin due to child startup`, `error|upstream|e`, `critical|main|f|g`,
		`critical|main|can\'t bind \"x\":\n  \\\'y\\\' \303\244`, `no format at all`, ``, `info|main|` + long, `info|main|last, without an end`,
	}, "\n")
	got, l := relayed(t, func(l *logs) { l.messages(strings.NewReader(said)) })
	message := func(level, component, text string) map[string]any {
		return map[string]any{"level": level, "msg": "Envoy says", "component": component, "text": text}
	}
	const buffer = 64 << 10
	want := []map[string]any{
		message("DEBUG", "main", "a"), message("DEBUG", "main", "b"), message("INFO", "main", "c"), message("WARN", "config", "d"),
		message("INFO", "main", "caught ENVOY_SIGTERM"), message("INFO", "main", "shutting down admin due to child startup"),
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

const accessed = `{"direction": "ingress", "peer": "192.0.2.1:1", "destination": "192.0.2.2:9000", "upstream": "192.0.2.2:9000", "dns_sans": "a,b",` +
	`"uri_sans": "spiffe://c", "tls_version": "TLSv1.3", "curve": "X25519", "refused": null, "failed": null, "flags": "-", "bytes_in": 1, "bytes_out": 2, "duration_ms": 3}`

func TestAccessLog(t *testing.T) {
	abandoned := `{"direction": "ingress", "peer": "192.0.2.1:1", "destination": "192.0.2.2:9000", "tls_version": "TLSv1.2", "bytes_in": 0, "bytes_out": 0, "duration_ms": 0}`
	got, l := relayed(t, func(l *logs) { l.access(strings.NewReader(accessed + "\nno JSON\n" + abandoned)) })
	want := []map[string]any{
		{
			"level": "INFO", "msg": "connection", "direction": "ingress", "peer": "192.0.2.1:1", "destination": "192.0.2.2:9000",
			"peer_sans": []any{"a,b", "spiffe://c"}, "tls_version": "1.3", "curve": "X25519", "bytes_in": 1.0, "bytes_out": 2.0, "duration_ms": 3.0,
		},
		{"level": "INFO", "msg": "Envoy says", "text": "no JSON", "left_out_before": 0.0},
		{
			"level": "INFO", "msg": "connection", "direction": "ingress", "peer": "192.0.2.1:1", "destination": "192.0.2.2:9000",
			"bytes_in": 0.0, "bytes_out": 0.0, "duration_ms": 0.0,
			"ended": "by the client, before it was let in", "left_out_before": 0.0,
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if l.refused.last != nil || l.refused.counts != nil {
		t.Errorf("nobody was refused: %+v", l.refused.last)
	}
}

// refusedLine is what Envoy writes of a peer without a certificate.
func refusedLine(direction, peer string) string {
	return fmt.Sprintf(`{"direction": %q, "peer": %q, "destination": "192.0.2.2:9000", "refused": %q}`+"\n",
		direction, peer, "TLS_error:|268435648:SSL_routines:OPENSSL_internal:PEER_DID_NOT_RETURN_A_CERTIFICATE:TLS_error_end")
}

// TestStrangersConnections shows that who does not even shake hands can't fill the log, though all connections are asked for.
func TestStrangersConnections(t *testing.T) {
	const many = 10 * refusalsAtOnce
	abandoned := `{"direction": "ingress", "peer": "192.0.2.1:1", "destination": "192.0.2.2:9000", "flags": "-"}` + "\n"
	got, _ := relayed(t, func(l *logs) {
		l.access(strings.NewReader(strings.Repeat(abandoned, many) + strings.Repeat(accessed+"\n", many)))
	})
	strangers := slices.IndexFunc(got, func(fields map[string]any) bool { return fields["ended"] == nil })
	if strangers < refusalsAtOnce || strangers > 2*refusalsAtOnce || len(got) != strangers+many {
		t.Errorf("%d connections of strangers and %d of others gave %d and %d lines", many, many, strangers, len(got)-strangers)
	}
}

func TestRefusals(t *testing.T) {
	const many = 10 * refusalsAtOnce
	got, l := relayed(t, func(l *logs) {
		l.access(strings.NewReader(strings.Repeat(refusedLine("ingress", "192.0.2.1:1"), many) + refusedLine(egress, "127.0.0.1:1")))
	})
	if len(got) < refusalsAtOnce || len(got) > 2*refusalsAtOnce {
		t.Errorf("%d refusals gave %d lines; want about %d", many, len(got), refusalsAtOnce)
	}
	want := map[string]any{
		"level": "WARN", "msg": "connection rejected", "direction": "ingress", "peer": "192.0.2.1:1", "destination": "192.0.2.2:9000",
		"reason": "no client certificate", "code": "no_client_certificate",
		"detail":   "TLS_error:|268435648:SSL_routines:OPENSSL_internal:PEER_DID_NOT_RETURN_A_CERTIFICATE:TLS_error_end",
		"bytes_in": 0.0, "bytes_out": 0.0, "duration_ms": 0.0, "left_out_before": 0.0,
	}
	if diff := cmp.Diff(want, got[0]); diff != "" {
		t.Error(diff)
	}
	if last := got[len(got)-1]; last["direction"] != egress {
		t.Errorf("those who are refused hide what fails on the way out: the last line is %v", last)
	}
	// What is left out is counted: by the next line that is not, and by reason.
	leftOut, ok := l.refused.admit("ingress", time.Now().Add(time.Minute))
	for _, fields := range got {
		leftOut += int(fields["left_out_before"].(float64))
	}
	if logged := len(got) - 1; !ok || leftOut+logged != many {
		t.Errorf("%d of %d lines are said to be left out, and %d were logged", leftOut, many, logged)
	}
	r := &Runner{refused: refusals{last: l.refused.last, counts: l.refused.counts}}
	last, counts := r.Refusals()
	if diff := cmp.Diff([]status.RefusalCount{
		{Direction: egress, Code: "no_client_certificate", Count: 1},
		{Direction: "ingress", Code: "no_client_certificate", Count: many},
	}, counts); diff != "" {
		t.Error(diff)
	}
	if len(last) != 2 || last[0].Peer != "192.0.2.1" || last[0].Count != many || last[1].Count != 1 {
		t.Errorf("what is kept is %+v", last)
	}
}

// TestFloodOfRefusals shows that a scan, each line of it another, leaves the one refusal that somebody looks for.
func TestFloodOfRefusals(t *testing.T) {
	var r refusals
	note := func(code Reason, port int) {
		r.note(status.Refusal{Count: 1, Direction: "ingress", Destination: fmt.Sprintf("192.0.2.2:%d", port), Code: string(code)})
	}
	note(SANNotAllowed, 9000)
	for port := range 1000 {
		note(Plaintext, port)
	}
	note(UnknownCA, 9000)
	var codes []string
	for _, refusal := range r.last {
		codes = append(codes, refusal.Code)
	}
	want := append(append([]string{"san_not_allowed"}, slices.Repeat([]string{"plaintext"}, lastRefusals-2)...), "unknown_ca")
	if !slices.Equal(codes, want) || r.last[lastRefusals-2].Destination != "192.0.2.2:999" {
		t.Errorf("what is kept is %v", codes)
	}
}

// TestFollow: followers get what comes from then on, a slow one not all of it, and there are not any number of them.
func TestFollow(t *testing.T) {
	var r refusals
	note := func(port int) {
		r.note(status.Refusal{Count: 1, Direction: "ingress", Destination: fmt.Sprintf("192.0.2.2:%d", port), Code: string(Plaintext)})
	}
	note(1)
	ctx, cancel := context.WithCancel(t.Context())
	slow, err := r.follow(ctx)
	if err != nil {
		t.Fatal(err)
	}
	const more = 10
	for port := range followerBuffer + more {
		note(1000 + port)
	}
	for port := range followerBuffer {
		if got := <-slow; got.Destination != fmt.Sprintf("192.0.2.2:%d", 1000+port) || got.Count != 1 || got.LeftOut != 0 {
			t.Fatalf("followed %d is %+v", port, got)
		}
	}
	note(2)
	if got := <-slow; got.Destination != "192.0.2.2:2" || got.LeftOut != more {
		t.Errorf("after those that were left out comes %+v", got)
	}
	for range maxFollowers - 1 {
		if _, err := r.follow(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.follow(ctx); err == nil {
		t.Error("any number may follow")
	}
	cancel()
	for range 1000 {
		if _, err = r.follow(t.Context()); err == nil {
			return
		}
		runtime.Gosched()
	}
	t.Errorf("those who are gone count: %v", err)
}

// TestLongCertificates shows that what a stranger writes into a certificate fills neither log nor memory.
func TestLongCertificates(t *testing.T) {
	identity, err := lab.NewIdentity(slices.Concat([]string{strings.Repeat("x", 1000)}, slices.Repeat([]string{"abcdefgh"}, 10_000))...)
	if err != nil {
		t.Fatal(err)
	}
	certificate := url.PathEscape(string(identity.ChainPEM()))
	line := strings.Replace(refusedLine("ingress", "192.0.2.1:1"), `"destination"`, `"certificate": "`+certificate+`", "destination"`, 1)
	longer := strings.Replace(line, "certificate", strings.Repeat("x", longestAccess), 1)
	got, l := relayed(t, func(l *logs) { l.access(strings.NewReader(line + longer)) })
	if len(got) < 2 || got[0]["code"] != "no_client_certificate" {
		t.Fatalf("the first line is %v", got[0])
	}
	names := append([]any{strings.Repeat("x", maxText) + "… (1000 bytes)"}, slices.Repeat([]any{"abcdefgh"}, maxSANs-1)...)
	if diff := cmp.Diff(append(names, "… and 9991 more"), got[0]["peer_sans"]); diff != "" {
		t.Error(diff)
	}
	for _, fields := range got {
		if text := fmt.Sprint(fields); len(text) > 1000 {
			t.Errorf("a line has %d characters: %s", len(text), text)
		}
	}
	if kept := l.refused.last; len(kept) != 1 || len(fmt.Sprint(kept[0])) > 1000 {
		t.Errorf("what is kept is %v", kept)
	}
}

// TestReasonsAreDocumented finds each reason in docs/operations.md with its words, and none beside them.
func TestReasonsAreDocumented(t *testing.T) {
	document, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(document), "| code | in words | what to do |\n|---|---|---|\n")
	table, _, _ = strings.Cut(table, "\n\n")
	documented := map[Reason]string{}
	for row := range strings.Lines(table) {
		cells := strings.Split(row, " | ")
		if len(cells) != 3 || len(cells[2]) < 10 {
			t.Fatalf("a row is %q", row)
		}
		documented[Reason(strings.Trim(cells[0], "| `"))] = cells[1]
	}
	if diff := cmp.Diff(reasonTexts, documented); diff != "" {
		t.Error(diff)
	}
}

// TestReasons shows that a peer does not choose the reason by what is in its certificate, nor by what else is odd.
func TestReasons(t *testing.T) {
	const verify = "TLS_error:|268435581:SSL_routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED:verify_cert_failed:_"
	for detail, want := range map[string]Reason{
		verify + "SAN_matcher,_certificate_SANs_are_[PEER_DID_NOT_RETURN_A_CERTIFICATE,_certificate_has_expired]:TLS_error_end":      SANNotAllowed,
		verify + "SAN_matcher,_certificate_SANs_are_[|1:SSL_routines:OPENSSL_internal:WRONG_VERSION_NUMBER:TLS_error_end]":           SANNotAllowed,
		verify + "X509_verify_cert:_certificate_verification_error_at_depth_0:_certificate_has_expired:TLS_error_end":                Expired,
		verify + "X509_verify_cert:_certificate_verification_error_at_depth_12:_certificate_has_expired:TLS_error_end":               Expired,
		verify + "X509_verify_cert:_certificate_verification_error_at_depth_1:_unable_to_get_local_issuer_certificate:TLS_error_end": UnknownCA,
		verify + "X509_verify_cert:_certificate_verification_error_at_depth_0:_unsupported_certificate_purpose:TLS_error_end":        BadCertificate,
		verify + "something new:TLS_error_end": BadCertificate,
		"TLS_error:|436207716:ECDSA_routines:OPENSSL_internal:BAD_SIGNATURE|268435570:SSL_routines:OPENSSL_internal:BAD_SIGNATURE:TLS_error_end": WrongKey,
		"TLS_error:|436207716:ECDSA_routines:OPENSSL_internal:BAD_SIGNATURE|184549382:X.509_certificate_routines:OPENSSL_internal:BAD|268435581:SSL_routines:OPENSSL_internal:" +
			"CERTIFICATE_VERIFY_FAILED:verify_cert_failed:_X509_verify_cert:_certificate_verification_error_at_depth_0:_certificate_signature_failure:TLS_error_end": UnknownCA,
		"TLS_error:|268435703:SSL_routines:OPENSSL_internal:WRONG_CURVE:TLS_error_end": NoSharedAlgorithm,
		"TLS_error:|1:SSL_routines:OPENSSL_internal:SOMETHING_NEW:TLS_error_end":       HandshakeFailed,
		"something new": HandshakeFailed,
	} {
		if got := (accessLine{Refused: detail}).reason(); got != want {
			t.Errorf("%s: the reason is %q, want %q", detail, got, want)
		}
	}
}
