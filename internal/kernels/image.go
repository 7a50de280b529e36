package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// image writes the part of the initramfs that all kernels share, and returns its path: the tests, mantlet, Envoy, nft, modprobe
// and the libraries of these, with the guest's program as init.
func (l *lane) image(ctx context.Context) (string, error) {
	root := l.path("root")
	if err := os.RemoveAll(root); err != nil {
		return "", err
	}
	for _, directory := range []string{"dev", "proc", "sys", "tmp", "run", "etc", "root", "usr/sbin", "usr/bin", "src"} {
		if err := os.MkdirAll(filepath.Join(root, directory), 0o755); err != nil {
			return "", err
		}
	}
	for to, pkg := range map[string]string{"init": "./internal/kernels/guest", "usr/bin/mantlet": "./cmd/mantlet"} {
		if err := build(ctx, "build", filepath.Join(root, to), pkg); err != nil {
			return "", err
		}
	}
	data := []string{"render"} // its golden files, which reconcile/nft reads
	for _, s := range suites {
		data = append(data, s.pkg)
		if err := build(ctx, "test", filepath.Join(root, "src", s.pkg, "pkg.test"), "./"+s.pkg); err != nil {
			return "", err
		}
	}
	for _, pkg := range data {
		if err := os.CopyFS(filepath.Join(root, "src", pkg, "testdata"), os.DirFS(filepath.Join(pkg, "testdata"))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	for program, to := range map[string]string{l.envoy: "usr/bin/envoy", "nft": "usr/sbin/nft", "kmod": "usr/bin/kmod"} {
		if err := install(ctx, root, program, to); err != nil {
			return "", err
		}
	}
	for link, to := range map[string]string{"sbin": "usr/sbin", "bin": "usr/bin", "usr/sbin/modprobe": "../bin/kmod", "usr/bin/lsmod": "kmod"} {
		if err := os.Symlink(to, filepath.Join(root, link)); err != nil {
			return "", err
		}
	}
	for name, text := range map[string]string{
		"passwd": "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n", "group": "root:x:0:\nnogroup:x:65534:\n",
		"hosts": "127.0.0.1 localhost\n::1 localhost\n", "nsswitch.conf": "hosts: files dns\n", "resolv.conf": "nameserver 127.0.0.1\n",
		"protocols": "ip 0 IP\nicmp 1 ICMP\ntcp 6 TCP\nudp 17 UDP\nipv6-icmp 58 IPv6-ICMP\ndccp 33 DCCP\nsctp 132 SCTP\nudplite 136 UDPLite\n", // by which nft names numbers
	} {
		if err := os.WriteFile(filepath.Join(root, "etc", name), []byte(text), 0o644); err != nil {
			return "", err
		}
	}
	return l.path("base.cpio"), pack(ctx, l.path("base.cpio"), root, func(string) bool { return true })
}

// build makes a static binary of a package, or of its tests.
func build(ctx context.Context, kind, to, pkg string) error {
	args := []string{"build", "-trimpath", "-ldflags", "-s -w", "-o", to, pkg}
	if kind == "test" {
		args = []string{"test", "-c", "-trimpath", "-ldflags", "-s -w", "-o", to, pkg}
	}
	command := exec.CommandContext(ctx, "go", args...)
	command.Env = append(command.Environ(), "CGO_ENABLED=0")
	if out, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

var library = regexp.MustCompile(`/[^ )]+`)

// install copies a program, and the libraries that the loader would find for it, to where they are here.
func install(ctx context.Context, root, program, to string) error {
	found, err := exec.LookPath(program)
	if err != nil {
		return err
	}
	if err := copyFile(found, filepath.Join(root, to)); err != nil {
		return err
	}
	needs, err := output(ctx, "ldd", found)
	if err != nil {
		return err
	}
	for _, lib := range library.FindAllString(needs, -1) {
		if err := copyFile(lib, filepath.Join(root, lib)); err != nil {
			return err
		}
	}
	return nil
}

func copyFile(from, to string) error {
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return os.WriteFile(to, content, 0o755)
}

// wanted are the modules that mantlet and the tests need, with all that these depend on.
var wanted = regexp.MustCompile(`/kernel/net/(netfilter|ipv4/netfilter|ipv6/netfilter|bridge|llc|802)/|/(veth|dummy|tun|sch_netem|inet_diag|tcp_diag|unix_diag|netlink_diag|serial8250|8250)\.ko`)

// modules writes the part of the initramfs that is a kernel's own and returns the kernel and the part.
func (l *lane) modules(ctx context.Context, k kernel, directory string) (image, part string, err error) {
	images, err := globs(directory, "boot/vmlinuz-*", "usr/lib/modules/*/vmlinuz")
	if err != nil {
		return "", "", err
	}
	found, err := globs(directory, "lib/modules/*", "usr/lib/modules/*")
	if err != nil {
		return "", "", err
	}
	if len(images) != 1 || len(found) != 1 {
		return "", "", fmt.Errorf("%s has the kernels %q and the modules %q, want one of each", directory, images, found)
	}
	// depmod looks in lib/modules below the directory.
	base := strings.TrimSuffix(found[0], "/lib/modules/"+filepath.Base(found[0]))
	if _, err := output(ctx, "/sbin/depmod", "-b", base, filepath.Base(found[0])); err != nil {
		return "", "", err
	}
	keep, err := dependencies(found[0])
	if err != nil {
		return "", "", err
	}
	part = l.path("modules-" + k.name + ".cpio")
	return images[0], part, pack(ctx, part, base, func(name string) bool {
		below, inside := strings.CutPrefix(name, "lib/modules/"+filepath.Base(found[0])+"/")
		return inside && (strings.HasPrefix(below, "modules.") || keep[below])
	})
}

// globs returns what matches any of the patterns below a directory.
func globs(directory string, patterns ...string) (all []string, err error) {
	for _, pattern := range patterns {
		found, err := filepath.Glob(filepath.Join(directory, pattern))
		if err != nil {
			return nil, err
		}
		all = append(all, found...)
	}
	return all, nil
}

// dependencies returns the files of all wanted modules and of those that they need, as modules.dep names them.
func dependencies(directory string) (map[string]bool, error) {
	text, err := os.ReadFile(filepath.Join(directory, "modules.dep"))
	if err != nil {
		return nil, err
	}
	keep := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		module, needs, _ := strings.Cut(strings.TrimSpace(line), ":")
		if wanted.MatchString("/"+module) && !strings.Contains(module, "/ipvs/") && !strings.Contains(module, "/ipset/") {
			keep[module] = true
			for _, need := range strings.Fields(needs) {
				keep[need] = true
			}
		}
	}
	return keep, nil
}

// pack writes a cpio archive of files below a directory, as an initramfs. The kernel takes several, one behind the other.
func pack(ctx context.Context, to, directory string, keep func(name string) bool) error {
	var names bytes.Buffer
	err := filepath.WalkDir(directory, func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		below, err := filepath.Rel(directory, name)
		if err == nil && (entry.IsDir() || keep(below)) {
			fmt.Fprintln(&names, below)
		}
		return err
	})
	if err != nil {
		return err
	}
	command := exec.CommandContext(ctx, "cpio", "--create", "--format=newc", "--owner=0:0", "--quiet", "--file="+to)
	command.Dir, command.Stdin = directory, &names
	if out, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("cpio: %w\n%s", err, out)
	}
	return nil
}
