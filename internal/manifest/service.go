package manifest

import (
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"mantlet/schema"
)

// Service is a Service of a manifest.
type Service struct {
	Name, Namespace string
	Selector        map[string]string
	Ports           []ServicePort
	Type            string
	ClusterIP       string // "None" for a headless one
	ExternalName    string
	Origin          schema.Origin
}

// ServicePort is a port of a Service.
type ServicePort struct {
	Name       string `yaml:"name"`
	Port       uint16 `yaml:"port"`
	TargetPort string `yaml:"targetPort"` // a number, or the name of a container's port; "" for the same number
	Protocol   string `yaml:"protocol"`   // "" for TCP
}

// Backend is a Service's port that an Ingress sends its clients to.
type Backend struct {
	Object    string // as "Ingress shop"
	Namespace string
	Service   string
	Port      string // a number, or the name of a Service's port
	Origin    schema.Origin
}

// Services returns the Services, in the order of the manifest.
func (m *Manifest) Services() []Service { return m.services }

// Backends returns what Ingresses lead to, in the order of the manifest.
func (m *Manifest) Backends() []Backend { return m.backends }

// addService takes a Service or an Ingress in.
func (m *Manifest) addService(o object) error {
	origin := func(node *yaml.Node) schema.Origin {
		return schema.Origin{Source: m.source, Line: node.Line, Column: node.Column}
	}
	switch o.Kind {
	case "Service":
		var service struct {
			Spec struct {
				Selector     map[string]string `yaml:"selector"`
				Ports        []ServicePort     `yaml:"ports"`
				Type         string            `yaml:"type"`
				ClusterIP    string            `yaml:"clusterIP"`
				ExternalName string            `yaml:"externalName"`
			} `yaml:"spec"`
		}
		if err := o.node.Decode(&service); err != nil {
			return err
		}
		spec := service.Spec
		m.services = append(m.services, Service{
			o.Metadata.Name, o.Metadata.Namespace, spec.Selector, spec.Ports, spec.Type, spec.ClusterIP, strings.TrimSuffix(spec.ExternalName, "."), origin(o.node),
		})
	case "Ingress":
		var find func(node *yaml.Node)
		find = func(node *yaml.Node) {
			for i := 0; node.Kind == yaml.MappingNode && i+1 < len(node.Content); i += 2 {
				var backend struct {
					Name string `yaml:"name"`
					Port struct {
						Name   string `yaml:"name"`
						Number string `yaml:"number"`
					} `yaml:"port"`
				}
				isBackend := node.Content[i].Value == "service" && node.Content[i+1].Decode(&backend) == nil && backend.Name != ""
				if isBackend {
					m.backends = append(m.backends, Backend{
						"Ingress " + o.Metadata.Name, o.Metadata.Namespace, backend.Name, backend.Port.Name + backend.Port.Number, origin(node.Content[i]),
					})
				}
			}
			for _, n := range node.Content {
				find(n)
			}
		}
		find(o.node)
	}
	return nil
}

// Pod is a pod of a manifest.
type Pod struct {
	manifest *Manifest
	pod      pod
}

// Pods returns the pods, in the order of the manifest.
func (m *Manifest) Pods() []Pod {
	all := make([]Pod, 0, len(m.pods))
	for _, p := range m.pods {
		all = append(all, Pod{m, p})
	}
	return all
}

// Object names what the pod is part of, as "Deployment web".
func (p Pod) Object() string { return p.pod.name }

// Namespace returns the pod's namespace, "" where the manifest leaves it open.
func (p Pod) Namespace() string { return p.pod.metadata.Namespace }

// Labels returns the pod's labels.
func (p Pod) Labels() map[string]string { return p.pod.metadata.Labels }

// ServiceAccount returns the name of the pod's service account.
func (p Pod) ServiceAccount() string {
	if p.pod.ServiceAccountName == "" {
		return "default"
	}
	return p.pod.ServiceAccountName
}

