package manifest

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"mantlet/schema"
)

// Settings is what a sidecar of a manifest makes of its environment.
type Settings struct {
	Process schema.Process
	// Mesh is nil where the configuration is not valid: what depends on it is not checked then.
	Mesh *schema.Mesh
	// IsPartial tells that more of the configuration comes from outside the manifest. What depends on it are warnings then.
	IsPartial bool
	// Runs returns why the arguments of a mantlet do not make it run as a sidecar.
	Runs func(arguments []string) error
}

// Check returns what in the pod keeps the sidecar from doing its work, or lets other containers defeat it.
func (s Sidecar) Check(settings Settings) []Finding {
	c := check{Sidecar: s, settings: settings}
	c.namespaces()
	c.command()
	c.privileges()
	c.start()
	c.volumes()
	c.override()
	for _, other := range s.pod.containers() {
		if other.path == s.container.path {
			continue
		}
		c.workload(other)
		c.ports(other)
		c.probes(other)
	}
	c.probes(s.container)
	return c.found
}

// check is a check of a sidecar, and what it has found so far.
type check struct {
	Sidecar

	settings Settings
	found    []Finding
}

func (c *check) add(severity Severity, at place, path, value, format string, args ...any) {
	c.found = append(c.found, c.finding(severity, at, path, value, format, args...))
}

// namespaces looks at the ones that the pod shares.
func (c *check) namespaces() {
	at := c.container.place // the pod itself has no place
	if c.pod.HostNetwork {
		c.add(Error, at, c.pod.path+".hostNetwork", "true", "mantlet's rules would close the node; remove hostNetwork")
	}
	if c.pod.HostPID {
		c.add(Warning, at, c.pod.path+".hostPID", "true", "processes of the node, and of other pods, can be seen and signalled; remove hostPID")
	}
	if c.pod.HostIPC {
		c.add(Warning, at, c.pod.path+".hostIPC", "true", "Envoy's shared memory would be the node's; remove hostIPC")
	}
	if c.pod.ShareProcessNamespace {
		c.add(Warning, at, c.pod.path+".shareProcessNamespace", "true",
			"other containers can see mantlet's processes, and end them if they run as the same user; remove shareProcessNamespace")
	}
}

// command looks at how the container is started. The image starts `mantlet run` by itself.
func (c *check) command() {
	argv, at := slices.Concat(c.container.Command, c.container.Args), c.container.path+".command"
	remedy := ""
	if len(c.container.Command) == 0 {
		argv, at = slices.Concat([]string{"mantlet", "run"}, c.container.Args), c.container.path+".args"
		remedy = "; the image starts mantlet run by itself: remove args"
	}
	if path.Base(argv[0]) != "mantlet" {
		c.add(Warning, c.container.place, at, argv[0], "starts another program than mantlet, so its arguments were not checked")
		return
	}
	if c.settings.Runs == nil {
		return
	}
	if err := c.settings.Runs(argv[1:]); err != nil {
		c.add(Error, c.container.place, at, strings.Join(argv[1:], " "), "%v%s", err, remedy)
	}
}

// What mantlet needs beside what container runtimes give by default. See package sandbox.
var needs = []string{"NET_ADMIN", "NET_RAW", "SETUID", "SETGID"}

// privileges looks at what mantlet itself may do.
func (c *check) privileges() {
	security := c.pod.security(c.container)
	at := c.container.path + ".securityContext"
	if !security.mayBeRoot() {
		c.add(Error, c.container.place, at+".runAsUser", "", "mantlet must be root, since added capabilities have no effect for other users; set runAsUser: 0 and runAsNonRoot: false for its container")
	}
	if security.Privileged {
		return
	}
	var missing []string
	for _, need := range needs {
		isDefault := need != "NET_ADMIN" && security.has(need)
		isOwnUser := strings.HasPrefix(need, "SET") && c.settings.Process.EnvoyUID == 0 // which needs no change
		if !security.adds(need) && !isDefault && !isOwnUser {
			missing = append(missing, need)
		}
	}
	if len(missing) > 0 {
		severity := Error
		if len(security.Capabilities.Add)+len(security.Capabilities.Drop) == 0 {
			severity = Warning // somebody else may give them
		}
		c.add(severity, c.container.place, at+".capabilities.add", "", "mantlet also needs %s", strings.Join(missing, ", "))
	}
}

