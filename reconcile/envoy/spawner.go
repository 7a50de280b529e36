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

// Confine gives the thread that starts Envoys their user, restricts it by rules where the kernel can enforce them, and closes the runtime
// directory to all users but that one and root. In between, while the thread still has the privileges that all threads give up together,
// it calls drop. Where Envoys can't have a user of their own, none is started: Start says why.
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

// executableError returns why Envoy's user can't execute the binary, as far as its path tells.
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

// writeFile replaces a file by one that only Envoy's group may read, whatever the mode of the old one. The group is the directory's.
func writeFile(path string, content []byte) error {
	file, err := prepareFile(path, content)
	if err != nil {
		return err
	}
	defer func() { _ = file.Cleanup() }()
	return files.Replacing(path, file.CloseAtomicallyReplace())
}

// prepareFile writes the new file of writeFile, and leaves replacing the old one to its caller.
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

// spawner is the OS thread that starts Envoys, lives as long as they do, and does whatever only their user may do.
//
// It must live that long: Envoy asks the kernel for SIGTERM when its parent dies, and the kernel takes the end of the thread that forked
// it for that. Go ends threads as it likes.
type spawner struct {
	mu     sync.Mutex
	calls  chan func()
	failed error // why it does nothing any more

	untraced bool // the kernel does not let the thread trace what it starts; used only on the thread
}

// errUntraced says that a process could not be started as a traced one.
var errUntraced = errors.New("the kernel does not let mantlet trace Envoy as it starts")

// start starts a command as a process that other processes of its user can't look into. It is called on the thread. The error is
// errUntraced where the kernel forbids tracing; later calls start processes without it. dumpable says why others can look into the
// process, if they can.
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

// runThread runs calls on a thread that is never unlocked, and so ends with the goroutine. It can't be the process's first thread: that
// one can't end, and others take its user for the process's. If the goroutine is on the first thread, it holds that until it has started
// one on another.
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

// stop ends the thread. why is the error of all later calls.
func (s *spawner) stop(why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.calls != nil {
		close(s.calls)
	}
	s.calls, s.failed = nil, why
}
