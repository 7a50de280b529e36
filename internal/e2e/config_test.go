package e2e

import (
	"encoding/json"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// withConfig gives a Deployment's mantlet the override file of ConfigMap "mesh", with this mount but for its volume.
func withConfig(d *appsv1.Deployment, mount corev1.VolumeMount) *appsv1.Deployment {
	pod := &d.Spec.Template.Spec
	sidecar := mantletOf(pod)
	set(sidecar, "MANTLET_CONFIG", "/etc/mantlet/mantlet.yaml")
	mount.Name, mount.ReadOnly = "mesh", true
	sidecar.VolumeMounts = append(sidecar.VolumeMounts, mount)
	pod.Volumes = append(pod.Volumes, corev1.Volume{Name: "mesh", VolumeSource: corev1.VolumeSource{
		ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "mesh"}},
	}})
	return d
}

func configMap(text string) *corev1.ConfigMap {
	return &corev1.ConfigMap{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "ConfigMap"},
		ObjectMeta: metav1.ObjectMeta{Name: "mesh"},
		Data:       map[string]string{"mantlet.yaml": text},
	}
}

// TestConfigMap checks what becomes of edits of a ConfigMap: a good one comes in force, and a bad one is told, changes nothing and
// is forgotten once a good one follows.
func TestConfigMap(t *testing.T) {
	n := newNamespace(t)
	n.apply(configMap("ingress: []\n"), withConfig(backend(t, "web"), corev1.VolumeMount{MountPath: "/etc/mantlet"}), outside(t))
	n.rollout("web")
	n.kubectl("wait", "--for=condition=Ready", "pod/outside")
	pod, outsider := n.pod("web"), n.pod("outside")
	address := net.JoinHostPort(pod.Status.PodIP, "9000")
	open := func() bool {
		_, err := get(t, outsider, "anonymous", address)
		return err == nil
	}
	if open() {
		t.Fatal("port 9000 is open before it is said to be")
	}

	n.apply(configMap("ingress: [{port: 9000, mode: tls}]\n"))
	eventually(t, "port 9000 being open", open)
	t.Logf("in force %v after the kubelet changed the volume", n.inForce(pod).Sub(changed(t, pod)))

	n.apply(configMap("ingress: [{port: 9000, mode: tsl}]\n"))
	const told = "mantlet.yaml:1:30: ingress[9000].mode"
	eventually(t, "a status that says what is wrong", func() bool {
		return strings.Contains(strings.Join(n.status(pod).Problems, "\n"), told)
	})
	if log := n.kubectl("logs", pod.Name, "--container=mantlet"); !strings.Contains(log, told) {
		t.Errorf("the log does not say what is wrong:\n%s", log)
	}
	if s := n.status(pod); !s.Ready || !open() {
		t.Errorf("the last good state does not go on: %+v", s)
	}

	n.apply(configMap("ingress: []\n"))
	eventually(t, "port 9000 being mutual TLS again", func() bool { return !open() })
	if s := n.status(pod); len(s.Problems) > 0 {
		t.Errorf("problems that are no more: %q", s.Problems)
	}
}

// changed returns when the kubelet last changed the volume of ConfigMap "mesh".
func changed(t *testing.T, pod corev1.Pod) time.Time {
	t.Helper()
	// A link to the directory of the current files, replaced as a whole.
	link, err := os.Lstat(cluster.Path("/var/lib/kubelet/pods/" + string(pod.UID) + "/volumes/kubernetes.io~configmap/mesh/..data"))
	if err != nil {
		t.Fatal(err)
	}
	return link.ModTime()
}

// inForce returns when a pod's mantlet last put rules in force.
func (n namespace) inForce(pod corev1.Pod) (last time.Time) {
	n.t.Helper()
	for line := range strings.Lines(n.kubectl("logs", pod.Name, "--container=mantlet")) {
		var entry struct {
			Time time.Time
			Msg  string
		}
		if json.Unmarshal([]byte(line), &entry) == nil && entry.Msg == "rules are in force" {
			last = entry.Time
		}
	}
	return last
}

// TestSubPath checks that mantlet tells of an override file that edits never reach.
func TestSubPath(t *testing.T) {
	n := newNamespace(t)
	mount := corev1.VolumeMount{MountPath: "/etc/mantlet/mantlet.yaml", SubPath: "mantlet.yaml"}
	n.apply(configMap("ingress: []\n"), withConfig(backend(t, "web"), mount))
	n.rollout("web")
	check := n.kubectl("exec", n.pod("web").Name, "--container=mantlet", "--", "/usr/local/bin/mantlet", "check")
	if !strings.Contains(check, "subPath") {
		t.Errorf("mantlet check tells nothing of it:\n%s", check)
	}
}
