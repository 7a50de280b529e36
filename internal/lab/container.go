package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"mantlet/internal/sandbox"
)

// limit takes all but these capabilities from what the calling thread will execute, as `drop: [ALL]` does, and the way to get
// more, as `allowPrivilegeEscalation: false`.
func limit(add []sandbox.Capability) error {
	for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
		if slices.ContainsFunc(add, func(a sandbox.Capability) bool { return a.Number == c }) {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			return fmt.Errorf("dropping capability %d: %w", c, err)
		}
	}
	return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
}

// container is what a program is executed in.
type container struct {
	Root         string // its root directory, which it can write, as it can do all that a privileged one can; "": the lab's, read-only
	Writable     string // the one directory, beside /dev/shm, where the root is read-only
	Capabilities []sandbox.Capability
	Forbidden    []uint32 // system calls
	Path         string
	Args         []string
	Env          []string
}

const (
	stageContainer   = "container"
	containerContent = "LAB_CONTAINER"
)

// around makes the command be the container's PID 1. The calling program is executed first, which is to call Enter.
func (c container) around(cmd *exec.Cmd) error {
	c.Path, c.Args, c.Env = cmd.Path, cmd.Args, cmd.Environ()
	text, err := json.Marshal(c)
	if c.Root == "" {
		err = errors.Join(err, os.MkdirAll(c.Writable, 0o777))
	}
	if err != nil {
		return err
	}
	cmd.Path, cmd.Env = "/proc/self/exe", []string{marker + "=" + stageContainer, containerContent + "=" + string(text)}
	cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWPID | unix.CLONE_NEWNS
	return nil
}

// execute turns PID 1 of new namespaces into the container's program. It returns only if it could not.
func execute() error {
	var c container
	if err := json.Unmarshal([]byte(os.Getenv(containerContent)), &c); err != nil {
		return err
	}
	runtime.LockOSThread() // which executes the program
	if c.Root != "" {
		if err := c.pivot(); err != nil {
			return err
		}
		return os.NewSyscallError("execve", unix.Exec(c.Path, c.Args, c.Env))
	}
	if err := c.mount(); err != nil {
		return err
	}
	if err := limit(c.Capabilities); err != nil {
		return err
	}
	if err := forbid(c.Forbidden); err != nil {
		return err
	}
	return os.NewSyscallError("execve", unix.Exec(c.Path, c.Args, c.Env))
}

// mount makes all mounts read-only but two, as `readOnlyRootFilesystem` does.
func (c container) mount() error {
	if err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &unix.MountAttr{
		Attr_set: unix.MOUNT_ATTR_RDONLY, Propagation: unix.MS_PRIVATE,
	}); err != nil {
		return fmt.Errorf("making mounts read-only: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mounting /proc: %w", err)
	}
	for _, directory := range []string{c.Writable, "/dev/shm"} {
		if err := unix.Mount(directory, directory, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mounting %s: %w", directory, err)
		}
		if err := unix.MountSetattr(unix.AT_FDCWD, directory, 0, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}); err != nil {
			return fmt.Errorf("making %s writable: %w", directory, err)
		}
	}
	return nil
}

// pivot makes the container's root directory the root, with a /proc, a /dev and a /dev/shm of its own.
func (c container) pivot() error {
	under := func(path string) string { return filepath.Join(c.Root, path) }
	devices := []string{"/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"}
	err := errors.Join(os.MkdirAll(under("/proc"), 0o755), os.MkdirAll(under("/dev/shm"), 0o755),
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), unix.Mount(c.Root, c.Root, "", unix.MS_BIND, ""))
	for _, path := range devices {
		err = errors.Join(err, os.WriteFile(under(path), nil, 0o666), unix.Mount(path, under(path), "", unix.MS_BIND, ""))
	}
	err = errors.Join(err,
		unix.Mount("proc", under("/proc"), "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""),
		unix.Mount("tmpfs", under("/dev/shm"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"),
		unix.Chdir(c.Root))
	if err == nil {
		err = errors.Join(unix.PivotRoot(".", "."), unix.Unmount(".", unix.MNT_DETACH), unix.Chdir("/")) // see pivot_root(2)
	}
	if err != nil {
		return fmt.Errorf("making %s the root: %w", c.Root, err)
	}
	return nil
}

// forbid refuses, to the calling thread and what it executes, these system calls and those that no container runtime's default
// profile (`seccompProfile: RuntimeDefault`) lets through without further capabilities. The thread must have no way to new
// privileges.
func forbid(calls []uint32) error {
	calls = append(calls,
		unix.SYS_ACCT, unix.SYS_ADD_KEY, unix.SYS_BPF, unix.SYS_CHROOT, unix.SYS_CLOCK_ADJTIME, unix.SYS_CLOCK_SETTIME, unix.SYS_DELETE_MODULE,
		unix.SYS_FANOTIFY_INIT, unix.SYS_FINIT_MODULE, unix.SYS_FSMOUNT, unix.SYS_FSOPEN, unix.SYS_INIT_MODULE, unix.SYS_IO_URING_SETUP,
		unix.SYS_KEXEC_LOAD, unix.SYS_KEYCTL, unix.SYS_MOUNT, unix.SYS_MOUNT_SETATTR, unix.SYS_MOVE_MOUNT,
		unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_OPEN_TREE, unix.SYS_PERF_EVENT_OPEN, unix.SYS_PIVOT_ROOT, unix.SYS_QUOTACTL, unix.SYS_REBOOT,
		unix.SYS_REQUEST_KEY, unix.SYS_SETDOMAINNAME, unix.SYS_SETHOSTNAME, unix.SYS_SETNS, unix.SYS_SETTIMEOFDAY, unix.SYS_SWAPON,
		unix.SYS_SYSLOG, unix.SYS_UMOUNT2, unix.SYS_UNSHARE, unix.SYS_USERFAULTFD, unix.SYS_VHANGUP,
	)
	calls = append(calls, ofThisArchitecture()...)
	statement := func(code uint16, k uint32, skipUnless uint8) unix.SockFilter {
		return unix.SockFilter{Code: code, K: k, Jf: skipUnless}
	}
	const load, equal, result = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
	program := []unix.SockFilter{statement(load, 0, 0)} // seccomp_data.nr
	for _, call := range append(calls, unix.SYS_CLONE3) {
		errno := unix.EPERM
		if call == unix.SYS_CLONE3 {
			errno = unix.ENOSYS // callers fall back to clone, whose flags a filter can see
		}
		program = append(program, statement(equal, call, 1), statement(result, unix.SECCOMP_RET_ERRNO|uint32(errno), 0))
	}
	program = append(program, statement(result, unix.SECCOMP_RET_ALLOW, 0))
	filter := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	if _, _, errno := unix.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&filter))); errno != 0 {
		return fmt.Errorf("forbidding system calls: %w", errno)
	}
	return nil
}
