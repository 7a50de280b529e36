package inject

import (
	"fmt"
	"path"
	"strings"

	"go.yaml.in/yaml/v3"

	"mantlet/schema"
)

// The names that inject gives.
const (
	sidecarName   = "mantlet"
	installerName = "mantlet-install"

	tlsVolume     = "mantlet-tls"
	runtimeVolume = "mantlet-runtime"
	memoryVolume  = "mantlet-shared-memory"
	configVolume  = "mantlet-config"
	gateVolume    = "mantlet-gate"

	gateDirectory = "/gate"
	gateSocket    = gateDirectory + "/mantlet.sock"
	configFolder  = "/etc/mantlet"

	ingressVariable = "EDG_INGRESS_PROXY_CONFIG"
	egressVariable  = "EDG_EGRESS_PROXY_CONFIG"
)

// certificates are where mantlet finds them.
type certificates struct {
	volume, mountPath, directory string
	own                          bool // the volume is inject's
	after                        int  // how many init containers start before mantlet: those that bring the certificates
}

// certificates returns where the pod's own containers keep them, or else a volume of inject's.
func (s subject) certificates(secret string) certificates {
	found := certificates{volume: tlsVolume, mountPath: "/tls-config", directory: "/tls-config", own: true}
	if secret != "" {
		return found
	}
	for _, list := range []string{"initContainers", "containers"} {
		for i, c := range s.containers(list) {
			for _, mount := range items(c, "volumeMounts") {
				name, folder := text(mount, "name"), path.Clean(text(mount, "mountPath"))
				for _, directory := range []string{"/tls-config", "/contrast/tls-config"} {
					isIn := strings.HasPrefix(directory+"/", folder+"/") && text(mount, "subPath") == ""
					if !isIn || !found.own && name != found.volume {
						continue
					}
					if found.own {
						found = certificates{volume: name, mountPath: folder, directory: directory}
					}
					if list == "initContainers" {
						found.after = i + 1
					}
				}
			}
		}
	}
	return found
}

// environ returns the variables of the sidecar that hold its configuration, in the form of os.Environ.
func (p *plan) environ() []string {
	var all []string
	for _, v := range p.variables() {
		all = append(all, v.name+"="+v.value)
	}
	return all
}

type variable struct{ name, value string }

func (p *plan) variables() []variable {
	var all []variable
	add := func(name, value string) { all = append(all, variable{name, value}) }
	if p.ingress != nil {
		add(ingressVariable, *p.ingress)
	}
	if p.egress != nil {
		add(egressVariable, *p.egress)
	}
	switch {
	case p.statusPort == 0:
	case p.isAdmin:
		add("EDG_ADMIN_PORT", fmt.Sprint(p.statusPort))
	default:
		add("MANTLET_STATUS_ADDRESS", fmt.Sprintf(":%d", p.statusPort))
	}
	if text := p.inline(); text != "" {
		add("MANTLET_CONFIG_INLINE", text)
	}
	if p.configMap != "" {
		add("MANTLET_CONFIG", path.Join(configFolder, p.key))
	}
	if p.tls.directory != "/tls-config" {
		add("MANTLET_TLS_DIRECTORY", p.tls.directory)
	}
	if p.gate {
		add(schema.GateVariable, gateSocket)
	}
	return all
}

// inline returns what the sidecar is told beside its entries.
func (p *plan) inline() string {
	var b strings.Builder
	if len(p.probes) > 0 {
		b.WriteString("probes:\n")
		for _, probe := range p.probes {
			fmt.Fprintf(&b, "  - {name: %s, %s: %s}\n", probe.Name, probe.Kind, scalar(probe))
		}
	}
	var named []string
	for _, e := range p.mesh.Egress {
		if e.Upstream.IsName() && len(e.ServerNames) == 0 && !p.noServerNames {
			named = append(named, fmt.Sprintf("  - {listen: %q, serverNames: [%s]}\n", e.Listen, quotedName(e.Upstream.Host)))
		}
	}
	if len(named) > 0 {
		b.WriteString("egress:\n" + strings.Join(named, ""))
	}
	return b.String()
}

// scalar returns what a probe asks for as YAML: a port alone is a number.
func scalar(probe schema.Probe) string {
	text := probe.String()
	if strings.Trim(text, "0123456789") == "" {
		return text
	}
	return quotedName(text)
}

