package main

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mantlet/internal/rundir"
	"mantlet/internal/status"
)

// reader is a writer that takes one line each time it is let.
type reader struct {
	turn chan struct{}

	mu   sync.Mutex
	text bytes.Buffer
}

func (r *reader) Write(line []byte) (int, error) {
	<-r.turn
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.Write(line)
}

// lines returns what was read.
func (r *reader) lines(t *testing.T) (all []map[string]any) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	for text := range bytes.Lines(r.text.Bytes()) {
		var line map[string]any
		if err := json.Unmarshal(text, &line); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		all = append(all, line)
	}
	return all
}

// TestLogQueue: whoever logs never waits for the reader. What is queued comes in its order once there is a reader again, and the next
// line after some that were dropped says how many.
func TestLogQueue(t *testing.T) {
	r := &reader{turn: make(chan struct{})}
	queue := newLogQueue(r)
	log := newLogger(queue, false, slog.LevelInfo).With("epoch", 7)
	pad := strings.Repeat("x", 1000)
	const lines = 2 * maxQueued / 1000
	for i := range lines {
		log.Info("line", "number", i, "pad", pad)
	}
	dropped, _ := queue.lost(time.Now())
	if dropped < lines/4 || dropped > lines*3/4 {
		t.Errorf("%d of %d lines were dropped", dropped, lines)
	}
	queue.flush(time.Millisecond) // which nobody lets it do
	close(r.turn)
	queue.flush(limit)
	log.Info("line", "number", lines)
	log.Info("line", "number", lines+1)
	queue.flush(limit)
	for i, line := range r.lines(t) {
		want := map[bool]float64{true: float64(i), false: float64(i) + float64(dropped)}[i < lines-int(dropped)]
		told, _ := line["lines_dropped_before"].(float64)
		if line["number"] != want || line["epoch"] != 7.0 || (told > 0) != (i == lines-int(dropped)) || told > 0 && told != float64(dropped) {
			t.Fatalf("line %d is %v; %d were dropped", i, line, dropped)
		}
	}
	if n := len(r.lines(t)); n != lines-int(dropped)+2 {
		t.Errorf("%d lines came, %d were dropped", n, dropped)
	}
	if now, unread := queue.lost(time.Now()); now != dropped || unread > 0 {
		t.Errorf("%d are dropped, unread for %v", now, unread)
	}
}

// TestLogUnread: a reader that takes nothing is told of, and no more once it goes on.
func TestLogUnread(t *testing.T) {
	r := &reader{turn: make(chan struct{})}
	queue := newLogQueue(r)
	newLogger(queue, false, slog.LevelInfo).Info("line")
	r.turn <- struct{}{} // the goroutine writes
	queue.flush(limit)
	if _, unread := queue.lost(time.Now().Add(time.Hour)); unread > 0 {
		t.Errorf("it was read, and is unread for %v", unread)
	}
	newLogger(queue, false, slog.LevelInfo).Info("line")
	for unread := time.Duration(0); unread == 0; { // until the goroutine writes
		_, unread = queue.lost(time.Now().Add(unreadLimit + time.Second))
	}
	if _, unread := queue.lost(time.Now()); unread > 0 {
		t.Errorf("it has just come, and is unread for %v", unread)
	}
	close(r.turn)
}

// tap is a pod's log through a pipe of the smallest size, as a container runtime has it, which can be left unread.
type tap struct {
	mu     sync.Mutex
	opens  sync.Cond
	closed bool
}

func (p *pod) tap() *tap {
	p.t.Helper()
	var fds [2]int
	p.must(syscall.Pipe2(fds[:], syscall.O_CLOEXEC)) // the writing end of os.Pipe would not block
	read, write := os.NewFile(uintptr(fds[0]), "read"), os.NewFile(uintptr(fds[1]), "write")
	_, err := unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, 4096)
	p.must(err)
	tap := &tap{}
	tap.opens.L = &tap.mu
	var reading sync.WaitGroup
	reading.Go(func() {
		for chunk := make([]byte, 4096); ; {
			tap.mu.Lock()
			for tap.closed {
				tap.opens.Wait()
			}
			tap.mu.Unlock()
			n, err := read.Read(chunk)
			_, _ = p.log.Write(chunk[:n])
			if err != nil {
				return
			}
		}
	})
	p.sidecar.Log = write
	p.t.Cleanup(func() {
		tap.set(false)
		_ = p.sidecar.Signal(syscall.SIGKILL)
		_ = write.Close()
		reading.Wait()
		_ = read.Close()
	})
	return tap
}

// set lets nobody read, or lets them read again.
func (t *tap) set(closed bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = closed
	t.opens.Broadcast()
}

// ask returns what mantlet answers at its socket. No command runs, which would write a log or read files of its own.
func (p *pod) ask(path string) []byte {
	p.t.Helper()
	ctx, cancel := p.context()
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://mantlet"+path, nil)
	p.must(err)
	response, err := status.OverSocket(rundir.Directory(p.sidecar.RuntimeDirectory).StatusSocket()).Do(request)
	p.must(err)
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	p.must(err)
	return text
}

// served is the status that mantlet answers at its socket.
func (p *pod) served() (s status.Status) {
	p.t.Helper()
	p.must(json.Unmarshal(p.ask("/status"), &s))
	return s
}

// TestBlockedLog: while nobody reads standard error, mantlet goes on: it tightens, revokes, restarts Envoy and answers. It tells how
// many lines were dropped.
func TestBlockedLog(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, "MANTLET_ENVOY_LOG_LEVEL=trace", "MANTLET_LOG_LEVEL=debug")
	tap, m := p.tap(), p.override("{}")
	p.start()
	tap.set(true)
	p.await("lines are dropped", func() bool { return p.served().LogDropped > 0 })
	p.await("that is told", func() bool {
		return strings.Contains(strings.Join(p.served().Problems, "\n"), "nobody has read standard error for ")
	})

	addr := netip.AddrPortFrom(p.IPv4, tlsPort)
	p.must(p.exchange(addr, p.anonymous()))
	m.write("ingress: [{port: 8080, mode: mtls}]")
	p.await("the port asks for a certificate", func() bool { return p.exchange(addr, p.anonymous()) != nil })
	envoy := p.envoy()
	p.must(syscall.Kill(envoy, syscall.SIGKILL))
	mesh := p.client.ClientConfig("pod")
	p.await("there is another Envoy", func() bool { return p.exchange(addr, mesh) == nil && p.envoy() != envoy })
	if said := p.ask("/livez"); string(said) != "ok\n" {
		t.Errorf("livez: %s", said)
	}

	tap.set(false)
	p.await("the log tells of dropped lines", func() bool { return p.log.count(`"lines_dropped_before":`) > 0 })
	p.await("all is well", func() bool { return len(p.served().Problems) == 0 })
	tap.set(true)
	dropped := p.served().LogDropped
	p.await("lines are dropped again", func() bool { return p.served().LogDropped > dropped })
	p.must(p.sidecar.Stop())
}

// TestBlockedLogAtTheEnd: what Go itself writes as it ends a process is no reason for it to live on.
func TestBlockedLogAtTheEnd(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, "MANTLET_ENVOY_LOG_LEVEL=trace", "MANTLET_LOG_LEVEL=debug")
	tap := p.tap()
	p.start()
	tap.set(true)
	p.await("lines are dropped", func() bool { return p.served().LogDropped > 0 })
	p.must(p.sidecar.Signal(syscall.SIGQUIT)) // it prints what all goroutines do
	p.await("mantlet has ended", p.sidecar.Ended)
}
