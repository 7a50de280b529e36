package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"mantlet/internal/lab"
	"mantlet/schema"
)

// gated returns a command behind `mantlet gate`, as a container's user that is not root, where the lab has one.
func gated(socket string, args ...string) (*exec.Cmd, *journal) {
	cmd := exec.Command("/proc/self/exe", append([]string{"gate"}, args...)...)
	cmd.Env = append(os.Environ(), asMantlet+"=1", "GORACE=atexit_sleep_ms=0", schema.GateVariable+"="+socket)
	user := uint32(lab.EnvoyUser())
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user, NoSetGroups: true}}
	said := &journal{}
	cmd.Stdout, cmd.Stderr = said, said
	return cmd, said
}

// sharedVolume returns a directory that all containers of a pod can get to and write to, as an emptyDir.
func sharedVolume(t *testing.T) string {
	t.Helper()
	directory := t.TempDir()
	lab.Open(directory)
	if err := os.Chmod(directory, 0o777); err != nil {
		t.Fatal(err)
	}
	return directory
}

// TestGate checks that a gated workload is executed once its mesh is ready and not before, and that it is the same process.
func TestGate(t *testing.T) {
	p := newPod(t, web)
	socket := filepath.Join(sharedVolume(t), "gate.sock")
	p.sidecar.Env = append(p.sidecar.Env, schema.GateVariable+"="+socket)
	p.besiege()

	cmd, said := gated(socket, "sh", "-c", `echo "pid $$"; exit 42`)
	p.must(cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	p.await("the gate waits for mantlet", func() bool { return said.count("mantlet does not answer") == 1 })
	p.run()
	p.await("mantlet answers that it is not ready", func() bool { return said.count("mantlet is not ready") == 1 })
	if said.count("pid") > 0 {
		t.Errorf("the workload was executed before its mesh was ready: %s", said)
	}
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	exited, ok := errors.AsType[*exec.ExitError](cmd.Wait())
	if !ok || exited.ExitCode() != 42 {
		t.Errorf("the gate ended with %v, want the workload's 42", exited)
	}
	if want := fmt.Sprintf("pid %d\n", cmd.Process.Pid); said.count(want) != 1 {
		t.Errorf("said %s, want %q", said, want)
	}
	p.ready()

	p.must(p.sidecar.Stop())
	cmd, said = gated(socket, "--timeout", "300ms", "--", "sh", "-c", "echo executed")
	if exited, _ := errors.AsType[*exec.ExitError](cmd.Run()); exited == nil || exited.ExitCode() != exitNot {
		t.Errorf("beside a mantlet that is gone the gate ended with %v, want 1: %s", exited, said)
	}
	if said.count("executed") > 0 || said.count("not ready within 300ms") != 1 {
		t.Errorf("said %s", said)
	}
}

// TestGateWithoutItsVolume checks that mantlet says what is missing where the gate's socket can have no place.
func TestGateWithoutItsVolume(t *testing.T) {
	p := newPod(t, web)
	p.sidecar.Env = append(p.sidecar.Env, schema.GateVariable+"=/no/such/volume/gate.sock")
	p.run()
	if err := p.sidecar.Wait(); err == nil {
		t.Error("mantlet ended well")
	}
	if p.log.count("there is no directory /no/such/volume") != 1 {
		t.Error("it does not say so")
	}
}

// TestGateCodes checks the exit codes of a gate that can't execute, and that a signal is the command's.
func TestGateCodes(t *testing.T) {
	shared := sharedVolume(t)
	socket := filepath.Join(shared, "gate.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	if err := os.Chmod(socket, 0o666); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_, _ = fmt.Fprintln(conn, "ready")
			_ = conn.Close()
		}
	}()
	plain := filepath.Join(shared, "plain")
	if err := os.WriteFile(plain, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		socket string
		args   []string
		code   int
		says   string
	}{
		{socket, []string{"true"}, 0, ""},
		{socket, []string{"sh", "-c", "exit 3"}, 3, ""},
		{socket, []string{"--", "no-such-command"}, 127, `executing "no-such-command"`},
		{socket, []string{"--", "/no/such/command"}, 127, "no such file"},
		{socket, []string{"--", plain}, 126, "permission denied"},
		{socket, []string{"sh", "-c", "kill -TERM $$"}, -1, ""},
		{socket, nil, exitError, "the command is missing: mantlet gate -- COMMAND"},
		{socket, []string{"--timeout=-1s", "true"}, exitError, "must not be negative"},
		{"", []string{"true"}, exitError, schema.GateVariable + " is not set"},
		{"gate.sock", []string{"true"}, exitError, "must be an absolute path"},
		{"/" + strings.Repeat("x", 200), []string{"true"}, exitError, "at most 107 bytes"},
	} {
		cmd, said := gated(c.socket, c.args...)
		_ = cmd.Run()
		if code := cmd.ProcessState.ExitCode(); code != c.code {
			t.Errorf("%q: exit code %d, want %d: %s", c.args, code, c.code, said)
		}
		if !strings.Contains(said.String(), c.says) {
			t.Errorf("%q: said %s, want %q", c.args, said, c.says)
		}
	}
}

// TestInstall checks that the copy is this binary, executable, and takes the place of one that runs.
func TestInstall(t *testing.T) {
	directory := t.TempDir()
	install := func() {
		cmd := exec.Command("/proc/self/exe", "install", directory)
		cmd.Env = append(os.Environ(), asMantlet+"=1", "GORACE=atexit_sleep_ms=0")
		if out, err := cmd.CombinedOutput(); err != nil || string(out) != filepath.Join(directory, "mantlet")+"\n" {
			t.Fatalf("%v: %s", err, out)
		}
	}
	install()
	running := exec.Command(filepath.Join(directory, "mantlet"), "gate", "true")
	running.Env = append(os.Environ(), asMantlet+"=1", schema.GateVariable+"=/no/such/socket")
	if err := running.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = running.Wait() }()
	defer func() { _ = running.Process.Kill() }()
	install()
	info, err := os.Stat(filepath.Join(directory, "mantlet"))
	if err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("%v, %v", info, err)
	}
	if left, err := os.ReadDir(directory); err != nil || len(left) != 1 {
		t.Errorf("the directory has %v, %v", left, err)
	}
	missing := exec.Command("/proc/self/exe", "install", filepath.Join(directory, "missing"))
	missing.Env = append(os.Environ(), asMantlet+"=1", "GORACE=atexit_sleep_ms=0")
	if out, _ := missing.CombinedOutput(); missing.ProcessState.ExitCode() != exitError || !strings.Contains(string(out), "no such file") {
		t.Errorf("into a directory that is not there: %d, %s", missing.ProcessState.ExitCode(), out)
	}
}
