package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// fetch unpacks a kernel of a suite of Debian into the cache and returns the directory. It is fetched once: a new one of the suite
// comes when the directory is removed.
func (l *lane) fetch(ctx context.Context, k kernel) (string, error) {
	directory := l.path("kernel-" + k.name)
	if _, err := os.Stat(directory); err == nil {
		return directory, nil
	}
	apt, err := l.apt(ctx)
	if err != nil {
		return "", err
	}
	plan, err := output(ctx, "apt-get", append(apt, "install", "--simulate", "--no-install-recommends", "-t", k.suite, "linux-image-cloud-amd64")...)
	if err != nil {
		return "", err
	}
	var packages []string
	for line := range strings.Lines(plan) {
		// Inst NAME (VERSION …
		if fields := strings.Fields(line); len(fields) > 2 && fields[0] == "Inst" && isKernel(fields[1]) {
			packages = append(packages, fields[1]+"="+strings.TrimPrefix(fields[2], "("))
		}
	}
	unpacked, err := os.MkdirTemp(l.cache, "fetch.")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(unpacked) }()
	fmt.Printf("%s: fetching %s\n", k.name, strings.Join(packages, " "))
	download := exec.CommandContext(ctx, "apt-get", append(apt, append([]string{"download", "--quiet"}, packages...)...)...)
	download.Dir, download.Stderr = unpacked, os.Stderr
	if err := download.Run(); err != nil {
		return "", fmt.Errorf("apt-get download: %w", err)
	}
	debs, err := filepath.Glob(filepath.Join(unpacked, "*.deb"))
	if err != nil {
		return "", err
	}
	all := filepath.Join(unpacked, "all")
	for _, deb := range debs {
		if _, err := output(ctx, "dpkg", "--extract", deb, all); err != nil {
			return "", err
		}
	}
	if err := os.Chmod(all, 0o755); err != nil {
		return "", err
	}
	return directory, os.Rename(all, directory)
}

// isKernel tells packages with an image or modules from those that only depend on them.
func isKernel(name string) bool {
	for _, prefix := range []string{"linux-image-", "linux-binary-", "linux-modules-"} {
		if rest, ok := strings.CutPrefix(name, prefix); ok && rest[0] >= '0' && rest[0] <= '9' {
			return true
		}
	}
	return false
}

// apt returns the options by which apt-get reads the suites of all kernels from the mirror that this machine uses, and nothing of what is
// installed.
func (l *lane) apt(ctx context.Context) ([]string, error) {
	lists, list, status := l.path("apt", "lists"), l.path("apt", "sources.list"), l.path("apt", "status")
	options := []string{
		"-o", "Dir::State::Lists=" + lists, "-o", "Dir::State::status=" + status, "-o", "Dir::Cache=" + l.path("apt", "cache"),
		"-o", "Dir::Etc::SourceList=" + list, "-o", "Dir::Etc::SourceParts=/dev/null", "-o", "Dir::Etc::PreferencesParts=/dev/null",
		"-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none", "-o", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
	}
	if _, err := os.Stat(list); err == nil {
		return options, nil
	}
	targets, err := output(ctx, "apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages")
	if err != nil {
		return nil, err
	}
	mirror := ""
	for uri := range strings.Lines(targets) {
		if uri = strings.TrimSpace(uri); strings.HasSuffix(strings.TrimSuffix(uri, "/"), "/debian") {
			mirror = uri
		}
	}
	if mirror == "" {
		return nil, errors.New("apt's sources name no mirror of Debian")
	}
	var text strings.Builder
	for _, k := range kernels { // backports are of a suite that is there too
		fmt.Fprintf(&text, "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n", mirror, k.suite)
	}
	for _, directory := range []string{filepath.Join(lists, "partial"), l.path("apt", "cache", "archives", "partial")} {
		if err := os.MkdirAll(directory, 0o755); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(status, nil, 0o644); err != nil {
		return nil, err
	}
	if err := os.WriteFile(list, []byte(text.String()), 0o644); err != nil {
		return nil, err
	}
	if _, err := output(ctx, "apt-get", append(options, "--quiet", "update")...); err != nil {
		return nil, errors.Join(err, os.Remove(list))
	}
	return options, nil
}

// output runs a command and returns its standard output; what it says to standard error is part of an error.
func output(ctx context.Context, name string, args ...string) (string, error) {
	command := exec.CommandContext(ctx, name, args...)
	var errs bytes.Buffer
	command.Stderr = &errs
	out, err := command.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, errs.String())
	}
	return string(out), nil
}
