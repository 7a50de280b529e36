package files_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/renameio/v2"
	"go.uber.org/goleak"

	"mantlet/internal/files"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestDo: what hangs is given up and told of, it holds one goroutine however often it is asked for, and it holds up no other.
func TestDo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang := make(chan struct{})
		var calls atomic.Int64
		read := func(path string, until chan struct{}) (string, error) {
			return files.Do("read", t.Name()+path, func() (string, error) {
				calls.Add(1)
				if until != nil {
					<-until
				}
				return "content of " + path, nil
			})
		}
		for range 3 {
			began := time.Now()
			_, err := read("a", hang)
			if failed, ok := errors.AsType[*fs.PathError](err); !ok || failed.Op != "read" || failed.Path != t.Name()+"a" {
				t.Errorf("it hangs: %v", err)
			}
			if took := time.Since(began); took != files.Limit {
				t.Errorf("it took %v to say so", took)
			}
		}
		if n := calls.Load(); n != 1 {
			t.Errorf("%d goroutines hang", n)
		}
		if content, err := read("b", nil); err != nil || content != "content of b" {
			t.Errorf("beside it: %q, %v", content, err)
		}
		close(hang)
		synctest.Wait()
		if content, err := read("a", nil); err != nil || content != "content of a" || calls.Load() != 3 {
			t.Errorf("after it went on: %q, %v, %d calls", content, err, calls.Load())
		}
	})
}

// TestDoFails: an error is passed on as it is.
func TestDoFails(t *testing.T) {
	if content, err := files.Do("read", t.Name(), func() ([]byte, error) { return []byte("half"), fs.ErrInvalid }); err != fs.ErrInvalid || string(content) != "half" { //nolint:errorlint // as it is
		t.Errorf("%q, %v", content, err)
	}
}

// TestReplacing: a file that can't be replaced is named, and is the same failure at each attempt.
func TestReplacing(t *testing.T) {
	directory := t.TempDir()
	taken := filepath.Join(directory, "taken")
	if err := os.MkdirAll(filepath.Join(taken, "not empty"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{filepath.Join(directory, "absent", "file"), taken} {
		replace := func() error {
			return files.Replacing(path, renameio.WriteFile(path, []byte("content"), 0o600, renameio.WithTempDir(filepath.Dir(path))))
		}
		first, second := replace(), replace()
		if first == nil || second == nil || first.Error() != second.Error() || !strings.Contains(first.Error(), path+": ") {
			t.Errorf("%s: %v, then %v", path, first, second)
		}
	}
	if err := files.Replacing(taken, nil); err != nil {
		t.Errorf("nothing failed: %v", err)
	}
}