// start looks at when the workload starts, and when it gets traffic.
func (c *check) start() {
	switch at := c.container.path; {
	case c.container.isInit && c.container.RestartPolicy != "Always":
		c.add(Error, c.container.place, at+".restartPolicy", c.container.RestartPolicy,
			"an init container has to end before the workload starts, and mantlet does not; set restartPolicy: Always")
	case !c.container.isInit:
		c.add(Warning, c.container.place, at, "",
			"the workload can start before mantlet's rules are in place; make it a native sidecar: an init container with restartPolicy: Always and a startupProbe")
	case c.container.StartupProbe == nil:
		c.add(Warning, c.container.place, at+".startupProbe", "", "is missing, so the workload can start before mantlet is ready; execute mantlet probe ready")
	}
	if c.container.ReadinessProbe == nil {
		c.add(Warning, c.container.place, c.container.path+".readinessProbe", "",
			"is missing, so the pod gets traffic while mantlet is not ready; execute mantlet probe ready")
	}
	for _, other := range c.pod.containers() {
		if other.path != c.container.path && other.Name == c.container.Name {
			c.add(Error, other.place, other.path, "", "the pod has two containers of this name, and only one mantlet can own the network namespace")
		}
	}
}

// systemDirectories are shared by the programs of an image.
var systemDirectories = []string{"/", "/bin", "/dev", "/dev/shm", "/etc", "/home", "/lib", "/opt", "/proc", "/root", "/run", "/sbin", "/srv", "/sys", "/tmp", "/usr", "/var", "/var/run", "/var/tmp"}

// IsShared reports whether a directory is one that other programs use, and mantlet would close to them.
func IsShared(directory string) bool {
	return slices.Contains(systemDirectories, path.Clean(directory))
}

// volumes looks at where mantlet reads certificates and keeps its state.
func (c *check) volumes() {
	at := c.container.path + ".volumeMounts"
	process := c.settings.Process
	isMounted := func(path string) bool { _, ok := c.container.mountOf(path); return ok }
	if process.TLS.Directory == schema.DefaultTLSDirectory(func(string) bool { return false }) {
		process.TLS.Directory = schema.DefaultTLSDirectory(isMounted)
	}
	mount, ok := c.container.mountOf(process.TLS.Directory)
	if !ok {
		c.add(Warning, c.container.place, at, "", "no volume is mounted at %s, so mantlet waits for certificates there and lets nothing in", process.TLS.Directory)
	} else if v, _ := c.pod.volume(mount.Name); v.EmptyDir != nil && len(c.others(mount.Name)) == 0 {
		c.add(Warning, c.container.place, at, mount.Name, "no other container mounts this emptyDir, so nobody writes certificates to %s", process.TLS.Directory)
	}
	mount, ok = c.container.mountOf(process.RuntimeDirectory)
	isOwn := ok && mount.MountPath == process.RuntimeDirectory
	switch v, _ := c.pod.volume(mount.Name); {
	case IsShared(process.RuntimeDirectory) && !isOwn:
		c.add(Error, c.container.place, c.container.path+".env[MANTLET_RUNTIME_DIRECTORY]", process.RuntimeDirectory,
			"others use this directory and mantlet would close it to them; name a directory of mantlet's own")
	case ok && len(c.others(mount.Name)) > 0:
		c.add(Error, c.container.place, at, mount.Name, "holds the key, and container %s mounts it, too; give mantlet a volume of its own for %s",
			strings.Join(c.others(mount.Name), ", "), process.RuntimeDirectory)
	case !ok && c.pod.security(c.container).ReadOnlyRootFilesystem:
		c.add(Error, c.container.place, at, "", "mantlet cannot write to %s, since the root file system is read-only; mount an emptyDir with medium: Memory there", process.RuntimeDirectory)
	case !ok || v.EmptyDir == nil || v.EmptyDir.Medium != "Memory":
		c.add(Warning, c.container.place, at, mount.Name, "the key would be written to the node's disk; mount an emptyDir with medium: Memory at %s", process.RuntimeDirectory)
	}
}

