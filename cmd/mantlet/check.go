package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"mantlet/internal/bind"
	"mantlet/internal/rundir"
	"mantlet/internal/sandbox"
	"mantlet/internal/sockdiag"
	"mantlet/internal/status"
	"mantlet/reconcile"
	"mantlet/reconcile/dns"
	"mantlet/reconcile/envoy"
	"mantlet/reconcile/iptables"
	"mantlet/reconcile/nft"
	"mantlet/reconcile/routes"
	"mantlet/render"
	"mantlet/schema"
)

func checkCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Try everything that mantlet needs of this place; exit 0 if it is there, 1 if not",
		Example: `  # In a pod of the image, beside a mantlet or without one.
  kubectl exec POD -c mantlet -- mantlet check`,
		Long: "Try everything that mantlet needs of this place, a line each, with what to do where it is not there. It leaves\n" +
			"nothing behind, and disturbs no mantlet that runs here. Exit 0: all is there, warnings aside; 1: something is not.",
		Args: noArgs(""),
	}
	output := outputFlag(cmd, "how to say it:", "text", "json")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		findings := findings(cmd.Context(), os.Environ())
		missing := slices.ContainsFunc(findings, func(f finding) bool { return f.Severity == failing })
		var err error
		if *output == "json" {
			err = printData(cmd.OutOrStdout(), map[string]any{"ok": !missing, "findings": findings}, "json")
		} else {
			err = printFindings(cmd.OutOrStdout(), findings)
		}
		if err == nil && missing {
			return errNot
		}
		return err
	}
	return cmd
}

// finding is what came of trying one need. Its JSON is stable.
type finding struct {
	Need     string   `json:"need"`
	Severity severity `json:"severity"`
	Detail   string   `json:"detail,omitempty"`
	Remedy   string   `json:"remedy,omitempty"`
}

type severity string

const (
	fine    severity = "ok"
	warning severity = "warning" // mantlet does its work, not all of it or not for long
	failing severity = "error"   // mantlet ends, or is not ready
)

func printFindings(to io.Writer, findings []finding) error {
	page := tabwriter.NewWriter(to, 0, 0, 2, ' ', 0)
	for _, f := range findings {
		text := f.Detail
		if f.Remedy != "" {
			text += "; " + f.Remedy
		}
		_, _ = fmt.Fprintf(page, "%s\t%s\t%s\n", f.Severity, printable(f.Need), printable(oneLine(text)))
	}
	return page.Flush()
}

// oneLine puts the lines of a text into one: each is an error, or one that those below it belong to.
func oneLine(text string) string {
	var all []string
	for line := range strings.Lines(text) {
		if words := strings.Fields(line); len(words) > 0 {
			all = append(all, strings.Join(words, " "))
		}
	}
	return strings.ReplaceAll(strings.Join(all, "; "), ":; ", ": ")
}

// tried is a need that has to be met. The detail is for one that is.
func tried(need, detail string, err error, remedy string) finding {
	if err != nil {
		return finding{need, failing, err.Error(), remedy}
	}
	return finding{need, fine, detail, ""}
}

// wanted is a need that mantlet can do without, for a while or in part.
func wanted(need, detail string, err error, remedy string) finding {
	f := tried(need, detail, err, remedy)
	if err != nil {
		f.Severity = warning
	}
	return f
}

// problems returns the findings that are worth a look.
func problems(all []finding) []finding {
	return slices.DeleteFunc(all, func(f finding) bool { return f.Severity == fine })
}

// findings tries all needs. What the environment says of them counts as far as it is right.
func findings(ctx context.Context, environ []string) []finding {
	env, err := schema.ParseEnvironment(environ)
	config, unloaded := env.Load()
	if unloaded != nil {
		config = env.Base()
	}
	process := env.Process
	all := slices.Concat(
		[]finding{tryNamespace(here(), interfaceNames(), environ), tryCapabilities(capabilities(env, config))},
		tryKernel(),
		[]finding{
			tryLegacy(iptables.Tables{}, process), tryLandlock(), tryIPv6(), tryAdvertisements("/proc/sys/net/ipv6/conf"), tryConntrack("/proc/sys/net/netfilter"),
			tryEnvoy(ctx, process.EnvoyPath, process.EnvoyUID), trySharedMemory("/dev/shm", process.EnvoyUID),
			tryRuntimeDirectory(process.RuntimeDirectory, process.EnvoyUID), tryCertificates(process.TLS),
		},
	)
	if err != nil {
		for _, problem := range schema.Problems(unloaded) { // of the override file, too
			if problem.Origin.Source == process.ConfigFile {
				all = append(all, triedOverrides(problem))
			} else {
				all = append(all, tried("environment", "", problem, "mantlet render --explain shows what mantlet reads"))
			}
		}
		return all
	}
	all = append(all, tried("environment", "", nil, ""))
	most, _ := limits()
	all = append(all, tryLimits(most, render.CostOf(config.Mesh)))
	return slices.Concat(all, tryRoutes(config.Mesh, place(env, dns.System())), tryOverrides(env, unloaded), []finding{tryAddresses(ctx, env, config)}, tryUpstreams(ctx, config.Mesh.Egress))
}

