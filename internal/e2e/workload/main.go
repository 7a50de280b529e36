// Command workload is every container of the cluster's pods that is not mantlet: its first argument or else its name says which.
package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"mantlet/internal/e2e/pki"
)

func main() {
	command := append([]string{filepath.Base(os.Args[0])}, os.Args[1:]...)
	if len(command) > 1 {
		command = command[1:]
	}
	if err := run(command); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", command[0], err)
		os.Exit(1)
	}
}

func run(command []string) error {
	args := append(command[1:], "", "")
	switch command[0] {
	case "pause":
		return pause()
	case "initializer":
		return initialize(cmp.Or(args[0], "/tls-config"))
	case "web":
		return web()
	case "shop":
		return shop()
	case "healthy":
		return healthy()
	case "job":
		return order("BILLING_URL", "CART_URL")
	case "get":
		return get(role(args[0]), args[1])
	case "load":
		return load(role(args[0]), args[1])
	case "flood":
		return flood(args[0])
	case "intrude":
		return intrude(args[0])
	}
	return errors.New("no such workload")
}

// pause is the first process of a pod's sandbox: it holds the namespaces.
func pause() error {
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM, syscall.SIGINT)
	<-end
	return nil
}

// initialize writes the pod's mesh certificate to a directory. Its names are the pod's, and those of what the pod is a replica of.
func initialize(directory string) error {
	pod, err := os.Hostname()
	if err != nil {
		return err
	}
	app, _, _ := strings.Cut(pod, "-")
	return pki.Issue("/ca", directory, pod, app+"-svc", app)
}
