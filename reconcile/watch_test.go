package reconcile

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// watched watches a directory until the test ends.
func watched(t *testing.T, directory string) <-chan struct{} {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	changed := make(chan struct{}, 1)
	var watching sync.WaitGroup
	watching.Go(func() { watch(ctx, directory, changed, slog.New(slog.DiscardHandler)) })
	t.Cleanup(func() {
		cancel()
		watching.Wait()
	})
	return changed
}

// within waits for a note.
func within(t *testing.T, limit time.Duration, changed <-chan struct{}) {
	t.Helper()
	select {
	case <-changed:
	case <-time.After(limit):
		t.Fatal("nothing was noted")
	}
}

// TestWatch does things to a directory, each of which must be noted sooner than by polling.
func TestWatch(t *testing.T) {
	t.Parallel()
	const soon = poll / 2
	directory := filepath.Join(t.TempDir(), "watched")
	file := func(name string) string { return filepath.Join(directory, name) }
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	changed := watched(t, directory)
	within(t, soon, changed) // the directory is not there
	for name, change := range map[string]func(){
		"write":   func() { do(os.WriteFile(file("a"), []byte("text"), 0o600)) },
		"rewrite": func() { do(os.WriteFile(file("a"), nil, 0o600)) },
		"rename":  func() { do(os.Rename(file("a"), file("b"))) },
		"mode":    func() { do(os.Chmod(file("a"), 0o400)) },
		"remove":  func() { do(os.Remove(file("a"))) },
		"swapped link": func() {
			do(os.Symlink("nowhere", file("new")))
			do(os.Rename(file("new"), file("a")))
		},
		"directory replaced": func() {
			do(os.RemoveAll(directory))
			do(os.Mkdir(directory, 0o700))
		},
		"directory moved, another in its place": func() {
			do(os.Rename(directory, filepath.Join(t.TempDir(), "elsewhere")))
			do(os.Mkdir(directory, 0o700))
		},
	} {
		t.Run(name, func(t *testing.T) {
			do(os.RemoveAll(directory))
			do(os.Mkdir(directory, 0o700))
			do(os.WriteFile(file("a"), nil, 0o600))
			quiet(t, changed)
			change()
			within(t, soon, changed)
			quiet(t, changed)
			do(os.WriteFile(file("still watched"), nil, 0o600))
			within(t, soon, changed)
		})
	}
}

// quiet waits until nothing has been noted for longer than a change that came before could take.
func quiet(t *testing.T, changed <-chan struct{}) {
	t.Helper()
	for {
		select {
		case <-changed:
		case <-time.After(pollMissing + 2*settle):
			return
		}
	}
}

// watchedQuietly is watched once the notes of its beginning are over.
func watchedQuietly(t *testing.T, directory string) <-chan struct{} {
	t.Helper()
	changed := watched(t, directory)
	within(t, poll/2, changed)
	quiet(t, changed)
	return changed
}

// TestWatchSettles: many changes in a row are noted once, when the last is made.
func TestWatchSettles(t *testing.T) {
	t.Parallel()
	directory := t.TempDir()
	changed := watchedQuietly(t, directory)
	until := time.Now().Add(settle / 2)
	for time.Now().Before(until) {
		if err := os.WriteFile(filepath.Join(directory, "a"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	within(t, poll/2, changed)
	select {
	case <-changed:
		t.Error("changes were noted more than once")
	case <-time.After(2 * settle):
	}
}

// TestWatchBesideAnother: a file that changes all the time holds up what is told of the others by no more than settleMost.
func TestWatchBesideAnother(t *testing.T) {
	t.Parallel()
	directory := t.TempDir()
	changed := watchedQuietly(t, directory)
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		tick := time.NewTicker(settle / 5)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				_ = os.WriteFile(filepath.Join(directory, "a"), nil, 0o600)
			case <-stop:
				return
			}
		}
	}()
	for range 2 {
		within(t, poll/2, changed)
	}
}

// TestPoll: a directory is read now and then although no event came.
func TestPoll(t *testing.T) {
	t.Parallel()
	changed := watchedQuietly(t, t.TempDir())
	began := time.Now()
	within(t, 2*poll, changed)
	if took := time.Since(began); took > poll+time.Second {
		t.Errorf("it took %v", took)
	}
}

func TestWatchMissing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		changed := watched(t, filepath.Join(t.TempDir(), "missing"))
		for range 10 {
			began := time.Now()
			within(t, time.Hour, changed)
			if took := time.Since(began); took > pollMissing {
				t.Errorf("it took %v", took)
			}
		}
	})
}
