// Package node is a Kubernetes of one node on this machine: etcd, API server, controllers, scheduler, kube-proxy, CoreDNS,
// kubelet and containerd, all of them the real ones, in namespaces and cgroups of their own.
//
//	func main() {
//		node.Main()
//		n, err := node.Start(ctx, …)
//		defer n.Close()
//		err = n.Command(ctx, "kube", "kubectl", "get", "nodes").Run()
//	}
//
// The machine's files are read-only to the node, and what it writes is in memory, but for its logs. So nothing is left of it,
// however the process ends that started it.
//
// Addresses: pods 10.77.0.0/24 and fd77::/64, services 10.77.128.0/20 and fd77:128::/112, the node itself 10.77.1.1 and
// fd77:1::1.
package node

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Node is one that was started.
type Node struct {
	pid      string        // of its first process
	keeper   int           // process
	unwanted io.Closer     // tells the keeper
	ended    chan struct{} // closed when the keeper has ended, and with it the node
	problems bytes.Buffer  // to be read after that
}

// Start starts a node and waits until it can run pods. The directory bin has kube, coredns, containerd with its shim and ctr, and
// CNI plugins. Components log to files in logs.
func Start(ctx context.Context, bin, logs string) (*Node, error) {
	runc, err := requirements()
	if err != nil {
		return nil, err
	}
	n := &Node{ended: make(chan struct{})}
	keeper := exec.Command("/proc/self/exe", bin, filepath.Dir(runc), logs)
	keeper.Env = append(os.Environ(), stage+"="+stageKeeper)
	keeper.Stderr = &n.problems
	keeper.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a terminal's signals are not for it
	if n.unwanted, err = keeper.StdinPipe(); err != nil {
		return nil, err
	}
	ids, err := keeper.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := keeper.Start(); err != nil {
		return nil, err
	}
	n.keeper = keeper.Process.Pid
	id, err := bufio.NewReader(ids).ReadString('\n')
	go func() {
		defer close(n.ended)
		_ = keeper.Wait() // what is wrong it has written
	}()
	n.pid = strings.TrimSpace(id)
	if err == nil {
		err = n.ready(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("starting a node, whose logs are in %s: %w", logs, err), n.Close())
	}
	return n, nil
}

// tools is where the node looks for programs of this machine.
const tools = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// requirements returns where runc is, or an error that names all programs that are missing.
func requirements() (runc string, err error) {
	var missing []error
	for _, need := range []struct{ program, pkg string }{
		{"runc", "runc"}, {"nft", "nftables"}, {"nsenter", "util-linux"}, {"mount", "mount"},
	} {
		path, err := exec.LookPath(need.program)
		if err != nil {
			missing = append(missing, fmt.Errorf("%w: it is in Debian's package %s", err, need.pkg))
		}
		if need.program == "runc" {
			runc = path
		}
	}
	return runc, errors.Join(missing...)
}

// ready waits until the node can run pods.
func (n *Node) ready(ctx context.Context) error {
	for _, question := range [][]string{
		{"ctr", "version"},
		{"kube", "kubectl", "get", "--raw=/readyz"},
		{"kube", "kubectl", "wait", "--for=create", "node/node", "serviceaccount/default", "--timeout=60s"},
		{"kube", "kubectl", "wait", "--for=condition=Ready", "node/node", "--timeout=60s"},
	} {
		for {
			answer, err := n.Command(ctx, question[0], question[1:]...).CombinedOutput()
			if err == nil {
				break
			}
			select {
			case <-n.ended:
				return errors.New("the node ended")
			case <-ctx.Done():
				return fmt.Errorf("the node is not ready: %s: %s", strings.Join(question, " "), bytes.TrimSpace(answer))
			case <-time.After(200 * time.Millisecond):
			}
		}
	}
	return nil
}

// Command returns a command that sees the node's network, files and processes. It dies with the node.
func (n *Node) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--target=" + n.pid, "--net", "--mount", "--pid", "--", name}, args...)...)
	cmd.Env = environment()
	return cmd
}

// Kill kills components by their names, all at once. The node starts each again after a second or two.
func (n *Node) Kill(ctx context.Context, components ...string) error {
	script := "cd " + home + "; kill -KILL"
	for _, name := range components {
		script += " $(cat " + name + ".pid)"
	}
	if out, err := n.Command(ctx, "sh", "-c", script).CombinedOutput(); err != nil {
		return fmt.Errorf("killing %v: %w: %s", components, err, out)
	}
	return nil
}

// Containers returns the processes of all containers of the node's pods, by their ids on the machine.
func (n *Node) Containers() ([]int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		return nil, err
	}
	own := fmt.Sprintf("/%s%d/kubepods/", prefix, n.keeper)
	var all []int
	for _, file := range files {
		cgroups, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(cgroups), own) {
			continue // it may have ended
		}
		id, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			return nil, err
		}
		all = append(all, id)
	}
	return all, nil
}

// environment is that of all that runs in the node.
func environment() []string {
	return []string{
		"PATH=" + home + "/bin:" + home + "/runc:" + tools,
		"HOME=" + home,
		"TMPDIR=" + home + "/tmp",
		"KUBECONFIG=" + home + "/kubeconfig",
		"CONTAINERD_ADDRESS=" + home + "/containerd.sock",
		"CONTAINERD_NAMESPACE=k8s.io",
	}
}

// Path returns where this process finds a file of the node.
func (n *Node) Path(file string) string { return filepath.Join("/proc", n.pid, "root", file) }

// Close ends the node and returns once nothing is left of it.
func (n *Node) Close() error {
	err := n.unwanted.Close()
	<-n.ended
	if text := strings.TrimSpace(n.problems.String()); text != "" {
		err = errors.Join(err, errors.New(text))
	}
	return err
}
