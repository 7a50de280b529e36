package inject

import (
	"bytes"

	"github.com/rogpeppe/go-internal/diff"
)

// Diff returns the unified diff from a source to what becomes of it; nothing where it stays as it is.
func Diff(source Source, result Result) []byte {
	return diff.Diff(source.Name, source.Text, source.Name+" (injected)", result.Text)
}

// Follow returns a text as it follows that of another source: as a document of its own.
func Follow(text []byte) []byte {
	if len(text) == 0 || bytes.HasPrefix(text, []byte("---")) || bytes.HasPrefix(text, []byte("%")) {
		return text
	}
	return append([]byte("---\n"), text...)
}
