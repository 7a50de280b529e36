package envoy

import (
	"bufio"
	"context"
	"errors"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"

	"mantlet/internal/peers"
	"mantlet/internal/status"
	"mantlet/render"
	"mantlet/schema"
)

// logFormat makes Envoy write its level, the component and the message. Line breaks and tabs are escaped.
const logFormat = "%l|%n|%v"

// logs relays an Envoy's output to mantlet's own log.
type logs struct {
	to       *slog.Logger
	refused  *refusals
	upstream func(listen string) status.Upstream // of an egress entry; may be nil
	peers    *peers.Table                        // gets the connections that are made; may be nil

	rejections chan string     // why Envoy rejected a secret
	trials     chan accessLine // handshakes of the trial that failed

	mu   sync.Mutex
	last string
}

func newLogs(to *slog.Logger, refused *refusals, upstream func(listen string) status.Upstream) *logs {
	const some = 8 // more than come of one trial
	return &logs{to: to, refused: refused, upstream: upstream, rejections: make(chan string, some), trials: make(chan accessLine, some)}
}

// discardAnswers drops what was logged about secrets and trials before.
func (l *logs) discardAnswers() {
	for len(l.rejections)+len(l.trials) > 0 {
		select {
		case <-l.rejections:
		case <-l.trials:
		default:
		}
	}
}

// rejection waits for the reason why Envoy rejected a secret.
func (l *logs) rejection() string {
	select {
	case text := <-l.rejections:
		return text
	case <-time.After(reasonLimit):
		return "it does not say why"
	}
}

// offer sends a value if the channel has room.
func offer[T any](to chan<- T, one T) {
	select {
	case to <- one:
	default:
	}
}

// updateRejected is the beginning of Envoy's message about a secret that it rejects.
const updateRejected = "Filesystem config update rejected: "

// level returns slog's level for one of Envoy's (spdlog's). Some warnings belong to every orderly restart, and are no warnings here.
func level(name, text string) slog.Level {
	if name == "warning" && (text == "caught ENVOY_SIGTERM" || text == "shutting down admin due to child startup") {
		name = "info"
	}
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
	for line := range lines(from, longestMessage) {
		fields := strings.SplitN(line, "|", 3)
		if len(fields) < 3 {
			fields = []string{"info", "", line}
		}
		text := unescape(fields[2])
		severity := level(fields[0], text)
		if why, ok := strings.CutPrefix(text, updateRejected); ok {
			severity = slog.LevelDebug // mantlet reports it itself
			offer(l.rejections, why)
		}
		if severity >= slog.LevelError {
			l.noteError(fields[1], text)
		}
		l.to.LogAttrs(context.Background(), severity, "Envoy says", slog.String("text", text), slog.String("component", fields[1]))
	}
}

// noteError keeps the last error. The backtrace of an Envoy that aborts says less than the message before it, so it counts only if there
// was none: its first line names the signal.
func (l *logs) noteError(component, text string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if trace := component == "backtrace" || component == "envoy_bug"; !trace || l.last == "" {
		l.last = text
	}
}

// unescape reverses --log-format-escaped, which escapes as C does, and replaces white space by single spaces.
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
	for text := range lines(from, longestAccess) {
		if made, ok := strings.CutPrefix(text, render.Connected+"\t"); ok {
			l.noteConnection(made)
			continue
		}
		c, err := parseAccessLine(text)
		if err != nil {
			if leftOut, ok := l.refused.admit("", time.Now()); ok { // strangers can cause lines that are too long, and must not fill the log
				l.to.Info("Envoy says", "text", truncate(text), "left_out_before", leftOut)
			}
			continue
		}
		if c.Direction == render.TrialDirection {
			if c.Refused+c.Failed != "" {
				offer(l.trials, c)
			}
			continue
		}
		reason := c.reason()
		if reason == UnknownCA {
			reason = l.refused.own.Load().untrustedReason(c.leaf, time.Now())
		}
		if reason == "" && c.Log == string(schema.AccessLogRefused) {
			continue
		}
		if reason == "" && (c.Upstream != "" || c.Attempts > 0) {
			l.to.LogAttrs(context.Background(), slog.LevelInfo, "connection", c.attrs()...)
			continue
		}
		if c.toItself(reason) {
			reason = EndpointIsSelf
		}
		var upstream status.Upstream
		if reason == NoEndpoint && l.upstream != nil {
			upstream = l.upstream(c.Destination)
		}
		refusal := c.refusal(reason, upstream)
		if reason != "" {
			l.refused.note(refusal)
		}
		leftOut, ok := l.refused.admit(c.Direction, refusal.Time)
		switch {
		case !ok:
		case reason == "":
			l.to.LogAttrs(context.Background(), slog.LevelInfo, "connection", append(c.attrs(),
				slog.String("ended", "by the client, before it was let in"), slog.Int("left_out_before", leftOut))...)
		default:
			l.to.LogAttrs(context.Background(), slog.LevelWarn, "connection rejected", append(c.attrs(), slog.String("reason", refusal.Reason),
				slog.String("code", refusal.Code), slog.String("detail", refusal.Detail), slog.Int("left_out_before", leftOut))...)
		}
	}
}

// noteConnection passes on who made a connection.
func (l *logs) noteConnection(line string) {
	fields := strings.Split(line, "\t")
	if l.peers == nil || len(fields) != render.ConnectedFields {
		return
	}
	if err := l.peers.Note(fields); err != nil {
		l.to.Debug("it is not known who is connected", "peer", fields[0], "destination", fields[1], "error", err)
	}
}

// The longest lines that are read as a whole. An access line can hold a peer's names twice, with six characters for each of their bytes, and
// its certificate in URL encoding. All of it comes from the 100 KiB of certificates that BoringSSL accepts at most.
const (
	longestMessage = 64 << 10
	longestAccess  = 2 << 20
)

// lines yields lines until the stream ends. Lines that are too long come in parts. It reads on in any case: a full pipe would block
// Envoy.
func lines(from io.Reader, longest int) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		reader := bufio.NewReader(from)
		var line []byte
		for {
			part, err := reader.ReadSlice('\n')
			line = append(line, part...)
			if errors.Is(err, bufio.ErrBufferFull) && len(line) < longest {
				continue
			}
			if text := strings.TrimRight(string(line), "\n"); text != "" && !yield(text) {
				return
			}
			if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
				return
			}
			if line = line[:0]; cap(line) > longestMessage {
				line = nil
			}
		}
	}
}
