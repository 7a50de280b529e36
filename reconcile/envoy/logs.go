package envoy

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/time/rate"
)

// logFormat makes Envoy write its level, the component and the message. Line breaks come escaped, and so would tabs.
const logFormat = "%l|%n|%v"

// logs relays what an Envoy writes to mantlet's own log.
type logs struct {
	to *slog.Logger

	mu   sync.Mutex
	last string
}

// levels maps Envoy's names (spdlog's) to slog's levels.
func level(name string) slog.Level {
	switch name {
	case "trace", "debug":
		return slog.LevelDebug
	case "info":
		return slog.LevelInfo
	case "warning":
		return slog.LevelWarn
	default:
		return slog.LevelError
	}
}

// messages relays standard error until it ends.
func (l *logs) messages(from io.Reader) {
	for line := range lines(from) {
		fields := strings.SplitN(line, "|", 3)
		if len(fields) < 3 {
			fields = []string{"info", "", line}
		}
		text := unescape(fields[2])
		if level(fields[0]) >= slog.LevelError {
			l.note(fields[1], text)
		}
		l.to.LogAttrs(context.Background(), level(fields[0]), "Envoy says", slog.String("text", text), slog.String("component", fields[1]))
	}
}

// note keeps the last error. The backtraces of an Envoy that aborts say less than what came before them; where nothing did,
// their first line names the signal.
func (l *logs) note(component, text string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if trace := component == "backtrace" || component == "envoy_bug"; !trace || l.last == "" {
		l.last = text
	}
}

// unescape undoes --log-format-escaped, which is C's way, and leaves single spaces for line breaks.
func unescape(text string) string {
	if plain, err := strconv.Unquote(`"` + strings.ReplaceAll(text, `\'`, `'`) + `"`); err == nil {
		text = plain
	}
	return strings.Join(strings.Fields(text), " ")
}

// lastError returns the last message of level error or above.
func (l *logs) lastError() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

// A burst of refusals is logged as it comes; a peer that goes on and on gets some lines a second.
const (
	refusalsPerSecond = 5
	refusalsAtOnce    = 50
)

// access relays the access log, which Envoy writes to standard output as JSON. Refusals are limited: whoever is refused
// must not be able to fill the log.
func (l *logs) access(from io.Reader) {
	limit := rate.NewLimiter(refusalsPerSecond, refusalsAtOnce)
	left := 0
	for line := range lines(from) {
		var fields map[string]any
		if json.Unmarshal([]byte(line), &fields) != nil {
			l.to.Info("Envoy says", "text", line)
			continue
		}
		detail, refused := fields["refused"].(string)
		switch {
		case !refused:
			l.to.Info("connection", "fields", fields)
		case limit.Allow():
			l.to.Warn("connection refused", "peer", fields["peer"], "destination", fields["destination"],
				"reason", inWords(detail), "detail", detail, "peer_dns_sans", fields["peer_dns_sans"], "peer_uri_sans", fields["peer_uri_sans"],
				"left_out_before", left)
			left = 0
		default:
			left++
		}
	}
}

// inWords says what Envoy's transport failure, made of BoringSSL's reasons, means here.
func inWords(detail string) string {
	for _, r := range []struct{ reason, words string }{
		{"PEER_DID_NOT_RETURN_A_CERTIFICATE", "no client certificate"},
		{"CERTIFICATE_VERIFY_FAILED", "the client certificate is not of the mesh CA, is expired, or has no SAN that is allowed"},
		{"WRONG_VERSION_NUMBER", "no TLS: plaintext"},
		{"HTTP_REQUEST", "no TLS: plaintext HTTP"},
		{"HTTPS_PROXY_REQUEST", "no TLS: plaintext HTTP"},
		{"UNSUPPORTED_PROTOCOL", "the client's TLS version is too old"},
		{"NO_SHARED_CIPHER", "no cipher in common"},
		{"NO_SHARED_GROUP", "no curve in common"},
	} {
		if strings.Contains(detail, r.reason) {
			return r.words
		}
	}
	return "the TLS handshake failed"
}

// lines yields lines until the stream ends. It goes on reading whatever comes: a full pipe would stop Envoy.
func lines(from io.Reader) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		reader := bufio.NewReaderSize(from, 64<<10)
		for {
			line, err := reader.ReadSlice('\n')
			if text := strings.TrimRight(string(line), "\n"); text != "" && !yield(text) {
				return
			}
			if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
				return
			}
		}
	}
}
