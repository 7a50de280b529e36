package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"mantlet/internal/lab"
)

// TestIngressOff: where the environment says so, whatever comes in gets to the workload as without mantlet, and egress works. Its
// listeners are nobody's outside all the same, and an override file can change nothing of it.
func TestIngressOff(t *testing.T) {
	t.Parallel()
	p := newPod(t, "CONTRAST_INGRESS_PROXY_CONFIG=DISABLED", "CONTRAST_EGRESS_PROXY_CONFIG=billing#127.137.0.1:8081#billing-svc:8080")
	file := p.override("tls: {minVersion: '1.2'}")
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	far := p.host("billing")
	p.zone(map[string][]netip.Addr{"billing-svc": {far.IPv4}})
	p.endpoint(far, p.issue("billing-svc"))
	plain := p.serve(far, lab.Service{Address: ":5432"})
	p.serve(p.Host, lab.Service{Address: ":8080"})
	p.serve(p.Host, lab.Service{Network: "udp", Address: ":8080"})
	p.must(p.Sysctl("net.ipv4.conf.eth0.route_localnet", "1"))

	inbound := map[netip.Addr]net.Conn{}
	for _, addr := range p.Addrs() {
		inbound[addr] = p.dial(p.outside, netip.AddrPortFrom(addr, 8080)) // older than mantlet
		p.must(echo(inbound[addr]))
	}
	p.run()
	p.ready()
	outbound := p.dial(p.Host, netip.AddrPortFrom(far.IPv4, 5432))
	works := func() {
		t.Helper()
		for _, addr := range p.Addrs() {
			p.must(echo(inbound[addr]))
			for _, network := range []string{"tcp", "udp"} {
				ctx, cancel := p.context()
				conn, err := p.outside.Dial(ctx, network, netip.AddrPortFrom(addr, 8080).String())
				cancel()
				p.must(err)
				p.must(echo(conn))
				p.must(conn.Close())
			}
		}
		p.reach("127.137.0.1:8081")
		p.must(echo(outbound))
	}
	works()
	p.same()
	if _, err := p.dialBriefly(listen("127.137.0.1:8081")); err == nil {
		t.Error("egress can be reached from outside")
	}
	status := p.status()
	if !status.Ready || !status.Applied.IngressOff || p.log.count("CONTRAST_INGRESS_PROXY_CONFIG: is DISABLED: whoever reaches the pod reaches the workload") != 1 {
		t.Errorf("it is not said: %+v", status.Applied)
	}
	if _, said, _ := p.mantlet("status"); strings.Contains(said, "problem") {
		t.Error(said)
	}
	before := p.rules()
	file.write("ingress: [{port: 8080, mode: mtls}]")
	p.await("the entry is refused", func() bool { return strings.Contains(strings.Join(p.status().Problems, ""), "has no effect") })
	if p.rules() != before {
		t.Errorf("an override file changed the rules to:\n%s", p.rules())
	}
	file.write("tls: {minVersion: '1.3'}")
	p.await("a hot restart", func() bool { s := p.status(); return len(s.Problems) == 0 && s.Applied.Generation == 2 })
	works()
	p.restart()
	works()
	if n := len(plain.Connections()); n != 1 {
		t.Errorf("the far end saw %d connections, want the first one alone", n)
	}
}

