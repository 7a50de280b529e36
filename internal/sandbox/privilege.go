package sandbox

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/psx"
)

// Capability is one of mantlet's container.
type Capability struct {
	Name   string // as manifests have it
	For    string
	Number uintptr // as the kernel does
}

// What the container has beside `drop: [ALL]`.
var (
	netAdmin = Capability{"NET_ADMIN", "to put rules into the kernel", unix.CAP_NET_ADMIN}
	netRaw   = Capability{"NET_RAW", "for Envoy's transparent sockets", unix.CAP_NET_RAW}
	setUID   = Capability{"SETUID", "to start Envoy as another user", unix.CAP_SETUID}
	setGID   = Capability{"SETGID", "to start Envoy as another user's group", unix.CAP_SETGID}
	// NetBindService is not needed as a rule. Who gives it wants a listener there; Envoy gets it if one is configured.
	NetBindService = Capability{"NET_BIND_SERVICE", "for egress listeners below net.ipv4.ip_unprivileged_port_start", unix.CAP_NET_BIND_SERVICE}
)

// Needs returns the capabilities without which an Envoy of this user, with egress listeners at these ports, does not run behind
// rules.
func Needs(uid int, ports ...uint16) []Capability {
	needs := []Capability{netAdmin, netRaw}
	if uid != os.Geteuid() {
		needs = append(needs, setUID, setGID)
	}
	first := unprivileged()
	if slices.ContainsFunc(ports, func(port uint16) bool { return uint32(port) < first }) {
		needs = append(needs, NetBindService)
	}
	return needs
}

// As returns what makes a child process a user's, without other groups than the one of the same number and without capabilities;
// nil where this process is that user's, or lacks the capabilities for it.
func As(uid int) *syscall.SysProcAttr {
	if uid == os.Geteuid() || Missing([]Capability{setUID, setGID}) != nil {
		return nil
	}
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
}

// Missing returns an error that names what is needed and the calling thread lacks.
func Missing(needs []Capability) error {
	has, err := capabilities()
	if err != nil {
		return err
	}
	var errs []error
	for _, c := range needs {
		if has.permitted&c.bit() == 0 {
			errs = append(errs, fmt.Errorf("CAP_%s is missing, which mantlet needs %s", c.Name, c.For))
		}
	}
	return errors.Join(errs...)
}

// Remedy says which lines of a manifest give what is needed.
func Remedy(needs []Capability) string {
	var names []string
	for _, c := range needs {
		names = append(names, c.Name)
	}
	return fmt.Sprintf("give mantlet's container capabilities: {drop: [ALL], add: [%s]} and runAsUser: 0: another user gets none of them",
		strings.Join(names, ", "))
}

func (c Capability) bit() uint64 { return 1 << c.Number }

// sets are a thread's capabilities, a bit each.
type sets struct{ effective, permitted, inheritable uint64 }

func (s sets) data() *[2]unix.CapUserData {
	return &[2]unix.CapUserData{
		{Effective: uint32(s.effective), Permitted: uint32(s.permitted), Inheritable: uint32(s.inheritable)},
		{Effective: uint32(s.effective >> 32), Permitted: uint32(s.permitted >> 32), Inheritable: uint32(s.inheritable >> 32)},
	}
}

func header() *unix.CapUserHeader {
	return &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
}

func capabilities() (sets, error) {
	var data [2]unix.CapUserData
	if err := unix.Capget(header(), &data[0]); err != nil {
		return sets{}, fmt.Errorf("reading the thread's capabilities: %w", err)
	}
	return sets{permitted: uint64(data[1].Permitted)<<32 | uint64(data[0].Permitted)}, nil
}

