package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"mantlet/internal/lab"
)

// spyVariable makes the test binary be a process of another container that shares the PID namespace. It looks into others as far as the
// kernel lets it, and prints what came of each attempt.
const spyVariable = "RUN_AS_SPY"

// victim is a process that is looked into.
type victim struct {
	PID  int
	File string // that it can read
}

func spy(text string) error {
	var victims map[string]victim
	if err := json.Unmarshal([]byte(text), &victims); err != nil {
		return err
	}
	outcomes := map[string]map[string]string{}
	for name, v := range victims {
		outcomes[name] = map[string]string{}
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", v.PID))
		for _, task := range tasks {
			for attempt, err := range v.spied(task) {
				said := "done"
				if err != nil {
					said = err.Error()
				}
				if outcomes[name][attempt] != "done" {
					outcomes[name][attempt] = said
				}
			}
		}
	}
	return json.NewEncoder(os.Stdout).Encode(outcomes)
}

// spied tries to get at a process by one of its threads.
func (v victim) spied(task string) map[string]error {
	readable := func(path string) error {
		f, err := os.Open(path)
		if err == nil {
			defer f.Close()
			_, err = f.Read(make([]byte, 1))
		}
		return err
	}
	linked := func(path string) error {
		_, err := os.Readlink(path)
		return err
	}
	thread, _ := strconv.Atoi(filepath.Base(task))
	all := map[string]error{
		"environment": readable(task + "/environ"), "map of its memory": readable(task + "/maps"), "file": readable(task + "/root" + v.File),
		"directory": linked(task + "/cwd"), "descriptor": linked(task + "/fd/0"),
	}
	memory, err := os.OpenFile(task+"/mem", os.O_RDWR, 0)
	if err == nil {
		_ = memory.Close()
	}
	all["memory"] = err
	if err = unix.PtraceSeize(thread); err == nil {
		_ = unix.PtraceDetach(thread)
	}
	all["trace"] = err
	if pidfd, err := unix.PidfdOpen(v.PID, 0); err == nil {
		_, all["copy of a descriptor"] = unix.PidfdGetfd(pidfd, 0, 0)
	}
	return all
}

// ofContainers are the capabilities that container runtimes give by default.
const ofContainers = "+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,+setpcap,+net_bind_service,+net_raw,+sys_chroot,+mknod,+audit_write,+setfcap"

// TestKeyIsOutOfReach: with a shared PID namespace, no process that has what runtimes give by default gets at the memory, the
// environment or the files of mantlet or Envoy, neither as root nor as Envoy's user; and neither leaves a core.
func TestKeyIsOutOfReach(t *testing.T) {
	t.Parallel()
	if lab.EnvoyUser() == 0 {
		t.Log("an ordinary user's lab has no other user; root there has all capabilities in its processes")
	}
	p := start(t, web)
	key := filepath.Join(p.sidecar.RuntimeDirectory, "envoy", "sds-identity.json")
	look := func(uid int) map[string]map[string]string {
		t.Helper()
		id := strconv.Itoa(uid)
		as := []string{
			"--reuid=" + id, "--regid=" + id, "--clear-groups", "--bounding-set=-all," + ofContainers, "--inh-caps=-all," + ofContainers,
			"--ambient-caps=-all," + ofContainers,
		}
		control := exec.Command("setpriv", append(slices.Clip(as), "sleep", "86395")...)
		p.must(p.Start(control))
		defer func() { _ = control.Process.Kill(); _ = control.Wait() }()
		p.await("the control has its capabilities", func() bool {
			name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", control.Process.Pid))
			return err == nil && strings.TrimSpace(string(name)) == "sleep"
		})
		victims, err := json.Marshal(map[string]victim{
			"mantlet": {p.sidecar.PID(), key}, "Envoy": {p.envoy(), key}, "control": {control.Process.Pid, "/etc/passwd"},
		})
		p.must(err)
		cmd := p.within(append([]string{"setpriv"}, as...)...)
		cmd.Env = append(cmd.Env, spyVariable+"="+string(victims))
		var out, said bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &said
		p.must(p.Start(cmd))
		err = cmd.Wait()
		var outcomes map[string]map[string]string
		if failed := json.Unmarshal(out.Bytes(), &outcomes); errors.Join(err, failed) != nil {
			t.Fatalf("%v, %v: %s%s", err, failed, &out, &said)
		}
		return outcomes
	}
	if lab.EnvoyUser() != 0 {
		for _, uid := range []int{0, lab.EnvoyUser()} {
			for name, outcome := range look(uid) {
				if len(outcome) != 8 {
					t.Errorf("of %s there are only the attempts %v", name, outcome)
				}
				for attempt, said := range outcome {
					denied := strings.HasSuffix(said, "permission denied") || strings.HasSuffix(said, "operation not permitted")
					if control := name == "control"; control != (said == "done") || !control && !denied {
						t.Errorf("user %d, %s of %s: %s", uid, attempt, name, said)
					}
				}
			}
		}
	}
	for name, pid := range map[string]int{"mantlet": p.sidecar.PID(), "Envoy": p.envoy()} {
		limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
		p.must(err)
		for line := range strings.Lines(string(limits)) {
			if size, ok := strings.CutPrefix(line, "Max core file size"); ok && strings.Fields(size)[1] != "0" {
				t.Errorf("%s: %s", name, line)
			}
		}
		// The files of a process that can't be dumped are root's.
		if info, err := os.Stat(fmt.Sprintf("/proc/%d/environ", pid)); err != nil || info.Sys().(*syscall.Stat_t).Uid != 0 {
			t.Errorf("%s can be dumped: %v", name, err)
		}
	}
	if n := p.log.count("can read its memory"); n > 0 {
		t.Error("mantlet says that Envoy's memory can be read")
	}
}

// TestWithoutPtrace: where seccomp forbids it, mantlet goes on, and warns of what others can read, for each Envoy.
func TestWithoutPtrace(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	p.sidecar.Contained, p.sidecar.Forbidden = true, []uint32{unix.SYS_PTRACE}
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.protect(mtlsPort)
	p.ready()
	const says = "other processes of Envoy's user can read its memory, and the key"
	if got := p.log.count(says); got != 1 {
		t.Errorf("mantlet said so %d times", got)
	}
	p.must(p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), p.client.ClientConfig("pod")))
}