// TestAdminPort: peers reach mantlet's status at an admin port as its entry says: in plaintext where it says passthrough, and else by
// mutual TLS. Envoy's counters are there, and nothing that changes anything.
func TestAdminPort(t *testing.T) {
	t.Parallel()
	for name, open := range map[string]bool{"web#8080#false##admin#9901#true": true, "web#8080#false": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := start(t, "CONTRAST_INGRESS_PROXY_CONFIG="+name, fmt.Sprintf("CONTRAST_ADMIN_PORT=%d", statusPort))
			for _, addr := range p.Addrs() {
				p.must(p.exchange(netip.AddrPortFrom(addr, tlsPort), p.anonymous()))
				ask := func(method, path string) (int, string, error) { return p.get(addr, method, path) }
				if !open {
					if code, said, err := ask(http.MethodGet, "/status"); err == nil {
						t.Errorf("it answers in plaintext: %d, %s", code, said)
					}
					ask = func(method, path string) (int, string, error) { return p.getMutual(addr, method, path) }
				}
				for path, part := range map[string]string{
					"/readyz": "ok\n", "/status": `"ready":true`, "/metrics": "mantlet_ready 1\n",
					"/stats/prometheus":                 `envoy_cluster_upstream_cx_total{envoy_cluster_name="workload"}`,
					"/stats/prometheus?filter=unknown.": "envoy_server_live",
				} {
					if code, said, err := ask(http.MethodGet, path); err != nil || code != http.StatusOK || !strings.Contains(said, part) {
						t.Errorf("%s: %d, %v, without %s:\n%.2000s", path, code, err, part, said)
					}
				}
				for _, path := range []string{"/quitquitquit", "/healthcheck/fail", "/reset_counters", "/logging?level=off", "/config_dump", "/certs", "/stats", "/stats/prometheus"} {
					if code, said, err := ask(http.MethodPost, path); err != nil || code != http.StatusNotFound && code != http.StatusMethodNotAllowed {
						t.Errorf("POST %s: %d, %v: %s", path, code, err, said)
					}
				}
			}
			p.besieged()
		})
	}
}

// bootDeny is what the guests of confidential clusters boot with.
const bootDeny = "-A INPUT -m conntrack ! --ctstate RELATED,ESTABLISHED -j DROP"

// iptables has the real iptables-legacy do something on the pod's host, and returns what it prints.
func (p *pod) iptables(args string) string {
	p.t.Helper()
	if _, err := exec.LookPath("iptables-legacy"); err != nil {
		p.t.Fatal("iptables-legacy is not on PATH: `go tool task iptables` finds or unpacks it")
	}
	cmd := exec.Command("iptables-legacy", strings.Fields(args)...)
	cmd.Env = append(os.Environ(), "XTABLES_LOCKFILE="+filepath.Join(p.t.TempDir(), "lock"))
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	p.must(p.Start(cmd))
	if err := cmd.Wait(); err != nil {
		p.t.Fatalf("iptables-legacy %s: %v: %s", args, err, &said)
	}
	return said.String()
}

