package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// marker is the environment variable that tells the stages of Enter apart: unset (or set by a lab further out) outside,
// stageInit in the process that sets the lab up, and inside the name of the PID namespace, which the lab's processes share. stageContainer is that of a container's process in it.
const (
	marker    = "LAB_NAMESPACE"
	stageInit = "init"
)

// Enter returns inside a lab: as root, with capabilities over user, mount, network, PID and IPC namespaces of its own, a fresh
// /proc, an empty /dev/shm and the loopback interface up. It is the first thing in main or TestMain, and does nothing when the
// program is inside already.
//
// Outside it runs the program again, with the same arguments, environment and standard files, passes signals on and exits with
// the program's status (128+n if signal n ended it). The program is not PID 1: that is a third process, the same executable
// again, which sets the lab up and then reaps. Only a process that has no children of its own to wait for may reap whatever is
// orphaned (wait4(-1) would take the exits that os/exec in the program waits for).
//
// However the program ends, PID 1 ends, and with it the kernel ends every process of the lab and releases its namespaces. That
// includes a SIGKILL of the outer process: PID 1 asked for its parent's death signal.
func Enter() {
	here, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		fail(err)
	}
	switch os.Getenv(marker) {
	case here:
		return
	case stageContainer:
		err = execute()
	case stageInit:
		err = errors.Join(prepare(), showEnvoy())
		if err == nil {
			err = continueAs(here, &syscall.SysProcAttr{})
		}
	default:
		err = continueAs(stageInit, &syscall.SysProcAttr{
			Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWIPC,
			UidMappings: mapped(os.Geteuid()),
			GidMappings: mapped(os.Getegid()),
			// Root leaves the groups that it came with; who is not root may not.
			GidMappingsEnableSetgroups: os.Geteuid() == 0 && exists(proxy),
			Pdeathsig:                  syscall.SIGKILL,
		})
	}
	fail(err)
}

// The users of the lab beside root, where root made it.
const (
	proxy    = 1337
	Stranger = 2000 // nobody in particular
)

// mapped returns the lab's users. An ordinary user can map no id but its own.
func mapped(own int) []syscall.SysProcIDMap {
	all := []syscall.SysProcIDMap{{ContainerID: 0, HostID: own, Size: 1}}
	for _, id := range []int{proxy, Stranger} {
		if own == 0 && exists(id) {
			all = append(all, syscall.SysProcIDMap{ContainerID: id, HostID: id, Size: 1})
		}
	}
	return all
}

// exists reports whether the user namespace has an id.
func exists(id int) bool {
	text, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		var inside, outside, size int
		if _, err := fmt.Sscan(line, &inside, &outside, &size); err == nil && inside <= id && id-inside < size {
			return true
		}
	}
	return false
}

// EnvoyUser returns the user that Envoy can have in the lab: one of its own where root made the lab, and else root.
func EnvoyUser() int {
	if exists(proxy) {
		return proxy
	}
	return 0
}

// envoyVariable names the Envoy of tests.
const envoyVariable = "MANTLET_ENVOY_PATH"

// showEnvoy gives Envoy another place in the lab if its user can't get to where it is: in a home directory, say.
func showEnvoy() error {
	path := os.Getenv(envoyVariable)
	if path == "" || EnvoyUser() == 0 {
		return nil
	}
	for directory := filepath.Dir(path); directory != "/"; directory = filepath.Dir(directory) {
		if info, err := os.Stat(directory); err != nil || info.Mode()&0o001 != 0 {
			continue
		}
		const place = "/dev/shm/.lab-envoy"
		err := errors.Join(os.Mkdir(place, 0o755), os.WriteFile(place+"/envoy", nil, 0o755))
		if err == nil {
			err = unix.Mount(path, place+"/envoy", "", unix.MS_BIND, "")
		}
		if err != nil {
			return fmt.Errorf("giving %s another place: %w", path, err)
		}
		return os.Setenv(envoyVariable, place+"/envoy")
	}
	return nil
}

// Open lets all users pass through a directory and those above it, up to the one for temporary files: what is above that is
// not the lab's.
func Open(directory string) {
	for end := filepath.Clean(os.TempDir()); directory != "/" && directory != end; directory = filepath.Dir(directory) {
		if info, err := os.Stat(directory); err == nil && info.Mode()&0o011 != 0o011 {
			_ = os.Chmod(directory, info.Mode()|0o011)
		}
	}
}

