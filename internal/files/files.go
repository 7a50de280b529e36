package files

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sync/singleflight"
)

// Limit is how long an operation on a file may take. A file of a MiB takes a few milliseconds; a network file system that
// has not answered by then has lost its server, as a rule.
const Limit = 5 * time.Second

// calls are those that run, by operation, path and type of result. What hangs, hangs for the whole process.
var calls singleflight.Group //nolint:gochecknoglobals // so that a path has one call, whoever asks

// Do calls fn and returns what it returns, or an *fs.PathError once Limit is over. The call then goes on by itself, and
// whoever asks for the same operation and path meanwhile waits for that one: a path that hangs holds one goroutine. So fn may
// have begun before Do was called; a result that must be newer than that is to be asked for again.
func Do[T any](operation, path string, fn func() (T, error)) (T, error) {
	var value T
	call := calls.DoChan(fmt.Sprintf("%s %s %T", operation, path, value), func() (any, error) { return fn() })
	limit := time.NewTimer(Limit)
	defer limit.Stop()
	select {
	case result := <-call:
		value, _ = result.Val.(T)
		return value, result.Err
	case <-limit.C:
		return value, &fs.PathError{Op: operation, Path: path, Err: fmt.Errorf("it takes longer than %s: does its file system answer?", Limit)}
	}
}

// Replacing says of a failed replacement of a file which file it is about. A file is replaced by way of a temporary one, whose name
// differs at each attempt: with that name in it the same failure would be logged again at each attempt, as a new one.
func Replacing(path string, err error) error {
	if file, ok := errors.AsType[*fs.PathError](err); ok {
		return &fs.PathError{Op: file.Op, Path: path, Err: file.Err}
	}
	if link, ok := errors.AsType[*os.LinkError](err); ok {
		return &fs.PathError{Op: link.Op, Path: path, Err: link.Err}
	}
	return err
}
