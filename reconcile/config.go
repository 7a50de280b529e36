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
	"slices"
	"time"

	"github.com/google/renameio/v2"

	"mantlet/render"
	"mantlet/schema"
)

// watchConfig watches the directory of the override file, if there is one.
func (d *Daemon) watchConfig(ctx context.Context) <-chan struct{} {
	if d.Environment.ReadsFile() {
		return watch(ctx, filepath.Dir(d.Environment.Process.ConfigFile), d.Log)
	}
	return nil
}

// readConfig takes a configuration that is good. Of a bad one it says what is wrong, and the last good one stays: also that
// of a mantlet before this one, if the environment is the same.
func (d *Daemon) readConfig() {
	content, next, err := d.load()
	if err == nil {
		d.settle(&d.badConfig, "configuration accepted again")
		d.accept(next)
		d.keep(content)
		return
	}
	if d.want == nil {
		if last, restoreErr := d.restore(); restoreErr == nil {
			d.Log.Warn("going on with the last good override file, of a mantlet before this one")
			d.accept(last)
		} else if !errors.Is(restoreErr, os.ErrNotExist) {
			d.Log.Warn("the last good override file is of no use", "error", restoreErr)
		}
	}
	what := "the override file was rejected; the last good state stays in force"
	if d.want == nil {
		what = notConfigured
	}
	if d.complain(&d.badConfig, "configuration rejected", what, err) {
		d.failed(checkConfig, err)
	}
}

// load reads the override file, if there is one to read, and renders what it makes of the environment.
func (d *Daemon) load() (content []byte, next *desired, err error) {
	if !d.Environment.ReadsFile() {
		next, err = d.render(d.Environment.Load())
		return nil, next, err
	}
	read, err := d.Environment.Read()
	if err != nil {
		return nil, nil, err
	}
	next, err = d.merge(read)
	return read.Text, next, err
}

// merge renders what a content of the override file makes of the environment.
func (d *Daemon) merge(content schema.Content) (*desired, error) {
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
	state, err := render.Render(config.Mesh, d.Place)
	if err != nil {
		return nil, err
	}
	return &desired{mesh: config.Mesh, state: state, source: "environment"}, nil
}

// accept makes a good configuration the wanted one, unless it means the same.
func (d *Daemon) accept(next *desired) {
	if d.want != nil {
		if d.want.state.Digest == next.state.Digest && d.want.state.Ruleset.Text() == next.state.Ruleset.Text() && slices.Equal(d.want.mesh.Probes, next.mesh.Probes) {
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
	d.pause, d.notBefore = backoff{}, time.Time{} // what failed was another state
	d.locked(func() {
		d.accepted++
		next.number = d.accepted
		d.want = next
	})
}

// kept is the last good override file, in the runtime directory, and the digest of the environment that it was merged
// with: with another one it could mean something else.
type kept struct {
	Environment string `json:"environment"`
	Content     []byte `json:"content"`
}

func (d *Daemon) keptPath() string {
	return filepath.Join(d.Environment.Process.RuntimeDirectory, "last-good.json")
}

// keep writes an accepted file down, if it is not there already. Where it can't, the file is unkept, and to be kept later.
func (d *Daemon) keep(content []byte) {
	if !d.Environment.ReadsFile() {
		return
	}
	before := d.unkept
	d.unkept = nil
	digest, err := d.Environment.Digest()
	if err == nil {
		var text []byte
		if text, err = json.Marshal(kept{digest, content}); err == nil {
			if have, readErr := os.ReadFile(d.keptPath()); readErr == nil && string(have) == string(text) {
				return
			}
			err = renameio.WriteFile(d.keptPath(), text, 0o600, renameio.WithTempDir(d.Environment.Process.RuntimeDirectory))
		}
	}
	if err != nil {
		// One before it may be looser: a mantlet that starts beside a bad file then waits for a good one.
		_ = os.Remove(d.keptPath())
		if !bytes.Equal(before, content) {
			d.Log.Warn("the override file could not be kept for a restart of mantlet; it is tried again", "error", err)
		}
		d.unkept = content
	}
}

// restore returns what the last good file makes of the environment. The error is os.ErrNotExist where none was kept.
func (d *Daemon) restore() (*desired, error) {
	text, err := os.ReadFile(d.keptPath())
	if err != nil {
		return nil, err
	}
	var last kept
	if err := json.Unmarshal(text, &last); err != nil {
		return nil, fmt.Errorf("reading %s: %w", d.keptPath(), err)
	}
	digest, err := d.Environment.Digest()
	if err != nil {
		return nil, err
	}
	if digest != last.Environment {
		return nil, errors.New("it was merged with another environment")
	}
	return d.merge(schema.Content{Text: last.Content})
}
