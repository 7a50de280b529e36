package e2e

import (
	"encoding/json"
	"net"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestExamples checks what the examples promise of their deployments. A shop is ready once it has ordered from both backends.
func TestExamples(t *testing.T) {
	n := newNamespace(t)
	n.apply(example(t, "web.yaml"), example(t, "clients.yaml"), backend(t, "billing"), backend(t, "cart"), outside(t))
	n.rollout("web", "billing", "cart", "shop")
	n.kubectl("wait", "--for=condition=Ready", "pod/outside")
	run := func(name string, test func(namespace)) { t.Run(name, func(t *testing.T) { test(n.of(t)) }) }
	run("Order", testOrder)
	run("FirstConnection", testFirstConnection)
	run("Ingress", testIngress)
	run("Hairpin", testHairpin)
	run("Probes", testProbes)
	run("LeastPrivilege", testLeastPrivilege)
	run("Egress", testEgress)
}

// testOrder checks that the initializer ended, then mantlet started, and then the workload.
func testOrder(n namespace) {
	for _, app := range []string{"web", "billing", "cart", "shop"} {
		for _, pod := range n.pods(app) {
			initializer, mantlet := pod.Status.InitContainerStatuses[0], pod.Status.InitContainerStatuses[1]
			workload := pod.Status.ContainerStatuses[0]
			first, second, third := initializer.State.Terminated.FinishedAt, mantlet.State.Running.StartedAt, workload.State.Running.StartedAt
			if second.Before(&first) || third.Before(&second) {
				n.t.Errorf("%s: the initializer ended at %v, mantlet started at %v, the workload at %v", pod.Name, first, second, third)
			}
			if mantlet.RestartCount+workload.RestartCount > 0 {
				n.t.Errorf("%s: restarts: mantlet %d, workload %d", pod.Name, mantlet.RestartCount, workload.RestartCount)
			}
		}
	}
}

// testFirstConnection checks that a workload finds its egress listeners when it starts: with its backends there, a new shop has no
// failure to log.
func testFirstConnection(n namespace) {
	n.kubectl("rollout", "restart", "deployment/shop")
	n.rollout("shop")
	if log := n.kubectl("logs", n.pod("shop").Name, "--container=shop"); log != "" {
		n.t.Errorf("a new shop logs: %s", log)
	}
}

// testIngress checks who gets in where, by pod address and by Service, over IPv4 and IPv6.
func testIngress(n namespace) {
	n.kubectl("patch", "service", "web", `--patch={"spec": {"ipFamilyPolicy": "RequireDualStack"}}`)
	var service corev1.Service
	n.get(&service, "service", "web")
	pod, outsider := n.pods("web")[0], n.pod("outside")
	if len(service.Spec.ClusterIPs) != 2 || len(pod.Status.PodIPs) != 2 {
		n.t.Fatalf("not dual-stack: service %v, pod %v", service.Spec.ClusterIPs, pod.Status.PodIPs)
	}
	admitted := map[string]map[string]bool{ // by port and role; of others nobody is
		"8080": {"anonymous": true, "stranger": true, "member": true},
		"7890": {"plaintext": true},
		"9000": {"member": true},
	}
	for _, role := range []string{"plaintext", "anonymous", "stranger", "member"} {
		for port, roles := range admitted {
			for _, ip := range pod.Status.PodIPs {
				address := net.JoinHostPort(ip.IP, port)
				body, err := get(n.t, outsider, role, address)
				if want := pod.Name + " at " + address; roles[role] && body != want {
					n.t.Errorf("%s at %s: %q, want %q: %v", role, address, body, want, err)
				}
				if !roles[role] && err == nil {
					n.t.Errorf("%s at %s is let in: %s", role, address, body)
				}
			}
			for _, host := range append(service.Spec.ClusterIPs, "web", "web."+n.name+".svc.cluster.local") {
				if port == "9000" {
					continue // the Service has no such port
				}
				address := net.JoinHostPort(host, port)
				if body, err := get(n.t, outsider, role, address); (err == nil) != roles[role] {
					n.t.Errorf("%s at %s: %q: %v", role, address, body, err)
				}
			}
		}
	}
	told := map[string]bool{}
	for _, refused := range n.status(pod).Refused {
		told[refused.Reason] = true
	}
	for _, reason := range []string{"plaintext", "no_client_certificate", "unknown_ca"} {
		if !told[reason] {
			n.t.Errorf("mantlet does not tell of %s: %v", reason, told)
		}
	}
}

// testHairpin checks what a workload gets that calls its own Service: what everybody else gets. A Service of this one pod leads back
// to it.
func testHairpin(n namespace) {
	pod := n.pods("web")[0]
	n.kubectl("label", "pod", pod.Name, "hairpin=yes")
	dual := corev1.IPFamilyPolicyRequireDualStack
	n.apply(&corev1.Service{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Service"},
		ObjectMeta: metav1.ObjectMeta{Name: "hairpin"},
		Spec: corev1.ServiceSpec{
			IPFamilyPolicy: &dual,
			Selector:       map[string]string{"hairpin": "yes"},
			Ports:          []corev1.ServicePort{{Name: "tls", Port: 8080}, {Name: "passthrough", Port: 7890}, {Name: "mtls", Port: 9000}},
		},
	})
	addresses := strings.Fields(n.kubectl("get", "service", "hairpin", "--output=jsonpath={.spec.clusterIPs[0]} {.spec.clusterIPs[1]}"))
	get := func(role, host, port string) (string, error) {
		return get(n.t, pod, role, net.JoinHostPort(host, port))
	}
	for _, host := range addresses {
		// kube-proxy takes a moment to know the Service.
		eventually(n.t, "an answer through "+host, func() bool {
			_, err := get("plaintext", host, "7890")
			return err == nil
		})
		if body, err := get("anonymous", host, "8080"); !strings.HasPrefix(body, pod.Name) {
			n.t.Errorf("by TLS: %q: %v", body, err)
		}
		for _, role := range []string{"plaintext", "anonymous"} {
			if body, err := get(role, host, "9000"); err == nil {
				n.t.Errorf("%s is let in at the port of mutual TLS: %s", role, body)
			}
		}
	}
}

// testProbes checks that the kubelet sees through mantlet how the workload is.
func testProbes(n namespace) {
	pod := n.pods("web")[0]
	passthrough := net.JoinHostPort(pod.Status.PodIP, "7890")
	for _, step := range []struct{ request, condition string }{{"/sicken", "False"}, {"/heal", "True"}} {
		if _, err := get(n.t, n.pod("outside"), "plaintext", passthrough+step.request); err != nil {
			n.t.Fatal(err)
		}
		n.kubectl("wait", "--for=condition=Ready="+step.condition, "pod/"+pod.Name, "--timeout=120s")
	}
	if events := n.kubectl("events", "--for=pod/"+pod.Name); !strings.Contains(events, "HTTP probe failed with statuscode: 503") {
		n.t.Errorf("the kubelet tells nothing of a probe that fails:\n%s", events)
	}
}

// testEgress checks that an egress entry follows its name: to IPv6, to nowhere, and back.
func testEgress(n namespace) {
	shop := n.pod("shop")
	order := func() string {
		body, _ := get(n.t, shop, "plaintext", "127.137.0.1:8081")
		return body
	}
	if body := order(); !strings.HasSuffix(body, n.pod("billing").Status.PodIP+":8080") {
		n.t.Errorf("over IPv4: %q", body)
	}
	n.kubectl("delete", "service", "billing-svc")
	n.apply(&corev1.Service{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Service"},
		ObjectMeta: metav1.ObjectMeta{Name: "billing-svc"},
		Spec: corev1.ServiceSpec{
			ClusterIP:  corev1.ClusterIPNone,
			IPFamilies: []corev1.IPFamily{corev1.IPv6Protocol},
			Selector:   map[string]string{"app": "billing"},
			Ports:      []corev1.ServicePort{{Name: "mesh", Port: 8080}},
		},
	})
	eventually(n.t, "an order over IPv6", func() bool { return strings.HasSuffix(order(), n.pod("billing").Status.PodIPs[1].IP+"]:8080") })

	n.kubectl("scale", "deployment/billing", "--replicas=0")
	eventually(n.t, "an upstream without addresses", func() bool {
		upstreams := n.status(shop).Upstreams
		return len(upstreams) == 2 && len(upstreams[0].Addresses) == 0 && upstreams[0].Answer != ""
	})
	if body := order(); body != "" {
		n.t.Errorf("without a backend: %q", body)
	}
	n.kubectl("scale", "deployment/billing", "--replicas=1")
	eventually(n.t, "an order at the new pod", func() bool { return order() != "" })
}

// state is what `mantlet status -o json` says, as far as tests ask.
type state struct {
	Ready    bool
	Problems []string
	Envoys   struct{ Started, Ended int }
	Refused  []struct{ Reason string }

	Upstreams []struct {
		Addresses []string
		Answer    string
	}
}

// status asks a pod's mantlet.
func (n namespace) status(pod corev1.Pod) state {
	n.t.Helper()
	// It exits with 1 where something is wrong.
	out, err := n.try("exec", pod.Name, "--container=mantlet", "--", "/usr/local/bin/mantlet", "status", "--output=json")
	var s state
	if json.Unmarshal([]byte(out), &s) != nil {
		n.t.Fatalf("mantlet status: %s: %v", out, err)
	}
	return s
}
