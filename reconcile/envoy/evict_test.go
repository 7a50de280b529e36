package envoy

import (
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mantlet/internal/lab"
)

// TestListens: what can't be ended keeps mantlet from starting only where Envoy's own user has a listener at an address of its own.
func TestListens(t *testing.T) {
	t.Parallel()
	network, err := lab.NewNetwork()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = network.Close() })
	host, err := network.Host("pod")
	if err != nil {
		t.Fatal(err)
	}
	check := func(when string, uid int, want bool) {
		t.Helper()
		r := &Runner{UID: uid}
		var got bool
		if err := host.Do(func() (err error) { got, err = r.hasIngressListeners(); return err }); err != nil || got != want {
			t.Errorf("%s: user %d listens: %v, %v; want %v", when, uid, got, err, want)
		}
	}
	own := os.Geteuid()
	check("at first", own, false)
	for _, addr := range []string{"127.0.0.1:15005", "127.0.0.1:15006", "[::1]:15007"} {
		listener, err := host.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		check(addr, own, addr != "127.0.0.1:15005")
		check(addr, own+1, false)
		_ = listener.Close()
		until(t, "the listener is closed", func() bool { // also in a child that was being started
			r, got := &Runner{UID: own}, true
			return host.Do(func() (err error) { got, err = r.hasIngressListeners(); return err }) == nil && !got
		})
	}
}

// TestAwaitEnds: all together get one time limit to end.
func TestAwaitEnds(t *testing.T) {
	t.Parallel()
	var all []leftover
	for range 4 {
		cmd := exec.Command("sleep", "86396")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		fd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Close(fd) })
		all = append(all, leftover{pid: cmd.Process.Pid, fd: fd})
	}
	if err := unix.PidfdSendSignal(all[0].fd, unix.SIGKILL, nil, 0); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	left := awaitExits(all)
	if took := time.Since(began); len(left) != 3 || left[0].pid != all[1].pid || left[0].err == nil || took < termLimit {
		t.Errorf("after %v are left %+v", took, left)
	}
}
