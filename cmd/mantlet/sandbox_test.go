package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"mantlet/internal/lab"
	"mantlet/internal/sandbox"
)

// threads returns a field of each thread of a process.
func (p *pod) threads(pid int, field string) (values []string) {
	p.t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	p.must(err)
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // the thread has ended
		}
		for line := range strings.Lines(string(text)) {
			if value, is := strings.CutPrefix(line, field+":"); is {
				values = append(values, strings.Join(strings.Fields(value), " "))
			}
		}
	}
	slices.Sort(values)
	return slices.Compact(values)
}

const (
	none        = "0000000000000000"
	netAdmin    = "0000000000001000"
	netRaw      = "0000000000002000"
	netAdminRaw = "0000000000003000"
)

// TestLeastPrivilege: every thread of mantlet has NET_ADMIN and no more that has effect, but for the one that is Envoy's
// user with NET_RAW; Envoy has NET_RAW, by being ambient. The pod's container adds what sandbox.Needs says and nothing else,
// as in all tests.
func TestLeastPrivilege(t *testing.T) {
	t.Parallel()
	p := start(t, web, "EDG_EGRESS_PROXY_CONFIG=billing#127.137.0.1:8081#192.0.2.1:8080")
	user := strconv.Itoa(lab.EnvoyUser())
	ids := func(id string) string { return strings.Join([]string{id, id, id, id}, " ") }
	check := func(when string) {
		for pid, want := range map[int]map[string][]string{
			p.sidecar.PID(): {
				"CapEff": {netAdmin, netRaw}, "CapPrm": {netRaw, netAdminRaw}, "CapInh": {none}, "CapAmb": {none},
				"NoNewPrivs": {"1"}, "Uid": slices.Compact([]string{ids("0"), ids(user)}), "Gid": slices.Compact([]string{ids("0"), ids(user)}),
			},
			p.envoy(): {
				"CapEff": {netRaw}, "CapPrm": {netRaw}, "CapInh": {netRaw}, "CapAmb": {netRaw}, "NoNewPrivs": {"1"},
				"Uid": {ids(user)}, "Gid": {ids(user)},
			},
		} {
			for field, want := range want {
				if got := p.threads(pid, field); !slices.Equal(got, want) {
					t.Errorf("%s: threads of process %d have %s %q, want %q", when, pid, field, got, want)
				}
			}
		}
		if got := p.threads(p.envoy(), "Groups"); user != "0" && !slices.Equal(got, []string{""}) {
			t.Errorf("%s: Envoy is in the groups %q", when, got)
		}
	}
	check("at first")
	first := p.envoy()
	p.must(syscall.Kill(first, syscall.SIGKILL))
	p.await("Envoy is back", func() bool {
		pids, _ := p.sidecar.Envoys()
		return len(pids) == 1 && pids[0] != first
	})
	p.ready()
	check("after Envoy was killed")
	for _, addr := range p.Addrs() {
		p.must(p.exchange(netip.AddrPortFrom(addr, mtlsPort), p.client.ClientConfig("pod")))
	}
	for path, want := range map[string]os.FileMode{
		"": os.ModeDir | 0o710, "mantlet.sock": os.ModeSocket | 0o600, "envoy": os.ModeDir | os.ModeSetgid | os.ModeSticky | 0o770,
		"envoy/sds-identity.json": 0o640,
	} {
		info, err := os.Stat(filepath.Join(p.sidecar.RuntimeDirectory, path))
		p.must(err)
		owner := info.Sys().(*syscall.Stat_t)
		group := user
		if path == "mantlet.sock" {
			group = "0"
		}
		if info.Mode() != want || owner.Uid != 0 || strconv.Itoa(int(owner.Gid)) != group {
			t.Errorf("%q is %v of user %d and group %d, want %v of 0 and %s", path, info.Mode(), owner.Uid, owner.Gid, want, group)
		}
	}
}

