package schema

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"mantlet/internal/rundir"
)

// The variables of the proxy that mantlet replaces. Each has an older and a newer spelling that mean the same.
const (
	ingressVariable    = "EDG_INGRESS_PROXY_CONFIG"
	egressVariable     = "EDG_EGRESS_PROXY_CONFIG"
	ingressVariableNew = "CONTRAST_INGRESS_PROXY_CONFIG"
	egressVariableNew  = "CONTRAST_EGRESS_PROXY_CONFIG"
	adminVariable      = "EDG_ADMIN_PORT"
	adminVariableNew   = "CONTRAST_ADMIN_PORT"
)

// ingressDisabled is what the variable of ingress entries holds where nothing inbound is to be protected.
const ingressDisabled = "DISABLED"

// The variables that say where more of the mesh stands, and what it may do.
const (
	inlineVariable    = "MANTLET_CONFIG_INLINE"
	fileVariable      = "MANTLET_CONFIG"
	digestVariable    = "MANTLET_CONFIG_SHA256"
	overridesVariable = "MANTLET_OVERRIDES"
)

const statusVariable = "MANTLET_STATUS_ADDRESS"

// GateVariable names the socket at which a workload may ask whether the sidecar is ready. mantlet and `mantlet gate` read it.
const GateVariable = "MANTLET_GATE_SOCKET"

// LogLevelVariable holds Envoy's log level.
const LogLevelVariable = "MANTLET_ENVOY_LOG_LEVEL"

// The variables that hold status.podIP and status.hostIP of the downward API.
const (
	podVariable  = "MANTLET_POD_IP"
	hostVariable = "MANTLET_HOST_IP"
)

// Overrides says what the override file may do.
type Overrides string

// The choices of Overrides.
const (
	OverridesAll     Overrides = "all"     // whatever it says
	OverridesTighten Overrides = "tighten" // only let in less, see tighten.go
	OverridesNone    Overrides = "none"    // it is not read
)

// DefaultEnvoyUID is nobody's in common images, and what service meshes give their proxies.
const DefaultEnvoyUID = 1337

// Process holds what only the environment may say: a mounted file never chooses which binary runs or which CA is trusted.
type Process struct {
	EnvoyPath        string // found on PATH where it has no slash
	EnvoyUID         int    // and number of its group; mantlet's own means the same user and group
	TLS              TLSFiles
	RuntimeDirectory string // private to mantlet; comes to hold the key
	StatusAddress    string // where the status is served over TCP, an IP address or nothing before the port; empty for nowhere
	GateSocket       string // where any user of the pod may ask whether the sidecar is ready; empty for nowhere
	LogLevel         string // mantlet's own: debug, info, warn or error
	ConfigFile       string // the override file; none if empty
	ConfigDigest     string // the SHA-256 that the file's content must have, in lower-case hex; any if empty
	Overrides        Overrides
	PodIP, HostIP    string // as the downward API has them; see HostNetwork
	ReadyFile        string // is there exactly while the sidecar is ready; empty for none
	LiftDefaultDeny  bool   // remove the rule of iptables-legacy that drops what comes in, once mantlet's rules are in force
	// AdminVariable is the variable that names the port of StatusAddress as an admin port: peers reach it as its ingress entry says,
	// or the lack of one. Empty where no variable does.
	AdminVariable string
	// IngressOff is the variable that says DISABLED: mantlet leaves alone whatever comes in. Empty where ingress is on.
	IngressOff string
}

// HostNetwork returns an error if an environment says that the pod has the node's network namespace and not one of its own. Whoever
// fills in the environment can say so of any pod: what is so shows by the namespace alone.
func HostNetwork(environ []string) error {
	var addrs [2]netip.Addr
	for i, name := range []string{podVariable, hostVariable} {
		for _, v := range environ {
			if text, ok := strings.CutPrefix(v, name+"="); ok {
				addrs[i], _ = netip.ParseAddr(text)
			}
		}
	}
	if addrs[0].IsValid() && addrs[1].IsValid() && addrs[0].Unmap() == addrs[1].Unmap() {
		return fmt.Errorf("%s and %s are both %s: the pod has hostNetwork, and mantlet's rules would close the node; "+
			"give the pod a network namespace of its own", podVariable, hostVariable, addrs[0])
	}
	return nil
}

