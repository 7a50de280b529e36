package analyze

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"

	"mantlet/internal/manifest"
	"mantlet/schema"
)

// outbound says what a pod calls, and finds what is wrong between it and what it calls.
func (all *world) outbound(w *workload) {
	say := func(format string, args ...any) {
		w.report.Outbound = append(w.report.Outbound, fmt.Sprintf(format, args...))
	}
	if !w.hasMesh {
		say("whatever it connects to, as it sends it: it has no mantlet")
		return
	}
	for _, e := range w.config.Mesh.Egress {
		c := call{world: all, from: w, entry: e, path: fmt.Sprintf("egress[%s]", e.Listen)}
		say("%s%s: %s, over mutual TLS%s: %s", e.Listen, label(e.Name), e.Upstream, named(e), strings.Join(c.follow(), "; "))
	}
	w.certified()
	w.unheard()
	say("everything else: as the workload sends it")
}

// named says whom an entry accepts.
func named(e schema.Egress) string {
	if len(e.ServerNames) == 0 {
		return ", to whoever of the mesh answers there"
	}
	return ", to " + strings.Join(e.ServerNames, " or ")
}

// certified looks for the files without which a workload is nobody in the mesh.
func (w *workload) certified() {
	directory := w.config.Process.TLS.Directory
	files, err := w.config.Process.TLS.Paths(func(path string) bool { _, ok := w.sidecar.File(path); return ok })
	if err != nil {
		w.problem("", "%v", err)
		return
	}
	var missing []string
	for _, file := range files {
		if _, ok := w.sidecar.File(file); !ok {
			missing = append(missing, path.Base(file))
		}
	}
	if source, ok := w.sidecar.Source(directory); ok && len(missing) > 0 {
		w.problem("", "%s is mounted at %s and lacks %s: without a certificate of its own the pod neither calls others nor lets anyone in", source, directory, strings.Join(missing, ", "))
	}
}

var loopback = regexp.MustCompile(`\b127\.\d+\.\d+\.\d+:\d+\b`)

// unheard looks for loopback addresses that the workload is told to connect to, and where mantlet does not listen. 127.0.0.1 is
// where a pod's containers speak to each other.
func (w *workload) unheard() {
	for _, text := range w.Texts() {
		for _, address := range loopback.FindAllString(text, -1) {
			listens := slices.ContainsFunc(w.config.Mesh.Egress, func(e schema.Egress) bool { return e.Listen.String() == address })
			if !listens && !strings.HasPrefix(address, "127.0.0.1:") {
				w.warning("", "the workload is told of %s, and no egress entry listens there", address)
			}
		}
	}
}

// call is an egress entry on its way.
type call struct {
	*world

	from  *workload
	entry schema.Egress
	path  string
}

func (c call) problem(format string, args ...any) { c.from.problem(c.path, format, args...) }

// follow returns in words where the entry leads to.
func (c call) follow() []string {
	up := c.entry.Upstream
	f := c.find(up.Host, c.from.Namespace())
	if f.outside {
		return []string{"outside of the manifests"}
	}
	if len(f.services) == 0 {
		var others []string
		for _, s := range c.services {
			if s.Name == f.name {
				others = append(others, s.Namespace)
			}
		}
		if f.namespace != c.from.Namespace() && !c.has(f.namespace) {
			c.from.warning(c.path, "nothing of namespace %s is in the manifests, so what answers to %s was not checked", f.namespace, up.Host)
			return []string{"outside of the manifests"}
		}
		if len(others) > 0 {
			c.problem("there is no Service %s in the pod's namespace; it is in %s: name it as %s.%s", f.name, strings.Join(others, ", "), f.name, others[0])
		} else {
			c.problem("no Service of the manifests is called %s, so nobody answers to %s%s", f.name, up.Host, nearest(f.name, c.services))
		}
		return []string{"nobody"}
	}
	var words []string
	for _, s := range f.services {
		words = append(words, c.service(s)...)
	}
	return words
}

// has reports whether the manifests have something of a namespace.
func (all *world) has(namespace string) bool {
	return slices.ContainsFunc(all.services, func(s manifest.Service) bool { return sameNamespace(s.Namespace, namespace) }) ||
		slices.ContainsFunc(all.workloads, func(w *workload) bool { return sameNamespace(w.Namespace(), namespace) })
}

// nearest suggests the Service whose name is most like one that is not there.
func nearest(name string, services []manifest.Service) string {
	for _, s := range services {
		if len(s.Name) > 2 && (strings.HasPrefix(name, s.Name) || strings.HasPrefix(s.Name, name)) {
			return fmt.Sprintf("; did you mean %s?", s.Name)
		}
	}
	return ""
}

// service returns in words where a Service leads to.
func (c call) service(s manifest.Service) []string {
	up := c.entry.Upstream
	if s.Type == "ExternalName" {
		return []string{"outside of the manifests: " + s.ExternalName}
	}
	i := slices.IndexFunc(s.Ports, func(p manifest.ServicePort) bool { return p.Port == up.Port && !strings.EqualFold(p.Protocol, "UDP") })
	if i < 0 && !isHeadless(s) {
		c.problem("Service %s has no TCP port %d; it has %s", s.Name, up.Port, ports(s))
		return []string{"nobody"}
	}
	if len(s.Selector) == 0 {
		return []string{fmt.Sprintf("Service %s, whose endpoints are not in the manifests", s.Name)}
	}
	var words []string
	isSelected := false
	for _, w := range c.workloads {
		if !selects(s, w.Pod) {
			continue
		}
		isSelected = true
		target := up.Port
		if i >= 0 {
			var ok bool
			if target, ok = targetOf(s, s.Ports[i], w.Pod); !ok {
				c.problem("port %d of Service %s leads to the port %q, and no container of %s has one of that name", up.Port, s.Name, s.Ports[i].TargetPort, w.name(c.from))
				continue
			}
		}
		words = append(words, fmt.Sprintf("%s, port %d", w.name(c.from), target))
		c.arrive(s, w, target)
	}
	switch {
	case len(words) > 0:
		return words
	case isSelected:
		return []string{"nobody"}
	}
	if near := c.nearly(s); near != nil {
		c.problem("Service %s selects no pod (%s); %s has other labels (%s)", s.Name, pairs(s.Selector), near.name(c.from), pairs(near.Labels()))
		return []string{"nobody"}
	}
	c.from.warning(c.path, "Service %s selects no pod of the manifests (%s), so what answers there was not checked", s.Name, pairs(s.Selector))
	return []string{"no pod of the manifests"}
}

