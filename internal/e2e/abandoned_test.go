package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestAbandoned checks that nothing is left of a node whose tests are killed.
func TestAbandoned(t *testing.T) {
	tests := exec.Command("/proc/self/exe", "-test.run=^$", "-bin="+*bin, "-scratch="+t.TempDir(), "-mantlet="+*mantlet, "-envoy="+*envoy)
	if err := tests.Start(); err != nil {
		t.Fatal(err)
	}
	keeper := 0
	eventually(t, "a node's cgroups", func() bool {
		for _, group := range cgroups(t, "*") {
			_, id, _ := strings.Cut(filepath.Base(group), "mantlet-e2e-")
			status, _ := os.ReadFile("/proc/" + id + "/status")
			if strings.Contains(string(status), "\nPPid:\t"+strconv.Itoa(tests.Process.Pid)+"\n") {
				keeper, _ = strconv.Atoi(id)
			}
		}
		return keeper != 0 && len(members(t, keeper)) > 3
	})
	if err := tests.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = tests.Wait()
	eventually(t, "nothing being left", func() bool {
		_, err := os.Stat("/proc/" + strconv.Itoa(keeper))
		return err != nil && len(cgroups(t, strconv.Itoa(keeper))) == 0 && len(members(t, keeper)) == 0
	})
}

// cgroups returns those of a node, by its keeper's id.
func cgroups(t *testing.T, keeper string) []string {
	t.Helper()
	var all []string
	for _, pattern := range []string{"/sys/fs/cgroup/mantlet-e2e-", "/sys/fs/cgroup/*/mantlet-e2e-"} {
		groups, err := filepath.Glob(pattern + keeper)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, groups...)
	}
	return all
}

// members returns the processes of a node.
func members(t *testing.T, keeper int) []string {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, file := range files {
		if text, err := os.ReadFile(file); err == nil && strings.Contains(string(text), "/mantlet-e2e-"+strconv.Itoa(keeper)) {
			all = append(all, file)
		}
	}
	return all
}
