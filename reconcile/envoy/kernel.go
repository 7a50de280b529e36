package envoy

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// What the kernel tells of Envoys, for when they tell nothing themselves.

// sockets is how many TCP sockets a process has.
type sockets struct {
	listening, open int
}

// sockets counts what the process has.
func (r *Runner) sockets(p *Process) (sockets, error) {
	states, err := socketStates(p.PID())
	if err != nil {
		return sockets{}, err
	}
	return r.socketsAmong(states, p)
}

// socketsAmong is sockets without a look at those that are new since the states were read. Only Envoy's own user may look
// at what it has, so the spawner does.
func (r *Runner) socketsAmong(states map[string]string, p *Process) (count sockets, err error) {
	directory := fmt.Sprintf("/proc/%d/fd", p.PID())
	err = r.spawner.do(func() error {
		files, err := os.ReadDir(directory)
		if err != nil {
			return fmt.Errorf("reading which sockets Envoy has: %w", err)
		}
		for _, f := range files {
			target, err := os.Readlink(filepath.Join(directory, f.Name()))
			if err != nil {
				continue // closed meanwhile
			}
			switch states[target] {
			case "":
			case listening:
				count.listening++
			default:
				count.open++
			}
		}
		return nil
	})
	return count, err
}

// listening is TCP_LISTEN of include/net/tcp_states.h, as /proc/net/tcp has it.
const listening = "0A"

// socketStates returns the state of each TCP socket in a process's network namespace, by what a descriptor links to.
func socketStates(pid int) (map[string]string, error) {
	states := map[string]string{}
	for _, family := range []string{"tcp", "tcp6"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, family))
		if err != nil && (family == "tcp" || !errors.Is(err, os.ErrNotExist)) { // a kernel without IPv6 has one of them
			return nil, fmt.Errorf("reading the sockets of the network namespace: %w", err)
		}
		for line := range strings.Lines(string(text)) {
			if fields := strings.Fields(line); len(fields) > 9 {
				states["socket:["+fields[9]+"]"] = fields[3]
			}
		}
	}
	return states, nil
}

// Evict ends Envoys of this network namespace that this program did not start. A mantlet that was killed leaves one behind
// where that was stopped: the signal that is to end it waits until it goes on. It would share the listeners' connections,
// and let in what the configuration of then did. What they have in the runtime directory is removed. It is called before the
// first Start.
func (r *Runner) Evict() error {
	b, err := newBase(nil)
	if err != nil {
		return err
	}
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	for _, line := range lines {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(line)))
		if err != nil || !b.runs(pid) {
			continue
		}
		r.Log.Warn("ending an Envoy that a mantlet before this one left behind", "pid", pid)
		if err := r.spawner.do(func() error { return b.end(pid) }); err != nil {
			return fmt.Errorf("ending Envoy %d, which a mantlet before this one left behind: %w", pid, err)
		}
	}
	return r.sweep()
}

// runs reports whether a process was started as an Envoy of the network namespace that the base is made from.
func (b *base) runs(pid int) bool {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return false // it has ended
	}
	arguments := strings.Split(string(bytes.TrimRight(line, "\x00")), "\x00")
	i := slices.Index(arguments, "--base-id")
	if i < 0 || i+1 == len(arguments) || !slices.Contains(arguments, "--restart-epoch") {
		return false
	}
	id, err := strconv.ParseUint(arguments[i+1], 10, 32)
	return err == nil && id%(1<<baseBits) == uint64(b.id)
}

// end kills the process if it still is an Envoy of the base: its number may be another's since it was looked at.
func (b *base) end(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	if !b.runs(pid) {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	ended := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(ended, int(termLimit/time.Millisecond))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err == nil && n == 0:
			return errors.New("it does not end")
		}
		return err
	}
}
