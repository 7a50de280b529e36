package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// crash is how many requests of the load's four workers a crash of Envoy can cut: those that are open, and those that come next
// while the process is dead and the kernel has not closed its listeners yet.
const crash = 2 * 4

// victim applies a server of one pod, and the pod outside.
func (n namespace) victim() {
	n.t.Helper()
	d := deployment(n.t, "web.yaml")
	d.Spec.Replicas = new(int32(1))
	n.apply(d, outside(n.t))
	n.rollout("web")
	n.kubectl("wait", "--for=condition=Ready", "pod/outside")
}

// signal sends a signal to processes of the pod's mantlet container.
func (n namespace) signal(signal syscall.Signal, names ...string) {
	n.t.Helper()
	pod := n.pod("web")
	for _, name := range names {
		all := processes(n.t, pod, "mantlet", name)
		if len(all) == 0 {
			n.t.Fatalf("there is no %s", name)
		}
		for _, p := range all {
			if err := syscall.Kill(p.id, signal); err != nil {
				n.t.Fatal(err)
			}
		}
	}
}

// restarts returns how often the pod's mantlet container was restarted.
func (n namespace) restarts() int32 { return n.pod("web").Status.InitContainerStatuses[1].RestartCount }

// TestKilled kills Envoy, mantlet and both.
func TestKilled(t *testing.T) {
	n := newNamespace(t)
	n.victim()
	s := n.besiege()
	n.signal(syscall.SIGKILL, "envoy")
	s.answered()
	if restarts := n.restarts(); restarts != 0 {
		t.Errorf("the container was restarted when Envoy was killed")
	}
	for restarts, names := range [][]string{{"mantlet"}, {"envoy", "mantlet"}} {
		n.signal(syscall.SIGKILL, names...)
		eventually(t, "a container that is restarted", func() bool { return n.restarts() == int32(restarts+1) })
		s.answered()
	}
	s.raise(3 * crash)
}

// TestHang checks that the kubelet restarts a mantlet that hangs.
func TestHang(t *testing.T) {
	n := newNamespace(t)
	n.victim()
	s := n.besiege()
	start := time.Now()
	n.signal(syscall.SIGSTOP, "mantlet")
	eventually(t, "a container that is restarted", func() bool { return n.restarts() == 1 })
	t.Logf("restarted after %v", time.Since(start).Round(time.Second))
	s.answered()
	s.raise(crash)
	n.kubectl("wait", "--for=condition=Ready", "pod/"+n.pod("web").Name, "--timeout=60s")
}

// TestOutOfMemory gives mantlet's container no more memory than it has, while ever more clients come for whom it would take more,
// until the kernel kills Envoy.
func TestOutOfMemory(t *testing.T) {
	n := newNamespace(t)
	n.victim()
	s := n.besiege()
	pod := n.pod("web")
	envoy := processes(t, pod, "mantlet", "envoy")[0]
	flood := begin(t, s.outsider, "flood", s.address)
	// The kernel kills the process that has most.
	eventually(t, "an Envoy larger than mantlet", func() bool {
		return resident(t, pod, "envoy") > resident(t, pod, "mantlet")+16<<10
	})
	limit := memoryLimit(t, envoy)
	before, err := os.ReadFile(limit)
	if err != nil {
		t.Fatal(err)
	}
	// Version 1 of cgroups refuses a limit that memory does not fit in, and version 2 kills at once.
	size := 512
	for err == nil && size > 0 {
		size--
		err = os.WriteFile(limit, []byte(strconv.Itoa(size<<20)), 0)
	}
	eventually(t, "the end of Envoy", func() bool { return syscall.Kill(envoy.id, 0) != nil })
	flood.close()
	// With version 2 the container is gone, and its cgroup with it.
	if err := os.WriteFile(limit, before, 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	s.answered()
	t.Logf("Envoy was killed at %d MiB; the container was restarted %d times", size, n.restarts())
	s.raise(crash)
}

// resident returns how much memory a process has, in KiB.
func resident(t *testing.T, pod corev1.Pod, name string) int {
	t.Helper()
	all := processes(t, pod, "mantlet", name)
	if len(all) != 1 {
		t.Fatalf("%d processes %s, want 1", len(all), name)
	}
	size, err := strconv.Atoi(strings.TrimSuffix(all[0].status["RssAnon"], " kB"))
	if err != nil {
		t.Fatal(err)
	}
	return size
}

// memoryLimit returns the file with the memory limit of a process's cgroup.
func memoryLimit(t *testing.T, p process) string {
	t.Helper()
	cgroups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.id))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(cgroups)) {
		// cgroups(7): hierarchy:controllers:path; version 2 names no controllers.
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		switch fields[1] {
		case "memory":
			return filepath.Join("/sys/fs/cgroup/memory", fields[2], "memory.limit_in_bytes")
		case "":
			if _, err := os.Stat(filepath.Join("/sys/fs/cgroup", fields[2], "memory.max")); err == nil {
				return filepath.Join("/sys/fs/cgroup", fields[2], "memory.max")
			}
		}
	}
	t.Fatalf("no memory limit in cgroups %s", cgroups)
	return ""
}

// TestNodeRestart kills containerd and the kubelet: the pods do not notice. Then all containers die, as when the node loses its
// power: all pods come back, in their order.
func TestNodeRestart(t *testing.T) {
	n := newNamespace(t)
	n.victim()
	pod := n.pod("web")
	s := n.besiege()
	if err := cluster.Kill(t.Context(), "containerd", "kubelet"); err != nil {
		t.Fatal(err)
	}
	// An exec takes both.
	eventually(t, "an exec", func() bool {
		_, err := n.try("exec", pod.Name, "--container=mantlet", "--", "/usr/local/bin/mantlet", "probe", "ready")
		return err == nil
	})
	n.kubectl("wait", "--for=condition=Ready", "pod/"+pod.Name, "--timeout=120s")
	s.answered()
	if same := n.pod("web"); same.UID != pod.UID || n.restarts() != 0 {
		t.Errorf("the pod was restarted: %+v", same.Status)
	}
	s.raise(0)

	all, err := cluster.Containers()
	if err != nil || len(all) == 0 {
		t.Fatalf("processes of containers: %v, %v", all, err)
	}
	for _, process := range all {
		_ = syscall.Kill(process, syscall.SIGKILL) // it may have gone with another
	}
	if err := cluster.Kill(t.Context(), "containerd", "kubelet"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a restart of every container", func() bool {
		status := n.pod("web").Status
		return status.InitContainerStatuses[1].RestartCount > 0 && status.ContainerStatuses[0].RestartCount > 0
	})
	for _, app := range []string{"web", "outside"} {
		n.kubectl("wait", "--for=condition=Ready", "pod", "--selector=app="+app, "--timeout=120s")
	}
	n.besiege().raise(0)
}