// TestBootDeny: a guest that boots with a rule of iptables-legacy that drops what comes in over IPv4. mantlet says so, and is not ready.
// Where it is to, it removes this rule and no other, once its own are in force and not before.
func TestBootDeny(t *testing.T) {
	t.Parallel()
	booted := func(t *testing.T, env ...string) *pod {
		t.Helper()
		p := newPod(t, append(env, web)...)
		p.iptables("-A INPUT -p udp --dport 9 -j DROP")
		p.iptables(bootDeny)
		p.besiege()
		return p
	}
	const says = "iptables-legacy drops what comes in over IPv4: " + bootDeny + " (table filter); "
	const others = "table filter of iptables-legacy has 1 rule: they apply beside mantlet's"
	t.Run("stays", func(t *testing.T) {
		t.Parallel()
		p := booted(t)
		p.must(p.identity.Write(p.sidecar.TLSDirectory))
		p.run()
		p.protect(mtlsPort)
		p.unready(says + "set MANTLET_LIFT_DEFAULT_DENY=true")
		p.must(p.exchange(netip.AddrPortFrom(p.IPv6, mtlsPort), p.client.ClientConfig("pod")))
		if _, err := p.dialBriefly(netip.AddrPortFrom(p.IPv4, mtlsPort)); err == nil {
			t.Error("IPv4 is let in")
		}
		if status := p.status(); status.Ready || len(status.Problems) != 2 || !strings.Contains(status.Problems[0], says) || status.Problems[1] != others {
			t.Errorf("problems: %q", status.Problems)
		}
		if code, said, _ := p.mantlet("check"); code != 1 || !strings.Contains(said, bootDeny+" (table filter) drops what comes in over IPv4; set MANTLET_LIFT_DEFAULT_DENY=true") {
			t.Errorf("check: exit code %d: %s", code, said)
		}
		p.iptables(strings.Replace(bootDeny, "-A", "-D", 1))
		p.ready()
		p.iptables("-F")
		p.await("all is well", func() bool { return len(p.status().Problems) == 0 })
	})
	t.Run("is lifted", func(t *testing.T) {
		t.Parallel()
		p := booted(t, "MANTLET_LIFT_DEFAULT_DENY=true")
		p.run()
		p.protect(tlsPort)
		p.protect(mtlsPort)
		p.unready("waiting for certificates")
		p.besieged()
		rules := p.iptables("-S")
		if !strings.Contains(rules, bootDeny) {
			t.Errorf("the rule is gone before mantlet's are in force: %s", rules)
		}
		if code, said, _ := p.mantlet("check"); !strings.Contains(said, "drops what comes in over IPv4; mantlet removes it by") && !strings.Contains(said, others) {
			t.Errorf("check: exit code %d: %s", code, said)
		}
		p.must(p.identity.Write(p.sidecar.TLSDirectory))
		p.ready()
		if got, want := p.iptables("-S"), strings.Replace(rules, bootDeny+"\n", "", 1); got != want {
			t.Errorf("it left %s, want %s", got, want)
		}
		for _, addr := range p.Addrs() {
			p.must(p.exchange(netip.AddrPortFrom(addr, mtlsPort), p.client.ClientConfig("pod")))
		}
		p.besieged()
		p.same()
		p.iptables(bootDeny) // by whoever
		p.await("it is removed again", func() bool {
			return p.log.count("a rule of iptables-legacy that dropped what comes in is removed") == 2
		})
		p.ready()
	})
	t.Run("cannot be lifted", func(t *testing.T) {
		t.Parallel()
		p := booted(t, "MANTLET_LIFT_DEFAULT_DENY=true", "PATH=/nowhere")
		p.must(p.identity.Write(p.sidecar.TLSDirectory))
		p.run()
		p.unready(says + "removing it with iptables-legacy: ")
		if code, said, _ := p.mantlet("check"); code != 1 || !strings.Contains(said, "mantlet cannot remove it") {
			t.Errorf("check: exit code %d: %s", code, said)
		}
	})
}

// TestReadyFile: the file is there exactly while mantlet is ready. It goes with a mantlet that is killed, and with one that ends.
func TestReadyFile(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "ready")
	p := newPod(t, web, "MANTLET_READY_FILE="+file)
	p.must(os.WriteFile(file, []byte("what an image could have there"), 0o644))
	isThere := func() bool { info, err := os.Stat(file); return err == nil && info.Mode().IsRegular() }
	p.run()
	p.unready("waiting for certificates")
	if isThere() {
		t.Error("it is there before mantlet is ready")
	}
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.ready()
	p.await("it is there", isThere)
	p.must(syscall.Kill(p.envoy(), syscall.SIGSTOP))
	p.unready("Envoy does not serve as it should")
	p.await("it is gone while Envoy hangs", func() bool { return !isThere() })
	p.must(syscall.Kill(p.envoy(), syscall.SIGCONT))
	p.await("it is there again", isThere)
	p.must(p.sidecar.Signal(syscall.SIGKILL))
	_ = p.sidecar.Wait()
	if isThere() {
		t.Error("it is there although mantlet was killed")
	}
	p.await("Envoy ends", func() bool { return len(p.processes()) == 0 })
	p.run()
	p.await("it is there with the next mantlet", isThere)
	p.must(p.sidecar.Stop())
	if isThere() {
		t.Error("it is there although mantlet ended")
	}
	p.leavesNothing()
}

