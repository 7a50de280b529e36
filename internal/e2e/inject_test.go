package e2e

import (
	"bytes"
	"net"
	"os/exec"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/yaml"
)

// TestInject checks that a Deployment that knows nothing of a mesh runs in it once `mantlet inject` has added the sidecar: with the
// initializer's certificates, the kubelet's probe and the gate.
func TestInject(t *testing.T) {
	n := newNamespace(t)
	d := backend(t, "web")
	pod := &d.Spec.Template.Spec
	pod.InitContainers = slices.DeleteFunc(pod.InitContainers, func(c corev1.Container) bool { return c.Name == "mantlet" })
	pod.Volumes = slices.DeleteFunc(pod.Volumes, func(v corev1.Volume) bool { return v.Name != "tls-config" })
	workload := &pod.Containers[0]
	workload.Command = []string{"/usr/local/bin/web"}
	workload.ReadinessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Port: intstr.FromInt32(8080)}}}
	plain, err := yaml.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	inject := exec.Command(*mantlet, "inject", "--image", "mantlet:e2e", "--ingress", "web#8080#false##metrics#7890#true", "--gate")
	inject.Stdin = bytes.NewReader(plain)
	var said bytes.Buffer
	inject.Stderr = &said
	injected, err := inject.Output()
	if err != nil || said.Len() > 0 {
		t.Fatalf("inject: %v: %s", err, &said)
	}
	n.apply(injected, outside(t))
	n.rollout("web")
	n.kubectl("wait", "--for=condition=Ready", "pod/outside")
	outsider, address := n.pod("outside"), n.pod("web").Status.PodIP
	if body, err := get(t, outsider, "member", net.JoinHostPort(address, "9000")); err != nil {
		t.Errorf("over mutual TLS: %q: %v", body, err)
	}
	if body, err := get(t, outsider, "plaintext", net.JoinHostPort(address, "9000")); err == nil {
		t.Errorf("in plaintext: %s", body)
	}
	if body, err := get(t, outsider, "plaintext", net.JoinHostPort(address, "7890")); err != nil {
		t.Errorf("in plaintext, at a passthrough port: %q: %v", body, err)
	}
}