// EnvoyUID returns the user that an environment gives Envoy, and DefaultEnvoyUID where it gives none that is valid.
func EnvoyUID(environ []string) uint32 {
	uid := uint32(DefaultEnvoyUID)
	for _, v := range environ {
		if text, ok := strings.CutPrefix(v, "MANTLET_ENVOY_UID="); ok {
			uid = DefaultEnvoyUID
			if n, err := strconv.ParseUint(text, 10, 31); err == nil {
				uid = uint32(n)
			}
		}
	}
	return uid
}

// EnvoyDirectory returns the part of the runtime directory that Envoy sees.
func (p *Process) EnvoyDirectory() string {
	return string(rundir.Directory(p.RuntimeDirectory).Envoy())
}

func (p *Process) variables() map[string]processVariable {
	return map[string]processVariable{
		"MANTLET_ENVOY_PATH": {&p.EnvoyPath, program},
		"MANTLET_ENVOY_UID": {new(string), func(text string) (string, string) {
			uid, err := strconv.ParseUint(text, 10, 31)
			if err != nil {
				return "", "must be a numeric user ID from 0 to 2147483647"
			}
			p.EnvoyUID = int(uid)
			return text, ""
		}},
		"MANTLET_TLS_DIRECTORY":     {&p.TLS.Directory, absolute},
		"MANTLET_TLS_CERTIFICATE":   {&p.TLS.Certificate, tlsFile},
		"MANTLET_TLS_KEY":           {&p.TLS.Key, tlsFile},
		"MANTLET_TLS_CA":            {&p.TLS.CA, tlsFile},
		"MANTLET_RUNTIME_DIRECTORY": {&p.RuntimeDirectory, absolute},
		"MANTLET_LOG_LEVEL": {&p.LogLevel, func(text string) (string, string) {
			return oneOf[string](text, []string{"debug", "info", "warn", "error"})
		}},
		"MANTLET_READY_FILE":        {&p.ReadyFile, absolute},
		"MANTLET_LIFT_DEFAULT_DENY": {new(string), p.liftDefaultDeny},
		podVariable:                 {&p.PodIP, ipAddress},
		hostVariable:                {&p.HostIP, ipAddress},
		statusVariable:              {&p.StatusAddress, listenAnywhere},
		GateVariable:                {&p.GateSocket, SocketPath},
		fileVariable:                {&p.ConfigFile, absolute},
		digestVariable:              {&p.ConfigDigest, digest},
		overridesVariable: {(*string)(&p.Overrides), func(text string) (string, string) {
			return oneOf[string](text, []string{string(OverridesAll), string(OverridesTighten), string(OverridesNone)})
		}},
	}
}

func (p *Process) liftDefaultDeny(text string) (string, string) {
	canonical, reason := oneOf[string](text, []string{"true", "false"})
	if reason != "" {
		reason += spelledOut(text)
	}
	p.LiftDefaultDeny = canonical == "true"
	return canonical, reason
}

// processVariable is where a variable's value goes, and how it is read.
type processVariable struct {
	field *string
	parse func(text string) (canonical, reason string)
}

func anyText(text string) (any, string) { return text, "" }

// program reads a path, or a name that is looked up on PATH.
func program(text string) (string, string) {
	if strings.TrimSpace(text) != text || strings.Trim(text, `"'`) != text {
		return "", "must be a path, or a name to look up on PATH"
	}
	return text, ""
}

func absolute(text string) (string, string) {
	if !filepath.IsAbs(text) {
		return "", "must be an absolute path"
	}
	return filepath.Clean(text), ""
}

// maxSocketPath is what sockaddr_un holds (include/uapi/linux/un.h) without the byte that ends it.
const maxSocketPath = 107

// SocketPath returns the canonical form of a unix socket's path, or why it can't be one.
func SocketPath(text string) (canonical, reason string) {
	canonical, reason = absolute(text)
	if reason == "" && len(canonical) > maxSocketPath {
		return "", fmt.Sprintf("must be at most %d bytes long, as paths of unix sockets are; this one has %d", maxSocketPath, len(canonical))
	}
	return canonical, reason
}

func ipAddress(text string) (string, string) {
	if _, err := netip.ParseAddr(text); err != nil {
		return "", "must be an IP address, as the downward API provides it"
	}
	return text, ""
}

// listenAnywhere reads an address of the pod's own, or all of them, and a port that is nobody else's.
func listenAnywhere(text string) (string, string) {
	const right = "must be a port, or an IP address and a port, for example :9901 or [::1]:9901"
	host, portText, err := net.SplitHostPort(text)
	if err != nil {
		return "", right
	}
	port, reason := parsePort(portText)
	switch {
	case reason != "":
		return "", right
	case port == IngressMTLSPort || port == IngressTLSPort:
		return "", reservedPorts()
	case host == "":
		return text, ""
	}
	addr, err := netip.ParseAddr(host)
	if err != nil || addr.Zone() != "" {
		return "", right
	}
	return netip.AddrPortFrom(addr.Unmap(), port).String(), ""
}