// nearly returns a pod that has some of the labels that a Service selects by, and not all.
func (all *world) nearly(s manifest.Service) *workload {
	for _, w := range all.workloads {
		for key, value := range s.Selector {
			if w.Labels()[key] == value && sameNamespace(s.Namespace, w.Namespace()) && !selects(s, w.Pod) {
				return w
			}
		}
	}
	return nil
}

func ports(s manifest.Service) string {
	var all []string
	for _, p := range s.Ports {
		all = append(all, fmt.Sprint(p.Port))
	}
	if len(all) == 0 {
		return "none"
	}
	return strings.Join(all, ", ")
}

// pairs writes labels as a selector has them.
func pairs(labels map[string]string) string {
	var all []string
	for key, value := range labels {
		all = append(all, key+"="+value)
	}
	slices.Sort(all)
	return strings.Join(all, ",")
}

// arrive looks at what the entry meets at a port of a pod.
func (c call) arrive(s manifest.Service, to *workload, port uint16) {
	name := to.name(c.from)
	if !to.hasMesh {
		c.problem("speaks mutual TLS to port %d of %s, which has no mantlet: give it one, or connect to it without an egress entry", port, name)
		return
	}
	mesh := to.config.Mesh
	policy := to.config.Policy(port)
	switch {
	case port == mesh.StatusPort:
		c.problem("leads to port %d of %s, where mantlet serves its status in plaintext", port, name)
		return
	case port == schema.IngressMTLSPort || port == schema.IngressTLSPort:
		c.problem("leads to port %d of %s, which is one of mantlet's own; name the workload's port", port, name)
		return
	case policy.Mode == schema.ModePassthrough:
		c.problem("speaks mutual TLS to port %d of %s, which is passthrough, so the workload itself meets it; make the port mtls or tls there, or connect to it without an egress entry", port, name)
		return
	}
	if !to.Declares(port) {
		hint := ""
		if isHeadless(s) {
			for _, p := range s.Ports {
				if target, ok := to.Port(p.TargetPort); ok && p.Port == port && target != port {
					hint = fmt.Sprintf("; Service %s is headless, so its name leads to the pods and targetPort counts for nothing: name port %d", s.Name, target)
				}
			}
		}
		c.from.warning(c.path, "leads to port %d of %s, and no container there declares that port%s", port, name, hint)
	}
	to.report.Callers = append(to.report.Callers, fmt.Sprintf("%s, at port %d%s", c.from.name(to), port, label(c.entry.Name)))
	c.identities(to, policy, port)
}

// identities looks at whether both sides accept each other's certificates.
func (c call) identities(to *workload, policy schema.Policy, port uint16) {
	name := to.name(c.from)
	if policy.Mode == schema.ModeMTLS && len(policy.Allow) > 0 && !c.from.has(policy.Allow, false) {
		c.problem("port %d of %s allows only %s, and this pod is none of them: %s", port, name, strings.Join(policy.Allow, ", "), c.from.known())
	}
	if len(c.entry.ServerNames) > 0 && !to.has(c.entry.ServerNames, true) {
		c.problem("accepts only the certificate of %s, and %s is none of them: %s", strings.Join(c.entry.ServerNames, ", "), name, to.known())
	}
	if !c.from.trusts(to) {
		c.problem("the certificate of %s does not lead to this pod's mesh-ca.pem: they are of different meshes, or the intermediate is missing", name)
	}
	if policy.Mode == schema.ModeMTLS && !to.trusts(c.from) {
		c.problem("this pod's certificate does not lead to the mesh-ca.pem of %s: they are of different meshes, or the intermediate is missing", name)
	}
	shared := slices.ContainsFunc(c.entry.ALPN, func(p string) bool { return slices.Contains(policy.ALPN, p) })
	if len(c.entry.ALPN) > 0 && len(policy.ALPN) > 0 && !shared {
		c.from.warning(c.path, "offers the protocols %s, and port %d of %s has only %s: they agree on none", strings.Join(c.entry.ALPN, ", "), port, name, strings.Join(policy.ALPN, ", "))
	}
}

// fromOutside looks at what clients of an Ingress meet: its controller has no certificate of the mesh.
func (all *world) fromOutside(b manifest.Backend) {
	for _, s := range all.services {
		if s.Name != b.Service || !sameNamespace(s.Namespace, b.Namespace) {
			continue
		}
		for _, port := range s.Ports {
			if port.Name != b.Port && fmt.Sprint(port.Port) != b.Port {
				continue
			}
			for _, w := range all.workloads {
				target, ok := targetOf(s, port, w.Pod)
				if ok && w.hasMesh && selects(s, w.Pod) && w.config.Policy(target).Mode == schema.ModeMTLS && target != w.config.Mesh.StatusPort {
					w.warning(fmt.Sprintf("ingress[%d]", target), "%s leads to port %d, which is mtls: its controller needs a certificate of the mesh, or the port must be tls", b.Object, target)
				}
			}
		}
	}
}