// ofNodes are interfaces that network plugins make on a node. A node that is a container itself, as kind's are, shows by nothing else.
var ofNodes = []string{"cni0", "cilium_host", "flannel.1", "kube-bridge", "kube-ipvs0", "nodelocaldns", "ovn-k8s-mp0"}

// tryNamespace judges whose a network namespace is, by what shows it, the names of its interfaces, and the environment.
func tryNamespace(n namespace, interfaces []string, environ []string) finding {
	const need, remedy = "network namespace", "if the pod has hostNetwork, take it out of the pod's specification"
	if err := n.judge(0); err != nil {
		return tried(need, "", err, "")
	}
	for _, name := range interfaces {
		if slices.Contains(ofNodes, name) {
			return wanted(need, "", fmt.Errorf("it has the interface %s, as a node's has; mantlet would close the node", name), remedy)
		}
	}
	if err := schema.HostNetwork(environ); err != nil {
		return wanted(need, "", err, "if it has not, correct the two variables")
	}
	if n.initial {
		return tried(need, "the virtual machine's, all of which is the pod: Kata Containers", nil, "")
	}
	return tried(need, "the pod's own", nil, "")
}

// interfaceNames returns those of the network namespace.
func interfaceNames() (names []string) {
	all, _ := net.Interfaces()
	for _, i := range all {
		names = append(names, i.Name)
	}
	return names
}

// capabilities returns those that mantlet's container needs.
func capabilities(env *schema.Environment, config schema.Config) []sandbox.Capability {
	var ports []uint16
	for _, e := range config.Mesh.Egress {
		ports = append(ports, e.Listen.Port())
	}
	return sandbox.Needs(env.Process.EnvoyUID, ports...)
}

func tryCapabilities(needs []sandbox.Capability) finding {
	return tried("capabilities", "all that are needed", sandbox.Missing(needs), sandbox.Remedy(needs))
}

// withoutTimeouts is what follows where the kernel has no ct timeout objects.
const withoutTimeouts = "a half-closed connection ends after a minute of silence, and closed ones fill conntrack's table for two minutes instead of 10 s"

// tryKernel tries what the rules need, in a table that is never there outside of a transaction.
func tryKernel() []finding {
	const options = "take a kernel that is built with it, or load its module on the node before the pod starts"
	table, err := nft.Open()
	var trials []nft.Trial
	if err == nil {
		defer func() { _ = table.Close() }()
		trials, err = table.Try()
	}
	all := []finding{tried("nftables", "", err, "it takes a kernel with CONFIG_NF_TABLES and CONFIG_NF_TABLES_INET, and CAP_NET_ADMIN")}
	if err != nil {
		return all
	}
	for _, t := range trials {
		if t.Optional {
			all = append(all, wanted(t.Options, "", t.Err, "take a kernel that is built with it; without, "+withoutTimeouts))
			continue
		}
		all = append(all, tried(t.Options, "", t.Err, options))
	}
	owns, err := table.CanOwn()
	if err == nil && !owns {
		err = errors.New("the kernel keeps no owner for a table: other privileged processes can change the rules, and mantlet puts them back")
	}
	all = append(all, wanted("ending connections", "", sockdiag.Supported(), "without it a connection that a change forbids ends at its next packet, and is told then"))
	return append(all, wanted("owned table", "", err, "take Linux 6.9 or later"))
}

// tryRoutes tries whether the kernel has the policy routes that clients' addresses take, where they are asked for.
func tryRoutes(mesh schema.Mesh, place render.Place) []finding {
	wants := render.State{Mesh: mesh}.Routes(place)
	if wants == (render.Routes{}) {
		return nil
	}
	return []finding{tried("policy routes", "for sourceAddress: client", routes.Kernel{}.Try(wants), "take a kernel that is built with it, or leave sourceAddress at pod")}
}

