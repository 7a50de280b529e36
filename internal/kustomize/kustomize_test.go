// Package kustomize tries the examples of Kustomize. It is a module of its own: nothing else needs Kustomize.
package kustomize

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

const repository = "../.."

// TestComponent checks that Kustomize gives the Deployment of the example its sidecar by the component, and what validate and analyze
// say of the result.
func TestComponent(t *testing.T) {
	built, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), repository+"/examples/kustomize/shop")
	if err != nil {
		t.Fatal(err)
	}
	text, err := built.AsYaml()
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, r := range built.Resources() {
		if r.GetKind() != "Deployment" {
			continue
		}
		found = true
		object, err := r.AsYAML()
		if err != nil {
			t.Fatal(err)
		}
		var deployment appsv1.Deployment
		if err := yaml.UnmarshalStrict(object, &deployment); err != nil {
			t.Errorf("the API server would not take it: %v", err)
		}
		if n := len(deployment.Spec.Template.Spec.InitContainers); n != 1 {
			t.Errorf("%d sidecars", n)
		}
	}
	if !found {
		t.Fatal("no Deployment")
	}
	mantlet := filepath.Join(t.TempDir(), "mantlet")
	build := exec.Command("go", "build", "-o", mantlet, "./cmd/mantlet")
	build.Dir = repository
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, args := range [][]string{{"validate", "--manifest", "-"}, {"analyze", "-"}} {
		cmd := exec.Command(mantlet, args...)
		cmd.Stdin = bytes.NewReader(text)
		if out, err := cmd.CombinedOutput(); err != nil || bytes.Contains(out, []byte("not checked")) {
			t.Errorf("%v says %v:\n%s", args, err, out)
		}
	}
}
