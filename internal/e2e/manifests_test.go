package e2e

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"slices"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// example returns a manifest of examples/, with the tag that the images have here: "latest" would be pulled.
func example(t *testing.T, file string) []byte {
	t.Helper()
	text, err := os.ReadFile("../../examples/" + file)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.ReplaceAll(text, []byte(":latest\n"), []byte(":e2e\n"))
}

// manifest returns the stream of manifests and objects that kubectl reads.
func manifest(t *testing.T, objects ...any) io.Reader {
	t.Helper()
	stream := new(bytes.Buffer)
	for _, object := range objects {
		stream.WriteString("---\n")
		if text, ok := object.([]byte); ok {
			stream.Write(text)
		} else if err := json.NewEncoder(stream).Encode(object); err != nil {
			t.Fatal(err)
		}
	}
	return stream
}

// separator is between an example's Deployment, which comes first, and its Services.
var separator = []byte("\n---\n")

// services returns the Services of an example.
func services(t *testing.T, file string) []byte {
	t.Helper()
	_, rest, _ := bytes.Cut(example(t, file), separator)
	return rest
}

// deployment returns the Deployment of an example, for a test that needs it a little different.
func deployment(t *testing.T, file string) *appsv1.Deployment {
	t.Helper()
	first, _, _ := bytes.Cut(example(t, file), separator)
	d := new(appsv1.Deployment)
	if err := yaml.UnmarshalStrict(first, d); err != nil {
		t.Fatal(err)
	}
	return d
}

// backend returns a server behind mantlet that is all mutual TLS: web.yaml's, by another name and without ingress entries.
func backend(t *testing.T, name string) *appsv1.Deployment {
	t.Helper()
	d := deployment(t, "web.yaml")
	rename(d, name)
	d.Spec.Replicas = new(int32(1))
	sidecar := mantletOf(&d.Spec.Template.Spec)
	unset(sidecar, "EDG_INGRESS_PROXY_CONFIG")
	d.Spec.Template.Spec.Containers[0].Ports = nil
	return d
}

// rename makes a Deployment one of another app.
func rename(d *appsv1.Deployment, name string) {
	labels := map[string]string{"app": name}
	d.Name, d.Labels = name, labels
	d.Spec.Selector.MatchLabels, d.Spec.Template.Labels = labels, labels
}

// mantletOf returns a pod's mantlet.
func mantletOf(pod *corev1.PodSpec) *corev1.Container {
	i := slices.IndexFunc(pod.InitContainers, func(c corev1.Container) bool { return c.Name == "mantlet" })
	return &pod.InitContainers[i]
}

func set(c *corev1.Container, name, value string) {
	unset(c, name)
	c.Env = append(c.Env, corev1.EnvVar{Name: name, Value: value})
}

func unset(c *corev1.Container, name string) {
	c.Env = slices.DeleteFunc(c.Env, func(v corev1.EnvVar) bool { return v.Name == name })
}

// outside returns a pod without mantlet, with a mesh certificate: from there tests speak to the others.
func outside(t *testing.T) *corev1.Pod {
	t.Helper()
	spec := deployment(t, "web.yaml").Spec.Template.Spec
	spec.InitContainers = spec.InitContainers[:1]
	spec.Containers = []corev1.Container{{
		Name:         "outside",
		Image:        "web:e2e",
		Command:      []string{"/usr/local/bin/web", "pause"},
		VolumeMounts: spec.InitContainers[0].VolumeMounts,
	}}
	return &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Name: "outside", Labels: map[string]string{"app": "outside"}},
		Spec:       spec,
	}
}