// status returns the status address, with the zero Addr where it is all of the pod's, and false where there is none.
func (p Process) status() (netip.AddrPort, bool) {
	host, port, _ := strings.Cut(p.StatusAddress, ":")
	if n, reason := parsePort(port); host == "" && reason == "" {
		return netip.AddrPortFrom(netip.Addr{}, n), true
	}
	addr, err := netip.ParseAddrPort(p.StatusAddress)
	return addr, err == nil
}

// StatusListen returns where the status is served over TCP: all addresses of the pod are the unspecified one of IPv6. It returns the
// zero AddrPort for nowhere.
func (p Process) StatusListen() netip.AddrPort {
	at, ok := p.status()
	if ok && !at.Addr().IsValid() {
		at = netip.AddrPortFrom(netip.IPv6Unspecified(), at.Port())
	}
	return at
}

// statusPort returns the port at which peers of a mesh with these entries may reach the status in plaintext; 0 where there is none.
// An admin port is as protected as any other that has no passthrough entry.
func (p Process) statusPort(ingress []Ingress) uint16 {
	addr, ok := p.status()
	if !ok || addr.Addr().IsLoopback() {
		return 0
	}
	if p.AdminVariable != "" && PolicyOf(ingress, addr.Port()).Mode != ModePassthrough {
		return 0
	}
	return addr.Port()
}

// checkStatus reports entries that mean the port of the status address for something else.
func (p Process) checkStatus(c Config, r *report) {
	own, ok := p.status()
	if !ok {
		return
	}
	variable := cmp.Or(p.AdminVariable, statusVariable)
	taken := fmt.Sprintf("port %d is already used by mantlet's own status (%s); choose another port for one of them", own.Port(), variable)
	for _, in := range c.Mesh.Ingress {
		if p.AdminVariable == "" && in.Ports.Contains(own.Port()) {
			key := in.Ports.String()
			r.add(c.merged.entries("ingress")[key].origin, "ingress["+key+"]", "", taken)
		}
	}
	for _, probe := range c.Mesh.Probes {
		if probe.Port == own.Port() { // a question that asks itself
			r.add(c.merged.entries("probes")[probe.Name].origin, "probes["+probe.Name+"]", "", taken)
		}
	}
	for _, out := range c.Mesh.Egress {
		everywhere := !own.Addr().IsValid() || own.Addr().IsUnspecified()
		if out.Listen.Port() == own.Port() && (everywhere || out.Listen.Addr() == own.Addr()) {
			key := out.Listen.String()
			r.add(c.merged.entries("egress")[key].origin, "egress["+key+"]", "", taken)
		}
	}
}

func digest(text string) (string, string) {
	const bytes = 32 // FIPS 180-4: SHA-256
	if sum, err := hex.DecodeString(text); err != nil || len(sum) != bytes {
		return "", "must be a SHA-256 digest: 64 hexadecimal digits and nothing else"
	}
	return strings.ToLower(text), ""
}

// Environment is what the environment says by itself, MANTLET_CONFIG_INLINE included. It is attested in a confidential
// pod; the override file is not.
type Environment struct {
	Process Process

	layers     []layer // defaults, variables, inline; the later overrides
	base       Config  // of the layers alone; the zero value if they have problems
	bad        error   // what ParseEnvironment returned
	problems   []Problem
	incomplete map[string]bool // see report
	partial    Config          // of the layers as far as they are right
}

