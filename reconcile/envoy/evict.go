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

	"mantlet/internal/bind"
	"mantlet/schema"
)

// Evict ends Envoys of this network namespace that this program did not start, and removes their files from the runtime directory. It is
// called before the first Start.
//
// Such an Envoy is left behind when its mantlet is killed while the Envoy is stopped (SIGSTOP): the SIGTERM that it gets when mantlet
// dies has no effect until it continues. It would then share the listeners with the next Envoy, and let in what its outdated
// configuration allows.
//
// Any process can have the command line of an Envoy. One that can't be ended is tolerated if it has none of the listeners: the kernel
// lets only processes of Envoy's user share them.
func (r *Runner) Evict() error {
	b, err := newBase(nil)
	if err != nil {
		return err
	}
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	var left []leftover
	defer func() {
		for _, l := range left {
			if l.fd >= 0 {
				_ = unix.Close(l.fd)
			}
		}
	}()
	for _, line := range lines {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(line)))
		if err != nil || !b.isEnvoy(pid, r.UID) {
			continue
		}
		r.Log.Warn("ending an Envoy that a mantlet before this one left behind", "pid", pid)
		l := leftover{pid: pid, fd: -1}
		l.err = r.spawner.do(func() (err error) {
			l.fd, err = b.kill(pid, r.UID)
			return err
		})
		if l.err != nil || l.fd >= 0 {
			left = append(left, l)
		}
	}
	for _, l := range awaitExits(left) {
		shares, err := r.hasIngressListeners()
		if err != nil || shares {
			return fmt.Errorf("ending Envoy %d, which a mantlet before this one left behind and whose listeners are there: %w", l.pid, errors.Join(l.err, err))
		}
		r.Log.Warn("a process with the command line of an Envoy could not be ended; it has no listener", "pid", l.pid, "error", l.err)
	}
	return r.removeLeftovers()
}

// leftover is a process that was told to end.
type leftover struct {
	pid int
	fd  int   // its pidfd, or -1
	err error // why it has not ended, if it has not
}

// awaitExits waits for processes to end, for termLimit in all, and returns those that have not.
func awaitExits(all []leftover) (left []leftover) {
	deadline := time.Now().Add(termLimit)
	for _, l := range all {
		if l.err == nil {
			l.err = awaitExit(l.fd, deadline)
		}
		if l.err != nil {
			left = append(left, l)
		}
	}
	return left
}

// awaitExit returns nil once the process of a pidfd has ended.
func awaitExit(fd int, deadline time.Time) error {
	ended := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(ended, int(max(0, time.Until(deadline))/time.Millisecond))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err == nil && n == 0:
			return errors.New("it does not end")
		}
		return err
	}
}

// hasIngressListeners reports whether Envoy's user listens at one of the ports of the ingress listeners.
func (r *Runner) hasIngressListeners() (bool, error) {
	all, err := bind.Listeners()
	return slices.ContainsFunc(all, func(l bind.Listener) bool {
		port := l.Address.Port()
		return l.User == strconv.Itoa(r.UID) && (port == schema.IngressMTLSPort || port == schema.IngressTLSPort)
	}), err
}

// isEnvoy reports whether a process runs as a user and has the command line of an Envoy with this base ID, that is of this network
// namespace.
func (b *base) isEnvoy(pid, uid int) bool {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !runsAs(pid, uid) {
		return false // it may have ended
	}
	arguments := strings.Split(string(bytes.TrimRight(line, "\x00")), "\x00")
	i := slices.Index(arguments, "--base-id")
	if i < 0 || i+1 == len(arguments) || !slices.Contains(arguments, "--restart-epoch") {
		return false
	}
	id, err := strconv.ParseUint(arguments[i+1], 10, 32)
	return err == nil && id%(1<<baseBits) == uint64(b.id)
}

// runsAs reports whether one of a process's user IDs, real, effective, saved or of the file system, is uid.
func runsAs(pid, uid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		if ids, ok := strings.CutPrefix(line, "Uid:"); ok {
			return slices.Contains(strings.Fields(ids), strconv.Itoa(uid))
		}
	}
	return false
}

// kill sends SIGKILL to a process, after checking through a pidfd that it still is an Envoy of this base ID: its process ID may have been
// reused. It returns the pidfd, or -1 where there is nothing to wait for.
func (b *base) kill(pid, uid int) (fd int, err error) {
	fd, err = unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return -1, nil
	}
	if err != nil {
		return -1, err
	}
	if !b.isEnvoy(pid, uid) {
		return -1, unix.Close(fd)
	}
	err = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	if errors.Is(err, unix.ESRCH) {
		err = nil
	}
	return fd, err
}
