package reconcile

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"mantlet/internal/rundir"
)

// readyPoll is how old what the ready file says may be. Probes usually look for the file once a second.
const readyPoll = 250 * time.Millisecond

// PlaceReadyFile makes a path a link to a file that exists exactly while a sidecar is ready; it does not exist yet. Whatever is at the
// path is replaced, unless it is a directory.
//
// The link leads to a name in the runtime directory, where mantlet may create and remove files once it is confined. That name is a link
// to a file of mantlet's own process: it does not outlive a mantlet that is killed.
func PlaceReadyFile(path, runtimeDirectory string) error {
	link := rundir.Directory(runtimeDirectory).Ready()
	if err := remove(link); err != nil {
		return err
	}
	if path == link {
		return nil
	}
	if there, err := os.Readlink(path); err == nil && there == link {
		return nil // of a mantlet before this one, or of the image
	}
	if err := remove(path); err != nil {
		return err
	}
	return os.Symlink(link, path)
}

// remove removes a file or a link, if there is one.
func remove(path string) error {
	if info, err := os.Lstat(path); err == nil && info.IsDir() {
		return fmt.Errorf("%s is a directory", path)
	}
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// keepReadyFile makes the ready file exist exactly while the sidecar is ready, until ctx ends. After that it does not exist.
func (d *Daemon) keepReadyFile(ctx context.Context) {
	link := rundir.Directory(d.Environment.Process.RuntimeDirectory).Ready()
	alive := filepath.Join("/proc", strconv.Itoa(os.Getpid()), "comm") // looks like a regular file
	var failed error
	defer func() { _ = remove(link) }()
	for ; ctx.Err() == nil; sleep(ctx, readyPoll) {
		var err error
		if len(d.Unready(ctx)) > 0 {
			err = remove(link)
		} else if err = os.Symlink(alive, link); errors.Is(err, fs.ErrExist) {
			err = nil
		}
		if err != nil && !sameError(err, failed) {
			d.Log.Warn("the ready file does not say how it is", "error", err)
		}
		failed = err
	}
}
