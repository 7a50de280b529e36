package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// The capabilities of include/uapi/linux/capability.h, as bits.
const (
	setGID   = 1 << 6
	setUID   = 1 << 7
	netAdmin = 1 << 12
	netRaw   = 1 << 13
)

// testLeastPrivilege checks what processes have that the manifest's security context made: what may be had at all, what
// mantlet and Envoy keep of it, the seccomp filter, and the root that cannot be written.
func testLeastPrivilege(n namespace) {
	pod := n.pods("web")[0]
	for name, want := range map[string]struct{ user, effective string }{
		"mantlet": {"0", fmt.Sprintf("%016x", netAdmin)},
		"envoy":   {"1337", fmt.Sprintf("%016x", netRaw)},
	} {
		all := processes(n.t, pod, "mantlet", name)
		if len(all) != 1 {
			n.t.Fatalf("%d processes %s, want 1", len(all), name)
		}
		p := all[0].status
		bounding, err := strconv.ParseUint(p["CapBnd"], 16, 64)
		if err != nil || bounding&^(setGID|setUID|netAdmin|netRaw) != 0 {
			n.t.Errorf("%s could have capabilities %s", name, p["CapBnd"])
		}
		if p["CapEff"] != want.effective {
			n.t.Errorf("%s has capabilities %s, want %s", name, p["CapEff"], want.effective)
		}
		if user := strings.Fields(p["Uid"])[0]; user != want.user {
			n.t.Errorf("%s runs as %s, want %s", name, user, want.user)
		}
		if p["Seccomp"] != "2" || p["NoNewPrivs"] != "1" {
			n.t.Errorf("%s: seccomp mode %s, no new privileges %s", name, p["Seccomp"], p["NoNewPrivs"])
		}
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/root/written", all[0].id), nil, 0o600); err == nil {
			n.t.Errorf("the root of %s can be written", name)
		}
	}
}

// TestEnvoyUser checks that Envoy can be any user.
func TestEnvoyUser(t *testing.T) {
	n := newNamespace(t)
	d := backend(t, "web")
	set(mantletOf(&d.Spec.Template.Spec), "MANTLET_ENVOY_UID", "4321")
	n.apply(d)
	n.rollout("web")
	all := processes(t, n.pod("web"), "mantlet", "envoy")
	if len(all) != 1 || strings.Fields(all[0].status["Uid"])[0] != "4321" {
		t.Errorf("Envoys: %v, want one of user 4321", all)
	}
}

// TestHostNetwork checks that a Deployment with hostNetwork is refused before it is deployed, and that mantlet says what is wrong where it
// is. It is not run there: it refuses the kernel's first network namespace, and this node has another one, which it would close.
func TestHostNetwork(t *testing.T) {
	n := newNamespace(t)
	d := backend(t, "web")
	d.Spec.Template.Spec.HostNetwork = true
	d.Spec.Template.Spec.Containers[0].Ports = nil
	validate := exec.Command(*mantlet, "validate", "--manifest", "-")
	validate.Stdin = manifest(t, d)
	if out, err := validate.CombinedOutput(); validate.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), "hostNetwork") {
		t.Errorf("validate: %v: %s", err, out)
	}

	pod := outside(t)
	pod.Name = "check"
	pod.Spec.HostNetwork = true
	pod.Spec.RestartPolicy = corev1.RestartPolicyNever
	sidecar := mantletOf(&d.Spec.Template.Spec).DeepCopy()
	sidecar.RestartPolicy, sidecar.StartupProbe, sidecar.ReadinessProbe, sidecar.LivenessProbe = nil, nil, nil, nil
	sidecar.Command = []string{"/usr/local/bin/mantlet", "check"}
	pod.Spec.Containers, pod.Spec.Volumes = []corev1.Container{*sidecar}, d.Spec.Template.Spec.Volumes
	n.apply(pod)
	eventually(t, "a check that says what is wrong", func() bool {
		log, err := n.try("logs", pod.Name)
		return err == nil && strings.Contains(log, "hostNetwork")
	})
}

// TestPodSecurity checks which Pod Security level a namespace must have: "privileged", and no other lets the examples in.
func TestPodSecurity(t *testing.T) {
	n := newNamespace(t)
	d := deployment(t, "web.yaml")
	pod := outside(t)
	pod.Spec = d.Spec.Template.Spec
	for level, admitted := range map[string]bool{"restricted": false, "baseline": false, "privileged": true} {
		n.kubectl("label", "namespace", n.name, "--overwrite", "pod-security.kubernetes.io/enforce="+level)
		cmd := n.command("create", "--dry-run=server", "--filename=-")
		cmd.Stdin = manifest(t, pod)
		_, err := output(cmd)
		if (err == nil) != admitted {
			t.Errorf("%s: admitted %t, want %t: %v", level, err == nil, admitted, err)
		}
		if err != nil && !strings.Contains(err.Error(), "NET_ADMIN") {
			t.Errorf("%s: refused for another reason: %v", level, err)
		}
	}
}