func tryLandlock() finding {
	version, err := sandbox.Landlock()
	return wanted("Landlock", fmt.Sprintf("version %d", version), err,
		"take a kernel with CONFIG_SECURITY_LANDLOCK that has it among its lsm=; without, files are guarded by their owners and modes alone")
}

func tryIPv6() finding {
	var err error
	if !hasIPv6() {
		err = errors.New("it is switched off; mantlet does without")
	}
	return wanted("IPv6", "", err, "where clients or upstreams have IPv6, set the sysctls net.ipv6.conf.all.disable_ipv6 and .lo. to 0")
}

// tryAdvertisements says which interfaces take router advertisements. It warns of none: a pod may have its address by them.
func tryAdvertisements(directory string) finding {
	const need = "router advertisements"
	entries, _ := os.ReadDir(directory) // there is none without IPv6
	var taking []string
	for _, e := range entries {
		is := func(name, value string) bool {
			text, _ := os.ReadFile(filepath.Join(directory, e.Name(), name))
			return strings.TrimSpace(string(text)) == value
		}
		// "all" and "default" are no interfaces. What takes them is in Documentation/networking/ip-sysctl.rst, accept_ra.
		takes := is("accept_ra", "2") || is("accept_ra", "1") && is("forwarding", "0")
		if takes && !is("disable_ipv6", "1") && !slices.Contains([]string{"all", "default", "lo"}, e.Name()) {
			taking = append(taking, e.Name())
		}
	}
	if len(taking) == 0 {
		return tried(need, "no interface takes them", nil, "")
	}
	return tried(need, fmt.Sprintf("%s: whoever is on the link can give the pod addresses and take them away, which no plaintext leaves by; "+
		"where the pod needs none, set net.ipv6.conf.%s.accept_ra to 0", strings.Join(taking, ", "), taking[0]), nil, "")
}

// fullConntrack is how full its table may be, in percent. Where it is full nothing new comes in, nor goes out.
const fullConntrack = 80

func tryConntrack(directory string) finding {
	const need = "conntrack's table"
	var numbers [2]int
	for i, name := range []string{"nf_conntrack_count", "nf_conntrack_max"} {
		text, err := os.ReadFile(filepath.Join(directory, name))
		if err == nil {
			numbers[i], err = strconv.Atoi(strings.TrimSpace(string(text)))
		}
		if errors.Is(err, os.ErrNotExist) {
			return tried(need, "nothing uses it yet", nil, "")
		}
		if err != nil {
			return wanted(need, "", err, "")
		}
	}
	filled := fmt.Sprintf("%d of %d entries", numbers[0], numbers[1])
	var err error
	if numbers[0]*100 >= numbers[1]*fullConntrack {
		err = errors.New(filled + " are taken; where all are, no new connection comes in")
	}
	return wanted(need, filled, err, "raise net.netfilter.nf_conntrack_max on the node, or shorten nf_conntrack_tcp_timeout_time_wait")
}

// The Envoy that mantlet was tried with: an older one lacks settings that the bootstrap has.
const (
	envoyMajor = 1
	envoyMinor = 40
)

// versionLimit is much more than the 50 ms that Envoy takes to print its version.
const versionLimit = 10 * time.Second

// tryEnvoy executes Envoy as the user that it is to run as.
func tryEnvoy(ctx context.Context, path string, uid int) finding {
	const need, remedy = "Envoy", "MANTLET_ENVOY_PATH names the binary of Envoy %d.%d"
	ctx, cancel := context.WithTimeout(ctx, versionLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "--version")
	cmd.SysProcAttr = sandbox.As(uid)
	cmd.WaitDelay = time.Second // for a script whose child holds the pipe
	text, err := cmd.CombinedOutput()
	said := strings.TrimSpace(string(text))
	var commit string
	var major, minor, patch int
	if err == nil {
		_, version, _ := strings.Cut(said, "version: ")
		commit, version, _ = strings.Cut(version, "/")
		_, err = fmt.Sscanf(version, "%d.%d.%d", &major, &minor, &patch)
	}
	if err != nil && said != "" {
		err = fmt.Errorf("%w: %.200s", err, said)
	}
	right := fmt.Sprintf(remedy, envoyMajor, envoyMinor)
	obstacle, inTheWay := errors.AsType[sandbox.Obstacle](sandbox.Executable(cmd.Path, uid))
	switch {
	case inTheWay && (err != nil || cmd.SysProcAttr == nil && uid != os.Geteuid()):
		return tried(need, "", errors.New(obstacle.What), obstacle.Remedy)
	case err != nil:
		return tried(need, "", fmt.Errorf("asking %q for its version: %w", path, err), right)
	case major < envoyMajor || major == envoyMajor && minor < envoyMinor:
		return tried(need, "", fmt.Errorf("%q is version %d.%d.%d, which is too old", path, major, minor, patch), right)
	case major != envoyMajor || minor != envoyMinor:
		return wanted(need, "", fmt.Errorf("%q is version %d.%d.%d, which mantlet was not tried with", path, major, minor, patch), right)
	}
	return tried(need, fmt.Sprintf("%d.%d.%d, %.12s", major, minor, patch, commit), nil, "")
}

