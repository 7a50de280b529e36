package inject

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"mantlet/schema"
)

// defaultStatusPort is where mantlet serves its status where nothing else is said and it must.
const defaultStatusPort = 9901

// takeOver has mantlet ask the workload what a kubelet, which has no mesh certificate, cannot ask it any more.
func (p *plan) takeOver(say *report) {
	var asked []kubeletProbe
	for _, list := range []string{"initContainers", "containers"} {
		for _, c := range p.subject.containers(list) {
			asked = append(asked, p.probesOf(list, c, say)...)
		}
	}
	if len(asked) == 0 {
		return
	}
	if p.statusPort == 0 {
		p.statusPort = p.freePort()
	}
	if p.isAdmin && p.mode(p.statusPort) != schema.ModePassthrough { // a kubelet has no mesh certificate
		say.warn(asked[0].handler, asked[0].path, "the kubelet asks mantlet at the admin port, so the entry admin#%d#true is added: anyone can read the status there", p.statusPort)
		p.ingress = new(strings.TrimPrefix(fmt.Sprintf("%s##admin#%d#true", deref(p.ingress), p.statusPort), "##"))
	}
	for _, k := range asked {
		k.probe.Name = p.probeName(k)
		p.changes = append(p.changes, p.redirect(k)...)
		if k.note != "" {
			say.warn(k.handler, k.path, "%s", k.note)
		}
	}
}

func deref(text *string) string {
	if text == nil {
		return ""
	}
	return *text
}

// kubeletProbe is a probe of a container that mantlet takes over.
type kubeletProbe struct {
	container string
	path      string     // from the pod's spec
	field     string     // as "readinessProbe"
	node      *yaml.Node // the probe
	key       *yaml.Node // of the handler
	handler   *yaml.Node
	probe     schema.Probe
	note      string
}

// probesOf returns the probes of a container that mantlet takes over.
func (p *plan) probesOf(list string, container *yaml.Node, say *report) []kubeletProbe {
	var all []kubeletProbe
	name := text(container, "name")
	for _, field := range []string{"startupProbe", "readinessProbe", "livenessProbe"} {
		k := kubeletProbe{container: name, path: fmt.Sprintf("%s[%s].%s", list, name, field), field: field, node: at(container, field)}
		if p.asks(container, &k) {
			all = append(all, k)
		}
	}
	for _, hook := range []string{"postStart", "preStop"} {
		k := kubeletProbe{node: at(container, "lifecycle", hook)}
		if p.asks(container, &k) {
			say.refuse(k.handler, fmt.Sprintf("%s[%s].lifecycle.%s", list, name, hook),
				"asks port %d, which is %s, and the kubelet has no mesh certificate; execute a command in the container instead, or make the port passthrough", k.probe.Port, p.mode(k.probe.Port))
		}
	}
	return all
}

func (p *plan) mode(port uint16) schema.Mode {
	if p.isOff {
		return schema.ModePassthrough
	}
	return schema.PolicyOf(p.mesh.Ingress, port).Mode
}

// asks fills in what a probe asks, and reports whether only mantlet could.
func (p *plan) asks(container *yaml.Node, k *kubeletProbe) bool {
	for key, kind := range map[string]schema.ProbeKind{"httpGet": schema.ProbeHTTP, "tcpSocket": schema.ProbeTCP, "grpc": schema.ProbeGRPC} {
		if n, handler := find(k.node, key); handler != nil && handler.Kind == yaml.MappingNode {
			k.key, k.handler, k.probe.Kind = n, handler, kind
		}
	}
	if k.handler == nil || text(k.handler, "host") != "" {
		return false
	}
	port, ok := portOf(container, text(k.handler, "port"))
	if !ok || port == p.statusPort {
		return false
	}
	k.probe.Port = port
	isHTTPS := strings.EqualFold(text(k.handler, "scheme"), "HTTPS")
	mode := p.mode(port)
	switch k.probe.Kind {
	case schema.ProbeTCP:
	case schema.ProbeHTTP:
		k.probe.Target = "/" + strings.TrimPrefix(text(k.handler, "path"), "/")
		if isHTTPS && mode != schema.ModeTLS {
			k.probe.Kind, k.probe.Target = schema.ProbeTCP, ""
			k.note = "asks by HTTPS, which mantlet's probes do not speak: mantlet tries whether the port accepts connections"
		} else if at(k.handler, "httpHeaders") != nil {
			k.note = "has httpHeaders, which mantlet's probes do not send"
		}
	case schema.ProbeGRPC:
		k.probe.Target = text(k.handler, "service")
	}
	return mode == schema.ModeMTLS || mode == schema.ModeTLS && !isHTTPS
}

