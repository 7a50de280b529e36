package envoy

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"log/slog"
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
		if level(fields[0]) >= slog.LevelError {
			l.mu.Lock()
			l.last = fields[2]
			l.mu.Unlock()
		}
		l.to.LogAttrs(context.Background(), level(fields[0]), "Envoy: "+fields[2], slog.String("component", fields[1]))
	}
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
			l.to.Info("Envoy: " + line)
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
			if err != nil && err != bufio.ErrBufferFull {
				return
			}
		}
	}
}