// instructions returns what follows an instruction in the stages of the Containerfile that a flavour is made of.
func instructions(t *testing.T, instruction string, of ...string) (all []string) {
	t.Helper()
	text, err := os.ReadFile("../../Containerfile")
	if err != nil {
		t.Fatal(err)
	}
	stage := ""
	for line := range strings.Lines(string(text)) {
		is, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		if _, name, ok := strings.Cut(rest, " AS "); is == "FROM" && ok {
			stage = name
		}
		if is == instruction && slices.Contains(of, stage) {
			all = append(all, rest)
		}
	}
	return all
}

// image makes a root directory as the flavour contrast of the image has it, and nothing else: mantlet, Envoy, iptables-legacy and the
// libraries of all three.
func (p *pod) image() string {
	p.t.Helper()
	root := p.t.TempDir()
	lab.Open(root)
	p.must(os.Chmod(root, 0o755))
	at := func(path string) string {
		p.must(os.MkdirAll(filepath.Dir(filepath.Join(root, path)), 0o755))
		return filepath.Join(root, path)
	}
	put := func(from, to string) {
		real, err := filepath.EvalSymlinks(from)
		p.must(err)
		p.install(real, at(to))
	}
	put("/proc/self/exe", "/usr/local/bin/mantlet")
	put(os.Getenv("MANTLET_ENVOY_PATH"), "/usr/local/bin/envoy")
	p.must(os.Symlink("mantlet", at("/usr/local/bin/test")))
	legacy, err := exec.LookPath("iptables-legacy")
	p.must(err)
	unpacked := filepath.Dir(legacy)
	put(filepath.Join(unpacked, "xtables-legacy-multi"), "/usr/sbin/iptables-legacy")
	triplet := runtimeArchitecture() + "-linux-gnu"
	for _, directory := range []string{unpacked, "/usr/lib/" + triplet + "/xtables"} {
		matches, err := filepath.Glob(filepath.Join(directory, "libxt_*.so"))
		p.must(err)
		for _, match := range matches {
			put(match, "/usr/lib/"+triplet+"/xtables/"+filepath.Base(match))
		}
	}
	for _, program := range []string{"/usr/local/bin/mantlet", "/usr/local/bin/envoy", "/usr/sbin/iptables-legacy"} {
		ldd := exec.Command("ldd", filepath.Join(root, program))
		ldd.Env = append(os.Environ(), "LD_LIBRARY_PATH="+unpacked)
		out, _ := ldd.Output() // which fails for a static program
		for _, library := range regexp.MustCompile(`/\S+`).FindAllString(string(out), -1) {
			to := library
			if filepath.Dir(library) == unpacked {
				to = "/usr/lib/" + triplet + "/" + filepath.Base(library)
			}
			if _, err := os.Stat(at(to)); err != nil {
				put(library, to)
			}
		}
	}
	p.must(os.WriteFile(at("/etc/resolv.conf"), nil, 0o644))
	p.must(os.WriteFile(at("/etc/hosts"), []byte("127.0.0.1 localhost\n"), 0o644))
	return root
}

func runtimeArchitecture() string {
	return map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[runtime.GOARCH]
}

