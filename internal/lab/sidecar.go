package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"mantlet/internal/rundir"
	"mantlet/internal/sandbox"
)

// Sidecar is a mantlet on a host, with the directories that a pod would mount.
type Sidecar struct {
	Host             *Host
	TLSDirectory     string
	RuntimeDirectory string
	Env              []string             // beside the directories' and Envoy's variables
	Capabilities     []sandbox.Capability // what its container adds to `drop: [ALL]`
	Contained        bool                 // PID 1, with a read-only root and the system calls that RuntimeDefault lets through
	Root             string               // PID 1 of a privileged container with this root directory, which has the other paths; "": none
	Forbidden        []uint32             // further system calls that a contained one can't make
	Binary           string               // mantlet
	Args             []string             // its arguments; nil: run
	Log              io.Writer

	executed time.Time
	cmd      *exec.Cmd
	exited   chan struct{}
	err      error
}

// Sidecar prepares a mantlet on the host. Its directories are made below dir, the TLS directory empty.
func (h *Host) Sidecar(dir, binary string, env ...string) (*Sidecar, error) {
	s := &Sidecar{
		Host:             h,
		TLSDirectory:     filepath.Join(dir, h.Name, "tls"),
		RuntimeDirectory: filepath.Join(dir, h.Name, "run"),
		Env:              env,
		Capabilities:     sandbox.Needs(EnvoyUser()),
		Binary:           binary,
		Log:              io.Discard,
	}
	Open(dir)
	return s, os.MkdirAll(s.TLSDirectory, 0o755)
}

// Command returns a mantlet command with the sidecar's environment, to be started on the host.
func (s *Sidecar) Command(args ...string) *exec.Cmd {
	cmd := exec.Command(s.Binary, args...)
	cmd.Env = append(os.Environ(), "MANTLET_ENVOY_UID="+strconv.Itoa(EnvoyUser()),
		"MANTLET_TLS_DIRECTORY="+s.TLSDirectory, "MANTLET_RUNTIME_DIRECTORY="+s.RuntimeDirectory)
	cmd.Env = append(cmd.Env, s.Env...)
	return cmd
}

// Start executes mantlet as a container runtime would: root, with no more capabilities than its container adds, and no
// way to more. It does not wait until anything works.
func (s *Sidecar) Start() error {
	args := s.Args
	if args == nil {
		args = []string{"run"}
	}
	s.cmd = s.Command(args...)
	s.cmd.Stdout, s.cmd.Stderr = s.Log, s.Log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	s.exited = make(chan struct{})
	started := make(chan error, 1)
	onThread(func() { // and keep the thread, see Host.Start
		err := errors.Join(s.Host.enter(), s.Host.enterMounts())
		switch {
		case err != nil:
		case s.Root != "":
			err = container{Root: s.Root}.around(s.cmd)
		case s.Contained:
			err = container{Writable: s.RuntimeDirectory, Capabilities: s.Capabilities, Forbidden: s.Forbidden}.around(s.cmd)
		default:
			err = limit(s.Capabilities)
		}
		if err == nil {
			s.executed = time.Now()
			err = s.cmd.Start()
		}
		if started <- err; err == nil {
			s.err = s.cmd.Wait()
			close(s.exited)
		}
	})
	if err := <-started; err != nil {
		return fmt.Errorf("starting mantlet on host %q: %w", s.Host.Name, err)
	}
	return nil
}

// Unready returns what keeps the sidecar from being ready, or "" if it is.
func (s *Sidecar) Unready(ctx context.Context) string {
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", rundir.Directory(s.RuntimeDirectory).StatusSocket())
		},
	}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://mantlet/readyz", nil)
	if err != nil {
		return err.Error()
	}
	response, err := client.Do(request)
	if err != nil {
		return err.Error()
	}
	defer func() { _ = response.Body.Close() }()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return err.Error()
	}
	if response.StatusCode == http.StatusOK {
		return ""
	}
	return strings.TrimSpace(string(text))
}

// Ready waits until the sidecar is.
func (s *Sidecar) Ready(ctx context.Context) error {
	var why string
	err := Until(ctx, func() bool {
		why = s.Unready(ctx)
		return why == "" || s.Ended()
	})
	if s.Ended() {
		return fmt.Errorf("mantlet on host %q ended: %w", s.Host.Name, errors.Join(s.err, errors.New(why)))
	}
	if err != nil {
		return fmt.Errorf("mantlet on host %q is not ready: %s: %w", s.Host.Name, why, err)
	}
	return nil
}

// Ended reports whether mantlet's process is over.
func (s *Sidecar) Ended() bool {
	select {
	case <-s.exited:
		return true
	default:
		return false
	}
}

// Signal sends a signal to mantlet.
func (s *Sidecar) Signal(signal os.Signal) error { return s.cmd.Process.Signal(signal) }

// Executed returns when mantlet was executed last, without what it takes to make a container for it.
func (s *Sidecar) Executed() time.Time { return s.executed }

// PID returns mantlet's process id.
func (s *Sidecar) PID() int { return s.cmd.Process.Pid }

// Wait returns how mantlet ended, once it has.
func (s *Sidecar) Wait() error {
	<-s.exited
	return s.err
}

// Stop ends mantlet with SIGTERM and waits.
func (s *Sidecar) Stop() error {
	if err := s.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	return s.Wait()
}

// Envoys returns the process ids of mantlet's children.
func (s *Sidecar) Envoys() ([]int, error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", s.PID()))
	if err != nil {
		return nil, err
	}
	var all []int
	for _, task := range tasks {
		text, err := os.ReadFile(task)
		if err != nil {
			continue // the thread has ended
		}
		for _, field := range strings.Fields(string(text)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				return nil, err
			}
			all = append(all, pid)
		}
	}
	return all, nil
}
