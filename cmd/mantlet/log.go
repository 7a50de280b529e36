package main

import (
	"context"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// logQueue is the way of log lines to a writer that may block: standard error is read by the host. Whoever logs never waits.
// While the writer blocks, lines are queued up to a limit, and dropped and counted from there on.
type logQueue struct {
	to io.Writer

	mu      sync.Mutex
	wake    sync.Cond // the writing goroutine: lines were queued
	lines   [][]byte  // queued
	size    int       // of them, in bytes
	dropped uint64    // lines, since the start
	untold  uint64    // those of them that no line has told of
	writing time.Time // when the write that is in progress began; zero where none is
	drained chan struct{}
}

const (
	// maxQueued bounds the queue. It is some thousand lines, and small beside all else that mantlet holds. Lines that are
	// queued at the same time by several goroutines can exceed it by one each.
	maxQueued = 512 << 10
	// flushLimit is how long the end of mantlet waits for its last lines to be written.
	flushLimit = time.Second
	// unreadLimit is how long a write takes before status tells that nobody reads the log.
	unreadLimit = 5 * time.Second
)

// newLogQueue starts the goroutine that writes; it lives as long as the process.
func newLogQueue(to io.Writer) *logQueue {
	q := &logQueue{to: to, drained: make(chan struct{})}
	close(q.drained) // it is empty
	q.wake.L = &q.mu
	go q.run()
	return q
}

func (q *logQueue) run() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for {
		for len(q.lines) == 0 {
			q.wake.Wait()
		}
		line := q.lines[0]
		q.writing = time.Now()
		q.mu.Unlock()
		_, err := q.to.Write(line)
		q.mu.Lock()
		if err != nil { // the reader is gone, say
			q.dropped++
			q.untold++
		}
		q.writing, q.lines[0], q.lines, q.size = time.Time{}, nil, q.lines[1:], q.size-len(line)
		if len(q.lines) == 0 {
			q.lines = nil // and the memory of what was queued
			close(q.drained)
		}
	}
}

// Write queues a line. It never fails, and never waits for the writer.
func (q *logQueue) Write(line []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.lines) == 0 {
		q.drained = make(chan struct{})
	}
	q.lines, q.size = append(q.lines, append([]byte(nil), line...)), q.size+len(line)
	q.wake.Signal()
	return len(line), nil
}

// admit reports whether a line may be queued and, if so, how many were dropped since the last one that was. One that may
// not is dropped.
func (q *logQueue) admit() (dropped uint64, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.size >= maxQueued {
		q.dropped++
		q.untold++
		return 0, false
	}
	dropped, q.untold = q.untold, 0
	return dropped, true
}

// flush waits until everything is written, for at most a limit.
func (q *logQueue) flush(limit time.Duration) {
	q.mu.Lock()
	drained := q.drained
	q.mu.Unlock()
	select {
	case <-drained:
	case <-time.After(limit):
	}
}

// lost returns how many lines were dropped since the start, and for how long, at now, the writer has taken none; 0 while it
// does.
func (q *logQueue) lost(now time.Time) (lines uint64, unread time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.writing.IsZero() {
		if since := now.Sub(q.writing); since > unreadLimit {
			unread = since
		}
	}
	return q.dropped, unread
}

// logHandler formats records for a queue. The first one after some were dropped tells how many.
type logHandler struct {
	slog.Handler

	queue *logQueue
}

// Handle implements slog.Handler.
func (h logHandler) Handle(ctx context.Context, record slog.Record) error {
	dropped, ok := h.queue.admit()
	if !ok {
		return nil
	}
	if dropped > 0 {
		record = record.Clone()
		record.AddAttrs(slog.Uint64("lines_dropped_before", dropped))
	}
	return h.Handler.Handle(ctx, record)
}

// WithAttrs implements slog.Handler.
func (h logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return logHandler{h.Handler.WithAttrs(attrs), h.queue}
}

// WithGroup implements slog.Handler.
func (h logHandler) WithGroup(name string) slog.Handler {
	return logHandler{h.Handler.WithGroup(name), h.queue}
}

// newLogger logs to a queue: text for a terminal, JSON for all else.
func newLogger(queue *logQueue, isTerminal bool, level slog.Leveler) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if isTerminal {
		return slog.New(logHandler{slog.NewTextHandler(queue, options), queue})
	}
	return slog.New(logHandler{slog.NewJSONHandler(queue, options), queue})
}

// logTo returns a logger to a file, and its queue.
func logTo(file *os.File, level slog.Leveler) (*slog.Logger, *logQueue) {
	isTerminal := term.IsTerminal(int(file.Fd()))
	queue := newLogQueue(file)
	return newLogger(queue, isTerminal, level), queue
}

// unblock makes standard error a file that never blocks the process, where it is a pipe or a terminal: what the Go runtime
// writes there by itself, as it does at a panic, would otherwise wait for whoever reads it, and mantlet would not end. The
// file is opened anew, since O_NONBLOCK would also hold for all other processes that have the same open file.
func unblock() *os.File {
	const stderr = 2
	var stat unix.Stat_t
	if err := unix.Fstat(stderr, &stat); err != nil || stat.Mode&unix.S_IFMT != unix.S_IFIFO && stat.Mode&unix.S_IFMT != unix.S_IFCHR {
		return os.Stderr
	}
	fd, err := unix.Open("/proc/self/fd/2", unix.O_WRONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.Stderr
	}
	_ = unix.Dup3(fd, stderr, 0) // on failure the runtime's own words may block, and the log still does not
	return os.NewFile(uintptr(fd), os.Stderr.Name())
}
