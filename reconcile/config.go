package reconcile

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/renameio/v2"

	"mantlet/internal/files"
	"mantlet/internal/rundir"
	"mantlet/internal/status"
	"mantlet/render"
	"mantlet/schema"
)

// configure reads the configuration until ctx ends: whenever it may have changed, or there is a note on reload, which is passed on to
// certify. The loop does not wait for it.
func (d *Daemon) configure(ctx context.Context, reload <-chan struct{}, reread chan<- struct{}) {
	changed := make(chan struct{}, 1)
	var watching sync.WaitGroup
	defer watching.Wait()
	if d.Environment.ReadsFile() {
		watching.Go(func() { watch(ctx, filepath.Dir(d.Environment.Process.ConfigFile), changed, d.Log) })
		watching.Go(func() { d.storeFiles(ctx) })
	}
	for {
		d.watchdog.begin(configurer, "reading the configuration", configLimit)
		d.readConfig()
		d.watchdog.idle(configurer)
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-reload:
			d.refresh()
			notify(reread)
		}
	}
}

// parsed is the result for an override file's content.
type parsed struct {
	digest [sha256.Size]byte
	link   string // see schema.Content
	err    error
}

// readConfig offers a good configuration to the loop, unless its content is the same as before. If it is bad, it says what is wrong, and
// the last good one stays in force. After a start, that is the one that the mantlet before this one stored, if its environment was the
// same.
func (d *Daemon) readConfig() {
	err := d.load()
	d.locked(func() {
		if d.reloaded.Succeeded = err == nil; err == nil {
			d.reloaded.SucceededAt = new(time.Now())
		}
	})
	if err == nil {
		d.clearProblem(&d.badConfig, "configuration accepted again")
		return
	}
	if !d.configuring.configured {
		if last, restoreErr := d.restore(); restoreErr == nil {
			d.Log.Warn("going on with the last good override file, of a mantlet before this one")
			d.offer(last)
		} else if !errors.Is(restoreErr, os.ErrNotExist) {
			d.Log.Warn("the last good override file is of no use", "error", restoreErr)
		}
	}
	what := "the override file was rejected; the last good state stays in force"
	if !d.configuring.configured {
		what = status.WaitingForConfiguration
	}
	if d.setProblem(&d.badConfig, "configuration rejected", what, err) {
		d.noteFailure(status.CheckConfig, err)
	}
}

// load reads the override file, if there is one to read, and offers what it makes of the environment.
func (d *Daemon) load() error {
	if !d.Environment.ReadsFile() {
		next, err := d.render(d.Environment.Load())
		if err == nil {
			d.offer(next)
		}
		return err
	}
	content, err := d.Environment.Read()
	if err != nil {
		return err
	}
	now := parsed{digest: sha256.Sum256(content.Text), link: content.Link}
	if d.configuring.parsed != nil && d.configuring.parsed.digest == now.digest && d.configuring.parsed.link == now.link {
		return d.configuring.parsed.err
	}
	var next *desired
	if next, now.err = d.mergeFile(content); now.err == nil {
		d.offer(next)
		d.locked(func() { d.unstored = content.Text })
		notify(d.notes.toStore)
	}
	d.configuring.parsed = &now
	return now.err
}

// offer hands a good configuration to the loop. It replaces one that the loop has not taken yet.
func (d *Daemon) offer(next *desired) {
	d.configuring.configured = true
	d.locked(func() { d.offered = next })
	notify(d.notes.changed)
}

// takeOffered makes the configuration that was offered last, if there is one, the wanted one.
func (d *Daemon) takeOffered() {
	var next *desired
	d.locked(func() { next, d.offered = d.offered, nil })
	if next != nil {
		d.accept(next)
	}
}

// mergeFile renders the environment merged with a content of the override file.
func (d *Daemon) mergeFile(content schema.Content) (*desired, error) {
	next, err := d.render(d.Environment.MergeContent(content))
	if err != nil {
		return nil, err
	}
	next.source, next.sourceDigest = d.Environment.Process.ConfigFile, fmt.Sprintf("%x", sha256.Sum256(content.Text))
	return next, nil
}

