package cgroup

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// TestFind reads what kernels and container runtimes show.
func TestFind(t *testing.T) {
	const (
		v2   = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup rw,nsdelegate\n"
		v1   = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
		both = "38 31 0:35 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n" +
			"32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n" + v1
	)
	for what, c := range map[string]struct {
		groups, mounts string
		files          map[string]string
		limit          uint64
		file           string
		kills          uint64
		missing        bool
	}{
		"version 2, in a namespace of its own": {
			"0::/\n", v2,
			map[string]string{"memory.max": "536870912\n", "memory.events": "low 0\nhigh 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 0\n"},
			512 << 20, "/sys/fs/cgroup/memory.max", 2, false,
		},
		"version 2, without a limit": {
			"0::/\n", v2, map[string]string{"memory.max": "max\n", "memory.events": "oom_kill 0\n"}, 0, "", 0, false,
		},
		"version 2, limited above": {
			"0::/pods/one/container\n", v2,
			map[string]string{
				"pods/one/container/memory.max": "max\n", "pods/one/container/memory.events": "oom_kill 1\n",
				"pods/one/memory.max": "1048576\n", "pods/memory.max": "2097152\n",
			},
			1 << 20, "/sys/fs/cgroup/pods/one/memory.max", 1, false,
		},
		"version 1": {
			"9:memory:/docker/abc\n8:cpu,cpuacct:/docker/abc\n0::/\n", both,
			map[string]string{
				"memory/docker/abc/memory.limit_in_bytes": "268435456\n",
				"memory/docker/abc/memory.oom_control":    "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n",
				"memory/memory.limit_in_bytes":            "9223372036854771712\n",
			},
			256 << 20, "/sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", 5, false,
		},
		"version 1, in a container that knows its name outside": {
			"9:memory:/kubepods/pod1/abc\n", "35 31 0:32 /kubepods/pod1/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
			map[string]string{"memory/memory.limit_in_bytes": "134217728\n", "memory/memory.oom_control": "oom_kill 0\n"},
			128 << 20, "/sys/fs/cgroup/memory/memory.limit_in_bytes", 0, false,
		},
		"version 1, where only the group above can be seen": {
			"9:memory:/elsewhere\n", "35 31 0:32 /kubepods /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
			map[string]string{"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.oom_control": "oom_kill 0\n"},
			0, "", 0, false,
		},
		"version 1, without a limit": {
			"9:memory:/\n", v1,
			map[string]string{"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.oom_control": "oom_kill 0\n"},
			0, "", 0, false,
		},
		"the root of version 2": {"0::/\n", v2, nil, 0, "", 0, true},
		"nothing mounted":       {"0::/\n", "", nil, 0, "", 0, true},
		"nothing":               {"", "", nil, 0, "", 0, true},
	} {
		t.Run(what, func(t *testing.T) {
			root := t.TempDir()
			write := func(name, text string) {
				path := filepath.Join(root, name)
				if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o600)); err != nil {
					t.Fatal(err)
				}
			}
			write("proc/self/cgroup", c.groups)
			write("proc/self/mountinfo", c.mounts)
			for name, text := range c.files {
				write("sys/fs/cgroup/"+name, text)
			}
			m, err := find(root)
			if c.missing {
				if !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("found %+v, %v", m, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			limit, file := m.Limit()
			if file != "" {
				file = file[len(root):]
			}
			if limit != c.limit || file != c.file {
				t.Errorf("the limit is %d, by %s; want %d, by %s", limit, file, c.limit, c.file)
			}
			if kills, err := m.Kills(); err != nil || kills != c.kills {
				t.Errorf("%d were killed, %v; want %d", kills, err, c.kills)
			}
		})
	}
}

// TestHere asks the kernel that the tests run on: whatever it answers, it can be read.
func TestHere(t *testing.T) {
	m, err := Find()
	if errors.Is(err, fs.ErrNotExist) {
		t.Logf("there is no control group: %v", err)
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	limit, file := m.Limit()
	kills, err := m.Kills()
	if err != nil {
		t.Error(err)
	}
	t.Logf("the limit is %d, by %q; %d were killed", limit, file, kills)
}
