package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// process is one of a container's, as the machine sees it.
type process struct {
	id     int
	status map[string]string // /proc/PID/status, see proc_pid_status(5)
}

// processes returns those of a pod's container that have a name, but for the kubelet's probes.
func processes(t *testing.T, pod corev1.Pod, container, name string) []process {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	id := containerID(t, pod, container)
	var all []process
	for _, file := range files {
		directory := filepath.Dir(file)
		cgroups, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(cgroups), id) {
			continue // it may have ended
		}
		text, err := os.ReadFile(filepath.Join(directory, "status"))
		if err != nil {
			continue
		}
		p := process{status: map[string]string{}}
		for line := range strings.Lines(string(text)) {
			key, value, _ := strings.Cut(line, ":")
			p.status[key] = strings.TrimSpace(value)
		}
		command, err := os.ReadFile(filepath.Join(directory, "cmdline"))
		if err != nil || p.status["Name"] != name || strings.HasPrefix(p.status["State"], "Z") || strings.Contains(string(command), "\x00probe\x00") {
			continue
		}
		if p.id, err = strconv.Atoi(filepath.Base(directory)); err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	return all
}

// containerID returns the id that the runtime knows a container by.
func containerID(t *testing.T, pod corev1.Pod, container string) string {
	t.Helper()
	for _, status := range append(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses...) {
		if _, id, ok := strings.Cut(status.ContainerID, "://"); ok && status.Name == container {
			return id
		}
	}
	t.Fatalf("pod %s has no container %s", pod.Name, container)
	return ""
}

// client returns a command of the workload, run in a pod: in the network and the files of its container, but not by the kubelet,
// since some tests end that.
func client(t *testing.T, pod corev1.Pod, args ...string) *exec.Cmd {
	t.Helper()
	program, _, _ := strings.Cut(pod.Spec.Containers[0].Image, ":")
	all := processes(t, pod, pod.Spec.Containers[0].Name, program)
	if len(all) == 0 {
		t.Fatalf("pod %s does not run", pod.Name)
	}
	target := "--target=" + strconv.Itoa(all[0].id)
	return exec.Command("nsenter", append([]string{target, "--net", "--mount", "--", "/usr/local/bin/" + program}, args...)...)
}
