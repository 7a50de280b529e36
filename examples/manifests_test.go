// Package examples checks that the manifests beside it are what Kubernetes and mantlet take them for.
package examples

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"mantlet/internal/sandbox"
	"mantlet/schema"
)

var kinds = map[metav1.TypeMeta]func() any{
	{APIVersion: "apps/v1", Kind: "Deployment"}: func() any { return new(appsv1.Deployment) },
	{APIVersion: "v1", Kind: "Service"}:         func() any { return new(corev1.Service) },
}

// decode reads a stream of manifests as the API server does with strict field validation. sigs.k8s.io/yaml alone would
// let a field of the wrong case through, which the API server does not know.
func decode(manifests []byte) (objects []any, err error) {
	for i, document := range bytes.Split(manifests, []byte("\n---\n")) {
		text, err := yaml.YAMLToJSONStrict(document)
		if err != nil {
			return nil, fmt.Errorf("document %d: %w", i+1, err)
		}
		var meta metav1.TypeMeta
		if err := json.UnmarshalCaseSensitivePreserveInts(text, &meta); err != nil {
			return nil, fmt.Errorf("document %d: %w", i+1, err)
		}
		object, known := kinds[meta]
		if !known {
			return nil, fmt.Errorf("document %d: unknown kind %q of %q", i+1, meta.Kind, meta.APIVersion)
		}
		objects = append(objects, object())
		problems, err := json.UnmarshalStrict(text, objects[i])
		if err := errors.Join(append(problems, err)...); err != nil {
			return nil, fmt.Errorf("document %d (%s): %w", i+1, meta.Kind, err)
		}
	}
	return objects, nil
}

// load returns what mantlet reads from an environment.
func load(t *testing.T, environ []string) (schema.Process, schema.Mesh) {
	t.Helper()
	env, err := schema.ParseEnvironment(environ)
	if err != nil {
		t.Fatal(err)
	}
	config, err := env.Load()
	if err != nil {
		t.Fatal(err)
	}
	return env.Process, config.Mesh
}

func TestManifests(t *testing.T) {
	_, web := load(t, nil)
	web.Ingress = []schema.Ingress{
		{Name: "metrics", Ports: schema.Ports{First: 7890, Last: 7890}, Mode: schema.ModePassthrough},
		{Name: "web", Ports: schema.Ports{First: 8080, Last: 8080}, Mode: schema.ModeTLS},
	}
	web.StatusPort = 9901
	web.Probes = []schema.Probe{{Name: "web", Kind: schema.ProbeHTTP, Port: 8080, Target: "/healthz"}}
	_, clients := load(t, nil)
	clients.Egress = []schema.Egress{
		{Name: "billing", Listen: netip.MustParseAddrPort("127.137.0.1:8081"), Upstream: schema.Upstream{Host: "billing-svc", Port: 8080}, ServerNames: []string{"billing-svc"}},
		{Name: "cart", Listen: netip.MustParseAddrPort("127.137.0.2:8081"), Upstream: schema.Upstream{Host: "cart-svc", Port: 8080}, ServerNames: []string{"cart-svc"}},
	}
	for file, want := range map[string]schema.Mesh{"web.yaml": web, "clients.yaml": clients} {
		t.Run(file, func(t *testing.T) {
			manifests, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			objects, err := decode(manifests)
			if err != nil {
				t.Fatal(err)
			}
			deployment, ok := objects[0].(*appsv1.Deployment)
			if !ok {
				t.Fatalf("the first object is a %T, not a Deployment", objects[0])
			}
			if diff := cmp.Diff(deployment.Spec.Selector.MatchLabels, deployment.Spec.Template.Labels); diff != "" {
				t.Errorf("selector and labels (-selector +labels):\n%s", diff)
			}
			pod := &deployment.Spec.Template.Spec
			mesh := sidecar(t, pod)
			if diff := cmp.Diff(want, mesh, cmpopts.EquateComparable(netip.AddrPort{}, netip.Prefix{})); diff != "" {
				t.Errorf("mesh (-want +got):\n%s", diff)
			}
			probes(t, pod, mesh)
			confined(t, pod)
			services(t, objects[1:], deployment, mesh)
		})
	}
}

