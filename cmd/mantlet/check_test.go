package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"mantlet/internal/lab"
	"mantlet/internal/sandbox"
)

// within returns a command that ends in executing mantlet, without arguments yet.
func (p *pod) within(command ...string) *exec.Cmd {
	p.t.Helper()
	self, err := os.Executable()
	p.must(err)
	cmd := exec.Command(command[0], append(command[1:], self)...)
	cmd.Env = p.sidecar.Command().Env
	return cmd
}

// needs runs `mantlet check` beside the sidecar, in a mount namespace of its own that a shell has prepared, and returns what
// is wrong, by need.
func (p *pod) needs(prepare string, env ...string) map[string]finding {
	p.t.Helper()
	cmd := p.within("unshare", "--mount", "sh", "-ec", prepare+"\nexec \"$@\"", "sh")
	cmd.Args = append(cmd.Args, "check", "-o", "json")
	cmd.Env = append(cmd.Env, env...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	p.must(p.Start(cmd))
	_ = cmd.Wait()
	var said struct {
		OK       bool
		Findings []finding
	}
	if err := json.Unmarshal(stdout.Bytes(), &said); err != nil {
		p.t.Fatalf("%v: %s%s", err, &stdout, &stderr)
	}
	failed := slices.ContainsFunc(said.Findings, func(f finding) bool { return f.Severity == failing })
	if code := cmd.ProcessState.ExitCode(); said.OK == failed || (code == 1) != failed || (code == 0) == failed {
		p.t.Errorf("exit %d, ok %t: %+v", code, said.OK, said.Findings)
	}
	found := map[string]finding{}
	for _, f := range problems(said.Findings) {
		if f.Detail == "" || f.Remedy == "" {
			p.t.Errorf("%+v does not says what is wrong, or what to do", f)
		}
		found[f.Need] = f
	}
	if _, err := sandbox.Landlock(); (err != nil) != (found["Landlock"].Severity == warning) {
		p.t.Errorf("Landlock: %v, and %+v", err, found["Landlock"])
	}
	delete(found, "Landlock")
	return found
}

// TestCheck takes the needs away one by one: each is named, and nothing else.
func TestCheck(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	memory, err := os.MkdirTemp("/dev/shm", "check")
	p.must(err)
	t.Cleanup(func() { _ = os.RemoveAll(memory) })
	p.must(os.Chmod(memory, 0o711))
	p.sidecar.RuntimeDirectory = filepath.Join(memory, "run", "mantlet")
	script := func(name, text string) string {
		path := filepath.Join(t.TempDir(), name)
		p.must(os.WriteFile(path, []byte(text), 0o755))
		lab.Open(filepath.Dir(path))
		return path
	}
	tls := p.sidecar.TLSDirectory
	empty, other, others, file := t.TempDir(), t.TempDir(), t.TempDir(), script("file", "")
	p.must(os.Chown(others, 1337, 1337))
	foreign := t.TempDir()
	stranger, err := lab.NewAuthority("mesh")
	p.must(err)
	p.must(os.WriteFile(filepath.Join(foreign, "mesh-ca.pem"), stranger.CAPEM(), 0o644))
	bad := script("bad.yaml", "ingress:\n  - {port: 0, mode: tls}\n  - {port: 80, mode: none}\n")
	good := script("good.yaml", "ingress:\n  - {port: 80, mode: tls}\n")
	for name, c := range map[string]struct {
		prepare string
		env     []string
		need    string // "" for nothing
		level   severity
		says    string
	}{
		"nothing": {},
		"nothing, in whole": {env: []string{
			"EDG_EGRESS_PROXY_CONFIG=a#127.0.0.2:1#localhost:2##b#127.0.0.3:1#192.0.2.1:1", "MANTLET_POD_IP=192.0.2.1", "MANTLET_HOST_IP=192.0.2.2",
			"MANTLET_CONFIG=" + good,
		}},
		"hostNetwork":             {"", []string{"MANTLET_POD_IP=192.0.2.1", "MANTLET_HOST_IP=192.0.2.1"}, "network namespace", warning, "hostNetwork"},
		"no Envoy":                {"", []string{"MANTLET_ENVOY_PATH=no-envoy"}, "Envoy", failing, "executable file not found"},
		"Envoy can't be started":  {"", []string{"MANTLET_ENVOY_PATH=" + bad + "/envoy"}, "Envoy", failing, "not a directory"},
		"Envoy is something else": {"", []string{"MANTLET_ENVOY_PATH=" + script("else", "#!/bin/sh\necho hello\n")}, "Envoy", failing, "hello"},
		"Envoy is old": {
			"",
			[]string{"MANTLET_ENVOY_PATH=" + script("old", "#!/bin/sh\necho 'x  version: abc/1.39.2/Clean/RELEASE/BoringSSL'\n")},
			"Envoy", failing, "1.39.2, which is too old",
		},
		"Envoy is new": {
			"",
			[]string{"MANTLET_ENVOY_PATH=" + script("new", "#!/bin/sh\necho 'x  version: abc/1.41.0/Clean/RELEASE/BoringSSL'\n")},
			"Envoy", warning, "1.41.0, which mantlet was not tried with",
		},
		"no shared memory":     {"mount -t tmpfs -o ro none /dev/shm", []string{"MANTLET_RUNTIME_DIRECTORY=" + empty}, "shared memory", failing, "read-only"},
		"no runtime directory": {"mount -t tmpfs -o ro none " + empty, []string{"MANTLET_RUNTIME_DIRECTORY=" + empty + "/run"}, "runtime directory", failing, "read-only"},
		"runtime directory is full": {
			"mount -t tmpfs -o size=8k,mode=700 none " + empty + "; head -c 8192 /dev/zero >" + empty + "/filler",
			[]string{"MANTLET_RUNTIME_DIRECTORY=" + empty},
			"runtime directory", failing, "no space left on device",
		},
		"runtime directory, closed": {
			"mount -t tmpfs -o mode=700 none " + empty,
			[]string{"MANTLET_RUNTIME_DIRECTORY=" + empty + "/run"},
			"runtime directory", failing, unreachable + empty + " (mode 0700)",
		},
		"shared memory, closed": {
			"mount -t tmpfs -o mode=755 none /dev/shm",
			[]string{"MANTLET_RUNTIME_DIRECTORY=" + empty},
			"shared memory", failing,
			fmt.Sprintf("user %d may not write to /dev/shm (mode 0755)", lab.EnvoyUser()),
		},
		"runtime directory on disk":   {"", []string{"MANTLET_RUNTIME_DIRECTORY=" + filepath.Join(empty, "run")}, "runtime directory", warning, "not in memory"},
		"another's runtime directory": {"", []string{"MANTLET_RUNTIME_DIRECTORY=" + others}, "runtime directory", failing, "belongs to user 1337"},
		"shared runtime directory":    {"", []string{"MANTLET_RUNTIME_DIRECTORY=" + filepath.Dir(file)}, "runtime directory", failing, "is open to others"},
		"runtime directory, a file":   {"", []string{"MANTLET_RUNTIME_DIRECTORY=" + file}, "runtime directory", failing, "not a directory"},
		"runtime directory, too long": {"", []string{"MANTLET_RUNTIME_DIRECTORY=/run/" + strings.Repeat("x", 100)}, "runtime directory", failing, "too long"},
		"no certificates":             {"", []string{"MANTLET_TLS_DIRECTORY=" + empty}, "certificates", failing, "key.pem: no such file"},
		"bad certificates": {
			"mount -t tmpfs none " + other + "; cp " + tls + "/* " + other + "; echo >" + other + "/key.pem",
			[]string{"MANTLET_TLS_DIRECTORY=" + other},
			"certificates", failing, "key.pem",
		},
		"certificates of another CA": {
			"mount -t tmpfs none " + other + "; cp " + tls + "/* " + other + "; cp " + foreign + "/mesh-ca.pem " + other,
			[]string{"MANTLET_TLS_DIRECTORY=" + other},
			"certificates", failing, "was issued by",
		},
		"no override file":  {"", []string{"MANTLET_CONFIG=" + empty + "/mesh.yaml"}, "override file", failing, "no such file"},
		"bad override file": {"", []string{"MANTLET_CONFIG=" + bad}, "override file", failing, "bad.yaml"},
		"override file by subPath": {
			"echo '{}' >" + other + "/new; mount --bind " + other + "/new " + good,
			[]string{"MANTLET_CONFIG=" + good},
			"override file", warning, "never reaches it",
		},
		"bad environment": {"", []string{"EDG_INGRESS_PROXY_CONFIG=web#0#true"}, "environment", failing, "EDG_INGRESS_PROXY_CONFIG"},
		"a dead name":     {"", []string{"EDG_EGRESS_PROXY_CONFIG=a#127.0.0.2:1#nowhere.invalid:1"}, "upstream nowhere.invalid", warning, "lookup nowhere.invalid"},
		"conntrack is full": {
			"echo 80 >" + other + "/80; echo 100 >" + other + "/100; cd /proc/sys/net/netfilter; mount --bind " + other + "/80 nf_conntrack_count; mount --bind " + other + "/100 nf_conntrack_max",
			nil, "conntrack's table", warning, "80 of 100",
		},
	} {
		t.Run(name, func(t *testing.T) {
			found := p.needs(c.prepare, c.env...)
			f, ok := found[c.need]
			if c.need == "" {
				ok = true
			}
			if delete(found, c.need); !ok || f.Severity != c.level || !strings.Contains(f.Detail, c.says) {
				t.Errorf("found %+v, want %s %q: %q", f, c.level, c.need, c.says)
			}
			// In the lab's own directories two needs can go at once.
			if c.need != "shared memory" {
				delete(found, "shared memory")
			}
			if c.need == "shared memory" {
				delete(found, "runtime directory")
			}
			if len(found) > 0 {
				t.Errorf("found beside it: %+v", found)
			}
		})
	}
	if _, err := os.Stat(p.sidecar.RuntimeDirectory); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the runtime directory was made: %v", err)
	}
	if tables, err := p.Run("nft", "list", "tables"); err != nil || tables != "" {
		t.Errorf("there are tables, %v:\n%s", err, tables)
	}
	p.must(p.Sysctl("net.ipv6.conf.all.disable_ipv6", "1"))
	if found := p.needs(""); len(found) != 1 || found["IPv6"].Severity != warning {
		t.Errorf("without IPv6: %+v", found)
	}
}

