package schema

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"mantlet/internal/files"
)

// Content is what was read of a file.
type Content struct {
	Text []byte
	Link string // where links led to, out of the file's volume; empty where they did not. See Withhold
}

// unread is a file that cannot be read: a problem with its place, and a reason that IsMissing knows.
type unread struct {
	Problem

	reason error
}

func (u unread) Unwrap() []error { return []error{u.Problem, u.reason} }

func readFile(path string, not ...string) (Content, error) {
	content, err := ReadContent(path, maxFile, not...)
	if perr, ok := errors.AsType[*fs.PathError](err); ok {
		err = perr.Err
	}
	if err != nil {
		return Content{}, unread{Problem{Origin: Origin{Source: path}, Reason: "cannot be read: " + err.Error()}, err}
	}
	return content, nil
}

// ReadFile reads a file, no more of it than a byte beyond most, and nothing but a file: a pipe would never end. It waits no
// longer than files.Limit. All errors are of *fs.PathError.
func ReadFile(path string, most int64) ([]byte, error) {
	return files.Do("read", path, func() ([]byte, error) {
		f, err := open(path)
		if err != nil {
			return nil, err
		}
		defer func() { _ = f.Close() }()
		return io.ReadAll(io.LimitReader(f, most+1))
	})
}

// ReadContent is ReadFile for a file whose text may be quoted: it tells where links led to. Where that is a directory among
// not, which the path does not name, it is an error.
func ReadContent(path string, most int64, not ...string) (Content, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return Content{}, &fs.PathError{Op: "find", Path: path, Err: err}
	}
	return files.Do("read", path, func() (Content, error) { return readContent(path, most, not) })
}

func readContent(path string, most int64, not []string) (Content, error) {
	f, err := open(path)
	if err != nil {
		return Content{}, err
	}
	defer func() { _ = f.Close() }()
	real, err := realPath(f)
	if err != nil {
		return Content{}, err
	}
	for _, directory := range not {
		if within(real, directory) && !within(path, directory) {
			return Content{}, unfit(path, fmt.Sprintf("it is a link to %s, and no file in %s is read as an override file", real, directory))
		}
	}
	content := Content{Link: outside(path, real)}
	content.Text, err = io.ReadAll(io.LimitReader(f, most+1))
	return content, err
}

// Link returns where the path of an open file led to, by links out of its volume; nothing where it did not, and for what is
// not a regular file.
func Link(f *os.File) string {
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return ""
	}
	path, err := filepath.Abs(f.Name())
	if err != nil {
		return ""
	}
	real, err := realPath(f)
	if err != nil {
		return ""
	}
	return outside(path, real)
}

func realPath(f *os.File) (string, error) {
	return os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
}

// outside returns a real path if it is not in the volume of the path that led there.
func outside(path, real string) string {
	if strings.HasPrefix(real, strings.TrimSuffix(volumeOf(path), "/")+"/") {
		return ""
	}
	return real
}

// open opens nothing but a file.
func open(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // else opening a pipe waits for its writer
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = unfit(path, "it must be a regular file, but is "+kindOf(info.Mode()))
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

func unfit(path, why string) error {
	return &fs.PathError{Op: "read", Path: path, Err: errors.New(why)}
}

// within reports whether a path is a directory's, or what a link in the place of the directory leads to.
func within(path, directory string) bool {
	if real, err := filepath.EvalSymlinks(directory); err == nil && strings.HasPrefix(path, real+"/") {
		return true
	}
	return strings.HasPrefix(path, filepath.Clean(directory)+"/")
}

// volumeOf returns the directory that links may lead to from a file without leading elsewhere: the one that the file is in.
// A link in the place of that directory, or above it, belongs to the image, unless it is in a mounted volume. What is in
// a volume comes from whoever fills it: there, as in a ConfigMap with items of several directories, it is all of the volume.
func volumeOf(path string) string {
	mounts := mountPoints()
	at, mounted := "/", ""
	for name := range strings.SplitSeq(strings.Trim(filepath.Dir(filepath.Clean(path)), "/"), "/") {
		at = filepath.Join(at, name)
		if info, err := os.Lstat(at); err == nil && info.Mode()&fs.ModeSymlink != 0 {
			if mounted != "" {
				return mounted
			}
			if real, err := filepath.EvalSymlinks(at); err == nil {
				at = real
			}
		}
		if mounts[at] {
			mounted = at
		}
	}
	return at
}

// mountPoints returns those of this process, but the root: the fifth field of each line of proc_pid_mountinfo(5).
func mountPoints() map[string]bool {
	const field = 4
	all := map[string]bool{}
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return all
	}
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > field && fields[field] != "/" {
			point, err := strconv.Unquote(`"` + fields[field] + `"`) // \040 is a space
			if err == nil {
				all[point] = true
			}
		}
	}
	return all
}

func kindOf(mode os.FileMode) string {
	switch mode.Type() {
	case fs.ModeDir:
		return "a directory"
	case fs.ModeNamedPipe:
		return "a pipe"
	default:
		return "something else"
	}
}
