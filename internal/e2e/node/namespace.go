package node

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// sysctls are settings of the whole machine that a kubelet would change. It gets to see files instead that have what it wants.
var sysctls = map[string]string{
	"vm/overcommit_memory":      "1",
	"vm/panic_on_oom":           "0",
	"kernel/panic":              "10",
	"kernel/panic_on_oops":      "1",
	"kernel/keys/root_maxkeys":  "1000000",
	"kernel/keys/root_maxbytes": "25000000",
}

// mount makes the node's file system: the machine's, read-only, with memory where the node writes. Directories of the machine
// are shown below home, by their names there, and stay writable.
func mount(directories map[string]string) error {
	shown := map[string]int{}
	for name, directory := range directories {
		// Opened first: what follows may cover it.
		tree, err := unix.OpenTree(unix.AT_FDCWD, directory, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return fmt.Errorf("opening %s: %w", directory, err)
		}
		defer func() { _ = unix.Close(tree) }()
		shown[name] = tree
	}
	cgroups, err := hierarchies()
	if err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("leaving the machine's mounts: %w", err)
	}
	readOnly := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, readOnly); err != nil {
		return fmt.Errorf("making the machine's files read-only: %w", err)
	}
	// With the machine's cgroup mounts, which runc might take for the node's.
	if err := unix.Unmount("/sys", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmounting /sys: %w", err)
	}
	for target, kind := range map[string]string{"/proc": "proc", "/sys": "sysfs", "/run": "tmpfs", "/var": "tmpfs"} {
		if err := unix.Mount(kind, target, kind, 0, ""); err != nil {
			return fmt.Errorf("mounting %s: %w", target, err)
		}
	}
	for name, tree := range shown {
		target := filepath.Join(home, name)
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return fmt.Errorf("mounting %s: %w", target, err)
		}
	}
	if err := mountCgroups(cgroups); err != nil {
		return err
	}
	if err := coverSysctls(); err != nil {
		return err
	}
	// A kubelet's mounts have to reach containers.
	return unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "")
}

// mountCgroups mounts hierarchies where the kubelet looks for them.
func mountCgroups(all []hierarchy) error {
	const root = "/sys/fs/cgroup"
	if all[0].v2 {
		if err := unix.Mount("cgroup2", root, "cgroup2", 0, ""); err != nil {
			return fmt.Errorf("mounting %s: %w", root, err)
		}
		// A cgroup that hands controllers down has no process of its own.
		own := filepath.Join(root, "node")
		if err := os.Mkdir(own, 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(own, "cgroup.procs"), []byte("1"), 0o644); err != nil {
			return err
		}
		return delegate(root)
	}
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mounting %s: %w", root, err)
	}
	for _, h := range all {
		name := filepath.Base(h.path) // the controllers, by convention
		target, options := filepath.Join(root, name), name
		if name == "systemd" {
			options = "none,name=systemd"
		}
		if err := os.Mkdir(target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount("cgroup", target, "cgroup", 0, options); err != nil {
			return fmt.Errorf("mounting %s: %w", target, err)
		}
	}
	return nil
}

func coverSysctls() error {
	for name, value := range sysctls {
		file := filepath.Join(home, strings.ReplaceAll(name, "/", "."))
		if err := os.WriteFile(file, []byte(value), 0o644); err != nil {
			return err
		}
		if err := unix.Mount(file, "/proc/sys/"+name, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("covering sysctl %s: %w", name, err)
		}
	}
	return nil
}

// connect makes the node's network: its addresses are on a bridge without ports (a dummy device would do, but fewer kernels
// have those), and everything else is behind it.
func connect() error {
	loopback, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "node0"}}
	if err := netlink.LinkAdd(bridge); err != nil {
		return fmt.Errorf("adding a bridge: %w", err)
	}
	for _, link := range []netlink.Link{loopback, bridge} {
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("setting %s up: %w", link.Attrs().Name, err)
		}
	}
	for own, all := range map[string]string{"10.77.1.1/24": "0.0.0.0/0", "fd77:1::1/64": "::/0"} {
		addr, err := netlink.ParseAddr(own)
		if err != nil {
			return err
		}
		addr.Flags = unix.IFA_F_NODAD // which would take a carrier
		if err := netlink.AddrAdd(bridge, addr); err != nil {
			return fmt.Errorf("adding address %s: %w", own, err)
		}
		_, destination, err := net.ParseCIDR(all)
		if err != nil {
			return err
		}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: bridge.Index, Dst: destination}); err != nil {
			return fmt.Errorf("adding a route to %s: %w", all, err)
		}
	}
	for _, name := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
		if err := os.WriteFile("/proc/sys/"+name, []byte("1"), 0o644); err != nil {
			return err
		}
	}
	return nil
}
