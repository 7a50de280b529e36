package schema

import (
	"os"
	"path/filepath"
	"testing"
)

// TestDefaultTLSDirectory checks which of the usual directories is read where no variable names one.
func TestDefaultTLSDirectory(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		there []string
		want  string
	}{
		{nil, "/tls-config"},
		{[]string{"/tls-config"}, "/tls-config"},
		{[]string{"/contrast/tls-config"}, "/contrast/tls-config"},
		{[]string{"/contrast"}, "/contrast/tls-config"}, // which the initializer is still to make
		{[]string{"/tls-config", "/contrast/tls-config"}, "/tls-config"},
	} {
		root := t.TempDir()
		for _, path := range c.there {
			if err := os.MkdirAll(filepath.Join(root, path), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if got := defaultTLSDirectory(root); got != c.want {
			t.Errorf("with %q there: %s, want %s", c.there, got, c.want)
		}
	}
}
