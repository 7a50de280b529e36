package e2e

import (
	"io"
	"net"
	"strings"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestRollingUpdate replaces all pods of a server and of a backend under load. No request is lost, neither through the Service nor
// through a client's sidecar, and a long download goes on until it is complete.
func TestRollingUpdate(t *testing.T) {
	n := newNamespace(t)
	billing := backend(t, "billing")
	billing.Spec.Replicas = new(int32(2))
	n.apply(example(t, "web.yaml"), billing, backend(t, "cart"), example(t, "clients.yaml"), outside(t))
	n.rollout("web", "billing", "cart", "shop")
	n.kubectl("wait", "--for=condition=Ready", "pod/outside")
	service := net.JoinHostPort(n.kubectl("get", "service", "web", "--output=jsonpath={.spec.clusterIP}"), "8080")

	outsider := n.pod("outside")
	loads := map[string]*traffic{
		"ingress": begin(t, outsider, "load", "anonymous", "https://"+service),
		"egress":  begin(t, n.pod("shop"), "load", "plaintext", "http://127.137.0.1:8081"),
	}
	download, complete := client(t, outsider, "get", "anonymous", "https://"+service+"/download?for=20s"), make(chan error, 1)
	go func() {
		body, err := output(download)
		if err == nil && !strings.HasSuffix(body, "complete") {
			err = io.ErrUnexpectedEOF
		}
		complete <- err
	}()
	n.kubectl("rollout", "restart", "deployment/web", "deployment/billing")
	n.rollout("web", "billing")
	if err := <-complete; err != nil {
		t.Errorf("the download: %v", err)
	}
	for name, load := range loads {
		r := load.stop()
		t.Logf("%s: %+v", name, r)
		if r.failed() > 0 || len(r.Answers) < 3 {
			t.Errorf("%s: requests were lost, or no new pod has answered", name)
		}
	}
}

// TestEnd checks how a pod ends: the workload first, which has its sidecar to the last, and then mantlet, within the grace period
// and by itself, although a client is slow.
func TestEnd(t *testing.T) {
	n := newNamespace(t)
	n.apply(example(t, "web.yaml"), backend(t, "billing"), backend(t, "cart"), example(t, "clients.yaml"), outside(t))
	n.rollout("web", "billing", "cart", "shop")
	n.kubectl("wait", "--for=condition=Ready", "pod/outside")
	web, shop := n.pods("web")[0], n.pod("shop")
	slow := client(t, n.pod("outside"), "get", "anonymous", "https://"+net.JoinHostPort(web.Status.PodIP, "8080")+"/download?for=50s")
	if err := slow.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = slow.Process.Kill()
		_ = slow.Wait()
	}()
	log := n.command("logs", "--follow", shop.Name, "--container=shop")
	said := make(chan string, 1)
	go func() {
		text, _ := output(log)
		said <- text
	}()
	for _, pod := range []corev1.Pod{web, shop} {
		n.end(pod)
	}
	if text := <-said; !strings.HasSuffix(text, "last order: <nil>") {
		t.Errorf("the shop's last order, after SIGTERM, fails:\n%s", text)
	}
}

// end deletes a pod and checks how its containers end.
func (n namespace) end(pod corev1.Pod) {
	n.t.Helper()
	// The API server keeps it, as long as it has this, and with it its status.
	n.kubectl("patch", "pod", pod.Name, `--patch={"metadata": {"finalizers": ["mantlet.example/e2e"]}}`)
	defer n.kubectl("patch", "pod", pod.Name, `--patch={"metadata": {"finalizers": null}}`)
	start := time.Now()
	n.kubectl("delete", "pod", pod.Name, "--wait=false")
	var mantlet, workload *corev1.ContainerStateTerminated
	eventually(n.t, "the end of all containers", func() bool {
		var now corev1.Pod
		n.get(&now, "pod", pod.Name)
		mantlet, workload = now.Status.InitContainerStatuses[1].State.Terminated, now.Status.ContainerStatuses[0].State.Terminated
		return mantlet != nil && workload != nil
	})
	n.t.Logf("%s: the workload ended after %v, mantlet after %v", pod.Name,
		workload.FinishedAt.Sub(start).Round(time.Second), mantlet.FinishedAt.Sub(start).Round(time.Second))
	if mantlet.FinishedAt.Before(&workload.FinishedAt) {
		n.t.Error("mantlet ended before the workload")
	}
	if mantlet.ExitCode != 0 {
		n.t.Errorf("mantlet did not end by itself: %+v", mantlet)
	}
}

// TestJob checks that a Job completes: a sidecar does not keep its pod, and ends in good order.
func TestJob(t *testing.T) {
	n := newNamespace(t)
	template := deployment(t, "clients.yaml").Spec.Template
	template.Labels = map[string]string{"app": "job"}
	template.Spec.RestartPolicy = corev1.RestartPolicyNever
	template.Spec.Containers[0].Image = "job:e2e"
	template.Spec.Containers[0].ReadinessProbe = nil
	n.apply(backend(t, "billing"), backend(t, "cart"), services(t, "clients.yaml"))
	n.rollout("billing", "cart")
	n.apply(&batchv1.Job{
		TypeMeta:   metav1.TypeMeta{APIVersion: "batch/v1", Kind: "Job"},
		ObjectMeta: metav1.ObjectMeta{Name: "job"},
		Spec:       batchv1.JobSpec{BackoffLimit: new(int32(0)), Template: template},
	})
	n.kubectl("wait", "--for=condition=Complete", "job/job", "--timeout=120s")
	if ended := n.pod("job").Status.InitContainerStatuses[1].State.Terminated; ended == nil || ended.ExitCode != 0 {
		t.Errorf("mantlet did not end by itself: %+v", ended)
	}
}
