package main

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"mantlet/internal/cgroup"
	"mantlet/render"
)

// limits returns what this process and its Envoys can have at most, and the control group that limits their memory; nil
// where the kernel shows none.
func limits() (render.Limits, *cgroup.Memory) {
	var all render.Limits
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err == nil && files.Max != unix.RLIM_INFINITY {
		all.Descriptors = files.Max
	}
	memory, err := cgroup.Find()
	if err != nil {
		return all, nil
	}
	all.Memory, _ = memory.Limit()
	all.Sockets = memory.Sockets()
	return all, memory
}

// raiseDescriptors makes the limit of open files as high as it may be, for Envoys too: where a program does not set it itself,
// Go gives children the limit that it found.
func raiseDescriptors() error {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return fmt.Errorf("reading the limit of open files: %w", err)
	}
	files.Cur = files.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return fmt.Errorf("raising the limit of open files to %d: %w", files.Max, err)
	}
	return nil
}

// fewConnections is less than a busy workload may need.
const fewConnections = 250

// tryLimits tells how many connections an Envoy takes with a configuration.
func tryLimits(all render.Limits, cost render.Cost) finding {
	const need = "connections"
	if err := all.Fit(cost); err != nil {
		return tried(need, "", err, "have fewer entries or names, or raise the limit")
	}
	c := all.Capacity(cost)
	detail := fmt.Sprintf("at most %d from outside at a time, %s; at most %d of the workload at each egress entry", c.Ingress, limitedBy(c.By, all.Memory, all.Descriptors), c.Egress)
	var err error
	if c.Ingress < fewConnections {
		err = errors.New(detail)
	}
	return wanted(need, detail, err, map[string]string{
		"memory":      "raise the container's memory limit",
		"descriptors": "raise the hard limit of open files (ulimit -Hn) of the container runtime",
	}[c.By])
}

// limitedBy says what a number of connections follows from.
func limitedBy(by string, memory, descriptors uint64) string {
	switch by {
	case "memory":
		return fmt.Sprintf("as the memory limit is %d MiB", memory>>20)
	case "descriptors":
		return fmt.Sprintf("as an Envoy may have %d open files", descriptors)
	default:
		return "as " + by + " can track no more"
	}
}
