package lab_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"mantlet/internal/lab"
)

// role names what the test binary is to do instead of testing, inside its lab.
const role = "LAB_TEST_ROLE"

func TestMain(m *testing.M) {
	lab.Enter()
	switch os.Getenv(role) {
	case "":
		goleak.VerifyTestMain(m)
	case "leave an orphan, exit 7":
		if err := exec.Command("sh", "-c", "sleep 86399 &").Run(); err != nil {
			panic(err)
		}
		os.Exit(7)
	case "die of SIGKILL":
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	case "exit 5 on SIGTERM":
		signals := make(chan os.Signal, 1)
		signal.Notify(signals, syscall.SIGTERM)
		fmt.Println("ready")
		<-signals
		os.Exit(5)
	case "orphans":
		orphans()
	case "execute Envoy as its user":
		cmd := exec.Command(os.Getenv("MANTLET_ENVOY_PATH"))
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(lab.EnvoyUser()), Gid: uint32(lab.EnvoyUser()), NoSetGroups: true}}
		if err := cmd.Run(); err != nil {
			panic(err)
		}
	case "where":
		where, _ := os.Readlink("/proc/self/ns/pid")
		fmt.Print(where)
	}
}

// program returns a command that runs this binary in a lab of its own, within the test's.
func program(does string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", "-test.run=^$")
	cmd.Env = append(os.Environ(), "LAB_NAMESPACE=", role+"="+does)
	cmd.Stderr = os.Stderr
	return cmd
}

// exitCode runs the command to its end.
func exitCode(t *testing.T, cmd *exec.Cmd) int {
	t.Helper()
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode()
}

// until fails the test if cond does not come to hold.
func until(t *testing.T, what string, cond func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := lab.Until(ctx, cond); err != nil {
		t.Fatalf("waiting until %s: %v", what, err)
	}
}

// processes counts the living processes of this and of inner labs whose file of /proc holds text.
func processes(file, text string) int {
	count := 0
	paths, _ := filepath.Glob("/proc/[0-9]*/" + file)
	for _, path := range paths {
		if data, err := os.ReadFile(path); err == nil && bytes.Contains(data, []byte(text)) {
			count++
		}
	}
	return count
}

func TestEnterPassesStatus(t *testing.T) {
	if got := exitCode(t, program("leave an orphan, exit 7")); got != 7 {
		t.Errorf("status %d, want 7", got)
	}
	until(t, "the orphan is gone", func() bool { return processes("cmdline", "86399") == 0 })
	if got, want := exitCode(t, program("die of SIGKILL")), 128+9; got != want {
		t.Errorf("status %d of a killed program, want %d", got, want)
	}
}

// TestEnvoyIsInAHome: its user gets to it all the same.
func TestEnvoyIsInAHome(t *testing.T) {
	home := t.TempDir()
	path := filepath.Join(home, "envoy")
	if err := errors.Join(os.WriteFile(path, []byte("#!/bin/sh\n"), 0o755), os.Chmod(home, 0o700)); err != nil {
		t.Fatal(err)
	}
	cmd := program("execute Envoy as its user")
	cmd.Env = append(cmd.Env, "MANTLET_ENVOY_PATH="+path)
	if got := exitCode(t, cmd); got != 0 {
		t.Errorf("status %d", got)
	}
}

func TestEnterPassesSignals(t *testing.T) {
	cmd := program("exit 5 on SIGTERM")
	start(t, cmd)
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if got := cmd.ProcessState.ExitCode(); got != 5 {
		t.Errorf("status %d, want 5", got)
	}
}

func TestEnterDiesWithOuterProcess(t *testing.T) {
	cmd := program("exit 5 on SIGTERM")
	start(t, cmd)
	if got := processes("environ", role); got != 3 {
		t.Errorf("%d processes, want outer, init and program", got)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	until(t, "all are gone", func() bool { return processes("environ", role) == 0 })
}

// start returns once the program has said that it is ready.
func start(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		t.Fatalf("program said %q: %v", line, err)
	}
}

func TestEnterReaps(t *testing.T) {
	cmd := program("orphans")
	if out, err := cmd.Output(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// orphans makes orphans that end at once while it waits for children of its own.
func orphans() {
	var done sync.WaitGroup
	for range 4 {
		done.Go(func() {
			for range 25 {
				cmd := exec.Command("sh", "-c", "(exec true) & exit 3")
				if _ = cmd.Run(); cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != 3 {
					fmt.Println("an exit was lost:", cmd.ProcessState)
					os.Exit(1)
				}
			}
		})
	}
	done.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := lab.Until(ctx, func() bool { return processes("stat", ") Z ") == 0 }); err != nil {
		fmt.Println("zombies are left:", err)
		os.Exit(1)
	}
}

func TestEnterOnce(t *testing.T) {
	here, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		t.Fatal(err)
	}
	cmd := program("where")
	cmd.Env = append(os.Environ(), role+"=where")
	if got, err := cmd.Output(); err != nil || string(got) != here {
		t.Errorf("a child of the lab is in %s (%v), want %s", got, err, here)
	}
	if got, err := program("where").Output(); err != nil || !strings.HasPrefix(string(got), "pid:") || string(got) == here {
		t.Errorf("a lab within the lab is in %s (%v), want another than %s", got, err, here)
	}
}

func TestEnterSaysWhatIsMissing(t *testing.T) {
	const limit = "/proc/sys/user/max_user_namespaces"
	before, err := os.ReadFile(limit)
	if err != nil {
		t.Fatal(err)
	}
	// The limit is this lab's own: it counts below the user namespace that it is written in.
	if err := os.WriteFile(limit, []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := os.WriteFile(limit, bytes.TrimSpace(before), 0); err != nil {
			t.Error(err)
		}
	}()
	cmd := program("where")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if got := exitCode(t, cmd); got != 2 {
		t.Errorf("status %d, want 2", got)
	}
	if !strings.Contains(stderr.String(), "user.max_user_namespaces") {
		t.Errorf("no remedy in %q", &stderr)
	}
}

func TestEnterMounts(t *testing.T) {
	var shm syscall.Statfs_t
	if err := syscall.Statfs("/dev/shm", &shm); err != nil || shm.Type != unix.TMPFS_MAGIC {
		t.Errorf("/dev/shm is a file system of type %x (%v), want tmpfs", shm.Type, err)
	}
	if _, err := os.Stat("/proc/1/status"); err != nil {
		t.Error(err)
	}
	if os.Getuid() != 0 || os.Getpid() == 1 {
		t.Errorf("user %d, process %d", os.Getuid(), os.Getpid())
	}
}

func TestStartedCommandsDieWithHost(t *testing.T) {
	network, err := lab.NewNetwork()
	if err != nil {
		t.Fatal(err)
	}
	host := addHost(t, network, "pod")
	cmd := host.Command("sh", "-c", "setsid sleep 86398 & echo ready; exec sleep 86398")
	cmd.Stdout = nil
	start := func() {
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := host.Start(cmd); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(stdout, make([]byte, len("ready\n"))); err != nil {
			t.Fatal(err)
		}
	}
	start()
	until(t, "both run", func() bool { return processes("cmdline", "sleep\x0086398") == 2 })
	for range 100 { // threads that come and go take no process with them
		if err := host.Do(func() error { return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if got := processes("cmdline", "sleep\x0086398"); got != 2 {
		t.Errorf("%d processes left, want 2", got)
	}
	if err := network.Close(); err != nil {
		t.Error(err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Errorf("command ended with %v, want SIGKILL", err)
	}
	if got := processes("cmdline", "86398"); got != 0 {
		t.Errorf("%d processes outlive their host", got)
	}
}
