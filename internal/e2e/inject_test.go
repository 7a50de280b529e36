package e2e

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// injected returns what `mantlet inject` makes of a manifest of testdata/inject.
func injected(t *testing.T, file string) []byte {
	t.Helper()
	inject := exec.Command(*mantlet, "inject", "--image", "mantlet:e2e", filepath.Join("testdata", "inject", file))
	var said bytes.Buffer
	inject.Stderr = &said
	text, err := inject.Output()
	if err != nil || said.Len() > 0 {
		t.Fatalf("inject %s: %v: %s", file, err, &said)
	}
	return text
}

// inMesh checks that a pod's ports are what a mesh's are: one takes members alone, one anybody, by plain TCP.
func (n namespace) inMesh(app string) {
	n.t.Helper()
	outsider, address := n.pod("outside"), n.pod(app).Status.PodIP
	if body, err := get(n.t, outsider, "member", net.JoinHostPort(address, "9000")); err != nil {
		n.t.Errorf("%s, by mutual TLS: %q: %v", app, body, err)
	}
	for _, role := range []string{"plaintext", "anonymous", "stranger"} {
		if body, err := get(n.t, outsider, role, net.JoinHostPort(address, "9000")); err == nil {
			n.t.Errorf("%s lets %s in: %s", app, role, body)
		}
	}
	if body, err := get(n.t, outsider, "plaintext", net.JoinHostPort(address, "7890")); err != nil {
		n.t.Errorf("%s, in plaintext at a passthrough port: %q: %v", app, body, err)
	}
}

// TestInject checks that manifests that know nothing of a mesh run in it once `mantlet inject` has added the sidecar: with the
// initializer's certificates, the kubelet's probes, users, a ConfigMap and the gate.
func TestInject(t *testing.T) {
	n := newNamespace(t)
	n.apply(injected(t, "deployment.yaml"), injected(t, "statefulset.yaml"), injected(t, "daemonset.yaml"), injected(t, "contrast.yaml"), outside(t))
	for _, workload := range []string{"deployment/shopfront", "statefulset/orders", "daemonset/agent", "deployment/voting"} {
		n.kubectl("rollout", "status", workload, "--timeout=180s")
	}
	n.kubectl("wait", "--for=condition=Ready", "pod/outside")
	for _, app := range []string{"shopfront", "orders", "agent", "voting"} {
		n.inMesh(app)
	}
	if body, err := get(t, n.pod("outside"), "anonymous", net.JoinHostPort(n.pod("voting").Status.PodIP, "8080")); err != nil {
		t.Errorf("a port that is TLS for anyone: %q: %v", body, err)
	}
	n.apply(injected(t, "job.yaml"))
	n.kubectl("wait", "--for=condition=Complete", "job/ordering", "--timeout=120s")
}

// TestContrast checks that mantlet does its work in the container that Contrast's generator writes for its own sidecar.
func TestContrast(t *testing.T) {
	n := newNamespace(t)
	pod, err := os.ReadFile("testdata/contrast.yaml")
	if err != nil {
		t.Fatal(err)
	}
	n.apply(pod, outside(t))
	n.kubectl("wait", "--for=condition=Ready", "pod/outside", "pod/emoji", "--timeout=180s")
	n.inMesh("emoji")
	for role, want := range map[string]bool{"member": true, "plaintext": false} {
		body, err := get(t, n.pod("outside"), role, net.JoinHostPort(n.pod("emoji").Status.PodIP, "9901")+"/metrics")
		if (err == nil) != want {
			t.Errorf("metrics, %s: %q: %v", role, body, err)
		}
	}
}
