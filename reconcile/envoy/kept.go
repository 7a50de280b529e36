package envoy

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"

	"mantlet/internal/files"
)

// The last accepted set is stored in mantlet's own part of the runtime directory. A mantlet that was killed and finds a bad set in the TLS
// directory goes on with the stored one. It also sees which mesh CAs were removed since.

// storedSet is the content of the file.
type storedSet struct {
	Chain, Key, CA string
}

// load reads the file once. Its certificates are checked when they are used.
func (s *Secrets) load() {
	if s.loaded || s.KeptFile == "" {
		return
	}
	s.loaded = true
	content, err := os.ReadFile(s.KeptFile)
	var kept storedSet
	if err == nil {
		err = json.Unmarshal(content, &kept)
	}
	if err == nil {
		c := &Certificates{paths: [3]string{s.KeptFile, s.KeptFile, s.KeptFile}, text: [3][]byte{[]byte(kept.Chain), []byte(kept.Key), []byte(kept.CA)}}
		if c.anchors, err = parseCertificates(c.text[2]); err == nil {
			s.stored = c
		}
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		s.Log.Warn("the last good certificates are of no use", "error", err)
	}
}

// store writes a set to the file. If that fails, the file is removed: an older set may trust a CA that was removed since.
func (s *Secrets) store(c *Certificates) {
	if s.KeptFile == "" {
		return
	}
	content, err := json.Marshal(storedSet{string(c.text[0]), string(c.text[1]), string(c.text[2])})
	if err == nil {
		err = files.Replacing(s.KeptFile, renameio.WriteFile(s.KeptFile, content, 0o600, renameio.WithTempDir(filepath.Dir(s.KeptFile))))
	}
	if err == nil {
		s.stored, s.unstored = c, nil
		return
	}
	_ = os.Remove(s.KeptFile)
	s.stored = nil
	if s.unstored != c {
		s.Log.Warn("the certificates could not be kept for a restart of mantlet; it is tried again", "error", err)
	}
	s.unstored = c
}

// restore has Envoy try the set that the mantlet before this one stored.
func (s *Secrets) restore(ctx context.Context, now time.Time) {
	if s.stored == nil {
		return
	}
	if err := s.adopt(ctx, s.stored, now); err != nil {
		if s.unusable != s.stored {
			s.Log.Warn("the last good certificates are of no use", "error", err)
		}
		s.unusable = s.stored
		return
	}
	if s.lastAccepted() == s.stored {
		s.Log.Warn("going on with the last good certificates, of a mantlet before this one")
	}
}

// Close removes the file, unless the next mantlet needs it: while the TLS directory holds a bad set, the file is the only good one.
func (s *Secrets) Close() error {
	if s.KeptFile == "" {
		return nil
	}
	if read, err := readCertificates(s.Files); err != nil || !read.Equal(s.lastAccepted()) {
		return nil
	}
	if err := os.Remove(s.KeptFile); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
