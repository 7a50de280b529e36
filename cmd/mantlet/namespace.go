package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// namespace is what shows whose the calling process's network namespace is. None of it is said by the pod's environment: whoever fills
// that in could keep mantlet from closing the pod.
type namespace struct {
	initial bool // it is the kernel's first one, and so a machine's own
	kata    bool // the machine is the guest of Kata Containers, all of which is the pod
}

// allowHostNetwork is the flag that has mantlet close a machine, where it is given twice.
const allowHostNetwork = "allow-host-network"

// judge returns an error if the namespace is a machine's own and not a pod's. allowed is how often allowHostNetwork was given.
func (n namespace) judge(allowed int) error {
	const twice = 2
	if !n.initial || n.kata || allowed >= twice {
		return nil
	}
	err := errors.New("this is the machine's own network namespace: mantlet would cut the machine off; give the pod a network namespace of " +
		"its own, by taking hostNetwork out of its specification")
	if allowed > 0 {
		return fmt.Errorf("%w; to have mantlet close the machine, --%s must be given twice", err, allowHostNetwork)
	}
	return fmt.Errorf("%w; where a pod is all that the machine runs, give --%[2]s --%[2]s", err, allowHostNetwork)
}

// What shows a namespace, below a root directory that is / but in tests.
const (
	namespaceLink = "proc/self/ns/net"
	// initialSysctl is there for processes in the initial namespace alone (net_core_table, net/core/sysctl_net_core.c), as far as
	// kernels are known that do not have initialLink.
	initialSysctl = "proc/sys/net/core/netdev_budget"
	// initialLink has the number NET_NS_INIT_INO (include/uapi/linux/nsfs.h), since Linux 6.18.
	initialLink = "net:[4026531833]"
	commandLine = "proc/cmdline"
	mounts      = "proc/self/mountinfo"
)

// readNamespace looks at the process's own. What cannot be seen counts as a pod's: that is closed.
func readNamespace(root, release string) namespace {
	link, _ := os.Readlink(filepath.Join(root, namespaceLink))
	_, err := os.Stat(filepath.Join(root, initialSysctl))
	var major, minor int
	_, unknown := fmt.Sscanf(release, "%d.%d", &major, &minor)
	numbered := unknown == nil && (major > 6 || major == 6 && minor >= 18)
	return namespace{
		initial: link == initialLink || err == nil && !numbered,
		kata:    isKata(root),
	}
}

// isKata reports whether the machine is a guest of Kata Containers, whose agent starts containers in the guest's initial network
// namespace: its runtime passes the agent's systemd unit on the kernel's command line, and what the agent mounts into a container
// comes from directories of its own.
func isKata(root string) bool {
	line, _ := os.ReadFile(filepath.Join(root, commandLine))
	if slices.Contains(strings.Fields(string(line)), "systemd.unit=kata-containers.target") {
		return true
	}
	text, _ := os.ReadFile(filepath.Join(root, mounts))
	for mount := range strings.Lines(string(text)) {
		before, after, _ := strings.Cut(mount, " - ")
		fields, source := strings.Fields(before), strings.Fields(after)
		if len(fields) < 5 || len(source) < 2 {
			continue
		}
		if strings.HasPrefix(fields[3], "/kata-containers/shared/containers/") || source[1] == "kataShared" {
			return true
		}
	}
	return false
}

// here returns the process's own namespace.
func here() namespace {
	var name unix.Utsname
	_ = unix.Uname(&name)
	return readNamespace("/", unix.ByteSliceToString(name.Release[:]))
}