// TestMissingCapability takes the needed ones away, one by one. What is missing is said with the line that gives it, and
// nothing comes in: neither is Envoy started with another user's privileges.
func TestMissingCapability(t *testing.T) {
	t.Parallel()
	for _, missing := range sandbox.Needs(lab.EnvoyUser()) {
		t.Run(missing.Name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t, web)
			p.must(p.identity.Write(p.sidecar.TLSDirectory))
			p.sidecar.Capabilities = slices.DeleteFunc(p.sidecar.Capabilities, func(c sandbox.Capability) bool { return c == missing })
			says := "CAP_" + missing.Name + " is missing"
			line := sandbox.Remedy(sandbox.Needs(lab.EnvoyUser())) // as check says it
			if missing.Name == "NET_ADMIN" {                       // then there are no rules to close the pod with
				p.must(p.sidecar.Start())
				err := p.sidecar.Wait()
				for _, text := range []string{says, line, "no deny-all could be put in place: the pod is open"} {
					if err == nil || !strings.Contains(p.log.String(), text) || strings.Contains(p.log.String(), "they stay") {
						t.Errorf("mantlet ended: %v, without %q alone: %s", err, text, p.log)
					}
				}
				if tables, err := p.Run("nft", "list", "tables"); err != nil || tables != "" {
					t.Errorf("there are tables, %v:\n%s", err, tables)
				}
				return
			}
			p.besiege()
			p.run()
			p.protect(mtlsPort)
			p.unready(says)
			p.unready(line)
			p.await("mantlet tried again", func() bool { return p.failedStarts() > 1 })
			p.besieged()
			if total := p.prober.Stats().Total(); total.Accepted > 0 {
				t.Errorf("%+v, want nothing accepted", total)
			}
			p.must(p.sidecar.Stop())
		})
	}
}

// TestLowPort: an egress listener at a low port takes one more capability, which Envoy has only while there is one.
func TestLowPort(t *testing.T) {
	t.Parallel()
	low := "EDG_EGRESS_PROXY_CONFIG=low#127.137.0.1:80#192.0.2.1:8080"
	for name, c := range map[string]struct {
		egress      string
		give        bool
		says, envoy string
	}{
		"given":     {egress: low, give: true, envoy: "0000000000002400"},
		"not given": {egress: low, says: "port 80 is below net.ipv4.ip_unprivileged_port_start, and CAP_NET_BIND_SERVICE is missing"},
		"of no use": {egress: "EDG_EGRESS_PROXY_CONFIG=", give: true, envoy: netRaw},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t, web, c.egress)
			p.must(p.Sysctl("net.ipv4.ip_unprivileged_port_start", "1024"))
			if c.give {
				p.sidecar.Capabilities = append(p.sidecar.Capabilities, sandbox.NetBindService)
			}
			p.must(p.identity.Write(p.sidecar.TLSDirectory))
			p.run()
			if c.says != "" {
				p.unready(c.says)
				said := p.checkWithout("NET_BIND_SERVICE")
				for _, text := range []string{"CAP_NET_BIND_SERVICE is missing", "SETGID, NET_BIND_SERVICE]"} {
					if !strings.Contains(said, text) {
						t.Errorf("check does not say %q:\n%s", text, said)
					}
				}
				return
			}
			p.ready()
			if got := p.threads(p.envoy(), "CapEff"); lab.EnvoyUser() != 0 && !slices.Equal(got, []string{c.envoy}) {
				t.Errorf("Envoy has %q, want %q", got, c.envoy)
			}
		})
	}
}

// intruder is what a compromised Envoy could do: this test binary, executed with all that Envoy has. It is given mantlet's
// process id, directories and an abstract socket, and writes down which attempts came to what.
const intruder = "RUN_AS_INTRUDER"

type target struct {
	Mantlet                                 int
	RuntimeDirectory, TLSDirectory, Outside string
	Abstract                                string
}

