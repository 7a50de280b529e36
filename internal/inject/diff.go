package inject

import (
	"bytes"

	"github.com/rogpeppe/go-internal/diff"
)

// Diff returns the unified diff from a source to what becomes of it; nothing where it stays as it is.
func Diff(source Source, result Result) []byte {
	return diff.Diff(source.Name, source.Text, source.Name+" (injected)", result.Text)
}

// Follow returns a text as it follows another: as documents of its own.
func Follow(before, text []byte) []byte {
	if len(before) == 0 || len(text) == 0 {
		return text
	}
	var between string
	if !bytes.HasSuffix(before, []byte("\n")) {
		between = "\n"
	}
	if !bytes.HasPrefix(text, []byte("---")) {
		between += "---\n"
	}
	return append([]byte(between), text...)
}
