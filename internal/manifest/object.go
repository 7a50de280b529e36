package manifest

import (
	"encoding/base64"
	"fmt"
	"strings"

	"go.yaml.in/yaml/v3"
)

// The parts of Kubernetes' objects that concern a sidecar. They are read leniently: whether all the rest of a manifest is
// right is not the question here, and Kubernetes' own types would make the binary half as large again.

type object struct {
	Kind     string   `yaml:"kind"`
	Metadata metadata `yaml:"metadata"`
	Items    []object `yaml:"items"`    // of a List
	Template template `yaml:"template"` // of a PodTemplate
	Spec     struct {
		podSpec     `yaml:",inline"`
		Template    template `yaml:"template"`
		JobTemplate struct {
			Spec struct {
				Template template `yaml:"template"`
			} `yaml:"spec"`
		} `yaml:"jobTemplate"`
	} `yaml:"spec"`

	// Of a ConfigMap or a Secret.
	Data       map[string]string `yaml:"data"`
	BinaryData map[string]string `yaml:"binaryData"`
	StringData map[string]string `yaml:"stringData"`

	node *yaml.Node
}

// UnmarshalYAML keeps the node, for the kinds that have other fields of the same names.
func (o *object) UnmarshalYAML(node *yaml.Node) error {
	type plain object
	err := node.Decode((*plain)(o))
	o.node = node
	return err
}

type metadata struct {
	Name        string            `yaml:"name"`
	Namespace   string            `yaml:"namespace"`
	Labels      map[string]string `yaml:"labels"`
	Annotations map[string]string `yaml:"annotations"`
}

type template struct {
	Metadata metadata `yaml:"metadata"`
	Spec     podSpec  `yaml:"spec"`
}

type podSpec struct {
	ServiceAccountName    string          `yaml:"serviceAccountName"`
	HostNetwork           bool            `yaml:"hostNetwork"`
	HostPID               bool            `yaml:"hostPID"`
	HostIPC               bool            `yaml:"hostIPC"`
	ShareProcessNamespace bool            `yaml:"shareProcessNamespace"`
	SecurityContext       securityContext `yaml:"securityContext"`
	InitContainers        []container     `yaml:"initContainers"`
	Containers            []container     `yaml:"containers"`
	EphemeralContainers   []container     `yaml:"ephemeralContainers"`
	Volumes               []volume        `yaml:"volumes"`
}

// place is where something stands in the manifest.
type place struct{ line, column int }

type container struct {
	Name            string          `yaml:"name"`
	Command         []string        `yaml:"command"`
	Args            []string        `yaml:"args"`
	RestartPolicy   string          `yaml:"restartPolicy"`
	Env             []variable      `yaml:"env"`
	EnvFrom         []variables     `yaml:"envFrom"`
	Ports           []port          `yaml:"ports"`
	VolumeMounts    []volumeMount   `yaml:"volumeMounts"`
	SecurityContext securityContext `yaml:"securityContext"`
	StartupProbe    *probe          `yaml:"startupProbe"`
	ReadinessProbe  *probe          `yaml:"readinessProbe"`
	LivenessProbe   *probe          `yaml:"livenessProbe"`
	Lifecycle       struct {
		PostStart *probe `yaml:"postStart"`
		PreStop   *probe `yaml:"preStop"`
	} `yaml:"lifecycle"`

	place  place
	isInit bool
	path   string // as "spec.containers[web]"
}

// UnmarshalYAML keeps the place.
func (c *container) UnmarshalYAML(node *yaml.Node) error {
	type plain container
	err := node.Decode((*plain)(c))
	c.place = place{node.Line, node.Column}
	return err
}

type securityContext struct {
	Privileged               bool   `yaml:"privileged"`
	AllowPrivilegeEscalation *bool  `yaml:"allowPrivilegeEscalation"`
	ReadOnlyRootFilesystem   bool   `yaml:"readOnlyRootFilesystem"`
	RunAsUser                *int64 `yaml:"runAsUser"`
	RunAsNonRoot             *bool  `yaml:"runAsNonRoot"`
	Capabilities             struct {
		Add  []string `yaml:"add"`
		Drop []string `yaml:"drop"`
	} `yaml:"capabilities"`
}

// user returns the user of a container's processes; false where that is the image's affair.
func (s securityContext) user() (uid int64, ok bool) {
	if s.RunAsUser == nil {
		return 0, false
	}
	return *s.RunAsUser, true
}

// mayBeRoot reports whether nothing says that the processes of a container are not root's.
func (s securityContext) mayBeRoot() bool {
	if uid, ok := s.user(); ok {
		return uid == 0
	}
	return s.RunAsNonRoot == nil || !*s.RunAsNonRoot
}