// ParseEnvironment reads the environment, given as os.Environ gives it. Of a variable that is there twice, the last holds,
// as in a Kubernetes manifest. One that is unset and one that is empty are the same: the default. The error holds every
// problem, see Problems. Process is right as far as it was understood even beside an error. Load and Merge then return the
// error too, with what is wrong with the override file.
func ParseEnvironment(environ []string) (*Environment, error) {
	p := &parser{values: map[string]string{}}
	for _, e := range environ {
		name, value, _ := strings.Cut(e, "=")
		p.values[name] = value
	}
	env := &Environment{Process: Process{
		EnvoyPath:        "envoy",
		EnvoyUID:         DefaultEnvoyUID,
		TLS:              TLSFiles{Directory: DefaultTLSDirectory(isDirectory)},
		RuntimeDirectory: "/run/mantlet",
		LogLevel:         "info",
		Overrides:        OverridesAll,
	}}
	variables := env.Process.variables()
	p.checkNames(variables)
	p.process(variables)
	p.admin(&env.Process)
	env.layers = []layer{defaultLayer(), p.variables()}
	env.Process.IngressOff = p.ingressOff
	if inline := p.values[inlineVariable]; inline != "" {
		env.layers = append(env.layers, fromYAML(inlineVariable, []byte(inline), &p.report))
	}
	if env.partial, env.bad = build(&p.report, env.Process, env.layers...); env.bad == nil {
		env.bad = p.report.err()
	}
	if env.bad == nil {
		env.base = env.partial
	}
	env.problems, env.incomplete = Problems(env.bad), p.report.incomplete
	return env, env.bad
}

// Base returns the configuration of the environment alone.
func (e *Environment) Base() Config { return e.base }

// Err returns the problems of the environment alone, as ParseEnvironment does.
func (e *Environment) Err() error { return e.bad }

// Partial returns the mesh of the environment alone as far as it is right. It is for what can be said beside problems, and
// nothing to run by.
func (e *Environment) Partial() Mesh { return e.partial.Mesh }

// DefaultTLSDirectory returns the first of the usual directories that is there, by isThere. Where none is yet, the volume tells in which
// one an initializer will make it.
func DefaultTLSDirectory(isThere func(path string) bool) string {
	const usual, volume, inVolume = "/tls-config", "/contrast", "/contrast/tls-config"
	if !isThere(usual) && (isThere(volume) || isThere(inVolume)) {
		return inVolume
	}
	return usual
}

