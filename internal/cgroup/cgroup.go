package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Memory is the control group that limits this process's memory, or some group above it that it can see.
type Memory struct {
	directories []string // the process's own first, then those above it
	limit       string   // the file that holds the limit
	events      string   // the file that counts what the kernel killed
}

// Find returns the control group of the process, of version 2 or 1. The error is fs.ErrNotExist where the kernel has none, or
// none that can be seen.
func Find() (*Memory, error) { return find("/") }

// unlimited is more than any machine has. Version 1 has no word for no limit, but a number near to 2^63.
const unlimited = 1 << 60

func find(root string) (*Memory, error) {
	groups, err := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	if err != nil {
		return nil, err
	}
	mounts, err := os.ReadFile(filepath.Join(root, "proc/self/mountinfo"))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(groups)) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) < 3 {
			continue
		}
		m := &Memory{limit: "memory.max", events: "memory.events"}
		kind, option := "cgroup2", ""
		switch {
		case has(fields[1], "memory"):
			m.limit, m.events = "memory.limit_in_bytes", "memory.oom_control"
			kind, option = "cgroup", "memory"
		case fields[0] != "0":
			continue
		}
		for _, directory := range directories(string(mounts), kind, option, fields[2]) {
			directory = filepath.Join(root, directory)
			if _, err := os.Stat(filepath.Join(directory, m.limit)); err == nil { // the root of version 2 has none
				m.directories = append(m.directories, directory)
			}
		}
		if len(m.directories) > 0 {
			return m, nil
		}
	}
	return nil, &fs.PathError{Op: "find", Path: "the memory's control group", Err: fs.ErrNotExist}
}

// directories returns where a group is mounted, and those above it.
func directories(mounts, kind, option, group string) (all []string) {
	for line := range strings.Lines(mounts) {
		before, after, _ := strings.Cut(line, " - ")
		mount, system := strings.Fields(before), strings.Fields(after)
		if len(mount) < 5 || len(system) < 3 || system[0] != kind || option != "" && !has(system[2], option) {
			continue
		}
		top, point := mount[3], mount[4]
		below, err := filepath.Rel(top, group)
		if err != nil || strings.HasPrefix(below, "..") {
			below = "." // it is named as outside of a container: what is mounted is the container's own
		}
		for {
			all = append(all, filepath.Join(point, below))
			if below == "." {
				return all
			}
			below = filepath.Dir(below)
		}
	}
	return nil
}

func has(list, item string) bool {
	for one := range strings.SplitSeq(list, ",") {
		if one == item {
			return true
		}
	}
	return false
}

// Directory returns where the control group of the process itself is.
func (m *Memory) Directory() string { return m.directories[0] }

// Limit returns how many bytes the process may have, and the file that says so; 0 where there is no limit.
func (m *Memory) Limit() (bytes uint64, file string) {
	bytes = unlimited
	for _, directory := range m.directories {
		path := filepath.Join(directory, m.limit)
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		if n, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64); err == nil && n < bytes { // "max" is no number
			bytes, file = n, path
		}
	}
	if bytes == unlimited {
		return 0, ""
	}
	return bytes, file
}

// Sockets reports whether the limit counts what the kernel buffers for sockets: version 2 does.
func (m *Memory) Sockets() bool { return m.limit == "memory.max" }

// Kills returns how many processes of the group the kernel has killed since they took more memory than they may.
func (m *Memory) Kills() (uint64, error) {
	path := filepath.Join(m.directories[0], m.events)
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if name, number, _ := strings.Cut(strings.TrimSpace(line), " "); name == "oom_kill" {
			kills, err := strconv.ParseUint(number, 10, 64)
			if err != nil {
				return 0, fmt.Errorf("%s: %w", path, err)
			}
			return kills, nil
		}
	}
	return 0, fmt.Errorf("%s: %w", path, errors.New("it does not tell how many processes were killed"))
}