// adds returns whether a container is given a capability beyond the runtime's default.
func (s securityContext) adds(capability string) bool {
	return contains(s.Capabilities.Add, capability)
}

// has returns whether a container has a capability that container runtimes give by default.
func (s securityContext) has(capability string) bool {
	return s.Privileged || s.adds(capability) || !contains(s.Capabilities.Drop, capability)
}

// contains reports whether a list of capabilities has one: by its name, with or without CAP_, or as one of ALL.
func contains(list []string, capability string) bool {
	for _, c := range list {
		if c = strings.TrimPrefix(strings.ToUpper(c), "CAP_"); c == capability || c == "ALL" {
			return true
		}
	}
	return false
}

type port struct {
	Name          string `yaml:"name"`
	ContainerPort uint16 `yaml:"containerPort"`
	Protocol      string `yaml:"protocol"`
}

// probe is a kubelet's probe, or a hook of a container's life.
type probe struct {
	HTTPGet *struct {
		Path   string `yaml:"path"`
		Port   string `yaml:"port"`
		Host   string `yaml:"host"`
		Scheme string `yaml:"scheme"`
	} `yaml:"httpGet"`
	TCPSocket *struct {
		Port string `yaml:"port"`
		Host string `yaml:"host"`
	} `yaml:"tcpSocket"`
	GRPC *struct {
		Port    string `yaml:"port"`
		Service string `yaml:"service"`
	} `yaml:"grpc"`

	place place
}

// UnmarshalYAML keeps the place.
func (p *probe) UnmarshalYAML(node *yaml.Node) error {
	type plain probe
	err := node.Decode((*plain)(p))
	p.place = place{node.Line, node.Column}
	return err
}

type volume struct {
	Name      string      `yaml:"name"`
	ConfigMap volumeFiles `yaml:"configMap"`
	Secret    volumeFiles `yaml:"secret"`
	EmptyDir  *struct {
		Medium string `yaml:"medium"`
	} `yaml:"emptyDir"`
	Projected struct {
		Sources []struct {
			ConfigMap volumeFiles `yaml:"configMap"`
			Secret    volumeFiles `yaml:"secret"`
		} `yaml:"sources"`
	} `yaml:"projected"`
}

// volumeFiles are the files of a volume that a ConfigMap or a Secret gives: all of its keys, or those that are listed.
type volumeFiles struct {
	Name       string `yaml:"name"`
	SecretName string `yaml:"secretName"` // in place of the name, where a Secret is all of the volume
	Items      []struct {
		Key  string `yaml:"key"`
		Path string `yaml:"path"`
	} `yaml:"items"`
}

type variable struct {
	Name      string `yaml:"name"`
	Value     string `yaml:"value"`
	ValueFrom *struct {
		ConfigMapKeyRef *reference `yaml:"configMapKeyRef"`
		SecretKeyRef    *reference `yaml:"secretKeyRef"`
		FieldRef        *struct {
			FieldPath string `yaml:"fieldPath"`
		} `yaml:"fieldRef"`
	} `yaml:"valueFrom"`

	place place
}

// UnmarshalYAML keeps the place.
func (v *variable) UnmarshalYAML(node *yaml.Node) error {
	type plain variable
	err := node.Decode((*plain)(v))
	v.place = place{node.Line, node.Column}
	return err
}

type variables struct {
	Prefix       string     `yaml:"prefix"`
	ConfigMapRef *reference `yaml:"configMapRef"`
	SecretRef    *reference `yaml:"secretRef"`

	place place
}

// UnmarshalYAML keeps the place.
func (v *variables) UnmarshalYAML(node *yaml.Node) error {
	type plain variables
	err := node.Decode((*plain)(v))
	v.place = place{node.Line, node.Column}
	return err
}

type volumeMount struct {
	Name      string `yaml:"name"`
	MountPath string `yaml:"mountPath"`
	SubPath   string `yaml:"subPath"`
}

type reference struct {
	Name string `yaml:"name"`
	Key  string `yaml:"key"`
}

// values returns what a ConfigMap or a Secret holds, by key. Bad base64 is an error, of which the values are left out.
func (o object) values() (map[string]string, error) {
	all := map[string]string{}
	var err error
	decode := func(encoded map[string]string) {
		for key, text := range encoded {
			plain, bad := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(text), ""))
			if bad != nil {
				err = fmt.Errorf("%s %s: the value of key %q is not base64: %w", o.Kind, o.Metadata.Name, key, bad)
				continue
			}
			all[key] = string(plain)
		}
	}
	plain := o.Data
	if o.Kind == secretKind {
		decode(o.Data)
		plain = o.StringData
	}
	decode(o.BinaryData)
	for key, text := range plain {
		all[key] = text
	}
	return all, err
}

const (
	configMapKind = "ConfigMap"
	secretKind    = "Secret"
)
