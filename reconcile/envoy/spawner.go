package envoy

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"mantlet/internal/files"
	"mantlet/internal/sandbox"
)

// Confine makes the thread that starts Envoys their user's, within rules where the kernel can enforce them, and lets no
// other user but root into the runtime directory. In between, while the thread still has what all threads are to give up
// alike, it calls drop. Where Envoys can't have a user of their own, none is started: Start says why.
func (r *Runner) Confine(rules sandbox.Rules, drop func() error) error {
	failed := os.MkdirAll(r.RuntimeDirectory, 0o700)
	if failed == nil {
		failed = r.spawner.do(func() error {
			return sandbox.Become(r.UID, r.Needs, filepath.Dir(r.RuntimeDirectory), r.RuntimeDirectory)
		})
	}
	if err := drop(); err != nil {
		return err
	}
	if failed == nil {
		failed = r.spawner.do(func() error { return errors.Join(sandbox.Confine(), rules.RestrictThread()) })
	}
	if errors.Is(failed, os.ErrPermission) {
		if obstacle := r.executableError(); obstacle != nil {
			r.spawner.stop(fmt.Errorf("executing %q: %w", r.Path, obstacle))
			return nil
		}
	}
	if failed != nil && !errors.Is(failed, sandbox.ErrNoLandlock) {
		r.spawner.stop(fmt.Errorf("confining Envoy: %w", failed))
	}
	return nil
}

// executableError returns why Envoys' user can't execute the binary, where its path tells.
func (r *Runner) executableError() error {
	path, err := exec.LookPath(r.Path)
	if err != nil {
		return nil // Start says why
	}
	err = sandbox.Executable(path, r.UID)
	if _, ok := errors.AsType[sandbox.Obstacle](err); !ok {
		return nil
	}
	return err
}

// writeFile replaces a file by one that Envoy may read, and no other user, whatever the mode of the one that was there. Its
// group is the directory's, which Envoy's is.
func writeFile(path string, content []byte) error {
	file, err := prepareFile(path, content)
	if err != nil {
		return err
	}
	defer func() { _ = file.Cleanup() }()
	return files.Replacing(path, file.CloseAtomicallyReplace())
}

// prepareFile writes what is to replace a file as writeFile does, and leaves the replacement to its caller.
func prepareFile(path string, content []byte) (*renameio.PendingFile, error) {
	file, err := renameio.NewPendingFile(path, renameio.WithStaticPermissions(0o640), renameio.WithTempDir(filepath.Dir(path)))
	if err != nil {
		return nil, files.Replacing(path, err)
	}
	if _, err := file.Write(content); err != nil {
		return nil, errors.Join(files.Replacing(path, err), file.Cleanup())
	}
	return file, nil
}

// spawner is the OS thread that starts Envoys, lives as long as they do, and does whatever else only their user may.
//
// It must live: Envoy asks the kernel for SIGTERM at its parent's death, and the kernel takes the end of the thread that
// forked it for that; Go ends threads as it likes.
type spawner struct {
	mu     sync.Mutex
	calls  chan func()
	failed error // why it does nothing

	untraced bool // the kernel does not let the thread trace what it starts; the thread alone has it
}

// errUntraced is that a process could not be started as one that is traced.
var errUntraced = errors.New("the kernel does not let mantlet trace Envoy as it starts")

// start starts a command as a process that other processes of its user can't look into. It is called on the thread. The error is
// errUntraced where the kernel forbids the first such attempt: the next ones are as usual. A process that runs with dumpable set could
// not be made undumpable: why is told.
func (s *spawner) start(cmd *exec.Cmd) (dumpable, err error) {
	cmd.SysProcAttr.Ptrace = !s.untraced
	if err := cmd.Start(); err != nil {
		if cmd.SysProcAttr.Ptrace && errors.Is(err, unix.EPERM) {
			s.untraced = true
			return nil, errUntraced
		}
		return nil, err
	}
	if s.untraced {
		return errUntraced, nil
	}
	return sandbox.Undumpable(cmd.Process.Pid), nil
}

// do calls fn on the thread.
func (s *spawner) do(fn func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed != nil {
		return s.failed
	}
	if s.calls == nil {
		s.calls = make(chan func())
		go runThread(s.calls)
	}
	done := make(chan error)
	s.calls <- func() { done <- fn() }
	return <-done
}

// runThread calls what comes, on a thread that is never unlocked and so ends with the goroutine. The process's first thread
// can't end, and its user is the process's to others: that one is held until another is found.
func runThread(calls <-chan func()) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		found := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(found)
			runThread(calls)
		}()
		<-found
		runtime.UnlockOSThread() //nolint:forbidigo // nothing was changed on this one
		return
	}
	for call := range calls {
		call()
	}
}

// stop ends the thread. It says why nothing is done any more.
func (s *spawner) stop(why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.calls != nil {
		close(s.calls)
	}
	s.calls, s.failed = nil, why
}
