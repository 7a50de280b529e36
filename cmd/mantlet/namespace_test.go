package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// outsideVariable has what came of trying mantlet in the namespaces that the tests were started in, before they entered the lab.
const outsideVariable = "TRIED_OUTSIDE"

// outcome is what a command did.
type outcome struct {
	Code int
	Said string
}

// outside is what showed the namespace that the tests were started in, and what mantlet made of it.
type outside struct {
	Initial, Kata bool
	Outcomes      map[string]outcome // by the arguments
}

// tryOutside runs mantlet without a single capability, so that it can't touch a rule whatever it decides.
func tryOutside() (all outside, err error) {
	n := here()
	all = outside{n.initial, n.kata, map[string]outcome{}}
	self, err := os.Executable()
	if err != nil {
		return all, err
	}
	without := []string{"--no-new-privs"}
	if os.Geteuid() == 0 {
		without = append(without, "--bounding-set=-all", "--inh-caps=-all")
	}
	for _, args := range []string{
		"check", "run", "run --nonsense", "run --" + allowHostNetwork, "run --" + allowHostNetwork + " --" + allowHostNetwork, "cleanup",
	} {
		cmd := exec.Command("setpriv", slices.Concat(without, []string{"--", self}, strings.Fields(args))...)
		cmd.Env = append(os.Environ(), asMantlet+"=1", "GORACE=atexit_sleep_ms=0", "MANTLET_POD_IP=192.0.2.1", "MANTLET_HOST_IP=192.0.2.2")
		var said bytes.Buffer
		cmd.Stdout, cmd.Stderr = &said, &said
		_ = cmd.Run()
		all.Outcomes[args] = outcome{cmd.ProcessState.ExitCode(), said.String()}
	}
	return all, nil
}

// TestMachine: in the machine's own network namespace mantlet ends before it touches anything, unless it is asked twice.
func TestMachine(t *testing.T) {
	t.Parallel()
	var all outside
	if err := json.Unmarshal([]byte(os.Getenv(outsideVariable)), &all); err != nil {
		t.Fatal(err)
	}
	if n := here(); n.initial {
		t.Errorf("the lab's namespace is taken for the machine's: %+v", n)
	}
	const machine, untouched, capability = "this is the machine's own network namespace", `"rules":"none was touched"`, "CAP_NET_ADMIN is missing"
	said := map[string][]string{
		"check": {"error", "network namespace", machine}, "run": {machine, untouched}, "run --nonsense": {machine, untouched, "unknown flag: --nonsense"},
		"run --allow-host-network": {machine, untouched, "must be given twice"}, "run --allow-host-network --allow-host-network": {capability},
		"cleanup": {capability},
	}
	if !all.Initial || all.Kata { // the tests run in a container, say
		said = map[string][]string{"check": {"network namespace"}, "run": {capability}, "run --nonsense": {capability}}
	}
	for args, texts := range said {
		got := all.Outcomes[args]
		want := 2
		if args == "check" {
			want = 1
		}
		if got.Code != want {
			t.Errorf("mantlet %s: exit code %d, want %d", args, got.Code, want)
		}
		for _, text := range texts {
			if !strings.Contains(got.Said, text) {
				t.Errorf("mantlet %s does not say %q:\n%s", args, text, got.Said)
			}
		}
		if strings.Contains(got.Said, closed) {
			t.Errorf("mantlet %s says:\n%s", args, got.Said)
		}
	}
}

func TestNamespace(t *testing.T) {
	t.Parallel()
	const (
		own, initial = "net:[4026532750]", "net:[4026531833]"
		older        = "net:[4026531840]" // the initial one's before 6.18
		sysctl       = "proc/sys/net/core/netdev_budget"
		unit         = "tsc=reliable systemd.unit=kata-containers.target quiet"
		container    = "1 0 0:5 / / rw - overlay overlay rw\n"
		shared       = "2 1 0:6 /kata-containers/shared/containers/c-hosts /etc/hosts rw - tmpfs tmpfs rw\n"
		virtiofs     = "2 1 0:6 /c/rootfs / rw - virtiofs kataShared rw\n"
		host         = "2 1 0:6 /kata-containers/shared/sandboxes/s /run/kata-containers/shared/sandboxes/s rw - tmpfs tmpfs rw\n"
	)
	for name, c := range map[string]struct {
		release, link, cmdline, mounts string
		sysctl                         bool
		allowed                        int
		refused                        bool
	}{
		"a pod":               {release: "6.18.1", link: own},
		"a pod on Linux 5.10": {release: "5.10.0-30-cloud", link: own},
		"a pod on a kernel that is not known yet": {release: "9.0", link: own, sysctl: true},
		"a pod on a node with such a number":      {release: "5.10.0", link: older},
		"nothing can be seen":                     {},
		"hostNetwork":                             {release: "6.18.1", link: initial, mounts: container, sysctl: true, refused: true},
		"hostNetwork on Linux 5.10":               {release: "5.10.0", link: older, mounts: container, sysctl: true, refused: true},
		"hostNetwork on Linux 6.12":               {release: "6.12.1", link: own, mounts: container, sysctl: true, refused: true},
		"hostNetwork without sysctls":             {release: "6.18.1", link: initial, refused: true},
		"a laptop that runs Kata":                 {release: "6.18.1", link: initial, mounts: host, cmdline: "quiet", refused: true},
		"asked once":                              {release: "6.18.1", link: initial, allowed: 1, refused: true},
		"asked twice":                             {release: "6.18.1", link: initial, allowed: 2},
		"Kata":                                    {release: "6.18.1", link: initial, cmdline: unit, sysctl: true},
		"Kata on Linux 6.12":                      {release: "6.12.1", link: older, mounts: container + shared, sysctl: true},
		"Kata by virtio-fs":                       {release: "6.18.1", link: initial, mounts: virtiofs},
		"not Kata's unit":                         {release: "6.18.1", link: initial, cmdline: "xsystemd.unit=kata-containers.target", refused: true},
	} {
		root := t.TempDir()
		put := func(name, text string) {
			t.Helper()
			path := filepath.Join(root, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		put("proc/cmdline", c.cmdline)
		put("proc/self/mountinfo", c.mounts)
		if c.sysctl {
			put(sysctl, "300\n")
		}
		if c.link != "" {
			if err := os.MkdirAll(filepath.Join(root, "proc/self/ns"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(c.link, filepath.Join(root, "proc/self/ns/net")); err != nil {
				t.Fatal(err)
			}
		}
		n := readNamespace(root, c.release)
		if err := n.judge(c.allowed); (err != nil) != c.refused {
			t.Errorf("%s: %+v, %v", name, n, err)
		}
	}
	for name, c := range map[string]struct {
		n          namespace
		interfaces []string
		level      severity
	}{
		"a pod":          {interfaces: []string{"lo", "eth0", "net1"}, level: fine},
		"kind's node":    {interfaces: []string{"lo", "eth0", "cni0"}, level: warning},
		"Kata":           {n: namespace{initial: true, kata: true}, interfaces: []string{"lo", "eth0"}, level: fine},
		"hostNetwork":    {n: namespace{initial: true}, interfaces: []string{"lo", "eth0"}, level: failing},
		"not hostwork's": {n: namespace{kata: true}, level: fine},
	} {
		if f := tryNamespace(c.n, c.interfaces, nil); f.Severity != c.level {
			t.Errorf("%s: %+v, want %s", name, f, c.level)
		}
	}
}