func trySharedMemory(directory string, envoyUID int) finding {
	err := tryWriting(directory)
	if err == nil {
		err = sandbox.Writable(directory, envoyUID)
	}
	return tried("shared memory", directory, err, "mount a memory-backed emptyDir at /dev/shm: Envoy's hot restart needs it")
}

func tryRuntimeDirectory(directory string, envoyUID int) finding {
	const need, remedy = "runtime directory", "mount a memory-backed emptyDir of mantlet's own there; MANTLET_RUNTIME_DIRECTORY names another place"
	err := suitable(directory, envoyUID)
	there := directory
	for err == nil {
		if _, err = os.Stat(there); errors.Is(err, os.ErrNotExist) && there != "/" {
			there, err = filepath.Dir(there), nil // mantlet makes what is missing
			continue
		}
		break
	}
	if err == nil {
		err = tryWriting(there)
	}
	if err != nil {
		return tried(need, "", err, remedy)
	}
	var system unix.Statfs_t
	if err = unix.Statfs(there, &system); err == nil && system.Type != unix.TMPFS_MAGIC && system.Type != unix.RAMFS_MAGIC {
		err = fmt.Errorf("%s is not in memory, and comes to hold the key", directory)
	}
	return wanted(need, directory, err, remedy)
}

// enough is what is written to see whether a directory has room: a bootstrap of a few entries and the secrets take less.
const enough = 64 << 10

// tryWriting returns why this process can't write a file in a directory. What it writes has no name.
func tryWriting(directory string) error {
	info, err := os.Stat(directory)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s is not a directory", directory)
	}
	file, err := os.CreateTemp(directory, ".check-*")
	if err == nil {
		err = os.Remove(file.Name())
		if err == nil {
			_, err = file.Write(make([]byte, enough))
		}
		err = errors.Join(err, file.Close())
	}
	if err != nil {
		return fmt.Errorf("writing to %s: %w", directory, err)
	}
	return nil
}

func tryCertificates(files schema.TLSFiles) finding {
	certificates, err := envoy.LoadCertificates(files, time.Now())
	remedy := "correct it there, and mantlet takes it"
	if errors.Is(err, os.ErrNotExist) {
		remedy = "mount certChain.pem, key.pem and mesh-ca.pem there (or tls.crt, tls.key and ca.crt; or svid.pem, svid_key.pem and bundle.pem), or let an " +
			"init container write them; mantlet waits for them. MANTLET_TLS_DIRECTORY names another place, MANTLET_TLS_CERTIFICATE, _KEY and _CA other files"
	}
	if err == nil {
		doubt, certain := certificates.Unverified(time.Now())
		if doubt != nil && !certain {
			return wanted("certificates", "", doubt, "Envoy decides whether it accepts them")
		}
		err = doubt
	}
	return tried("certificates", files.Directory, err, remedy)
}

func tryOverrides(env *schema.Environment, err error) []finding {
	const need = "override file"
	path := env.Process.ConfigFile
	switch {
	case !env.ReadsFile():
		return []finding{tried(need, "none is read", nil, "")}
	case err == nil:
		return []finding{wanted(need, path, tryFollows(path), "mount the whole volume at a directory, without subPath")}
	case schema.IsMissing(err):
		return []finding{tried(need, "", err, "mount it; at its first start mantlet waits for it")}
	}
	var all []finding
	for _, problem := range schema.Problems(err) {
		all = append(all, triedOverrides(problem))
	}
	return all
}

func triedOverrides(problem schema.Problem) finding {
	return tried("override file", "", problem, "mantlet schema describes the file")
}