// sidecar checks that mantlet is a native sidecar that starts after the initializer, with its volumes, and returns what
// it reads from its environment.
func sidecar(t *testing.T, pod *corev1.PodSpec) schema.Mesh {
	t.Helper()
	if names := names(pod.InitContainers); !slices.Equal(names, []string{"initializer", "mantlet"}) {
		t.Fatalf("init containers %q: the initializer must end before mantlet's startup probe can pass", names)
	}
	mantlet := pod.InitContainers[1]
	if mantlet.RestartPolicy == nil || *mantlet.RestartPolicy != corev1.ContainerRestartPolicyAlways {
		t.Error("mantlet is not a native sidecar: restartPolicy is not Always")
	}
	for _, c := range []struct {
		name  string
		probe *corev1.Probe
		what  string
	}{
		{"startupProbe", mantlet.StartupProbe, "ready"},
		{"readinessProbe", mantlet.ReadinessProbe, "ready"},
		{"livenessProbe", mantlet.LivenessProbe, "live"},
	} {
		want := []string{"/usr/local/bin/mantlet", "probe", c.what}
		if c.probe == nil || c.probe.Exec == nil || !slices.Equal(c.probe.Exec.Command, want) {
			t.Errorf("%s does not execute %q", c.name, want)
		}
	}
	if pod.EnableServiceLinks == nil || *pod.EnableServiceLinks {
		t.Error("service links can put MANTLET_ variables into mantlet's environment")
	}

	var environ []string
	for _, e := range mantlet.Env {
		environ = append(environ, e.Name+"="+e.Value)
	}
	for name, path := range map[string]string{"MANTLET_POD_IP": "status.podIP", "MANTLET_HOST_IP": "status.hostIP"} {
		e := find(mantlet.Env, func(e corev1.EnvVar) bool { return e.Name == name })
		if e.ValueFrom == nil || e.ValueFrom.FieldRef == nil || e.ValueFrom.FieldRef.FieldPath != path {
			t.Errorf("%s is not %s", name, path)
		}
	}
	process, mesh := load(t, environ)
	for path, readOnly := range map[string]bool{
		process.TLS.Directory: true, process.RuntimeDirectory: false, "/dev/shm": false,
	} {
		mount := find(mantlet.VolumeMounts, func(m corev1.VolumeMount) bool { return m.MountPath == path })
		volume := find(pod.Volumes, func(v corev1.Volume) bool { return v.Name == mount.Name })
		if mount.ReadOnly != readOnly || volume.EmptyDir == nil || volume.EmptyDir.Medium != corev1.StorageMediumMemory {
			t.Errorf("%s: want a memory-backed volume, read-only %t; is %+v of %+v", path, readOnly, mount, volume)
		}
		// The key: whoever makes it and mantlet.
		for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
			if c.Name != "mantlet" && c.Name != "initializer" && slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == mount.Name }) {
				t.Errorf("container %s mounts %s", c.Name, mount.Name)
			}
		}
	}
	return mesh
}

// probes checks that the workload's probes by HTTP ask mantlet, for each probe that it has and for nothing else.
func probes(t *testing.T, pod *corev1.PodSpec, mesh schema.Mesh) {
	t.Helper()
	var asked, had []string
	for _, c := range pod.Containers {
		for _, probe := range []*corev1.Probe{c.StartupProbe, c.ReadinessProbe, c.LivenessProbe} {
			if probe != nil && probe.HTTPGet != nil {
				asked = append(asked, fmt.Sprintf("%s%s", probe.HTTPGet.Port.String(), probe.HTTPGet.Path))
			}
		}
	}
	for _, p := range mesh.Probes {
		had = append(had, fmt.Sprintf("%d/probe/%s", mesh.StatusPort, p.Name))
	}
	if diff := cmp.Diff(had, asked); diff != "" {
		t.Errorf("probes (-mantlet's +the kubelet's):\n%s", diff)
	}
	live := pod.InitContainers[1].LivenessProbe
	if grace := live.TerminationGracePeriodSeconds; grace == nil || *grace >= *pod.TerminationGracePeriodSeconds {
		t.Error("a mantlet that hangs is given as long to end as one that drains")
	}
}

