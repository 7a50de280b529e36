package gate

import (
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"syscall"
)

// The exit codes of those who execute another program and cannot, as of env(1) and nohup(1) (POSIX.1-2017, XCU 2.8.2).
const (
	ExitNotFound      = 127
	ExitNotExecutable = 126
)

// ExecError says why a command could not be executed.
type ExecError struct {
	Code int // one of ExitNotFound and ExitNotExecutable
	err  error
}

func (e *ExecError) Error() string { return e.err.Error() }

// Unwrap returns the cause.
func (e *ExecError) Unwrap() error { return e.err }

// Exec makes the calling process the command args[0], found on PATH where it has no slash, with args as its arguments and
// environ as its environment. Process id, user, limits and open files stay. It returns only if it could not, an *ExecError.
func Exec(args, environ []string) error {
	path, err := exec.LookPath(args[0])
	if errors.Is(err, exec.ErrDot) { // PATH may hold the working directory: what a shell would execute
		err = nil
	}
	if err == nil {
		err = syscall.Exec(path, args, environ)
	}
	code := ExitNotExecutable
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		code = ExitNotFound
	}
	return &ExecError{code, fmt.Errorf("executing %q: %w", args[0], err)}
}
