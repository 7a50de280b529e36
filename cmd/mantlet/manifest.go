package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"regexp"
	"strings"

	"go.yaml.in/yaml/v3"

	"mantlet/schema"
)

// The parts of Kubernetes' objects that tell a sidecar's configuration. They are read leniently: whether the manifest is
// right in all else is not the question here, and Kubernetes' own types would make the binary half as large again.

type object struct {
	Kind     string `yaml:"kind"`
	Metadata struct {
		Name      string `yaml:"name"`
		Namespace string `yaml:"namespace"`
	} `yaml:"metadata"`
	Data  map[string]string `yaml:"data"`  // of a ConfigMap
	Items []object          `yaml:"items"` // of a List
	Spec  struct {
		podSpec     `yaml:",inline"`
		Template    template `yaml:"template"`
		JobTemplate struct {
			Spec struct {
				Template template `yaml:"template"`
			} `yaml:"spec"`
		} `yaml:"jobTemplate"`
	} `yaml:"spec"`
}

type template struct {
	Spec podSpec `yaml:"spec"`
}

type podSpec struct {
	InitContainers []container `yaml:"initContainers"`
	Containers     []container `yaml:"containers"`
	Volumes        []volume    `yaml:"volumes"`
}

type volume struct {
	Name      string      `yaml:"name"`
	ConfigMap volumeFiles `yaml:"configMap"`
	Projected struct {
		Sources []struct {
			ConfigMap volumeFiles `yaml:"configMap"`
		} `yaml:"sources"`
	} `yaml:"projected"`
}

// volumeFiles are the files of a volume that a ConfigMap gives: all of its keys, or those that are listed.
type volumeFiles struct {
	Name  string `yaml:"name"`
	Items []struct {
		Key  string `yaml:"key"`
		Path string `yaml:"path"`
	} `yaml:"items"`
}

type container struct {
	Name         string        `yaml:"name"`
	Env          []variable    `yaml:"env"`
	EnvFrom      []variables   `yaml:"envFrom"`
	VolumeMounts []volumeMount `yaml:"volumeMounts"`
}

type variable struct {
	Name      string `yaml:"name"`
	Value     string `yaml:"value"`
	ValueFrom *struct {
		ConfigMapKeyRef *reference `yaml:"configMapKeyRef"`
		FieldRef        struct {
			FieldPath string `yaml:"fieldPath"`
		} `yaml:"fieldRef"`
	} `yaml:"valueFrom"`
}

type variables struct {
	Prefix       string     `yaml:"prefix"`
	ConfigMapRef *reference `yaml:"configMapRef"`
	SecretRef    *reference `yaml:"secretRef"`
}

type volumeMount struct {
	Name      string `yaml:"name"`
	MountPath string `yaml:"mountPath"`
	SubPath   string `yaml:"subPath"`
}

type reference struct {
	Name     string `yaml:"name"`
	Key      string `yaml:"key"`
	Optional bool   `yaml:"optional"`
}

// pods returns the pods that the object describes, each under its own name.
func (o object) pods() []podObject {
	var all []podObject
	for _, item := range o.Items {
		all = append(all, item.pods()...)
	}
	for _, spec := range []podSpec{o.Spec.podSpec, o.Spec.Template.Spec, o.Spec.JobTemplate.Spec.Template.Spec} {
		all = append(all, podObject{spec, strings.TrimSpace(o.Kind + " " + o.Metadata.Name), o.Metadata.Namespace})
	}
	return all
}

// podObject is a pod, and what it is part of.
type podObject struct {
	podSpec

	name, namespace string
}

// containers returns the pod's containers of a name.
func (p podObject) containers(name string) []container {
	var all []container
	for _, c := range append(p.InitContainers, p.Containers...) {
		if c.Name == name {
			all = append(all, c)
		}
	}
	return all
}

// manifest is what a file holds.
type manifest struct {
	pods       []podObject
	configMaps map[string]map[string]string // by namespace/name
}

// readManifest returns the configuration of each container of a name.
func readManifest(file, name string) ([]subject, error) {
	text, link, err := readManifestFile(file)
	if err != nil {
		return nil, fmt.Errorf("reading the manifest: %w", err)
	}
	m := manifest{configMaps: map[string]map[string]string{}}
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	for {
		var o object
		err := decoder.Decode(&o)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil && (!errors.As(err, new(*yaml.TypeError)) || o.concerns(name)) {
			return nil, fmt.Errorf("reading the manifest %s: %w", file, err)
		}
		m.add(o)
	}
	var all []subject
	for _, p := range m.pods {
		for _, c := range p.containers(name) {
			environ, err := m.environ(p, c)
			if err != nil {
				return nil, fmt.Errorf("reading the manifest %s: %s: %w", file, p.name, err)
			}
			all = append(all, subject{name: p.name, environ: environ, link: link, file: func(path string) ([]byte, bool) { return m.file(p, c, path) }})
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("reading the manifest %s: no container is named %q; --container names another", file, name)
	}
	return all, nil
}

func readManifestFile(path string) (text []byte, link string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, "", err
	}
	defer func() { _ = f.Close() }()
	text, err = io.ReadAll(f)
	return text, schema.Link(f), err
}