func isDirectory(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

func defaultLayer() layer {
	l := layer{}
	for _, f := range fields {
		s := &setting{list: []string{}, origin: Origin{Source: "default"}}
		if !f.isList {
			s = newSetting(f.preset, s.origin)
		}
		l.set(f.path, s)
	}
	return l
}

// parser is the environment being read, and what was wrong with it so far.
type parser struct {
	values     map[string]string
	report     report
	ingressOff string // see Process.IngressOff
}

func (p *parser) process(variables map[string]processVariable) {
	for name, v := range variables {
		if p.values[name] == "" {
			continue
		}
		canonical, reason := parse(v.parse, p.values[name])
		if reason != "" {
			p.report.add(Origin{Source: name}, "", p.values[name], reason)
			continue
		}
		*v.field = canonical
	}
	if p.values[digestVariable] != "" && p.values[fileVariable] == "" {
		p.report.add(Origin{Source: digestVariable}, "", "", "pins the content of the override file, but "+fileVariable+" does not name one")
	}
}

// variables reads the layer of all variables but the inline text.
func (p *parser) variables() layer {
	l := layer{"ingress": hide(p.ingress()), "egress": hide(p.egress())}
	for _, f := range fields {
		if p.values[f.variable] == "" {
			continue
		}
		if s := p.field(f.variable, f.path, f.kind, f.isList); s != nil {
			l.set(f.path, s)
		}
	}
	return l
}

// field reads a variable that sets a field. It returns nil where the value is wrong.
func (p *parser) field(name, path string, kind leaf, isList bool) *setting {
	if isList {
		return p.list(name, path, kind)
	}
	value, reason := parse(kind.parse, p.values[name])
	if reason != "" {
		p.report.add(Origin{Source: name}, path, p.values[name], reason)
		return nil
	}
	return newSetting(value, Origin{Source: name})
}

// list reads the items of a variable, which commas separate. Blanks around an item, and empty ones, are left out. It returns nil where an
// item is wrong.
func (p *parser) list(name, path string, kind leaf) *setting {
	var items []any
	all, good := &setting{list: []string{}, origin: Origin{Source: name}}, true
	for text := range strings.SplitSeq(p.values[name], ",") {
		if text = strings.TrimSpace(text); text == "" {
			continue
		}
		item, reason := parse(kind.parse, text)
		if reason != "" {
			p.report.add(Origin{Source: name}, path, text, reason)
			good = false
			continue
		}
		if text := canonical(item); !slices.Contains(all.list, text) {
			items, all.list = append(items, item), append(all.list, text)
		}
	}
	if !good {
		return nil
	}
	all.parsed = items
	return all
}

// spelled returns the value of a variable that has two spellings, and the name of the one that holds it.
func (p *parser) spelled(name, newer string) (value, source string) {
	old, renamed := p.values[name], p.values[newer]
	switch {
	case renamed == "":
		return old, name
	case old == "":
		return renamed, newer
	case old != renamed:
		p.report.add(Origin{Source: newer}, "", renamed,
			fmt.Sprintf("%s is also set, to a different value (%s); set only one of them, or both to the same value", name, quote(old)))
	}
	return renamed, newer
}

// admin reads the port of the admin interface that the proxy had which mantlet replaces. It is the status address of mantlet.
func (p *parser) admin(process *Process) {
	value, source := p.spelled(adminVariable, adminVariableNew)
	if value == "" || value == "0" {
		return
	}
	refuse := func(reason string) { p.report.add(Origin{Source: source}, "", value, reason) }
	if strings.Contains(value, "://") {
		refuse("is what Kubernetes sets in pods beside a Service of that name; set enableServiceLinks: false, or the variable to a port number")
		return
	}
	address, reason := parse(func(text string) (string, string) { return listenAnywhere(":" + text) }, value)
	switch {
	case reason == reservedPorts():
		refuse(reason)
	case reason != "":
		refuse("must be a port number from 1 to 65535")
	case process.StatusAddress != "" && process.StatusAddress != address:
		refuse(fmt.Sprintf("%s is also set, to another address (%s); set only one of them", statusVariable, process.StatusAddress))
	default:
		process.StatusAddress, process.AdminVariable = address, source
	}
}

func (p *parser) ingress() entries {
	value, source := p.spelled(ingressVariable, ingressVariableNew)
	switch {
	case value == ingressDisabled:
		p.ingressOff = source
		return entries{}
	case strings.EqualFold(strings.TrimSpace(value), ingressDisabled):
		p.report.add(Origin{Source: source}, "", value, "write "+ingressDisabled+" and nothing else to leave alone whatever comes in")
		p.report.lose("ingress")
		return entries{}
	}
	return p.entries("ingress", value, source, "name#port#disableTLS", []field{
		{"name", "name", anyText},
		{"port", "port", func(text string) (any, string) {
			if _, reason := parsePort(text); reason != "" {
				return nil, reason
			}
			return portsText("").parse(text)
		}},
		{"disableTLS", "mode", func(text string) (any, string) {
			switch text {
			case "true":
				return ModePassthrough, ""
			case "false":
				return ModeTLS, ""
			default:
				return nil, `must be "true" (passthrough, no TLS) or "false" (TLS without client certificates)` + spelledOut(text)
			}
		}},
	})
}

// spelledOut suggests the word for a text that other programs take for true or false (strconv.ParseBool).
func spelledOut(text string) string {
	meant, err := strconv.ParseBool(text)
	if err != nil {
		return ""
	}
	return fmt.Sprintf("; write %t", meant)
}

func (p *parser) egress() entries {
	value, source := p.spelled(egressVariable, egressVariableNew)
	return p.entries("egress", value, source, "name#listen-ip:listen-port#host-or-ip:port", []field{
		{"name", "name", anyText},
		{"listen address", "listen", listenText("").parse},
		{"upstream", "upstream", upstreamText("").parse},
	})
}

// field is one of an entry's fields in a variable.
type field struct {
	words string // what it is called to people
	name  string // in the override file
	parse func(text string) (value any, reason string)
}

// entries reads a variable's entries, which ## separates. Empty ones are left out, but count.
func (p *parser) entries(list, value, source, form string, fields []field) entries {
	all := entries{}
	for i, text := range strings.Split(value, "##") {
		if text == "" {
			continue
		}
		origin := Origin{Source: source, Entry: i + 1}
		values := strings.Split(text, "#")
		if len(values) != len(fields) {
			reason := fmt.Sprintf("must have %d fields, %s, but has %d", len(fields), form, len(values))
			if len(values) > len(fields) {
				reason += "; separate entries with ##"
			}
			p.report.add(origin, "", text, reason)
			p.report.lose(list)
			continue
		}
		e := &entry{origin: origin, fields: make(map[string]*setting, len(fields)), bad: map[string]bool{}}
		for i, f := range fields {
			value, reason := parse(f.parse, values[i])
			if reason != "" {
				p.report.add(origin, fmt.Sprintf("%s of %s", f.words, quote(text)), values[i], reason)
				e.bad[f.name] = true
				continue
			}
			e.fields[f.name] = newSetting(value, origin)
		}
		if e.key = e.text(lists[list].key); e.key == "" {
			p.report.lose(list)
			continue
		}
		all.add(list, e, &p.report)
	}
	return all
}