func (d *Daemon) render(config schema.Config, err error) (*desired, error) {
	if err != nil {
		return nil, err
	}
	place := d.currentPlace()
	state, err := render.Render(config.Mesh, place)
	if err == nil {
		err = d.Limits.Fit(state.Cost)
	}
	if err != nil {
		return nil, err
	}
	return &desired{mesh: config.Mesh, place: place, state: state, source: "environment"}, nil
}

// accept makes a good configuration the wanted one, unless it has the same effect.
func (d *Daemon) accept(next *desired) {
	if d.want != nil {
		if d.want.same(next) {
			d.locked(func() {
				if d.have != nil && d.have.number == d.want.number {
					d.have.sourceDigest = next.sourceDigest
				}
				d.want.sourceDigest = next.sourceDigest
			})
			return
		}
		for _, step := range Compare(d.want.mesh, next.mesh) {
			d.Log.Info("configuration changed", "step", step.What, "needs", step.Need)
		}
	}
	d.loop.backoff, d.loop.notBefore = backoff{}, time.Time{} // the failures were of another state
	d.locked(func() {
		d.accepted++
		next.number = d.accepted
		d.want = next
	})
	d.follow()
}

// storedFile is the last good override file in the runtime directory, and the digest of the environment that it was merged with. With
// another environment it could mean something else.
type storedFile struct {
	Environment string `json:"environment"`
	Content     []byte `json:"content"`
}

// maxStored is more than the largest override file takes in base64.
const maxStored = 8 << 20

func (d *Daemon) storedPath() string {
	return rundir.Directory(d.Environment.Process.RuntimeDirectory).LastGoodConfig()
}

// storeFiles stores each good override file for the next mantlet, until ctx ends. A failed attempt is repeated: a full disk gives no
// event when it has room again.
func (d *Daemon) storeFiles(ctx context.Context) {
	for {
		var retry <-chan time.Time
		d.locked(func() {
			if d.unstored != nil {
				retry = time.After(retryInputs)
			}
		})
		select {
		case <-ctx.Done():
			return
		case <-d.notes.toStore:
		case <-retry:
		}
		d.store()
	}
}

// store writes the file that is to be stored, unless it is stored already.
func (d *Daemon) store() {
	var content []byte
	d.locked(func() { content = d.unstored })
	if content == nil {
		return
	}
	err := d.writeStored(content)
	if err != nil && !sameError(err, d.configuring.storeErr) {
		d.Log.Warn("the override file could not be kept for a restart of mantlet; it is tried again", "error", err)
	}
	d.configuring.storeErr = err
	d.locked(func() {
		if err == nil && bytes.Equal(content, d.unstored) { // otherwise there is a newer one
			d.unstored = nil
		}
	})
}

func (d *Daemon) writeStored(content []byte) error {
	digest, err := d.Environment.Digest()
	if err != nil {
		return err
	}
	text, err := json.Marshal(storedFile{digest, content})
	if err != nil {
		return err
	}
	path := d.storedPath()
	isThere := func() bool {
		have, err := schema.ReadFile(path, int64(len(text)))
		return err == nil && bytes.Equal(have, text)
	}
	if isThere() {
		return nil
	}
	_, err = files.Do("write", path, func() (any, error) {
		return nil, files.Replacing(path, renameio.WriteFile(path, text, 0o600, renameio.WithTempDir(filepath.Dir(path))))
	})
	if err == nil && !isThere() {
		err = errors.New("an earlier file was still being written")
	}
	if err != nil {
		// The older file may allow more. Without it, a mantlet that starts with a bad override file waits for a good one.
		_, _ = files.Do("remove", path, func() (any, error) { return nil, os.Remove(path) })
	}
	return err
}

// restore returns the state of the stored override file. The error is os.ErrNotExist if there is none.
func (d *Daemon) restore() (*desired, error) {
	text, err := schema.ReadFile(d.storedPath(), maxStored)
	if err != nil {
		return nil, err
	}
	var last storedFile
	if err := json.Unmarshal(text, &last); err != nil {
		return nil, fmt.Errorf("reading %s: %w", d.storedPath(), err)
	}
	digest, err := d.Environment.Digest()
	if err != nil {
		return nil, err
	}
	if digest != last.Environment {
		return nil, errors.New("it was merged with another environment")
	}
	return d.mergeFile(schema.Content{Text: last.Content})
}
