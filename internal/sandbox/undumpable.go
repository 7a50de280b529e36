package sandbox

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Undumpable takes from other processes of its user, and from root without CAP_SYS_PTRACE, a process's memory, environment, descriptors
// and root directory (ptrace(2), proc(5)), and makes it leave no core. The process must have been started with SysProcAttr.Ptrace by the
// calling thread, and not have been waited for: it stands before its first instruction. Whatever comes of it, it goes on.
//
// A process can only do that itself, by prctl(PR_SET_DUMPABLE), and what it did before it executed its program is undone by that: so the
// process is made to do it, by an instruction of its own that makes a system call. Its memory is not written to.
func Undumpable(pid int) error {
	if err := awaitTrap(pid); err != nil {
		return fmt.Errorf("waiting until the process is executed: %w", err)
	}
	return errors.Join(forbidDumps(pid), os.NewSyscallError("ptrace", unix.PtraceDetach(pid)))
}

// awaitTrap waits until a traced process stops for its tracer.
func awaitTrap(pid int) error {
	for {
		var status unix.WaitStatus
		_, err := unix.Wait4(pid, &status, unix.WALL, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return os.NewSyscallError("wait4", err)
		case status.Stopped() && status.StopSignal() == unix.SIGTRAP:
			return nil
		}
		return fmt.Errorf("it has the wait status %#x", uint32(status))
	}
}
