package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
)

// boot runs all suites in a guest and returns its console.
func (l *lane) boot(ctx context.Context, k kernel, image, base, modules string) ([]byte, error) {
	initramfs, console := l.path("initramfs-"+k.name), l.path("results", k.name+".log")
	if err := os.WriteFile(console, nil, 0o644); err != nil { // whatever becomes of the run, no earlier one's is read
		return nil, err
	}
	if err := join(initramfs, base, modules); err != nil {
		return nil, err
	}
	defer func() { _ = os.Remove(initramfs) }()
	var what []string
	for _, s := range suites {
		run := s.run
		if l.run != "" {
			run = l.run
		}
		what = append(what, s.pkg+"="+run)
	}
	ctx, cancel := context.WithTimeout(ctx, l.limit)
	defer cancel()
	qemu := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-M", "q35", "-accel", "tcg,thread=single,tb-size=512", "-icount", "shift=0,sleep=off", "-rtc", "clock=vm", "-cpu", "max,la57=off",
		"-m", "4G", "-nodefaults", "-no-reboot", "-display", "none", "-serial", "file:"+console, "-device", "virtio-rng-pci",
		"-kernel", image, "-initrd", initramfs,
		"-append", "console=ttyS0 quiet panic=-1 mitigations=off nokaslr random.trust_cpu=on -- "+strings.Join(what, " "))
	if out, err := qemu.CombinedOutput(); err != nil && ctx.Err() == nil {
		return nil, fmt.Errorf("qemu: %w\n%s", err, out)
	}
	return os.ReadFile(console)
}

// join writes files behind each other.
func join(to string, parts ...string) (err error) {
	file, err := os.Create(to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	for _, part := range parts {
		in, err := os.Open(part)
		if err != nil {
			return err
		}
		_, err = io.Copy(file, in)
		if err := errors.Join(err, in.Close()); err != nil {
			return err
		}
	}
	return nil
}
