package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"go.yaml.in/yaml/v3"
)

// The parts of Kubernetes' objects that tell a sidecar's configuration. They are read leniently: whether the manifest is
// right in all else is not the question here, and Kubernetes' own types would make the binary half as large again.

type object struct {
	Kind     string                `yaml:"kind"`
	Metadata struct{ Name string } `yaml:"metadata"`
	Data     map[string]string     `yaml:"data"`  // of a ConfigMap
	Items    []object              `yaml:"items"` // of a List
	Spec     struct {
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
	Volumes        []struct {
		Name      string `yaml:"name"`
		ConfigMap struct {
			Name  string `yaml:"name"`
			Items []struct {
				Key  string `yaml:"key"`
				Path string `yaml:"path"`
			} `yaml:"items"`
		} `yaml:"configMap"`
	} `yaml:"volumes"`
}

type container struct {
	Name string `yaml:"name"`
	Env  []struct {
		Name      string `yaml:"name"`
		Value     string `yaml:"value"`
		ValueFrom *struct {
			ConfigMapKeyRef *struct {
				Name string `yaml:"name"`
				Key  string `yaml:"key"`
			} `yaml:"configMapKeyRef"`
		} `yaml:"valueFrom"`
	} `yaml:"env"`
	EnvFrom []struct {
		Prefix       string `yaml:"prefix"`
		ConfigMapRef *struct {
			Name string `yaml:"name"`
		} `yaml:"configMapRef"`
	} `yaml:"envFrom"`
	VolumeMounts []struct {
		Name      string `yaml:"name"`
		MountPath string `yaml:"mountPath"`
		SubPath   string `yaml:"subPath"`
	} `yaml:"volumeMounts"`
}

// manifest is what a file holds.
type manifest struct {
	pods       []podSpec
	configMaps map[string]map[string]string
}

// readManifest returns the environment of the first container of that name, and the content of the override file that it
// names, where a ConfigMap of the manifest holds it.
func readManifest(file, name string) (environ []string, content []byte, err error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, nil, fmt.Errorf("reading the manifest: %w", err)
	}
	m := manifest{configMaps: map[string]map[string]string{}}
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	for {
		var o object
		if err := decoder.Decode(&o); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, nil, fmt.Errorf("reading the manifest %s: %w", file, err)
		}
		m.add(o)
	}
	for _, pod := range m.pods {
		for _, c := range append(pod.InitContainers, pod.Containers...) {
			if c.Name == name {
				environ, err = m.environ(c)
				return environ, m.overrideFile(pod, c, environ), err
			}
		}
	}
	return nil, nil, fmt.Errorf("reading the manifest %s: no container is named %q; --container names another", file, name)
}

func (m *manifest) add(o object) {
	for _, item := range o.Items {
		m.add(item)
	}
	if o.Kind == "ConfigMap" {
		m.configMaps[o.Metadata.Name] = o.Data
	}
	m.pods = append(m.pods, o.Spec.podSpec, o.Spec.Template.Spec, o.Spec.JobTemplate.Spec.Template.Spec)
}

// environ returns the container's variables. Of those that come from elsewhere, it knows the manifest's ConfigMaps.
func (m *manifest) environ(c container) ([]string, error) {
	var environ []string
	for _, from := range c.EnvFrom {
		if from.ConfigMapRef == nil {
			continue // a Secret: mantlet takes nothing from one
		}
		for key, value := range m.configMaps[from.ConfigMapRef.Name] {
			environ = append(environ, from.Prefix+key+"="+value)
		}
	}
	for _, e := range c.Env {
		value := e.Value
		if e.ValueFrom != nil {
			ref := e.ValueFrom.ConfigMapKeyRef
			if ref == nil || m.configMaps[ref.Name] == nil {
				if isMantlets(e.Name) {
					return nil, fmt.Errorf("the value of %s does not stand in the manifest; it can't be checked", e.Name)
				}
				continue
			}
			value = m.configMaps[ref.Name][ref.Key]
		}
		environ = append(environ, e.Name+"="+value)
	}
	return environ, nil
}

func isMantlets(name string) bool {
	return strings.HasPrefix(name, "MANTLET_") || strings.HasSuffix(name, "GRESS_PROXY_CONFIG")
}

// overrideFile finds the file that MANTLET_CONFIG names in the volumes.
func (m *manifest) overrideFile(pod podSpec, c container, environ []string) []byte {
	var file string
	for _, e := range environ {
		if value, ok := strings.CutPrefix(e, "MANTLET_CONFIG="); ok {
			file = path.Clean(value)
		}
	}
	for _, mount := range c.VolumeMounts {
		inside, ok := strings.CutPrefix(file, path.Clean(mount.MountPath)+"/")
		switch {
		case file == path.Clean(mount.MountPath) && mount.SubPath != "":
			inside = mount.SubPath
		case !ok:
			continue
		}
		for _, v := range pod.Volumes {
			if v.Name != mount.Name {
				continue
			}
			for _, item := range v.ConfigMap.Items {
				if item.Path == inside {
					inside = item.Key
				}
			}
			if text, ok := m.configMaps[v.ConfigMap.Name][inside]; ok {
				return []byte(text)
			}
		}
	}
	return nil
}
