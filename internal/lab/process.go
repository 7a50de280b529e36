package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Command returns a command for Start with standard output and error of this process.
func (h *Host) Command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd
}

// Start starts the command on the host, in a process group of its own; waiting for it is the caller's part. It gets SIGKILL when
// the host is closed, and when this program ends.
//
// The kernel sends a parent death signal when the thread that forked ends, not the process. So the thread that lasts as long as
// the host does the forking.
func (h *Host) Start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid, cmd.SysProcAttr.Pdeathsig = true, syscall.SIGKILL
	started := make(chan error)
	h.starter <- func() { started <- cmd.Start() }
	return <-started
}

// Run runs a command to its end and returns its standard output. The error has what it wrote to standard error.
func (h *Host) Run(name string, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := h.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return stdout.String(), fmt.Errorf("running %s on host %q: %w: %s", cmd, h.Name, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.String(), nil
}

// kill ends every process in the host's namespace, whoever started it, and waits until none is left alive.
func (h *Host) kill() error {
	var own unix.Stat_t
	if err := unix.Fstat(int(h.namespace.Fd()), &own); err != nil {
		return fmt.Errorf("naming the namespace of host %q: %w", h.Name, err)
	}
	namespace := fmt.Sprintf("net:[%d]", own.Ino)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var alive []string
	err := Until(ctx, func() bool {
		alive = nil
		// Of each thread: where a process's first one is over, another may still write a file.
		links, _ := filepath.Glob("/proc/[0-9]*/task/[0-9]*/ns/net")
		for _, link := range links {
			if is, err := os.Readlink(link); err != nil || is != namespace { // a zombie has none
				continue
			}
			pid, _ := strconv.Atoi(strings.Split(link, "/")[2])
			if pid == os.Getpid() { // threads of the host's own
				continue
			}
			if err := unix.Kill(pid, unix.SIGKILL); !errors.Is(err, unix.ESRCH) {
				alive = append(alive, strconv.Itoa(pid))
			}
		}
		return len(alive) == 0
	})
	if err != nil {
		return fmt.Errorf("killing processes %s of host %q: %w", strings.Join(alive, ", "), h.Name, err)
	}
	return nil
}
