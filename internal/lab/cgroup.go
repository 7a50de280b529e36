package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"mantlet/internal/cgroup"
)

// MemoryGroup is a control group whose processes have so much memory together, and no more.
type MemoryGroup struct{ directory string }

// NewMemoryGroup makes one below that of this process. The error is fs.ErrPermission, or of another kind, where the machine does not
// let this process make any.
func NewMemoryGroup(name string, bytes uint64) (*MemoryGroup, error) {
	own, err := cgroup.Find()
	if err != nil {
		return nil, err
	}
	g := &MemoryGroup{filepath.Join(own.Directory(), fmt.Sprintf("%s-%d", name, os.Getpid()))}
	if err := os.Mkdir(g.directory, 0o755); err != nil {
		return nil, err
	}
	for _, file := range []string{"memory.max", "memory.limit_in_bytes"} { // of version 2, and 1
		if err = os.WriteFile(filepath.Join(g.directory, file), []byte(strconv.FormatUint(bytes, 10)), 0o600); err == nil {
			return g, nil
		}
	}
	return nil, errors.Join(err, g.Remove())
}

// Script returns the lines of a shell script by which a process joins the group.
func (g *MemoryGroup) Script() string { return fmt.Sprintf("echo $$ >%s/cgroup.procs\n", g.directory) }

// Used returns how many bytes the processes of the group have.
func (g *MemoryGroup) Used() (uint64, error) {
	for _, file := range []string{"memory.current", "memory.usage_in_bytes"} {
		if text, err := os.ReadFile(filepath.Join(g.directory, file)); err == nil {
			return strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
		}
	}
	return 0, fmt.Errorf("%s does not tell what is used", g.directory)
}

// Remove removes the group. Its processes must have ended.
func (g *MemoryGroup) Remove() error { return os.Remove(g.directory) }