func (to target) intrude() map[string]string {
	outcome := map[string]string{}
	try := func(attempt string, err error) {
		outcome[attempt] = "done"
		if err != nil {
			outcome[attempt] = err.Error()
		}
	}
	readable := func(path string) error { _, err := os.ReadFile(path); return err }
	own := func(name string) string { return filepath.Join(to.RuntimeDirectory, "envoy", name) }

	// What it needs, or could do anyway: without these the rest would prove nothing.
	try("read the key that it was given", readable(own("sds-identity.json")))
	try("make a file beside it", os.WriteFile(own("test-file"), []byte("#!/bin/true\n"), 0o700))
	try("open a raw socket", func() error { _, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP); return err }())

	conn, err := nftables.New()
	if err == nil {
		conn.DelTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "mantlet"})
		err = conn.Flush()
	}
	try("remove the rules", err)
	try("become root", syscall.Setuid(0))
	try("execute what it wrote", exec.Command(own("test-file")).Run())
	try("replace the key that it was given", os.Rename(own("test-file"), own("sds-identity.json")))
	try("read the TLS directory", readable(filepath.Join(to.TLSDirectory, "mesh-ca.pem")))
	try("write elsewhere", os.WriteFile(to.Outside, nil, 0o600))
	try("ask mantlet", func() error {
		_, err := net.Dial("unix", filepath.Join(to.RuntimeDirectory, "mantlet.sock"))
		return err
	}())
	// By its process id: one of its threads is Envoy's user's, and by that one it could.
	try("end mantlet", unix.Kill(to.Mantlet, 0))
	try("speak to an abstract socket", func() error { _, err := net.Dial("unix", to.Abstract); return err }())
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", to.Mantlet))
	for i, task := range tasks {
		thread, _ := strconv.Atoi(filepath.Base(task))
		try(fmt.Sprintf("read the memory of thread %d", i), readable(task+"/mem"))
		try(fmt.Sprintf("trace thread %d", i), unix.PtraceSeize(thread))
	}
	return outcome
}

// TestIntruder: what gets hold of Envoy reaches neither rules nor mantlet, and no file but those that it was given.
func TestIntruder(t *testing.T) {
	t.Parallel()
	directory := t.TempDir()
	lab.Open(directory)
	p := newPod(t, web, "MANTLET_ENVOY_PATH="+filepath.Join(directory, "envoy"))
	var abstract net.Listener
	p.must(p.Do(func() (err error) {
		abstract, err = net.Listen("unix", "@intruder")
		return err
	}))
	defer abstract.Close()
	report := filepath.Join(p.sidecar.RuntimeDirectory, "envoy", "test-report")
	self, err := os.Readlink("/proc/self/exe")
	p.must(err)
	p.install(self, filepath.Join(directory, "intruder"))
	p.must(os.WriteFile(filepath.Join(directory, "envoy"), fmt.Appendf(nil, `#!/bin/sh
%s='{"Mantlet": '$PPID', "RuntimeDirectory": "%s", "TLSDirectory": "%s", "Outside": "/tmp/intruder", "Abstract": "@intruder"}' \
	%s/intruder >%s
exec %s "$@"
`, intruder, p.sidecar.RuntimeDirectory, p.sidecar.TLSDirectory, directory, report, os.Getenv("MANTLET_ENVOY_PATH")), 0o755))
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	for _, name := range []string{lab.ChainFile, lab.KeyFile, lab.CAFile} { // modes are not what keeps it out
		p.must(os.Chmod(filepath.Join(p.sidecar.TLSDirectory, name), 0o644))
	}
	p.run()
	var outcome map[string]string
	p.await("the intruder is done", func() bool {
		text, err := os.ReadFile(report)
		return err == nil && json.Unmarshal(text, &outcome) == nil
	})
	want := map[string]string{
		"read the key that it was given": "done", "make a file beside it": "done", "open a raw socket": "done",
		"remove the rules":            "operation not permitted",
		"execute what it wrote":       "permission denied",
		"read the TLS directory":      "permission denied",
		"write elsewhere":             "permission denied",
		"speak to an abstract socket": "operation not permitted",
		"read the memory":             "permission denied",
		"trace":                       "operation not permitted",
	}
	if lab.EnvoyUser() != 0 { // what users keep apart
		for _, attempt := range []string{"become root", "replace the key that it was given", "end mantlet"} {
			want[attempt] = "operation not permitted"
		}
		want["ask mantlet"] = "permission denied"
	}
	seen := 0
	for attempt, got := range outcome {
		for what, want := range want {
			if strings.HasPrefix(attempt, what) {
				seen++
				if !strings.HasSuffix(got, want) {
					t.Errorf("%s: %s, want %s", attempt, got, want)
				}
			}
		}
	}
	if seen < len(want)+2*5 { // of each thread, of which there are some
		t.Errorf("outcomes are missing: %v", outcome)
	}
}

