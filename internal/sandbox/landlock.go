package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/psx"
)

// Rules are what stays allowed of the file system: what is not at or below one of these is closed, to read, write or
// execute. A name that is not there stands for the nearest directory above it that is: it may come later.
type Rules struct {
	Read, Execute, Write []string
	Link                 []string // as Write, and symbolic links may be made there
}

// ErrNoLandlock is the kernel's: it has no Landlock, or it is switched off, or seccomp hides it.
var ErrNoLandlock = errors.New("the kernel offers no Landlock")

// What the rights are. None of them is the right to read a file that can be written where it could be executed.
const (
	rightsRead    = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR
	rightsExecute = rightsRead | unix.LANDLOCK_ACCESS_FS_EXECUTE
	rightsWrite   = rightsRead | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_TRUNCATE |
		unix.LANDLOCK_ACCESS_FS_MAKE_REG | unix.LANDLOCK_ACCESS_FS_MAKE_SOCK | unix.LANDLOCK_ACCESS_FS_REMOVE_FILE
	rightsLink    = rightsWrite | unix.LANDLOCK_ACCESS_FS_MAKE_SYM
	rightsOfFiles = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE |
		unix.LANDLOCK_ACCESS_FS_TRUNCATE
)

// System is what every program needs to run: its interpreter and libraries, how names are resolved, what the kernel says of
// the machine, shared memory.
func System() Rules {
	return Rules{
		Read:    present("/etc", "/etc/resolv.conf", "/etc/hosts", "/proc", "/sys", "/dev/urandom", "/dev/random"),
		Execute: present("/bin", "/sbin", "/usr", "/lib", "/lib64"),
		Write:   present("/dev/null", "/dev/shm"),
	}
}

func present(paths ...string) []string {
	return slices.DeleteFunc(paths, func(path string) bool {
		_, err := os.Stat(path)
		return err != nil
	})
}

// And returns both.
func (r Rules) And(other Rules) Rules {
	return Rules{
		Read:    slices.Concat(r.Read, other.Read),
		Execute: slices.Concat(r.Execute, other.Execute),
		Write:   slices.Concat(r.Write, other.Write),
		Link:    slices.Concat(r.Link, other.Link),
	}
}

// RestrictThread puts rules in force for the calling thread and its children. Nor do they reach abstract sockets of
// processes that have other rules: those have no permissions. The thread must have called Confine.
func (r Rules) RestrictThread() error {
	return r.restrict(true, func(ruleset uintptr) error {
		if _, _, errno := unix.RawSyscall(unix.SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0, 0); errno != 0 {
			return errno
		}
		return nil
	})
}

// Restrict puts rules in force for all threads of the process and their children. Drop must have been called.
func (r Rules) Restrict() error {
	return r.restrict(false, func(ruleset uintptr) error {
		if _, _, errno := psx.Syscall3(unix.SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0, 0); errno != 0 {
			return errno
		}
		return nil
	})
}

// Landlock returns the version of the kernel's, and ErrNoLandlock where it has none.
func Landlock() (version uintptr, err error) {
	version, _, errno := unix.RawSyscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return 0, fmt.Errorf("%w: %w", ErrNoLandlock, errno)
	}
	return version, nil
}

func (r Rules) restrict(scoped bool, enforce func(ruleset uintptr) error) error {
	abi, err := Landlock()
	if err != nil {
		return err
	}
	attr := handled(abi)
	if scoped && abi >= 6 {
		attr.Scoped = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET
	}
	ruleset, _, errno := unix.RawSyscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0)
	if errno != 0 {
		return fmt.Errorf("making Landlock's ruleset: %w", errno)
	}
	defer func() { _ = unix.Close(int(ruleset)) }()
	for _, set := range []struct {
		rights uint64
		paths  []string
	}{{rightsRead, r.Read}, {rightsExecute, r.Execute}, {rightsWrite, r.Write}, {rightsLink, r.Link}} {
		for _, path := range set.paths {
			if err := allow(ruleset, path, set.rights&attr.Access_fs); err != nil {
				return fmt.Errorf("allowing %s: %w", path, err)
			}
		}
	}
	if err := enforce(ruleset); err != nil {
		return fmt.Errorf("putting Landlock's rules in force: %w", err)
	}
	return nil
}

// handled returns all that a version of Landlock can forbid of the file system.
func handled(abi uintptr) unix.LandlockRulesetAttr {
	rights := uint64(unix.LANDLOCK_ACCESS_FS_MAKE_SYM)<<1 - 1 // the first version's, of which this is the last
	if abi >= 2 {
		rights |= unix.LANDLOCK_ACCESS_FS_REFER
	}
	if abi >= 3 {
		rights |= unix.LANDLOCK_ACCESS_FS_TRUNCATE
	}
	if abi >= 5 {
		rights |= unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	}
	return unix.LandlockRulesetAttr{Access_fs: rights}
}

// allow adds a rule for what a path leads to: links are followed now, once.
func allow(ruleset uintptr, path string, rights uint64) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	for ; errors.Is(err, unix.ENOENT) && path != "/"; fd, err = unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0) {
		path = filepath.Dir(path)
	}
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return err
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFDIR {
		rights &= rightsOfFiles
	}
	rule := unix.LandlockPathBeneathAttr{Allowed_access: rights, Parent_fd: int32(fd)}
	if _, _, errno := unix.RawSyscall6(unix.SYS_LANDLOCK_ADD_RULE, ruleset, unix.LANDLOCK_RULE_PATH_BENEATH,
		uintptr(unsafe.Pointer(&rule)), 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// Inputs returns what to allow so that files of a directory can be read, also those that are links, and also once another
// directory took its place: the one above it, except where that is all there is.
func Inputs(directory string, files ...string) []string {
	all := []string{directory}
	for _, name := range files {
		if real, err := filepath.EvalSymlinks(filepath.Join(directory, name)); err == nil {
			all = append(all, filepath.Dir(real))
		}
	}
	for i, directory := range all {
		if above := filepath.Dir(directory); above != "/" {
			all[i] = above
		}
	}
	return all
}