// confined checks what each container may do: nothing out of the ordinary, and mantlet what it needs.
func confined(t *testing.T, pod *corev1.PodSpec) {
	t.Helper()
	if pod.HostNetwork || pod.HostPID || pod.HostIPC || pod.ShareProcessNamespace != nil {
		t.Error("the pod shares namespaces")
	}
	if sc := pod.SecurityContext; sc == nil || sc.SeccompProfile == nil || sc.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
		t.Error("the pod does not have the runtime's seccomp profile")
	}
	for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
		want := &corev1.SecurityContext{
			Privileged:               new(false),
			AllowPrivilegeEscalation: new(false),
			ReadOnlyRootFilesystem:   new(true),
			Capabilities:             &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
			RunAsUser:                new(int64(0)),
		}
		switch c.Name {
		case "mantlet":
			for _, c := range sandbox.Needs(1337) {
				want.Capabilities.Add = append(want.Capabilities.Add, corev1.Capability(c.Name))
			}
		case "initializer":
		default:
			want.RunAsNonRoot, want.RunAsUser = new(true), new(int64(10001))
		}
		if diff := cmp.Diff(want, c.SecurityContext); diff != "" {
			t.Errorf("container %s (-want +got):\n%s", c.Name, diff)
		}
		if c.Resources.Limits.Memory().IsZero() || c.Resources.Requests.Cpu().IsZero() {
			t.Errorf("container %s has no memory limit or no CPU request", c.Name)
		}
	}
}

// services checks that each Service is the Deployment's own, with ports that the workload has, or an upstream.
func services(t *testing.T, objects []any, deployment *appsv1.Deployment, mesh schema.Mesh) {
	t.Helper()
	var upstreams []string
	for _, object := range objects {
		service, ok := object.(*corev1.Service)
		if !ok {
			t.Errorf("a second %T", object)
			continue
		}
		if service.Name != deployment.Name {
			for _, port := range service.Spec.Ports {
				upstreams = append(upstreams, fmt.Sprintf("%s:%d", service.Name, port.Port))
			}
			continue
		}
		if diff := cmp.Diff(service.Spec.Selector, deployment.Spec.Template.Labels); diff != "" {
			t.Errorf("service %s (-selector +labels):\n%s", service.Name, diff)
		}
		for _, port := range service.Spec.Ports {
			ports := deployment.Spec.Template.Spec.Containers[0].Ports
			target := find(ports, func(p corev1.ContainerPort) bool { return p.Name == port.TargetPort.StrVal })
			if target.ContainerPort != port.Port {
				t.Errorf("service %s: port %d leads to %d", service.Name, port.Port, target.ContainerPort)
			}
		}
	}
	for _, egress := range mesh.Egress {
		if !slices.Contains(upstreams, egress.Upstream.String()) {
			t.Errorf("no Service for upstream %s in %q", egress.Upstream, upstreams)
		}
	}
}

func names(containers []corev1.Container) (names []string) {
	for _, c := range containers {
		names = append(names, c.Name)
	}
	return names
}

// find returns the first element that fits, or none's zero value.
func find[T any](elements []T, fits func(T) bool) (found T) {
	if i := slices.IndexFunc(elements, fits); i >= 0 {
		found = elements[i]
	}
	return found
}

// TestDecodeRefuses is the negative control: without it a decoder that lets everything through would do as well.
func TestDecodeRefuses(t *testing.T) {
	web, err := os.ReadFile("web.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, old, new, want string }{
		{"misspelt field", "\n          restartPolicy:", "\n          restartPolcy:", `unknown field "spec.template.spec.initContainers[1].restartPolcy"`},
		{"wrong case", "readOnlyRootFilesystem:", "readonlyRootFilesystem:", `unknown field "spec.template.spec.initContainers[0].securityContext.readonlyRootFilesystem"`},
		{"wrong place", "replicas: 2", "replicas: 2\n  privileged: true", `unknown field "spec.privileged"`},
		{"twice", "replicas: 2", "replicas: 2\n  replicas: 3", `key "replicas" already set`},
		{"wrong type", "replicas: 2", "replicas: two", "cannot unmarshal string"},
		{"unknown kind", "kind: Service", "kind: Servcie", `document 2: unknown kind "Servcie" of "v1"`},
		{"wrong version", "apiVersion: apps/v1", "apiVersion: apps/v1beta1", `document 1: unknown kind "Deployment" of "apps/v1beta1"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := decode([]byte(strings.Replace(string(web), c.old, c.new, 1))); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %s", err, c.want)
			}
		})
	}
}