// TestReadsNoOtherFiles: what mantlet itself may read is set when it starts. A link that leads elsewhere from then on is an
// input that is not good, whoever may read it; the last good one stays.
func TestReadsNoOtherFiles(t *testing.T) {
	t.Parallel()
	p := start(t, web)
	next, outside := p.issue("pod"), t.TempDir()
	p.must(next.Write(outside))
	link := func(to string) {
		for _, name := range []string{lab.ChainFile, lab.KeyFile, lab.CAFile} {
			path := filepath.Join(p.sidecar.TLSDirectory, name)
			p.must(errors.Join(os.Symlink(filepath.Join(to, name), path+".tmp"), os.Rename(path+".tmp", path)))
		}
	}
	link(outside)
	p.await("mantlet says why", func() bool { return p.log.count("permission denied") > 0 })
	p.ready()
	p.shows(p.identity)
	inside := filepath.Join(p.sidecar.TLSDirectory, "next")
	p.must(errors.Join(os.Mkdir(inside, 0o755), next.Write(inside)))
	link(inside)
	p.await("the certificates are published", func() bool { return p.log.count("certificates published") == 2 })
	p.shows(next)
}

// TestForeignListener: the kernel lets none but Envoy's user join its listeners, where it would get a part of their
// connections. Root is no exception.
func TestForeignListener(t *testing.T) {
	t.Parallel()
	p := start(t, web)
	join := func(uid int) error {
		return p.Do(func() error { // on a thread that ends
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
				return errno
			}
			socket, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
			if err != nil {
				return err
			}
			defer func() { _ = unix.Close(socket) }()
			if err := unix.SetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
				return err
			}
			return unix.Bind(socket, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: 15006})
		})
	}
	if err := join(lab.EnvoyUser()); err != nil {
		t.Errorf("Envoy's own user: %v; then the rest proves nothing", err)
	}
	if lab.EnvoyUser() == 0 {
		return // an ordinary user's lab has no other
	}
	for _, uid := range []int{0, lab.Stranger} {
		if err := join(uid); !errors.Is(err, unix.EADDRINUSE) {
			t.Errorf("user %d joins Envoy's listener: %v", uid, err)
		}
	}
}

// TestJoinedListener: a process of Envoy's user that joins a listener is named, and the pod is not ready until it has left. Envoys that
// take over from each other, with more threads or fewer, are not taken for one.
func TestJoinedListener(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, "EDG_EGRESS_PROXY_CONFIG=billing#127.137.0.1:8081#192.0.2.1:8080")
	m := p.override("{}")
	p.start()
	const said = "another process listens where Envoy does"
	for _, threads := range []string{"3", "1", "2"} {
		before := p.log.count("Envoy is live")
		m.write("envoy: {concurrency: " + threads + "}")
		p.await("a hot restart", func() bool { return p.log.count("Envoy is live") > before })
		p.ready()
	}
	if p.log.count(said) > 0 {
		t.Errorf("Envoy's own sockets are taken for another process's:\n%s", p.log)
	}
	for _, address := range []string{"127.0.0.1:15006", "[::1]:15006", "0.0.0.0:15006", "127.137.0.1:8081"} {
		before := p.log.count(said)
		joiner := p.join(address)
		p.unready(said)
		p.await("the log says so", func() bool { return p.log.count(said) > before })
		if status := p.status(); status.Ready || !slices.ContainsFunc(status.Problems, func(s string) bool { return strings.Contains(s, said) }) {
			t.Errorf("%s is joined: ready %v, problems %q", address, status.Ready, status.Problems)
		}
		p.must(joiner.Close())
		p.ready()
	}
}

// join makes Envoy's user listen where Envoy does.
func (p *pod) join(address string) (listener net.Listener) {
	p.t.Helper()
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		failed := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
		return errors.Join(failed, err)
	}}
	p.must(p.Do(func() (err error) { // on a thread that ends
		uid := uintptr(lab.EnvoyUser())
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uid, uid, uid); errno != 0 {
			return errno
		}
		listener, err = config.Listen(context.Background(), "tcp", address)
		return err
	}))
	p.t.Cleanup(func() { _ = listener.Close() })
	return listener
}

