package reconcile

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// settle is how long a directory must be quiet before it is read: writers replace several files one after another.
	settle = 50 * time.Millisecond
	// settleMost is when it is read at the latest: another file of the directory may change all the time.
	settleMost = time.Second
	// poll is how often a directory is read without an event: some sandboxed runtimes deliver none, and a directory that does not exist yet
	// can't be watched.
	poll = 5 * time.Second
	// pollMissing is how often a missing directory is looked for.
	pollMissing = 250 * time.Millisecond
)

// watch leaves a note on the channel whenever the content of a directory may have changed, until ctx ends: after events, once they have
// settled, and at every poll. The reader finds out what changed by comparing content. The files themselves are not watched: the kubelet
// swaps a link, and a watch would stay with the old file.
func watch(ctx context.Context, directory string, changed chan<- struct{}, log *slog.Logger) {
	var opens <-chan opened
	for ctx.Err() == nil {
		if opens == nil {
			opens = open(ctx, directory)
		}
		select {
		case o := <-opens:
			opens = nil
			if err := o.follow(ctx, changed); err != nil {
				log.Debug("directory can't be watched; polling", "directory", directory, "error", err)
			}
			notify(changed)
			sleep(ctx, pollMissing)
		case <-time.After(poll): // the file system hangs
			notify(changed)
		case <-ctx.Done():
		}
	}
}

// opened is a watch, or why there is none.
type opened struct {
	watcher *fsnotify.Watcher
	err     error
}

// open begins to watch a directory in a goroutine of its own, since that hangs where the file system does. If ctx ends first, nothing is
// sent.
func open(ctx context.Context, directory string) <-chan opened {
	opens := make(chan opened)
	go func() {
		watcher, err := fsnotify.NewWatcher()
		if err == nil {
			err = watcher.Add(directory)
		}
		o := opened{watcher, err}
		select {
		case opens <- o:
		case <-ctx.Done():
			o.close()
		}
	}()
	return opens
}

func (o opened) close() {
	if o.watcher != nil {
		_ = o.watcher.Close()
	}
}

// follow passes on events of the directory until ctx ends or the directory is gone.
func (o opened) follow(ctx context.Context, changed chan<- struct{}) error {
	defer o.close()
	if o.err != nil {
		return o.err
	}
	watcher := o.watcher
	notify(changed) // for what happened before the watch
	tick := time.NewTicker(poll)
	defer tick.Stop()
	var settled <-chan time.Time
	var first time.Time // of the events since it was read last
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-watcher.Events:
			if settled == nil {
				first = time.Now()
			}
			settled = time.After(min(settle, time.Until(first.Add(settleMost))))
			if len(watcher.WatchList()) == 0 {
				return errors.New("the directory was removed")
			}
		case err := <-watcher.Errors: // an overflow: events were lost
			if err != nil {
				notify(changed)
			}
		case <-settled:
			settled = nil
			notify(changed)
		case <-tick.C:
			notify(changed)
		}
	}
}

// notify leaves a note. A reader that has not read the last one needs no second.
func notify(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
