package manifest

import (
	"path"
	"regexp"
	"strings"
)

// Environ returns the environment that the sidecar gets, in the form of os.Environ, as far as the manifest tells. Where it
// does not tell the value of one of mantlet's variables, the name is among unknown, and there is a finding.
func (s Sidecar) Environ() (environ, unknown []string, findings []Finding) {
	values := map[string]string{}
	set := func(name, value string) {
		environ = append(environ, name+"="+value)
		values[name] = value
	}
	for _, from := range s.container.EnvFrom {
		kind, ref := configMapKind, from.ConfigMapRef
		if ref == nil {
			kind, ref = secretKind, from.SecretRef
		}
		if ref == nil {
			continue
		}
		data, known := s.manifest.lookup(kind, ref.Name, s.pod.metadata.Namespace)
		if !known {
			findings = append(findings, s.finding(Warning, from.place, s.container.path+".envFrom", "",
				"the variables of %s %q are not in the manifest, so they were not checked", kind, ref.Name))
			continue
		}
		for key, value := range data {
			set(from.Prefix+key, value)
		}
	}
	seen := map[string]bool{}
	for _, v := range s.container.Env {
		at := s.container.path + ".env[" + v.Name + "]"
		if seen[v.Name] && isMantlets(v.Name) {
			findings = append(findings, s.finding(Warning, v.place, at, "", "is set more than once; only this last value counts"))
		}
		seen[v.Name] = true
		value, known, source := s.value(v, values)
		switch {
		case known:
			set(v.Name, value)
		case isMantlets(v.Name) && source != "":
			unknown = append(unknown, v.Name)
			findings = append(findings, s.finding(Warning, v.place, at, "", "its value comes from %s, which is not in the manifest, so it was not checked", source))
		}
	}
	return environ, unknown, append(findings, s.addresses()...)
}

// value returns a variable's value, or where it comes from; neither for what is known only once the pod runs.
func (s Sidecar) value(v variable, before map[string]string) (value string, known bool, source string) {
	if v.ValueFrom == nil {
		return expand(v.Value, before), true, ""
	}
	kind, ref := configMapKind, v.ValueFrom.ConfigMapKeyRef
	if ref == nil {
		kind, ref = secretKind, v.ValueFrom.SecretKeyRef
	}
	switch field := v.ValueFrom.FieldRef; {
	case ref != nil:
		data, _ := s.manifest.lookup(kind, ref.Name, s.pod.metadata.Namespace)
		value, known = data[ref.Key]
		return value, known, "key " + ref.Key + " of " + kind + " " + ref.Name
	case field != nil && strings.HasPrefix(field.FieldPath, "status."):
		return "", false, ""
	case field != nil:
		value, known = s.pod.metadata.field(field.FieldPath)
		return value, known, "the field " + field.FieldPath
	default:
		return "", false, "a source"
	}
}

// field returns a field of a pod's metadata by its path of the downward API.
func (m metadata) field(path string) (string, bool) {
	for prefix, values := range map[string]map[string]string{"metadata.labels['": m.Labels, "metadata.annotations['": m.Annotations} {
		if key, ok := strings.CutPrefix(path, prefix); ok {
			value, ok := values[strings.TrimSuffix(key, "']")]
			return value, ok
		}
	}
	if path == "metadata.namespace" {
		return m.Namespace, m.Namespace != ""
	}
	return "", false // names of a Deployment's pods are made when they are
}

// addresses reports variables of the pod's addresses that have those of others.
func (s Sidecar) addresses() []Finding {
	var all []Finding
	for _, v := range s.container.Env {
		want := map[string]string{"MANTLET_POD_IP": "status.podIP", "MANTLET_HOST_IP": "status.hostIP"}[v.Name]
		if want == "" || v.ValueFrom == nil || v.ValueFrom.FieldRef == nil || v.ValueFrom.FieldRef.FieldPath == want {
			continue
		}
		all = append(all, s.finding(Error, v.place, s.container.path+".env["+v.Name+"]", v.ValueFrom.FieldRef.FieldPath, "must be the field %s", want))
	}
	return all
}

func isMantlets(name string) bool {
	return strings.HasPrefix(name, "MANTLET_") || strings.HasSuffix(name, "GRESS_PROXY_CONFIG")
}

// A variable's value may refer to those before it, as kubelet has it: $(NAME), and $$ for a dollar sign.
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

// File returns the content of a file of the sidecar, if a ConfigMap or a Secret of the manifest holds it.
func (s Sidecar) File(name string) ([]byte, bool) {
	mount, ok := s.container.mountOf(name)
	if !ok {
		return nil, false
	}
	below, _ := strings.CutPrefix(path.Clean(name)+"/", strings.TrimSuffix(path.Clean(mount.MountPath), "/")+"/")
	inside := path.Join(mount.SubPath, below)
	v, ok := s.pod.volume(mount.Name)
	if !ok {
		return nil, false
	}
	type source struct {
		kind  string
		files volumeFiles
	}
	sources := []source{{configMapKind, v.ConfigMap}, {secretKind, v.Secret}}
	for _, p := range v.Projected.Sources {
		sources = append(sources, source{configMapKind, p.ConfigMap}, source{secretKind, p.Secret})
	}
	for _, from := range sources {
		values, _ := s.manifest.lookup(from.kind, from.files.Name+from.files.SecretName, s.pod.metadata.Namespace)
		if text, ok := values[from.files.key(inside)]; ok {
			return []byte(text), true
		}
	}
	return nil, false
}

// mountOf returns the innermost mount that a path is in, or is.
func (c container) mountOf(name string) (found volumeMount, ok bool) {
	for _, mount := range c.VolumeMounts {
		at := strings.TrimSuffix(path.Clean(mount.MountPath), "/") + "/"
		if strings.HasPrefix(path.Clean(name)+"/", at) && len(path.Clean(mount.MountPath)) > len(found.MountPath) {
			found, ok = mount, true
			found.MountPath = path.Clean(mount.MountPath)
		}
	}
	return found, ok
}

func (p pod) volume(name string) (volume, bool) {
	for _, v := range p.Volumes {
		if v.Name == name {
			return v, true
		}
	}
	return volume{}, false
}

// key returns the key of the ConfigMap or Secret that a file of the volume has its content from, "" if there is no such file.
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