// concerns tells whether it matters that an object has fields of other types than expected: those of other kinds may.
func (o object) concerns(container string) bool {
	for _, p := range o.pods() {
		if len(p.containers(container)) > 0 {
			return true
		}
	}
	return o.Kind == "ConfigMap" || o.Kind == "List" || o.Kind == ""
}

func (m *manifest) add(o object) {
	for _, item := range o.Items {
		m.add(item)
	}
	if o.Kind == "ConfigMap" {
		m.configMaps[o.Metadata.Namespace+"/"+o.Metadata.Name] = o.Data
	}
	if len(o.Items) == 0 {
		m.pods = append(m.pods, o.pods()...)
	}
}

// environ returns the container's variables. Those whose values stand elsewhere it knows of the manifest's ConfigMaps; one
// of mantlet's that it does not know is an error.
func (m *manifest) environ(p podObject, c container) ([]string, error) {
	var environ []string
	values := map[string]string{}
	set := func(name, value string) {
		environ = append(environ, name+"="+value)
		values[name] = value
	}
	for _, from := range c.EnvFrom {
		ref := from.ConfigMapRef
		if ref == nil {
			ref = from.SecretRef
		}
		if ref == nil {
			continue
		}
		data, known := m.configMaps[p.namespace+"/"+ref.Name]
		if from.ConfigMapRef == nil || !known && !ref.Optional {
			return nil, fmt.Errorf("the variables of %q do not stand in the manifest; they can't be checked", ref.Name)
		}
		for key, value := range data {
			set(from.Prefix+key, value)
		}
	}
	for _, e := range c.Env {
		if e.ValueFrom == nil {
			set(e.Name, expand(e.Value, values))
			continue
		}
		var value string
		var known, optional bool
		if ref := e.ValueFrom.ConfigMapKeyRef; ref != nil {
			value, known = m.configMaps[p.namespace+"/"+ref.Name][ref.Key]
			optional = ref.Optional
		}
		switch {
		case known:
			set(e.Name, value)
		case strings.HasPrefix(e.ValueFrom.FieldRef.FieldPath, "status."): // where the pod is: nobody knows before it runs
		case isMantlets(e.Name) && !optional:
			return nil, fmt.Errorf("the value of %s does not stand in the manifest; it can't be checked", e.Name)
		}
	}
	return environ, nil
}

func isMantlets(name string) bool {
	return strings.HasPrefix(name, "MANTLET_") || strings.HasSuffix(name, "GRESS_PROXY_CONFIG")
}

// A variable's value may speak of those before it, as kubelet has it: $(NAME), and $$ for a dollar sign.
var variableReference = regexp.MustCompile(`\$\$|\$\([^)]*\)`)

func expand(text string, values map[string]string) string {
	return variableReference.ReplaceAllStringFunc(text, func(reference string) string {
		if reference == "$$" {
			return "$"
		}
		if value, ok := values[reference[2:len(reference)-1]]; ok {
			return value
		}
		return reference
	})
}

// file returns the content of a file of the container, if a ConfigMap of the manifest holds it.
func (m *manifest) file(p podObject, c container, name string) ([]byte, bool) {
	name = path.Clean(name)
	var volume, inside, mounted string
	for _, mount := range c.VolumeMounts {
		at := path.Clean(mount.MountPath)
		below, ok := strings.CutPrefix(name+"/", strings.TrimSuffix(at, "/")+"/")
		if ok && len(at) > len(mounted) { // the innermost
			volume, inside, mounted = mount.Name, path.Join(mount.SubPath, below), at
		}
	}
	for _, v := range p.Volumes {
		if v.Name != volume {
			continue
		}
		sources := []volumeFiles{v.ConfigMap}
		for _, s := range v.Projected.Sources {
			sources = append(sources, s.ConfigMap)
		}
		for _, s := range sources {
			if text, ok := m.configMaps[p.namespace+"/"+s.Name][s.key(inside)]; ok {
				return []byte(text), true
			}
		}
	}
	return nil, false
}

// key returns the key of the ConfigMap that a file of the volume has its content from, "" if there is no such file.
func (f volumeFiles) key(file string) string {
	for _, item := range f.Items {
		if path.Clean(item.Path) == file {
			return item.Key
		}
	}
	if len(f.Items) > 0 {
		return ""
	}
	return file
}