// tryFollows returns an error if a file is a mount of its own, as one is that a manifest mounts with subPath. An update of the
// volume replaces the file, and a mount stays with the one that it was made of. Kernels before 5.8 do not tell (statx(2)).
func tryFollows(path string) error {
	var about unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, 0, 0, &about); err != nil {
		return fmt.Errorf("reading the attributes of %s: %w", path, err)
	}
	if about.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 {
		return fmt.Errorf("%s is a mount of its own (subPath): an edit of the ConfigMap never reaches it", path)
	}
	return nil
}

// tryAddresses binds to the addresses that Envoy and mantlet are to listen at. Those that they listen at already are left out.
func tryAddresses(ctx context.Context, env *schema.Environment, config schema.Config) finding {
	ctx, cancel := context.WithTimeout(ctx, liveLimit)
	defer cancel()
	var taken []netip.AddrPort
	if running, _, err := envoy.Read(ctx, env.Process.EnvoyDirectory()); err == nil {
		taken = render.ListenAddresses(running.Bootstrap)
	}
	if _, _, err := probe(ctx, rundir.Directory(env.Process.RuntimeDirectory).StatusSocket(), "/livez"); err == nil {
		taken = append(taken, env.Process.StatusListen()) // if it is somebody else's, mantlet's status says so
	}
	wanted := slices.DeleteFunc(addresses(env, config), func(a netip.AddrPort) bool { return slices.Contains(taken, a) })
	err := bind.Try(nil, wanted...)
	if errors.Is(err, unix.EACCES) { // a low port, and then a capability is missing
		err = nil
	}
	return tried("listen addresses", fmt.Sprintf("%d free", len(wanted)), reconcile.Explain(err, config.Mesh),
		"end what listens there, or have it listen at another port")
}

// lookupLimit is more than a lookup takes where servers do not answer.
const lookupLimit = 30 * time.Second

// tryUpstreams looks the names among upstreams up, as mantlet does. One that has no address is looked up again and again, and holds
// up nothing else.
func tryUpstreams(ctx context.Context, entries []schema.Egress) []finding {
	ctx, cancel := context.WithTimeout(ctx, lookupLimit)
	defer cancel()
	resolver := dns.System()
	all := make([]finding, len(entries))
	var lookups errgroup.Group
	lookups.SetLimit(lookupsAtOnce)
	for i, e := range entries {
		if addr, isAddress := e.Upstream.Addr(); isAddress && bind.IsOwn(addr) {
			all[i] = itself(e, addr.String())
		}
		if !e.Upstream.IsName() || slices.ContainsFunc(entries[:i], func(other schema.Egress) bool { return other.Upstream.Host == e.Upstream.Host }) {
			continue
		}
		lookups.Go(func() error {
			all[i] = tryUpstream(resolver.Lookup(ctx, e.Upstream.Host, dns.Record{}, time.Now()).Resolved(), e)
			return nil
		})
	}
	_ = lookups.Wait()
	return slices.DeleteFunc(all, func(f finding) bool { return f.Need == "" })
}

// lookupsAtOnce keeps names, however many, from taking all descriptors.
const lookupsAtOnce = 32

// itself is about an upstream with an address of this pod.
func itself(e schema.Egress, addr string) finding {
	return wanted("upstream "+e.Upstream.Host, "", fmt.Errorf("%s is this pod itself, whose own connections do not pass mantlet", addr),
		"nothing speaks mutual TLS there: name another pod for "+e.Listen.String()+", or leave this one out of the Service")
}

// tryUpstream is what came of a lookup.
func tryUpstream(r status.Resolved, e schema.Egress) finding {
	var addrs []string
	for _, addr := range r.Addresses {
		addrs = append(addrs, addr.String())
	}
	if i := slices.IndexFunc(r.Addresses, bind.IsOwn); i >= 0 {
		return itself(e, addrs[i])
	}
	var err error
	if len(addrs) == 0 {
		err = fmt.Errorf("lookup %s: %s", e.Upstream.Host, r.Answer)
	}
	detail := strings.Join(addrs, ", ")
	if r.Source != strings.TrimSuffix(e.Upstream.Host, ".") {
		detail += " by " + r.Source
	}
	return wanted("upstream "+e.Upstream.Host, detail, err,
		"connections to "+e.Listen.String()+" fail until it resolves: is there such a Service, and does the pod's DNS work?")
}
