package node

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// prefix begins the names of nodes' cgroups; the id of the process that removes them follows.
const prefix = "mantlet-e2e-"

// hierarchy is a mounted cgroup hierarchy.
type hierarchy struct {
	path string // where it is mounted
	v2   bool
}

// hierarchies returns those that nodes use: all of version 1, or the one of version 2. In between, on machines with both,
// version 2 has no controllers.
func hierarchies() ([]hierarchy, error) {
	mounts, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer mounts.Close()
	var v1, v2 []hierarchy
	for lines := bufio.NewScanner(mounts); lines.Scan(); {
		// proc_pid_mountinfo(5): the fifth field is the mount point, and the type follows the separator.
		fields := strings.Fields(lines.Text())
		separator := slices.Index(fields, "-")
		if separator < 5 || !strings.HasPrefix(fields[4], "/sys/fs/cgroup") {
			continue
		}
		switch fields[separator+1] {
		case "cgroup":
			v1 = append(v1, hierarchy{path: fields[4]})
		case "cgroup2":
			v2 = append(v2, hierarchy{path: fields[4], v2: true})
		}
	}
	if len(v1) > 0 {
		return v1, nil
	}
	if len(v2) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted below /sys/fs/cgroup")
	}
	return v2, nil
}

// makeCgroups makes a cgroup for process id in each hierarchy, and moves the process there. They are all named after
// keeper.
func makeCgroups(id, keeper int) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		group := filepath.Join(h.path, prefix+strconv.Itoa(keeper))
		if h.v2 {
			if err := delegate(h.path); err != nil {
				return err
			}
		}
		if err := os.Mkdir(group, 0o755); err != nil {
			return fmt.Errorf("making a cgroup; e2e must be able to: %w", err)
		}
		// A new cgroup of version 1 has no CPUs and no memory nodes, and takes no process without.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			if text, err := os.ReadFile(filepath.Join(h.path, file)); err == nil && !h.v2 {
				if err := os.WriteFile(filepath.Join(group, file), text, 0o644); err != nil {
					return err
				}
			}
		}
		if err := os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte(strconv.Itoa(id)), 0o644); err != nil {
			return fmt.Errorf("moving a process to a cgroup: %w", err)
		}
	}
	return nil
}

// delegate lets the children of a cgroup of version 2 have all controllers that it has itself.
func delegate(group string) error {
	text, err := os.ReadFile(filepath.Join(group, "cgroup.controllers"))
	if err != nil {
		return err
	}
	var add []string
	for _, controller := range strings.Fields(string(text)) {
		add = append(add, "+"+controller)
	}
	if err := os.WriteFile(filepath.Join(group, "cgroup.subtree_control"), []byte(strings.Join(add, " ")), 0o644); err != nil {
		return fmt.Errorf("handing controllers down; no process may be in %s itself: %w", group, err)
	}
	return nil
}

// removeCgroups removes the cgroups of keepers that have ended, and those of one that ends. Their processes have ended.
func removeCgroups(keeper int) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		groups, err := filepath.Glob(filepath.Join(h.path, prefix+"*"))
		if err != nil {
			return err
		}
		for _, group := range groups {
			owner := strings.TrimPrefix(filepath.Base(group), prefix)
			if _, err := os.Stat("/proc/" + owner); err == nil && owner != strconv.Itoa(keeper) {
				continue // another node's
			}
			if err := remove(group); err != nil {
				return err
			}
		}
	}
	return nil
}

// remove removes a cgroup and those below it. The kernel can take a moment until it sees that one is empty.
func remove(group string) error {
	var groups []string
	err := filepath.WalkDir(group, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			groups = append(groups, path)
		}
		return err
	})
	if err != nil {
		return err
	}
	slices.Reverse(groups)
	for _, group := range groups {
		for range 100 {
			if err = unix.Rmdir(group); !errors.Is(err, unix.EBUSY) {
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
		if err != nil {
			return fmt.Errorf("removing cgroup %s: %w", group, err)
		}
	}
	return nil
}
