package sandbox

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// Obstacle is what keeps a user from a file, and what to do about it.
type Obstacle struct{ What, Remedy string }

func (o Obstacle) Error() string { return o.What + ": " + o.Remedy }

// Executable returns an Obstacle if owners, modes or a mount keep a user, whose group has the same number, from executing a program;
// nil if they do not. The program is a path, not a name to be found on PATH.
func Executable(program string, uid int) error {
	const remedy = "put Envoy into /usr/local/bin"
	real, err := filepath.EvalSymlinks(program)
	if err != nil {
		return err
	}
	for _, path := range []string{program, real} {
		if err := Enterable(filepath.Dir(path), uid, remedy); err != nil {
			return err
		}
	}
	info, err := os.Stat(real)
	if err != nil {
		return err
	}
	if !permits(info, uid, unix.X_OK) {
		return Obstacle{fmt.Sprintf("user %d may not execute %s (mode %04o)", uid, real, info.Mode().Perm()), "give it mode 0755"}
	}
	var system unix.Statfs_t
	if err := unix.Statfs(real, &system); err == nil && system.Flags&unix.ST_NOEXEC != 0 {
		return Obstacle{fmt.Sprintf("nothing can be executed on the volume of %s, which is mounted noexec", real), remedy}
	}
	return nil
}

// Enterable returns an Obstacle if the mode of a directory, or of one above it, keeps a user from entering it; nil if none does. A
// directory that does not exist keeps out nobody.
func Enterable(directory string, uid int, remedy string) error {
	directory, err := filepath.Abs(directory)
	if err != nil {
		return err
	}
	if directory != "/" {
		if err := Enterable(filepath.Dir(directory), uid, remedy); err != nil {
			return err
		}
	}
	info, err := os.Stat(directory)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if !permits(info, uid, unix.X_OK) {
		return Obstacle{fmt.Sprintf("user %d cannot enter %s (mode %04o)", uid, directory, info.Mode().Perm()), remedy}
	}
	return nil
}

// Writable returns an error if owner and mode keep a user from making files in a directory; nil if they do not.
func Writable(directory string, uid int) error {
	info, err := os.Stat(directory)
	if err == nil && !permits(info, uid, unix.W_OK|unix.X_OK) {
		err = fmt.Errorf("user %d may not write to %s (mode %04o)", uid, directory, info.Mode().Perm())
	}
	return err
}

// permits reports whether owner and mode let a user do something with a file: R_OK, W_OK and X_OK of access(2).
func permits(info fs.FileInfo, uid int, what fs.FileMode) bool {
	gid := uid
	if uid == os.Geteuid() {
		gid = os.Getegid()
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return true
	}
	mode := info.Mode().Perm()
	switch {
	case int(owner.Uid) == uid:
		mode >>= 6
	case int(owner.Gid) == gid:
		mode >>= 3
	}
	return mode&what == what
}
