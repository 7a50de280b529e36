package manifest

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"mantlet/schema"
)

// request is what a kubelet asks of a container.
type request struct {
	field    string // of the container, as "readinessProbe.httpGet"
	kind     schema.ProbeKind
	port     string // a number, or a name
	target   string // the path or the service
	isHTTPS  bool
	toOthers bool // of another address than the pod's
	place    place
}

// requests returns what a kubelet asks of a container from outside of its network namespace.
func (c container) requests() []request {
	var all []request
	for _, asked := range []struct {
		field string
		*probe
	}{
		{"startupProbe", c.StartupProbe},
		{"readinessProbe", c.ReadinessProbe},
		{"livenessProbe", c.LivenessProbe},
		{"lifecycle.postStart", c.Lifecycle.PostStart},
		{"lifecycle.preStop", c.Lifecycle.PreStop},
	} {
		if asked.probe == nil {
			continue
		}
		r := request{place: asked.place}
		switch {
		case asked.HTTPGet != nil:
			get := asked.HTTPGet
			r.kind, r.port, r.target, r.isHTTPS, r.toOthers = schema.ProbeHTTP, get.Port, get.Path, strings.EqualFold(get.Scheme, "HTTPS"), get.Host != ""
			r.field = asked.field + ".httpGet"
		case asked.TCPSocket != nil:
			r.kind, r.port, r.toOthers = schema.ProbeTCP, asked.TCPSocket.Port, asked.TCPSocket.Host != ""
			r.field = asked.field + ".tcpSocket"
		case asked.GRPC != nil:
			r.kind, r.port, r.target = schema.ProbeGRPC, asked.GRPC.Port, asked.GRPC.Service
			r.field = asked.field + ".grpc"
		default:
			continue // what is executed in the container
		}
		all = append(all, r)
	}
	return all
}

// number returns the port of a request; false for a name that the container's ports do not have.
func (c container) number(name string) (uint16, bool) {
	if n, err := strconv.ParseUint(name, 10, 16); err == nil {
		return uint16(n), true
	}
	i := slices.IndexFunc(c.Ports, func(p port) bool { return p.Name == name })
	if i < 0 {
		return 0, false
	}
	return c.Ports[i].ContainerPort, true
}

// probes looks at what a kubelet asks of a container: it has no mesh certificate.
func (c *check) probes(of container) {
	if c.settings.Mesh == nil {
		return
	}
	for _, r := range of.requests() {
		port, ok := of.number(r.port)
		if !ok || r.toOthers {
			continue
		}
		at := of.path + "." + r.field
		status := c.settings.Mesh.StatusPort
		switch mode := c.mode(port); {
		case port == status:
			c.statusRequest(r, at)
		case isStatus(r) && status == 0:
			c.weigh(r, at, "mantlet serves this only where MANTLET_STATUS_ADDRESS is set; set it to :%d", port)
		case isStatus(r):
			c.weigh(r, at, "mantlet serves this at port %d (MANTLET_STATUS_ADDRESS)", status)
		case mode == schema.ModePassthrough:
		case mode == schema.ModeTLS && r.kind == schema.ProbeHTTP && r.isHTTPS: // the kubelet does not verify, and shows no certificate
		case r.kind == schema.ProbeTCP:
			c.add(Warning, r.place, at, r.port, "port %d is %s, so Envoy accepts this connection even where the workload does not; %s", port, mode, c.remedy(of, r, port))
		case mode == schema.ModeTLS:
			c.weigh(r, at, "port %d is tls, and this probe does not speak TLS; %s", port, c.remedy(of, r, port))
		default:
			c.weigh(r, at, "port %d is %s, and the kubelet has no mesh certificate; %s", port, mode, c.remedy(of, r, port))
		}
	}
}

// weigh adds an error, unless the configuration that it depends on is not all known.
func (c *check) weigh(r request, at, format string, args ...any) {
	severity := Error
	if c.settings.IsPartial {
		severity = Warning
	}
	c.add(severity, r.place, at, r.port, format, args...)
}

// isStatus reports whether a request is one that only mantlet's status answers.
func isStatus(r request) bool {
	return r.kind == schema.ProbeHTTP && strings.HasPrefix(r.target, "/probe/")
}

// statusRequest looks at a request to mantlet's status.
func (c *check) statusRequest(r request, at string) {
	target, _, _ := strings.Cut(r.target, "?")
	name, isProbe := strings.CutPrefix(target, "/probe/")
	known := slices.ContainsFunc(c.settings.Mesh.Probes, func(p schema.Probe) bool { return p.Name == name })
	switch {
	case r.kind == schema.ProbeTCP:
	case r.kind == schema.ProbeGRPC || r.isHTTPS:
		c.add(Error, r.place, at, r.port, "is mantlet's status port, which speaks plain HTTP")
	case isProbe && !known:
		reason := fmt.Sprintf("mantlet has no probe named %q; add probes: [{name: %s, http: PORT/PATH}]", name, name)
		if names := c.probeNames(); names != "" {
			reason += ", or choose among " + names
		}
		severity := Error
		if c.settings.IsPartial {
			severity = Warning
		}
		c.add(severity, r.place, at, r.target, "%s", reason)
	case !isProbe && !slices.Contains([]string{"/livez", "/readyz", "/status", "/metrics"}, target):
		c.add(Error, r.place, at, r.target, "mantlet serves no such path at its status port; /probe/NAME asks the workload")
	}
}

func (c *check) probeNames() string {
	var names []string
	for _, p := range c.settings.Mesh.Probes {
		names = append(names, p.Name)
	}
	return strings.Join(names, ", ")
}

// remedy says how to have mantlet ask instead.
func (c *check) remedy(of container, r request, port uint16) string {
	target := schema.Probe{Kind: r.kind, Port: port, Target: r.target}
	if r.kind == schema.ProbeHTTP && !strings.HasPrefix(r.target, "/") {
		target.Target = "/" + r.target
	}
	name := strings.ToLower(of.Name)
	for _, p := range c.settings.Mesh.Probes {
		if p.Kind == r.kind && p.Port == port {
			name = p.Name
		}
	}
	status := c.settings.Mesh.StatusPort
	text := fmt.Sprintf("let mantlet ask: probes: [{name: %s, %s: %s}]", name, r.kind, target)
	if status == 0 {
		status = 9901
		text += fmt.Sprintf(", MANTLET_STATUS_ADDRESS=:%d", status)
	}
	return text + fmt.Sprintf(" and httpGet: {path: /probe/%s, port: %d}", name, status)
}