// unreachable returns the path of an Envoy in a directory, or below one, that is closed to its user.
func (p *pod) unreachable(below string) (path, closed string) {
	p.t.Helper()
	outer := p.t.(*testing.T).TempDir()
	lab.Open(outer)
	closed = filepath.Join(outer, "closed")
	p.must(os.Mkdir(closed, 0o700))
	p.must(os.MkdirAll(filepath.Join(closed, below), 0o755))
	path = filepath.Join(closed, below, "envoy")
	p.must(os.Symlink(os.Getenv("MANTLET_ENVOY_PATH"), path))
	return path, closed
}

// unreachable is what is said of it.
var unreachable = fmt.Sprintf("user %d cannot enter ", lab.EnvoyUser())

// TestEnvoyOutOfReach: run says the same as check.
func TestEnvoyOutOfReach(t *testing.T) {
	t.Parallel()
	for name, below := range map[string]string{"in a closed directory": ".", "below one": "bin"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t, web)
			path, closed := p.unreachable(below)
			p.sidecar.Env = append(p.sidecar.Env, "MANTLET_ENVOY_PATH="+path)
			p.must(p.identity.Write(p.sidecar.TLSDirectory))
			if lab.EnvoyUser() == os.Geteuid() { // the directory's own user
				p.run()
				p.ready()
				return
			}
			said := unreachable + closed + " (mode 0700)"
			if f := p.needs("")["Envoy"]; f.Detail != said || f.Remedy != "put Envoy into /usr/local/bin" {
				t.Errorf("check says %+v, want %s", f, said)
			}
			p.run()
			p.unready(fmt.Sprintf("starting Envoy: executing %q: %s: put Envoy into /usr/local/bin", path, said))
		})
	}
}