// quotedName returns a text in quotes where YAML needs them.
func quotedName(text string) string {
	if strings.Trim(text, "abcdefghijklmnopqrstuvwxyz-./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_") == "" && strings.Trim(text, "-.0123456789_") != "" {
		var node yaml.Node
		if err := yaml.Unmarshal([]byte(text), &node); err == nil && node.Content[0].Tag == "!!str" {
			return text
		}
	}
	return quoted(text)
}

// initContainers returns those that are added, as a list in block style.
func (p *plan) initContainers() string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	if p.gate {
		line("- name: %s", installerName)
		line("  image: %s", quotedName(p.image))
		line("  command: [/usr/local/bin/mantlet, install, %s]", gateDirectory)
		line("  securityContext:")
		line("    runAsUser: 0")
		line("    runAsNonRoot: false")
		line("    privileged: false")
		line("    allowPrivilegeEscalation: false")
		line("    readOnlyRootFilesystem: true")
		line("    capabilities: {drop: [ALL]}")
		line("    seccompProfile: {type: RuntimeDefault}")
		line("  resources:")
		line("    requests: {cpu: 100m, memory: 64Mi}")
		line("    limits: {memory: 128Mi}")
		line("  volumeMounts:")
		line("  - {name: %s, mountPath: %s}", gateVolume, gateDirectory)
	}
	line("- name: %s", sidecarName)
	line("  image: %s", quotedName(p.image))
	line("  restartPolicy: Always")
	line("  env:")
	for _, v := range p.variables() {
		value := strings.ReplaceAll(v.value, "$", "$$") // which a kubelet would read as the start of a reference
		if !strings.Contains(value, "\n") {
			line("  - name: %s", v.name)
			line("    value: %s", quotedName(value))
			continue
		}
		line("  - name: %s", v.name)
		line("    value: |")
		for text := range strings.Lines(value) {
			b.WriteString("      " + text)
		}
	}
	for _, v := range []variable{{"MANTLET_POD_IP", "status.podIP"}, {"MANTLET_HOST_IP", "status.hostIP"}} {
		line("  - name: %s", v.name)
		line("    valueFrom: {fieldRef: {fieldPath: %s}}", v.value)
	}
	b.WriteString(`  securityContext:
    runAsUser: 0
    runAsNonRoot: false
    privileged: false
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities: {drop: [ALL], add: [NET_ADMIN, NET_RAW, SETUID, SETGID]}
    seccompProfile: {type: RuntimeDefault}
  startupProbe:
    exec: {command: [/usr/local/bin/mantlet, probe, ready]}
    periodSeconds: 1
    failureThreshold: 120
    timeoutSeconds: 5
  readinessProbe:
    exec: {command: [/usr/local/bin/mantlet, probe, ready]}
    periodSeconds: 5
    timeoutSeconds: 5
  livenessProbe:
    exec: {command: [/usr/local/bin/mantlet, probe, live]}
    periodSeconds: 10
    failureThreshold: 3
    timeoutSeconds: 5
    terminationGracePeriodSeconds: 5
  resources:
    requests: {cpu: 100m, memory: 128Mi}
    limits: {memory: 512Mi}
  volumeMounts:
`)
	line("  - {name: %s, mountPath: %s, readOnly: true}", quotedName(p.tls.volume), quotedName(p.tls.mountPath))
	line("  - {name: %s, mountPath: /run/mantlet}", runtimeVolume)
	line("  - {name: %s, mountPath: /dev/shm}", memoryVolume)
	if p.configMap != "" {
		line("  - {name: %s, mountPath: %s, readOnly: true}", configVolume, configFolder)
	}
	if p.gate {
		line("  - {name: %s, mountPath: %s}", gateVolume, gateDirectory)
	}
	return b.String()
}

// volumes returns those that are added, as a list in block style.
func (p *plan) volumes() string {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "- name: %s\n  %s\n", name, fmt.Sprintf(format, args...))
	}
	switch {
	case p.tlsSecret != "":
		line(tlsVolume, "secret: {secretName: %s, defaultMode: 256}", quotedName(p.tlsSecret)) // 0400
	case p.tls.own:
		line(tlsVolume, "emptyDir: {medium: Memory, sizeLimit: 1Mi}")
	}
	line(runtimeVolume, "emptyDir: {medium: Memory, sizeLimit: 8Mi}")
	line(memoryVolume, "emptyDir: {medium: Memory, sizeLimit: 1Mi}")
	if p.configMap != "" {
		line(configVolume, "configMap: {name: %s}", quotedName(p.configMap))
	}
	if p.gate {
		line(gateVolume, "emptyDir: {sizeLimit: 64Mi}")
	}
	return b.String()
}
