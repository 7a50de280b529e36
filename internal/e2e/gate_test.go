package e2e

import (
	"net"
	"slices"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
)

// withGate makes a Deployment's workload insist on its mesh.
func withGate(d *appsv1.Deployment) *appsv1.Deployment {
	pod := &d.Spec.Template.Spec
	pod.Volumes = append(pod.Volumes, corev1.Volume{Name: "gate", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}})
	mount := corev1.VolumeMount{Name: "gate", MountPath: "/gate"}

	sidecar, workload := mantletOf(pod), &pod.Containers[0]
	sidecar.VolumeMounts = append(sidecar.VolumeMounts, mount)
	installer := pod.InitContainers[0]
	installer.Name, installer.Image = "install", sidecar.Image
	installer.Command = []string{"/usr/local/bin/mantlet", "install", "/gate"}
	installer.VolumeMounts = []corev1.VolumeMount{mount}

	mount.ReadOnly = true
	workload.VolumeMounts = append(workload.VolumeMounts, mount)
	workload.Command = []string{"/gate/mantlet", "gate", "--", "/usr/local/bin/web"}
	for _, container := range []*corev1.Container{sidecar, workload} {
		set(container, "MANTLET_GATE_SOCKET", "/gate/mantlet.sock")
	}
	pod.InitContainers = slices.Insert(pod.InitContainers, 0, installer)
	return d
}

// TestGate checks that a workload with the gate starts behind mantlet, and not where mantlet was left out.
func TestGate(t *testing.T) {
	n := newNamespace(t)
	without := withGate(backend(t, "without"))
	pod := &without.Spec.Template.Spec
	pod.InitContainers = slices.DeleteFunc(pod.InitContainers, func(c corev1.Container) bool { return c.Name == "mantlet" })
	pod.Containers[0].ReadinessProbe = nil // which mantlet would answer
	n.apply(withGate(backend(t, "web")), without, outside(t))
	n.rollout("web", "without")
	n.kubectl("wait", "--for=condition=Ready", "pod/outside")
	outsider := n.pod("outside")
	if body, err := get(t, outsider, "member", net.JoinHostPort(n.pod("web").Status.PodIP, "9000")); err != nil {
		t.Errorf("behind mantlet: %q: %v", body, err)
	}
	if body, err := get(t, outsider, "plaintext", net.JoinHostPort(n.pod("without").Status.PodIP, "9000")); err == nil {
		t.Errorf("the workload started without mantlet: %s", body)
	}
	if all := processes(t, n.pod("without"), "web", "mantlet"); len(all) != 1 {
		t.Errorf("%d gates wait, want 1", len(all))
	}
}
