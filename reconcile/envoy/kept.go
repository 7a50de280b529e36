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

// The last good generation is kept in mantlet's own part of the runtime directory. So a mantlet that was killed, and finds a
// bad one in the TLS directory, goes on with what was in force; and it sees which mesh CAs are gone since.

// storedSet is the file's content.
type storedSet struct {
	Chain, Key, CA string
}

// load reads the file, once. What is in it is checked when it is used.
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

// store writes a generation down. Where it can't, none is kept: an older one may trust a CA that is gone.
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

// restore has the generation tried that a mantlet before this one kept.
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

// Close removes what was kept, unless it is needed: while the TLS directory holds what is not good, a mantlet after this one
// has nothing else.
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