// TestContrastsContainer: mantlet in a container of the shape that Contrast's generator gives its sidecar, which it does not know is
// another: arguments, variables, certificates, probe and privileges are Contrast's, the rest is what the image's flavour has. The guest
// has booted with its rule.
func TestContrastsContainer(t *testing.T) {
	t.Parallel()
	far := "127.0.0.1:9" // nobody
	p := newPod(t, instructions(t, "ENV", "base", "contrast")...)
	p.sidecar.Root = p.image()
	p.sidecar.Binary = "/usr/local/bin/mantlet"
	p.sidecar.Args = []string{"run", "-l", "debug"} // the image's ENTRYPOINT, and the container's args
	p.sidecar.Env = append(p.sidecar.Env,
		"CONTRAST_INGRESS_PROXY_CONFIG=web#8080#false##admin#9901#true", "CONTRAST_EGRESS_PROXY_CONFIG=billing#127.137.0.1:8081#"+far, "CONTRAST_ADMIN_PORT=9901",
		"MANTLET_TLS_DIRECTORY=", "MANTLET_RUNTIME_DIRECTORY=", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	p.sidecar.RuntimeDirectory = filepath.Join(p.sidecar.Root, "run/mantlet") // as seen from outside
	initialized := filepath.Join(p.sidecar.Root, "contrast/tls-config")
	p.must(os.MkdirAll(initialized, 0o755))
	p.must(p.identity.Write(initialized))
	p.iptables(bootDeny)
	p.besiege()

	startupProbe := func() int {
		cmd := p.sidecar.Command("-f", "/ready")
		cmd.Path, cmd.Args = "", append([]string{"nsenter", "--mount", "--pid", "--target", strconv.Itoa(p.sidecar.PID()), "test"}, cmd.Args[1:]...)
		cmd.Path, _ = exec.LookPath("nsenter")
		_ = cmd.Run()
		return cmd.ProcessState.ExitCode()
	}
	p.run()
	p.protect(tlsPort)
	p.protect(mtlsPort)
	p.await("the startup probe succeeds", func() bool { return startupProbe() == 0 })
	p.ready()
	for _, addr := range p.Addrs() {
		p.must(p.exchange(netip.AddrPortFrom(addr, tlsPort), p.anonymous()))
		p.must(p.exchange(netip.AddrPortFrom(addr, mtlsPort), p.client.ClientConfig("pod")))
		for _, path := range []string{"/status", "/metrics", "/stats/prometheus"} {
			if code, said, err := p.get(addr, http.MethodGet, path); err != nil || code != http.StatusOK {
				t.Errorf("%s: %d, %v: %s", path, code, err, said)
			}
		}
	}
	if rules := p.iptables("-S INPUT"); rules != "-P INPUT ACCEPT\n" {
		t.Errorf("the guest's rule is still there: %s", rules)
	}
	p.besieged()

	p.must(syscall.Kill(p.envoy(), syscall.SIGSTOP))
	p.await("the probe fails while Envoy hangs", func() bool { return startupProbe() == 1 })
	p.must(syscall.Kill(p.envoy(), syscall.SIGCONT))
	p.await("it succeeds again", func() bool { return startupProbe() == 0 })
	p.must(p.sidecar.Signal(syscall.SIGSTOP))
	if code := startupProbe(); code != 1 {
		t.Errorf("while mantlet hangs the probe's exit code is %d", code)
	}
	p.must(p.sidecar.Signal(syscall.SIGCONT))
	p.await("it succeeds again", func() bool { return startupProbe() == 0 })
	p.must(p.sidecar.Stop())
}

// TestTest checks what mantlet answers where it is called by the name test.
func TestTest(t *testing.T) {
	directory := t.TempDir()
	link := filepath.Join(directory, "test")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(directory, "file")
	if err := errors.Join(os.Symlink(self, link), os.WriteFile(file, nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		code int
	}{
		{[]string{"-f", file}, 0},
		{[]string{"-f", link}, 0}, // to a file
		{[]string{"-f", file + "s"}, 1},
		{[]string{"-f", directory}, 1},
		{[]string{"-f", "/dev/null"}, 1},
		{[]string{"-e", file}, 2},
		{[]string{"-f"}, 2},
		{nil, 2},
		{[]string{"-f", file, "-a", "-f", file}, 2},
	} {
		cmd := exec.Command(link, c.args...)
		cmd.Env = append(os.Environ(), asMantlet+"=1", "GORACE=atexit_sleep_ms=0")
		if _ = cmd.Run(); cmd.ProcessState.ExitCode() != c.code {
			t.Errorf("test %q: exit code %d, want %d", c.args, cmd.ProcessState.ExitCode(), c.code)
		}
	}
}