// portOf returns the number of a container's port.
func portOf(container *yaml.Node, name string) (uint16, bool) {
	if n, err := strconv.ParseUint(name, 10, 16); err == nil {
		return uint16(n), true
	}
	for _, port := range items(container, "ports") {
		if name != "" && text(port, "name") == name {
			n, err := strconv.ParseUint(text(port, "containerPort"), 10, 16)
			return uint16(n), err == nil
		}
	}
	return 0, false
}

// freePort returns a port for mantlet's status that nothing of the pod uses.
func (p *plan) freePort() uint16 {
	taken := map[uint16]bool{}
	for _, list := range []string{"initContainers", "containers"} {
		for _, c := range p.subject.containers(list) {
			for _, port := range items(c, "ports") {
				n, _ := strconv.ParseUint(text(port, "containerPort"), 10, 16)
				taken[uint16(n)] = true
			}
		}
	}
	port := uint16(defaultStatusPort)
	for ; taken[port] || slices.ContainsFunc(p.mesh.Ingress, func(in schema.Ingress) bool { return in.Ports.Contains(port) }); port++ {
	}
	return port
}

var label = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`)

// probeName returns the name of mantlet's probe that asks what a kubelet's did: one that there is, or a new one.
func (p *plan) probeName(k kubeletProbe) string {
	is := func(other schema.Probe) bool {
		other.Name = ""
		return other == k.probe
	}
	known := slices.Concat(p.mesh.Probes, p.probes)
	if i := slices.IndexFunc(known, is); i >= 0 {
		return known[i].Name
	}
	const longest = 63 // of a DNS label
	isTaken := func(name string) bool {
		return len(name) > longest || slices.ContainsFunc(known, func(other schema.Probe) bool { return other.Name == name })
	}
	base := "workload"
	if label.MatchString(k.container) {
		base = k.container
	}
	name := base
	if isTaken(name) {
		name = base + "-" + strings.ToLower(strings.TrimSuffix(k.field, "Probe"))
	}
	for i := 2; isTaken(name); i++ {
		suffix := fmt.Sprintf("-%d", i)
		name = base[:min(len(base), longest-len(suffix))] + suffix
	}
	k.probe.Name = name
	p.probes = append(p.probes, k.probe)
	return name
}

// redirect makes a kubelet's probe ask mantlet.
func (p *plan) redirect(k kubeletProbe) []edit {
	d := p.document
	from, to := d.offset(k.key), d.end(k.handler, k.key.Column)
	for to > from && (d.text[to-1] == '\n' || d.text[to-1] == '\r' || d.text[to-1] == ' ') {
		to--
	}
	handler := fmt.Sprintf("{path: /probe/%s, port: %d}", k.probe.Name, p.statusPort)
	edits := []edit{{from, to, "httpGet: " + handler}}
	timeout := at(k.node, "timeoutSeconds") // mantlet gives the workload a second
	switch {
	case timeout == nil && isFlow(k.node):
		edits[0].text += ", timeoutSeconds: 2"
	case timeout == nil:
		edits[0].text += d.lineEnd + strings.Repeat(" ", k.key.Column-1) + "timeoutSeconds: 2"
	case timeout.Value == "1":
		from := d.offset(timeout)
		edits = append(edits, edit{from, d.end(timeout, k.key.Column), "2"})
	}
	return edits
}

// wrap has the workload's containers wait for mantlet before they execute their commands.
func (p *plan) wrap(say *report) {
	d := p.document
	for _, c := range p.subject.containers("containers") {
		path := fmt.Sprintf("containers[%s]", text(c, "name"))
		k, command := find(c, "command")
		if command == nil || command.Kind != yaml.SequenceNode || len(command.Content) == 0 {
			say.refuse(c, path+".command", "is missing, so what the image executes is not known here and the gate can't be put before it; set it to the image's entrypoint (docker image inspect %s shows it)",
				text(c, "image"))
			continue
		}
		for _, mount := range items(c, "volumeMounts") {
			if text(mount, "mountPath") == gateDirectory {
				say.refuse(mount, path+".volumeMounts", "mounts another volume at %s, where the gate's would be; mount it elsewhere", gateDirectory)
			}
		}
		p.changes = append(p.changes, d.addItems(c, "command", "- "+gateDirectory+"/mantlet\n- gate\n- --\n", 0, 0)...)
		place := d.nextLine(d.end(command, k.Column))
		p.changes = append(p.changes, d.addItems(c, "env", "- name: "+schema.GateVariable+"\n  value: "+gateSocket+"\n", 0, place)...)
		p.changes = append(p.changes, d.addItems(c, "volumeMounts", "- name: "+gateVolume+"\n  mountPath: "+gateDirectory+"\n  readOnly: true\n", len(items(c, "volumeMounts")), place)...)
	}
}