// checkWithout runs `mantlet check` without a capability, and returns what it says.
func (p *pod) checkWithout(capability string) string {
	p.t.Helper()
	cmd := p.within("setpriv", "--bounding-set=-"+strings.ToLower(capability), "--")
	cmd.Args = append(cmd.Args, "check")
	var text bytes.Buffer
	cmd.Stdout = &text
	p.must(p.Start(cmd))
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 1 {
		p.t.Errorf("without %s: exit %d", capability, code)
	}
	return text.String()
}

// TestCheckAdvertisements: the interfaces that take router advertisements are named, and no others.
func TestCheckAdvertisements(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		settings map[string]map[string]string // by interface
		says     string
	}{
		"no IPv6": {nil, "no interface"},
		"takes":   {map[string]map[string]string{"eth0": {"accept_ra": "1", "forwarding": "0", "disable_ipv6": "0"}}, "eth0: whoever"},
		"router":  {map[string]map[string]string{"eth0": {"accept_ra": "1", "forwarding": "1", "disable_ipv6": "0"}}, "no interface"},
		"router that takes them": {map[string]map[string]string{
			"eth0": {"accept_ra": "2", "forwarding": "1", "disable_ipv6": "0"}, "net1": {"accept_ra": "0", "forwarding": "0", "disable_ipv6": "0"},
		}, "eth0: whoever"},
		"switched off": {map[string]map[string]string{"eth0": {"accept_ra": "1", "forwarding": "0", "disable_ipv6": "1"}}, "no interface"},
		"no interface": {map[string]map[string]string{"all": {"accept_ra": "2"}, "lo": {"accept_ra": "2"}}, "no interface"},
	} {
		directory := t.TempDir()
		for link, settings := range c.settings {
			check(t, os.Mkdir(filepath.Join(directory, link), 0o755))
			for setting, value := range settings {
				check(t, os.WriteFile(filepath.Join(directory, link, setting), []byte(value+"\n"), 0o644))
			}
		}
		if f := tryAdvertisements(directory); f.Severity != fine || !strings.HasPrefix(f.Detail, c.says) {
			t.Errorf("%s: %+v, want %q", name, f, c.says)
		}
	}
}