// Sidecar returns the pod's container of one of the names.
func (p Pod) Sidecar(names ...string) (Sidecar, bool) {
	for _, c := range p.pod.containers() {
		for _, name := range names {
			if c.Name == name {
				return Sidecar{p.manifest, p.pod, c}, true
			}
		}
	}
	return Sidecar{}, false
}

// Port returns the number of a port: of a number itself, or of the container's port that has the name.
func (p Pod) Port(name string) (uint16, bool) {
	for _, c := range p.pod.containers() {
		if n, ok := c.number(name); ok {
			return n, true
		}
	}
	return 0, false
}

// Declares reports whether one of the containers says that it listens on a TCP port, or none says anything of its ports.
func (p Pod) Declares(port uint16) bool {
	declared := false
	for _, c := range p.pod.containers() {
		for _, declaration := range c.Ports {
			isTCP := declaration.Protocol == "" || strings.EqualFold(declaration.Protocol, "TCP")
			if isTCP && declaration.ContainerPort == port {
				return true
			}
			declared = true
		}
	}
	return !declared
}

// Origin returns where the pod's first container stands.
func (p Pod) Origin() schema.Origin {
	for _, c := range p.pod.containers() {
		return schema.Origin{Source: p.manifest.source, Line: c.place.line, Column: c.place.column}
	}
	return schema.Origin{Source: p.manifest.source}
}

// Configuration is what a sidecar makes of its environment and of its override file.
type Configuration struct {
	Process schema.Process
	Mesh    schema.Mesh // as far as it is right
	// IsPartial tells that more of it comes from outside the manifest.
	IsPartial bool
	Findings  []Finding
}

// Policy returns what happens to connections to a port.
func (c Configuration) Policy(port uint16) schema.Policy {
	if c.Mesh.IngressOff {
		return schema.Policy{Mode: schema.ModePassthrough}
	}
	return schema.PolicyOf(c.Mesh.Ingress, port)
}

// Configuration returns the sidecar's, as far as the manifest tells.
func (s Sidecar) Configuration() Configuration {
	environ, unknown, findings := s.Environ()
	env, err := schema.ParseEnvironment(environ)
	config, isPartial := env.Base(), len(unknown) > 0
	if env.ReadsFile() {
		content, known := s.File(env.Process.ConfigFile)
		switch {
		case !known:
			isPartial = true
		case err == nil:
			config, err = env.Merge(content)
		}
	}
	for _, problem := range schema.Problems(err) {
		findings = append(findings, Finding{problem, Error})
	}
	mesh := config.Mesh
	if err != nil {
		mesh, isPartial = env.Partial(), true
	}
	return Configuration{env.Process, mesh, isPartial, findings}
}

// Origin returns where the sidecar stands.
func (s Sidecar) Origin() schema.Origin {
	return schema.Origin{Source: s.manifest.source, Line: s.container.place.line, Column: s.container.place.column}
}

// Source names the Secret or the ConfigMap that is mounted at a directory of the sidecar, if the manifests have it.
func (s Sidecar) Source(directory string) (string, bool) {
	mount, _ := s.container.mountOf(directory)
	v, _ := s.pod.volume(mount.Name)
	for _, from := range []struct{ kind, name string }{{secretKind, v.Secret.SecretName}, {configMapKind, v.ConfigMap.Name}} {
		if _, known := s.manifest.lookup(from.kind, from.name, s.pod.metadata.Namespace); known && from.name != "" {
			return from.kind + " " + from.name, true
		}
	}
	return "", false
}

// Texts returns what the containers are told: their commands, arguments and the values of their variables.
func (p Pod) Texts() []string {
	var all []string
	for _, c := range p.pod.containers() {
		all = slices.Concat(all, c.Command, c.Args)
		for _, v := range c.Env {
			if !isMantlets(v.Name) {
				all = append(all, v.Value)
			}
		}
	}
	return all
}