// TestContainer: mantlet as PID 1 of a container, with all mounts read-only but the runtime directory and /dev/shm, and
// with the system calls that the runtimes' default profiles let through. It reaps what others leave behind, and takes
// no child's end from whoever waits for it.
func TestContainer(t *testing.T) {
	t.Parallel()
	directory := t.TempDir()
	lab.Open(directory)
	path, config := filepath.Join(directory, "envoy"), filepath.Join(directory, "mesh.yaml")
	p := newPod(t, web, "MANTLET_ENVOY_PATH="+path, "MANTLET_CONFIG="+config)
	p.sidecar.Contained = true
	p.install(os.Getenv("MANTLET_ENVOY_PATH"), path+"-proper")
	p.must(os.WriteFile(path, []byte("#!/bin/sh\n(sleep 86397 >/dev/null 2>&1 &)\nexec "+path+`-proper "$@"`), 0o755))
	p.must(os.WriteFile(config, []byte("tls: {minVersion: '1.2'}"), 0o644))
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.besiege()
	p.run()
	p.protect(mtlsPort)
	p.ready()
	if p.threads(p.sidecar.PID(), "NSpid")[0] == strconv.Itoa(p.sidecar.PID()) {
		t.Error("mantlet is not PID 1")
	}

	children := func(comm string) (pids []int) {
		all, err := p.sidecar.Envoys()
		p.must(err)
		for _, pid := range all {
			name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
			if err == nil && strings.TrimSpace(string(name)) == comm {
				pids = append(pids, pid)
			}
		}
		return pids
	}
	for round := range 3 {
		p.await("mantlet has the orphan and Envoy", func() bool { return len(children("sleep")) == 1 && len(children("envoy-proper")) == 1 })
		orphan, envoy := children("sleep")[0], children("envoy-proper")[0]
		p.must(syscall.Kill(orphan, syscall.SIGKILL))
		p.await("the orphan is reaped", func() bool { return errors.Is(syscall.Kill(orphan, 0), syscall.ESRCH) })
		p.must(syscall.Kill(envoy, syscall.SIGKILL))
		p.await("mantlet knows how Envoy ended", func() bool { return p.log.count(" exited: signal: killed, ") > round })
		p.await("Envoy is back", func() bool { return len(children("envoy-proper")) == 1 && children("envoy-proper")[0] != envoy })
		p.ready()
	}
	p.must(os.WriteFile(config, []byte("tls: {minVersion: '1.3'}"), 0o644))
	p.await("a hot restart, and the rules after it", func() bool { return p.log.count(`"epoch":1`) > 0 && p.log.count(inForce) > 1 })
	p.ready()
	for _, addr := range p.Addrs() {
		p.must(p.exchange(netip.AddrPortFrom(addr, mtlsPort), p.client.ClientConfig("pod")))
	}
	p.besieged()
	for _, bad := range []string{"read-only file system", "operation not permitted", "no child processes", "could not be kept"} {
		if p.log.count(bad) > 0 {
			t.Errorf("mantlet's log has %q", bad)
		}
	}
	p.must(p.sidecar.Stop())
	p.leavesNothing()
}

// TestWithoutLandlock: where there is none, or seccomp hides it, mantlet goes on and says so, once.
func TestWithoutLandlock(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	p.sidecar.Contained, p.sidecar.Forbidden = true, []uint32{unix.SYS_LANDLOCK_CREATE_RULESET}
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.protect(mtlsPort)
	p.ready()
	if got := p.log.count("files are guarded by their owners and modes alone"); got != 1 {
		t.Errorf("mantlet said so %d times", got)
	}
	p.must(p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), p.client.ClientConfig("pod")))
}

// install puts a program in place, of the same content.
func (p *pod) install(from, to string) {
	p.t.Helper()
	if os.Link(from, to) == nil {
		return
	}
	binary, err := os.ReadFile(from)
	p.must(errors.Join(err, os.WriteFile(to, binary, 0o755)))
}