// TestCheckWithoutPrivilege: each capability that is missing is named, and what can't be tried is not said to be missing.
func TestCheckWithoutPrivilege(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	for _, name := range []string{"NET_ADMIN", "NET_RAW", "SETUID", "SETGID"} {
		text := p.checkWithout(name)
		if remedy := sandbox.Remedy(sandbox.Needs(lab.EnvoyUser())); !strings.Contains(text, remedy) {
			t.Errorf("without %s, check does not say %q:\n%s", name, remedy, text)
		}
		bad := slices.DeleteFunc(strings.Split(strings.TrimSpace(text), "\n"), func(line string) bool { return !strings.HasPrefix(line, "error") })
		want := 1
		if name == "NET_ADMIN" {
			want = 2 // and nftables, of which nothing can be tried
		}
		if len(bad) != want || !strings.Contains(bad[0], "CAP_"+name+" is missing") || strings.Contains(text, "CONFIG_NFT_TPROXY") == (name == "NET_ADMIN") {
			t.Errorf("without %s:\n%s", name, text)
		}
	}
}

// TestCheckBesideMantlet: a mantlet that runs is not disturbed, and its status has what a check finds when something is wrong.
func TestCheckBesideMantlet(t *testing.T) {
	t.Parallel()
	p := start(t, web)
	before := p.rules()
	for range 3 {
		for need, f := range p.needs("") {
			if f.Severity == failing {
				t.Errorf("%s: %+v", need, f)
			}
		}
	}
	p.ready()
	if diff := cmp.Diff(before, p.rules()); diff != "" {
		t.Errorf("the rules changed (-before +after):\n%s", diff)
	}
	if n := p.log.count("changed from outside"); n > 0 {
		t.Errorf("mantlet saw %d changes", n)
	}
	if code, text, _ := p.mantlet("status"); code != 0 || strings.Contains(text, "runtime directory") {
		t.Errorf("exit %d, while all is well:\n%s", code, text)
	}

	p.must(os.Remove(filepath.Join(p.sidecar.TLSDirectory, "key.pem")))
	p.await("status says what check finds", func() bool {
		code, text, _ := p.mantlet("status")
		return code == 1 && strings.Contains(text, "error    certificates") && strings.Contains(text, "init container")
	})
	var status struct {
		Ready    bool
		Findings []finding
	}
	_, text, _ := p.mantlet("status", "-o", "json")
	p.must(json.Unmarshal([]byte(text), &status))
	if !status.Ready || !slices.ContainsFunc(status.Findings, func(f finding) bool { return f.Need == "certificates" && f.Remedy != "" }) {
		t.Errorf("%+v", status)
	}
}

// TestLines: what is put into one line shows where each error ends, and what is cut is quoted on both sides or on none.
func TestLines(t *testing.T) {
	long := strings.Repeat("x", 61)
	for _, c := range []struct{ got, want string }{
		{oneLine("one\ntwo; do this"), "one; two; do this"},
		{oneLine("the file:\n  one\n\n  two  words"), "the file: one; two words"},
		{printable("plain, \"quoted\" and é words"), "plain, \"quoted\" and é words"},
		{printable("\x1b[2J\ta\u202eb\x00"), `\x1b[2J\ta\u202eb\x00`},
		{indented("one\n two\x1b\n", "  "), "one\n   two\\x1b"},
		{onLine("plain words"), "plain words"},
		{onLine(""), `""`},
		{onLine("a\tb"), `"a\tb"`},
		{onLine(long), long[:60] + "…"},
		{onLine(`"` + long), `"\"` + long[:58] + `…"`},
	} {
		if c.got != c.want {
			t.Errorf("%s, want %s", c.got, c.want)
		}
	}
}
