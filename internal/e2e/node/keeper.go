package node

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// stage is the environment variable that tells a node's processes apart, which are all the same executable: unset for who
// starts a node.
const (
	stage       = "E2E_NODE_STAGE"
	stageKeeper = "keeper"
	stageInit   = "init"      // waits to be moved to its cgroups
	stagePID1   = "namespace" // and has them as its root
)

// Main goes on as the part of a node that the process was started as. It returns in all other processes, and comes first in
// main or TestMain.
func Main() {
	var err error
	switch os.Getenv(stage) {
	default:
		return
	case stageKeeper:
		err = keep()
	case stageInit:
		err = enterCgroups()
	case stagePID1:
		err = initialize()
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s of the node: %v\n", os.Getenv(stage), err)
		os.Exit(1)
	}
	os.Exit(0)
}

// keep starts the node's first process and prints its id. Once that ends, or standard input does, it removes all that there is
// of the node. The other end of standard input is with the process that wants the node: whatever ends that one (a signal,
// a time limit, a panic), nothing is left.
func keep() (err error) {
	runtime.LockOSThread() // a parent's death signal comes when its thread ends
	if err := removeCgroups(os.Getpid()); err != nil {
		return err
	}
	init := again(stageInit)
	init.Stderr = os.Stderr
	init.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		Pdeathsig:  syscall.SIGKILL,
	}
	start, err := init.StdinPipe()
	if err != nil {
		return err
	}
	if err := init.Start(); err != nil {
		return fmt.Errorf("making namespaces, which takes CAP_SYS_ADMIN: %w", err)
	}
	ended := make(chan error, 1)
	defer func() {
		// The kernel ends all processes of a PID namespace with its first, and only then lets it be waited for.
		_ = init.Process.Kill()
		for range ended { // closed at the end
		}
		err = errors.Join(err, removeCgroups(os.Getpid()))
	}()
	go func() {
		defer close(ended)
		ended <- init.Wait()
	}()
	if err := makeCgroups(init.Process.Pid, os.Getpid()); err != nil {
		return err
	}
	if err := start.Close(); err != nil {
		return err
	}
	fmt.Println(init.Process.Pid)
	unwanted := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, os.Stdin)
		unwanted <- err
	}()
	select {
	case err := <-unwanted:
		return err
	case err := <-ended:
		return fmt.Errorf("the node's first process: %w", err)
	}
}

// enterCgroups waits until standard input ends, and makes the cgroups that the process is in by then the root of all that it will
// see.
func enterCgroups() error {
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	// A cgroup namespace is a thread's; by the exec this one becomes the process.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("making a cgroup namespace: %w", err)
	}
	if err := os.Setenv(stage, stagePID1); err != nil {
		return err
	}
	return unix.Exec("/proc/self/exe", os.Args, os.Environ())
}

// again returns this executable as another stage, with the same arguments.
func again(as string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), stage+"="+as)
	return cmd
}
