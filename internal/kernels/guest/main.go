// Command guest is the first process in a guest of the kernels lane. It runs the suites that the kernel's command line names, and tells
// what came out on the console.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func main() {
	if err := prepare(); err != nil {
		fmt.Println("guest: ", err)
	}
	var name unix.Utsname
	_ = unix.Uname(&name)
	fmt.Printf("guest: kernel %s\n", unix.ByteSliceToString(name.Release[:]))
	run("/", "/usr/bin/mantlet", "check")
	for _, arg := range os.Args[1:] {
		pkg, tests, isSuite := strings.Cut(arg, "=")
		if !isSuite {
			continue
		}
		fmt.Printf("guest: suite %s\n", pkg)
		args := []string{"-test.v", "-test.timeout=2h", "-test.parallel=2"}
		if pkg == "reconcile/nft" { // has random rulesets, which an emulated processor takes a second each for
			args = append(args, "-rapid.checks=10")
		}
		if tests != "" {
			args = append(args, "-test.run="+tests)
		}
		run("/src/"+pkg, "./pkg.test", args...)
	}
	fmt.Println("guest: done")
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// prepare makes the root file system one that programs know.
func prepare() (err error) {
	for _, m := range []struct{ kind, at string }{
		{"proc", "/proc"},
		{"sysfs", "/sys"},
		{"devtmpfs", "/dev"},
		{"tmpfs", "/dev/shm"},
		{"tmpfs", "/tmp"},
		{"tmpfs", "/run"},
		{"cgroup2", "/sys/fs/cgroup"},
		{"securityfs", "/sys/kernel/security"},
	} {
		err = errors.Join(err, os.MkdirAll(m.at, 0o755))
		if failed := unix.Mount(m.kind, m.at, m.kind, 0, ""); failed != nil {
			err = errors.Join(err, fmt.Errorf("mounting %s: %w", m.at, failed))
		}
	}
	err = errors.Join(err, os.Chmod("/tmp", 0o1777), os.Chmod("/dev/shm", 0o1777), os.Symlink("/proc/self/fd", "/dev/fd"))
	lo, failed := netlink.LinkByName("lo")
	if failed != nil {
		return errors.Join(err, failed)
	}
	err = errors.Join(err, netlink.LinkSetUp(lo))
	for name, value := range map[string]string{"PATH": "/usr/sbin:/usr/bin", "HOME": "/root", "MANTLET_ENVOY_PATH": "/usr/bin/envoy", "TMPDIR": "/tmp"} {
		err = errors.Join(err, os.Setenv(name, value))
	}
	return err
}

// run runs a program whose output is the console's.
func run(directory, program string, args ...string) {
	command := exec.Command(program, args...)
	command.Dir, command.Stdout, command.Stderr = directory, os.Stdout, os.Stderr
	if err := command.Run(); err != nil {
		fmt.Printf("guest: %s: %v\n", program, err)
	}
}