// Become makes the calling thread another user's, whose group has the same number, and gives directories, which must be
// mantlet's own, to that group: outer to pass through, inner to make files in. What mantlet makes in inner it alone can
// remove, and the group can read. The goroutine must be locked to the thread, which is not to be the process's first:
// the kernel takes that one's user for the process's. The thread keeps its capabilities until Confine. Where some that it takes
// are missing, the error says how to give all of the needs.
func Become(uid int, needs []Capability, outer, inner string) error {
	if err := Missing(Needs(uid)); err != nil {
		return fmt.Errorf("%w; %s", err, Remedy(needs))
	}
	gid := uid
	same := uid == os.Geteuid()
	if same {
		gid = os.Getegid()
	}
	// The package syscall would do it to all threads.
	set := func(what string, call, a, b, c uintptr) error {
		if _, _, errno := unix.RawSyscall(call, a, b, c); errno != 0 {
			return fmt.Errorf("%s %d: %w", what, uid, errno)
		}
		return nil
	}
	if !same {
		if err := errors.Join(
			set("leaving the groups for those of user", unix.SYS_SETGROUPS, 0, 0, 0),
			set("taking the group of user", unix.SYS_SETRESGID, uintptr(gid), uintptr(gid), uintptr(gid)),
		); err != nil {
			return unmapped(err)
		}
	}
	// Now the thread is root of Envoy's group, and needs no capability to give to it what is root's.
	if err := errors.Join(
		os.Chown(outer, -1, gid), os.Chmod(outer, 0o710),
		os.Chown(inner, -1, gid), os.Chmod(inner, 0o770|os.ModeSetgid|os.ModeSticky),
	); err != nil {
		return fmt.Errorf("letting user %d into the runtime directory: %w", uid, err)
	}
	if same {
		return nil
	}
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("keeping capabilities: %w", err)
	}
	return unmapped(set("becoming user", unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)))
}

func unmapped(err error) error {
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%w: this user namespace does not have it: name another one in MANTLET_ENVOY_UID", err)
	}
	return err
}

// Confine leaves the calling thread with what Envoy needs. AmbientCapabilities says what of it a child is to get.
func Confine() error {
	has, err := capabilities()
	if err != nil {
		return err
	}
	keep := has.permitted & (netRaw.bit() | NetBindService.bit())
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("giving up new privileges: %w", err)
	}
	if err := unix.Capset(header(), &sets{effective: keep, permitted: keep}.data()[0]); err != nil {
		return fmt.Errorf("giving up Envoy's capabilities: %w", err)
	}
	return nil
}

// Drop leaves all threads of the process with what mantlet needs from then on, for good: whatever it executes, root's
// powers do not come back. NET_RAW stays permitted, and without effect: what it is for is a thread's that was made with
// Become, and capabilities can only be taken from all threads alike.
func Drop() error {
	has, err := capabilities()
	if err != nil {
		return err
	}
	keep := sets{
		effective: has.permitted & netAdmin.bit(),
		permitted: has.permitted & (netAdmin.bit() | netRaw.bit() | NetBindService.bit()),
	}
	// Not dumpable: no process of Envoy's user, and none of root without CAP_SYS_PTRACE, gets at mantlet's memory. Envoy inherits the
	// limit.
	if err := errors.Join(unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0), unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})); err != nil {
		return fmt.Errorf("closing mantlet's memory: %w", err)
	}
	if _, _, errno := psx.Syscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0); errno != 0 {
		return fmt.Errorf("giving up new privileges: %w", errno)
	}
	head, data := header(), keep.data()
	if _, _, errno := psx.Syscall3(unix.SYS_CAPSET, uintptr(unsafe.Pointer(head)), uintptr(unsafe.Pointer(data)), 0); errno != 0 {
		return fmt.Errorf("giving up capabilities: %w", errno)
	}
	return nil
}

// AmbientCapabilities returns what an Envoy gets whose listeners have these ports, for a child of a thread that called
// Confine. The error says which capability a port takes that the thread does not have.
func AmbientCapabilities(ports []uint32) ([]uintptr, error) {
	has, err := capabilities()
	if err != nil {
		return nil, err
	}
	ambient := []uintptr{netRaw.Number}
	for _, port := range ports {
		if port >= unprivileged() {
			continue
		}
		if has.permitted&NetBindService.bit() == 0 {
			return nil, fmt.Errorf("port %d is below net.ipv4.ip_unprivileged_port_start, and CAP_%s is missing: add it to the "+
				"capabilities of mantlet's container, or take a higher port", port, NetBindService.Name)
		}
		return append(ambient, NetBindService.Number), nil
	}
	return ambient, nil
}

// unprivileged returns the first port that everyone may listen at.
func unprivileged() uint32 {
	const usual = 1024
	text, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if err != nil {
		return usual
	}
	var first uint32
	if _, err := fmt.Sscan(string(text), &first); err != nil {
		return usual
	}
	return first
}
