package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// namespace is a Kubernetes namespace, and the test that it is of.
type namespace struct {
	t    *testing.T
	name string
}

// newNamespace makes a namespace that ends with the test. If the test fails, it shows how the pods are.
func newNamespace(t *testing.T) namespace {
	t.Helper()
	n := namespace{t, strings.ToLower(t.Name())}
	n.kubectl("create", "namespace", n.name)
	t.Cleanup(func() {
		if t.Failed() {
			n.show()
		}
		n.kubectl("delete", "pods", "--all", "--grace-period=1")
		n.kubectl("delete", "namespace", n.name, "--wait=false")
	})
	return n
}

// of returns the namespace for a part of its test.
func (n namespace) of(t *testing.T) namespace { return namespace{t, n.name} }

// command returns kubectl for the namespace.
func (n namespace) command(args ...string) *exec.Cmd {
	return cluster.Command(context.Background(), "kube", append([]string{"kubectl", "--namespace=" + n.name}, args...)...)
}

// try runs kubectl and returns its standard output; an error has what it said instead.
func (n namespace) try(args ...string) (string, error) { return output(n.command(args...)) }

func output(cmd *exec.Cmd) (string, error) {
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%w: %s", err, bytes.TrimSpace(problems.Bytes()))
	}
	return strings.TrimSpace(out.String()), nil
}

// kubectl is try for what must succeed.
func (n namespace) kubectl(args ...string) string {
	n.t.Helper()
	out, err := n.try(args...)
	if err != nil {
		n.t.Fatalf("kubectl %s: %v", strings.Join(args, " "), err)
	}
	return out
}

// apply applies manifests and objects.
func (n namespace) apply(objects ...any) {
	n.t.Helper()
	cmd := n.command("apply", "--filename=-")
	cmd.Stdin = manifest(n.t, objects...)
	if _, err := output(cmd); err != nil {
		n.t.Fatal("kubectl apply: ", err)
	}
}

// rollout waits until deployments are as they were applied, with all pods ready.
func (n namespace) rollout(deployments ...string) {
	n.t.Helper()
	for _, deployment := range deployments {
		n.kubectl("rollout", "status", "deployment/"+deployment, "--timeout=180s")
	}
}

// get reads an object.
func (n namespace) get(object any, args ...string) {
	n.t.Helper()
	if err := json.Unmarshal([]byte(n.kubectl(append([]string{"get", "--output=json"}, args...)...)), object); err != nil {
		n.t.Fatal(err)
	}
}

// pods returns the pods of an app that are not being deleted.
func (n namespace) pods(app string) []corev1.Pod {
	n.t.Helper()
	var list corev1.PodList
	n.get(&list, "pods", "--selector=app="+app)
	var pods []corev1.Pod
	for _, pod := range list.Items {
		if pod.DeletionTimestamp == nil {
			pods = append(pods, pod)
		}
	}
	return pods
}

// pod returns the one pod of an app.
func (n namespace) pod(app string) corev1.Pod {
	n.t.Helper()
	pods := n.pods(app)
	if len(pods) != 1 {
		n.t.Fatalf("%d pods of %s, want 1", len(pods), app)
	}
	return pods[0]
}

// show logs what explains a failure.
func (n namespace) show() {
	show := func(args ...string) {
		out, err := n.try(args...)
		n.t.Logf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	show("get", "pods", "--output=wide")
	show("events", "--types=Warning")
	for _, pod := range strings.Fields(n.kubectl("get", "pods", "--selector=app!=outside", "--output=name")) {
		show("logs", pod, "--container=mantlet", "--tail=20")
	}
}

// eventually waits until a condition holds that the cluster brings about in its own time.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	limit, tick := time.After(3*time.Minute), time.Tick(200*time.Millisecond)
	for !condition() {
		select {
		case <-limit:
			t.Fatal("it does not come to this: ", what)
		case <-tick:
		}
	}
}
