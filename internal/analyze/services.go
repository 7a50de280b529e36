package analyze

import (
	"net/netip"
	"slices"
	"strings"

	"mantlet/internal/manifest"
)

// world is all that the manifests have.
type world struct {
	workloads []*workload
	services  []manifest.Service
}

// sameNamespace reports whether two namespaces may be one: where a manifest leaves it open, it is the one that it is applied to.
func sameNamespace(a, b string) bool { return a == b || a == "" || b == "" }

// selects reports whether a Service leads to a pod.
func selects(s manifest.Service, p manifest.Pod) bool {
	if len(s.Selector) == 0 || !sameNamespace(s.Namespace, p.Namespace()) {
		return false
	}
	labels := p.Labels()
	for key, value := range s.Selector {
		if labels[key] != value {
			return false
		}
	}
	return true
}

// isHeadless reports whether the Service's name has the addresses of the pods, so that its ports map nothing.
func isHeadless(s manifest.Service) bool { return s.ClusterIP == "None" }

// targetOf returns the port of a pod that a Service's port leads to; false where the pod has no port of that name.
func targetOf(s manifest.Service, port manifest.ServicePort, p manifest.Pod) (uint16, bool) {
	if isHeadless(s) || port.TargetPort == "" {
		return port.Port, true
	}
	return p.Port(port.TargetPort)
}

// found is what a host name leads to.
type found struct {
	services        []manifest.Service // as a rule one
	outside         bool               // the name is not one of a Service
	name, namespace string             // of the Service that it would be
}

// find returns the Services that a host leads to, as a pod of a namespace has it looked up.
func (all *world) find(host, namespace string) found {
	if _, err := netip.ParseAddr(host); err == nil {
		is := func(s manifest.Service) bool { return s.ClusterIP == host }
		services := slices.DeleteFunc(slices.Clone(all.services), func(s manifest.Service) bool { return !is(s) })
		return found{services: services, outside: len(services) == 0}
	}
	labels := strings.Split(strings.TrimSuffix(strings.ToLower(host), "."), ".")
	const cluster = 2 // labels behind svc: cluster.local, as a rule
	svc := slices.Index(labels, "svc")
	isFull := svc >= 2 && (len(labels) == svc+1 || len(labels) == svc+1+cluster)
	switch {
	case isFull:
		labels = labels[:svc] // maybe the name of a pod before those of Service and namespace
	case len(labels) > 3:
		return found{outside: true}
	}
	if len(labels) > 1 || isFull {
		namespace = labels[len(labels)-1]
		labels = labels[:len(labels)-1]
	}
	name := labels[len(labels)-1]
	f := found{name: name, namespace: namespace}
	for _, s := range all.services {
		if s.Name == name && sameNamespace(s.Namespace, namespace) && (len(labels) == 1 || isHeadless(s)) {
			f.services = append(f.services, s)
		}
	}
	if exact := slices.IndexFunc(f.services, func(s manifest.Service) bool { return s.Namespace == namespace }); exact >= 0 {
		f.services = f.services[exact : exact+1]
	}
	isDotted := strings.Contains(strings.TrimSuffix(host, "."), ".")
	f.outside = len(f.services) == 0 && isDotted && !isFull
	return f
}