// prepare turns the bare namespaces of PID 1 into a place to work in.
func prepare() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mounting /proc: %w", err)
	}
	if err := unix.Mount("tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"); err != nil {
		return fmt.Errorf("mounting /dev/shm: %w", err)
	}
	return raiseLoopback()
}

// raiseLoopback brings up lo in the thread's network namespace.
func raiseLoopback() error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("bringing up lo: %w", err)
	}
	return nil
}

// continueAs runs the program again as the given stage and ends this process with its status. It returns only if it could not.
func continueAs(stage string, attr *syscall.SysProcAttr) error {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGQUIT, unix.SIGHUP) // QUIT: go test asks for a dump before it kills

	runtime.LockOSThread() // the parent whose death PID 1 is told of is this thread
	if err := os.Setenv(marker, stage); err != nil {
		return err
	}
	child, err := syscall.ForkExec("/proc/self/exe", os.Args, &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2}, Sys: attr,
	})
	if err != nil {
		return err
	}
	go func() {
		for s := range signals {
			if s == unix.SIGTERM || !foreground() {
				_ = unix.Kill(child, s.(syscall.Signal))
			}
		}
	}()
	code, err := wait(child)
	if err != nil {
		return err
	}
	syscall.Exit(code) // os.Exit would write coverage data over the program's, and take a second of its own under -race
	return nil
}

// wait reaps whatever ends until child does, and returns its status as a shell would.
func wait(child int) (int, error) {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR) || err == nil && pid != child:
		case err != nil:
			return 0, fmt.Errorf("waiting for the program: %w", err)
		case status.Signaled():
			return 128 + int(status.Signal()), nil
		default:
			return status.ExitStatus(), nil
		}
	}
}

// foreground reports whether the terminal sends its signals to this process group: then the program, which is of the same group,
// has got them already, and a second SIGINT could mean something else to it.
func foreground() bool {
	group, err := unix.IoctlGetInt(0, unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

func fail(err error) {
	fmt.Fprintf(os.Stderr, "lab: %v\n", err)
	if denied := []error{unix.EPERM, unix.EACCES, unix.ENOSPC, unix.EUSERS, unix.EINVAL, unix.ENOSYS}; slices.ContainsFunc(denied,
		func(errno error) bool { return errors.Is(err, errno) }) {
		fmt.Fprint(os.Stderr, `The lab needs user namespaces. Whichever of these sysctls the system has stands in the way:
  sysctl -w user.max_user_namespaces=10000                     (0 forbids them)
  sysctl -w kernel.unprivileged_userns_clone=1                 (Debian)
  sysctl -w kernel.apparmor_restrict_unprivileged_userns=0     (Ubuntu)
In a container its seccomp profile must allow clone(CLONE_NEWUSER) and nothing may be mounted over /proc: docker run
--security-opt seccomp=unconfined --security-opt systempaths=unconfined.
`)
	}
	os.Exit(2)
}

// Hosts makes entries the content of the lab's own /etc/hosts, names in order. Calling it again replaces them. Resolvers cache: Go's
// looks at the file again after five seconds.
func Hosts(entries map[string][]netip.Addr) error {
	var lines []string
	for name, addrs := range entries {
		for _, addr := range addrs {
			lines = append(lines, fmt.Sprintf("%s\t%s\n", addr, name))
		}
	}
	slices.Sort(lines)
	return cover("/etc/hosts", "127.0.0.1\tlocalhost\n::1\tlocalhost\n"+strings.Join(lines, ""))
}

// Resolver makes the lab's own /etc/resolv.conf name these servers; with none it names one that nobody serves.
func Resolver(addrs ...netip.Addr) error {
	if len(addrs) == 0 {
		addrs = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}
	}
	var content strings.Builder
	for _, addr := range addrs {
		fmt.Fprintf(&content, "nameserver %s\n", addr)
	}
	return cover("/etc/resolv.conf", content.String())
}

// cover mounts a file of this content over path, which must exist, in the lab's mount namespace only. Readers see the old or the
// new content whole. Former covers stay beneath; none may be unlinked, since nothing can be mounted on what is unlinked.
func cover(path, content string) error {
	file, err := os.CreateTemp("/dev/shm", ".lab-*") // the file system that is known to be the lab's own
	if err != nil {
		return fmt.Errorf("covering %s: %w", path, err)
	}
	_, err = file.WriteString(content)
	err = errors.Join(err, file.Chmod(0o644), file.Close())
	if err == nil {
		err = unix.Mount(file.Name(), path, "", unix.MS_BIND, "")
	}
	if err != nil {
		return fmt.Errorf("covering %s: %w", path, err)
	}
	return nil
}
