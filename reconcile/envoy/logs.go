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
			l.mu.Lock()
			l.last = text
			l.mu.Unlock()
		}
		l.to.LogAttrs(context.Background(), level(fields[0]), "Envoy says", slog.String("text", text), slog.String("component", fields[1]))
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

// access relays the access log, which Envoy writes to standard output as JSON.
func (l *logs) access(from io.Reader) {
	for line := range lines(from) {
		var fields map[string]any
		if json.Unmarshal([]byte(line), &fields) != nil {
			l.to.Info("Envoy says", "text", line)
			continue
		}
		l.to.Info("connection", "fields", fields)
	}
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
