package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"mantlet/internal/rundir"
	"mantlet/schema"
)

// testLimit is less than the second that a kubelet gives a probe, if it is not told otherwise.
const testLimit = 900 * time.Millisecond

// test is test(1) where mantlet is called by that name: an image without a shell has no other. It answers `-f FILE` alone: exit code 0 if
// FILE is a regular file, 1 if not, 2 for another question. About the ready file it also asks mantlet, which may hang.
func test(args []string, stderr io.Writer) int {
	if len(args) != 2 || args[0] != "-f" {
		_, _ = fmt.Fprintf(stderr, "test: cannot answer %q: this is mantlet's, which knows -f FILE alone\n", args)
		return exitError
	}
	info, err := os.Stat(args[1])
	if err != nil || !info.Mode().IsRegular() {
		return exitNot
	}
	env, err := schema.ParseEnvironment(os.Environ())
	if err != nil || args[1] != env.Process.ReadyFile {
		return 0
	}
	ctx, cancel := context.WithTimeout(context.Background(), testLimit)
	defer cancel()
	if ok, _, err := probe(ctx, rundir.Directory(env.Process.RuntimeDirectory).StatusSocket(), "/readyz"); err != nil || !ok {
		return exitNot
	}
	return 0
}
