package inject_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"mantlet/internal/inject"
	"mantlet/internal/manifest"
)

var update = flag.Bool("update", false, "rewrite what the golden cases expect")

// golden is a case: what goes in, with which options, what comes out and what is said.
type golden struct {
	file    string
	archive *txtar.Archive
}

func goldens(t *testing.T) []golden {
	t.Helper()
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no golden cases: %v", err)
	}
	var all []golden
	for _, file := range files {
		archive, err := txtar.ParseFile(file)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, golden{file, archive})
	}
	return all
}

func (g golden) part(name string) []byte {
	for _, f := range g.archive.Files {
		if f.Name == name {
			return f.Data
		}
	}
	return nil
}

func (g golden) source() inject.Source {
	return inject.Source{Name: "in.yaml", Text: g.part("in.yaml")}
}

func (g golden) options(t *testing.T) inject.Options {
	t.Helper()
	var o inject.Options
	if text := g.part("options"); text != nil {
		if err := json.Unmarshal(text, &o); err != nil {
			t.Fatal(err)
		}
	}
	return o
}

// injector returns one that knows the source's own ConfigMaps.
func injector(t *testing.T, o inject.Options, source inject.Source) inject.Injector {
	t.Helper()
	m, err := manifest.Parse(source.Name, source.Text)
	if err != nil {
		t.Fatal(err)
	}
	return inject.Injector{Options: o, Known: []*manifest.Manifest{m}, Runs: func(arguments []string) error {
		if len(arguments) == 0 || arguments[0] != "run" {
			return errors.New("not run")
		}
		return nil
	}}
}

func put(t *testing.T, o inject.Options, source inject.Source) inject.Result {
	t.Helper()
	result, err := injector(t, o, source).Inject(source)
	if err != nil {
		t.Fatal(err)
	}
	return result
}

func remove(t *testing.T, text []byte) []byte {
	t.Helper()
	result, err := inject.Injector{}.Remove(inject.Source{Name: "out.yaml", Text: text})
	if err != nil {
		t.Fatal(err)
	}
	return result.Text
}

func said(result inject.Result) []byte {
	var b bytes.Buffer
	for _, f := range result.Refused {
		fmt.Fprintf(&b, "refused: %s: %v\n", f.Object, f.Problem)
	}
	for _, f := range result.Warnings {
		fmt.Fprintf(&b, "warning: %s: %v\n", f.Object, f.Problem)
	}
	return b.Bytes()
}

// TestGolden checks what comes out of manifests, and that it can be undone.
func TestGolden(t *testing.T) {
	for _, g := range goldens(t) {
		t.Run(strings.TrimSuffix(filepath.Base(g.file), ".txtar"), func(t *testing.T) {
			o := g.options(t)
			in := g.source()
			got := put(t, o, in)
			if *update {
				files := g.archive.Files[:0:0]
				for _, f := range g.archive.Files {
					if f.Name != "out.yaml" && f.Name != "said" {
						files = append(files, f)
					}
				}
				g.archive.Files = append(files, txtar.File{Name: "said", Data: said(got)}, txtar.File{Name: "out.yaml", Data: got.Text})
				if err := os.WriteFile(g.file, txtar.Format(g.archive), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if diff := cmp.Diff(string(g.part("out.yaml")), string(got.Text)); diff != "" {
				t.Errorf("the result (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(string(g.part("said")), string(said(got))); diff != "" {
				t.Errorf("what is said (-want +got):\n%s", diff)
			}
			if err := decode(got.Text); err != nil {
				t.Errorf("the API server would not take it: %v", err)
			}
			if again := put(t, o, inject.Source{Name: "in.yaml", Text: got.Text}); !bytes.Equal(again.Text, got.Text) {
				t.Errorf("a second time changes it:\n%s", cmp.Diff(string(got.Text), string(again.Text)))
			}
			if len(got.Refused) > 0 {
				return
			}
			if diff := cmp.Diff(string(in.Text), string(remove(t, got.Text))); diff != "" {
				t.Errorf("removed (-want +got):\n%s", diff)
			}
			o.Image, o.TLSSecret, o.StatusPort = "registry/mantlet:2", "other", "9911"
			want := put(t, o, in)
			if other := put(t, o, inject.Source{Name: "in.yaml", Text: got.Text}); !bytes.Equal(other.Text, want.Text) {
				t.Errorf("other options over these:\n%s", cmp.Diff(string(want.Text), string(other.Text)))
			}
		})
	}
}

var kinds = map[metav1.TypeMeta]func() any{
	{APIVersion: "apps/v1", Kind: "Deployment"}:  func() any { return new(appsv1.Deployment) },
	{APIVersion: "apps/v1", Kind: "StatefulSet"}: func() any { return new(appsv1.StatefulSet) },
	{APIVersion: "apps/v1", Kind: "DaemonSet"}:   func() any { return new(appsv1.DaemonSet) },
	{APIVersion: "apps/v1", Kind: "ReplicaSet"}:  func() any { return new(appsv1.ReplicaSet) },
	{APIVersion: "batch/v1", Kind: "Job"}:        func() any { return new(batchv1.Job) },
	{APIVersion: "batch/v1", Kind: "CronJob"}:    func() any { return new(batchv1.CronJob) },
	{APIVersion: "v1", Kind: "Pod"}:              func() any { return new(corev1.Pod) },
	{APIVersion: "v1", Kind: "PodTemplate"}:      func() any { return new(corev1.PodTemplate) },
	{APIVersion: "v1", Kind: "Service"}:          func() any { return new(corev1.Service) },
	{APIVersion: "v1", Kind: "ServiceAccount"}:   func() any { return new(corev1.ServiceAccount) },
	{APIVersion: "v1", Kind: "ConfigMap"}:        func() any { return new(corev1.ConfigMap) },
	{APIVersion: "v1", Kind: "Secret"}:           func() any { return new(corev1.Secret) },
}

// decode reads manifests as the API server does with strict field validation.
func decode(manifests []byte) error {
	text := regexp.MustCompile(`(?m)^(%.*|\.\.\.)$`).ReplaceAllString(string(manifests), "")
	for _, document := range strings.Split("\n"+text, "\n---") {
		text, err := yaml.YAMLToJSONStrict([]byte(document))
		if err != nil {
			return err
		}
		if err := decodeObject(text); err != nil {
			return err
		}
	}
	return nil
}

func decodeObject(text []byte) error {
	var meta struct {
		metav1.TypeMeta

		Items []json.RawMessage
	}
	if err := kjson.UnmarshalCaseSensitivePreserveInts(text, &meta); err != nil {
		return err
	}
	for _, item := range meta.Items {
		if err := decodeObject(item); err != nil {
			return err
		}
	}
	if meta.Kind == "List" || meta.Kind == "" {
		return nil
	}
	object, known := kinds[meta.TypeMeta]
	if !known && strings.Contains(meta.APIVersion, ".") { // of a custom resource
		return nil
	}
	if !known {
		return fmt.Errorf("unknown kind %v", meta.TypeMeta)
	}
	problems, err := kjson.UnmarshalStrict(text, object())
	return errors.Join(append(problems, err)...)
}