// override looks at how the override file is mounted.
func (c *check) override() {
	file := c.settings.Process.ConfigFile
	mount, ok := c.container.mountOf(file)
	if ok && mount.MountPath == file && mount.SubPath != "" {
		c.add(Warning, c.container.place, c.container.path+".volumeMounts", mount.MountPath,
			"a file that is mounted with subPath never changes: an edit of the ConfigMap does not reach mantlet; mount the whole volume at a directory")
	}
}

// others returns the names of the other containers that mount a volume.
func (c *check) others(volume string) []string {
	var names []string
	for _, other := range c.pod.containers() {
		mounts := slices.ContainsFunc(other.VolumeMounts, func(m volumeMount) bool { return m.Name == volume })
		if mounts && other.path != c.container.path {
			names = append(names, other.Name)
		}
	}
	return names
}

// workload looks at what another container could do to mantlet.
func (c *check) workload(other container) {
	security := c.pod.security(other)
	at := other.path + ".securityContext"
	bad := func(field, value, format string, args ...any) {
		c.add(Error, other.place, at+field, value, format, args...)
	}
	if security.Privileged {
		bad(".privileged", "true", "a privileged container can remove mantlet's rules; remove privileged")
	}
	for _, capability := range []struct{ name, reason string }{
		{"NET_ADMIN", "can remove mantlet's rules"},
		{"SYS_ADMIN", "can enter mantlet's namespaces and remove its rules"},
		{"NET_RAW", "can take over Envoy's sockets and send packets past the rules"},
	} {
		if security.adds(capability.name) {
			bad(".capabilities.add", capability.name, "a container with %s %s; remove it", capability.name, capability.reason)
		}
	}
	envoy := int64(c.settings.Process.EnvoyUID)
	if uid, ok := security.user(); ok && uid == envoy {
		bad(".runAsUser", fmt.Sprint(uid), "is Envoy's user, who can join its listeners and read its memory; choose another user, or another MANTLET_ENVOY_UID")
	}
	canEscalate := security.AllowPrivilegeEscalation == nil || *security.AllowPrivilegeEscalation
	switch {
	case security.Privileged || security.adds("NET_RAW") || !security.mayBeRoot() && !canEscalate:
		return
	case !security.has("NET_RAW"):
		if security.mayBeRoot() && security.has("SETUID") {
			c.add(Warning, other.place, at+".capabilities.drop", "",
				"its processes, as root, can have SETUID, which container runtimes give by default, and so join Envoy's listeners as its user; drop ALL, or at least SETUID")
		}
		return
	}
	who := "its processes, as root,"
	if !security.mayBeRoot() {
		who = "a setuid program in it"
	}
	c.add(Warning, other.place, at+".capabilities.drop", "",
		"%s can have NET_RAW, which container runtimes give by default, and so send packets past the rules; drop ALL, or at least NET_RAW", who)
}

// ports looks at those that another container says it listens on.
func (c *check) ports(other container) {
	for _, p := range other.Ports {
		at := fmt.Sprintf("%s.ports[%d]", other.path, p.ContainerPort)
		isTCP := p.Protocol == "" || strings.EqualFold(p.Protocol, "TCP")
		switch {
		case isTCP && (p.ContainerPort == schema.IngressMTLSPort || p.ContainerPort == schema.IngressTLSPort):
			c.add(Error, other.place, at, "", "is the port of one of mantlet's own listeners; choose another port")
		case c.settings.Mesh == nil:
		case isTCP && p.ContainerPort == c.settings.Mesh.StatusPort:
			c.add(Error, other.place, at, "", "is mantlet's status port (MANTLET_STATUS_ADDRESS), so nobody reaches the workload there; choose another port for one of them")
		case !isTCP && c.settings.Mesh.OtherProtocols == schema.OtherProtocolsDrop && c.mode(p.ContainerPort) != schema.ModePassthrough:
			c.add(Warning, other.place, at, p.Protocol, "inbound %s is dropped; make the port passthrough, or set otherProtocols: accept", p.Protocol)
		}
	}
}

// mode returns that of a port.
func (c *check) mode(port uint16) schema.Mode {
	if c.settings.Mesh.IngressOff {
		return schema.ModePassthrough
	}
	return schema.PolicyOf(c.settings.Mesh.Ingress, port).Mode
}
