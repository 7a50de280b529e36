package proxy

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"mantlet/internal/bench/meter"
	"mantlet/internal/lab"
	"mantlet/reconcile/nft"
)

// Pod is a mantlet by itself, whose configuration changes, with a server behind it, and a host beside it.
type Pod struct {
	*Path
	Sidecar *lab.Sidecar

	mesh    *lab.Authority
	outside *lab.Host
	client  *lab.Identity
	config  string
}

// StartPod lays out a pod without a mantlet.
func StartPod(programs Programs, directory string, mesh *lab.Authority) (p *Pod, err error) {
	p = &Pod{Path: &Path{Options: Options{Proxy: Mantlet}, programs: programs, directory: directory}, mesh: mesh}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	if p.network, err = lab.NewNetwork(); err != nil {
		return p, err
	}
	p.close = append(p.close, p.network.Close)
	if p.pod, err = p.host("server"); err != nil {
		return p, err
	}
	if p.outside, err = p.host("outside"); err != nil {
		return p, err
	}
	if p.client, err = mesh.Issue(lab.Leaf{DNSNames: []string{"client"}}); err != nil {
		return p, err
	}
	if p.server, err = p.start(p.pod, "server", programs.Self, "serve", fmt.Sprintf("0.0.0.0:%d", workload)); err != nil {
		return p, err
	}
	// A table that is there stays without an owner: else nobody could change the rules, and there would be nothing to repair.
	if _, err := p.pod.Run("nft", "add", "table", "inet", "mantlet"); err != nil {
		return p, err
	}
	p.config = filepath.Join(directory, "config.yaml")
	return p, nil
}

// Configure replaces the configuration. It returns when it did.
func (p *Pod) Configure(text string) (time.Time, error) {
	next := p.config + ".next"
	err := os.WriteFile(next, []byte(text), 0o644)
	began := time.Now()
	return began, errors.Join(err, os.Rename(next, p.config))
}

// Begin starts mantlet. It returns how long it took until mantlet was ready, and the CPU time of mantlet and Envoy until then.
func (p *Pod) Begin() (took, cpu time.Duration, err error) {
	if p.Sidecar, err = p.sidecar(p.pod, p.mesh, "MANTLET_CONFIG="+p.config); err != nil {
		return 0, 0, fmt.Errorf("%w%s", err, p.said())
	}
	took = time.Since(p.Sidecar.Executed())
	cpu, err = meter.CPU(meter.Tree(p.Sidecar.PID())...)
	return took, cpu, err
}

// CPU returns the CPU time of mantlet without its Envoys, and theirs.
func (p *Pod) CPU() (mantlet, envoys time.Duration, err error) {
	if mantlet, err = meter.CPU(p.Sidecar.PID()); err != nil {
		return 0, 0, err
	}
	all, err := p.Sidecar.Envoys()
	if err != nil {
		return 0, 0, err
	}
	envoys, err = meter.CPU(all...)
	return mantlet, envoys, err
}

// Commit is a transaction that changed mantlet's table.
type Commit struct {
	At time.Time
	By string
}

// Commits returns what the kernel tells of transactions, until the pod is closed.
func (p *Pod) Commits() (<-chan Commit, error) {
	ctx, cancel := context.WithCancel(context.Background())
	var notes <-chan string
	var table *nft.Table
	err := p.pod.Do(func() (err error) {
		if table, err = nft.Open(); err == nil {
			notes = table.Watch(ctx)
		}
		return err
	})
	if err != nil {
		cancel()
		return nil, err
	}
	told := make(chan Commit, 64)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for by := range notes {
			if by != "" {
				select {
				case told <- Commit{time.Now(), by}:
				case <-ctx.Done():
				}
			}
		}
	}()
	p.close = append(p.close, func() error {
		cancel()
		<-ended
		return table.Close()
	})
	return told, nil
}

// Tamper changes the rules as somebody else.
func (p *Pod) Tamper(command string) error {
	_, err := p.pod.Run("nft", command)
	return err
}

// Port is where the server behind mantlet listens.
func (p *Pod) Port() uint16 { return workload }

// Connect connects from outside, in plaintext or else as the client that the mesh has, and exchanges a message.
func (p *Pod) Connect(plaintext bool) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), startWithin)
	defer cancel()
	conn, err := p.outside.Dial(ctx, "tcp", netip.AddrPortFrom(p.pod.IPv4, workload).String())
	if err != nil || plaintext {
		return conn, err
	}
	secured := tls.Client(conn, p.client.ClientConfig("server"))
	if err := secured.HandshakeContext(ctx); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return secured, nil
}

// Rotate writes a new certificate and waits until a handshake shows it.
func (p *Pod) Rotate() (took time.Duration, err error) {
	next, err := p.mesh.Issue(lab.Leaf{DNSNames: []string{"server"}})
	if err != nil {
		return 0, err
	}
	if err := next.Write(p.Sidecar.TLSDirectory); err != nil {
		return 0, err
	}
	began := time.Now()
	for {
		conn, err := p.Connect(false)
		if err != nil {
			return 0, err
		}
		shown := conn.(*tls.Conn).ConnectionState().PeerCertificates[0].Equal(next.Leaf)
		_ = conn.Close()
		if shown {
			return time.Since(began), nil
		}
		if time.Since(began) > startWithin {
			return 0, errors.New("no handshake shows the new certificate")
		}
	}
}

// Bare returns how long Envoy by itself takes with the newest bootstrap that mantlet wrote: to validate it, and from exec until it is
// live. It runs on the host outside, so that nothing is in its way.
func (p *Pod) Bare() (validate, live, cpu time.Duration, err error) {
	directory := filepath.Join(p.Sidecar.RuntimeDirectory, "envoy")
	bootstrap, err := newest(filepath.Join(directory, "bootstrap-*.json"))
	if err != nil {
		return 0, 0, 0, err
	}
	own, err := os.MkdirTemp(p.directory, "bare")
	if err != nil {
		return 0, 0, 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(own)) }()
	secrets, err := filepath.Glob(filepath.Join(directory, "sds-*.json"))
	if err != nil {
		return 0, 0, 0, err
	}
	for _, file := range append(secrets, bootstrap) {
		text, err := os.ReadFile(file)
		if err != nil {
			return 0, 0, 0, err
		}
		text = bytes.ReplaceAll(text, []byte(directory+"/"), []byte(own+"/"))
		if err := os.WriteFile(filepath.Join(own, filepath.Base(file)), text, 0o600); err != nil {
			return 0, 0, 0, err
		}
	}
	config := filepath.Join(own, filepath.Base(bootstrap))
	epoch := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(bootstrap), "bootstrap-"), ".json")
	began := time.Now()
	if _, err := p.outside.Run(p.programs.Envoy, "--mode", "validate", "--config-path", config, "--log-level", "error"); err != nil {
		return 0, 0, 0, err
	}
	validate = time.Since(began)
	began = time.Now()
	envoy := exec.Command(p.programs.Envoy, "--config-path", config, "--disable-hot-restart", "--concurrency", "2", "--log-level", "error")
	if err := p.outside.Start(envoy); err != nil {
		return 0, 0, 0, err
	}
	defer func() {
		_ = envoy.Process.Kill()
		_ = envoy.Wait()
	}()
	ctx, cancel := context.WithTimeout(context.Background(), startWithin)
	defer cancel()
	admin := filepath.Join(own, "admin-"+epoch+".sock")
	if err := lab.Until(ctx, func() bool { return isLive(ctx, admin) }); err != nil {
		return 0, 0, 0, fmt.Errorf("waiting for Envoy to be live: %w", err)
	}
	live = time.Since(began)
	cpu, err = meter.CPU(envoy.Process.Pid)
	return validate, live, cpu, err
}

// newest returns the file of a pattern that was changed last.
func newest(pattern string) (name string, err error) {
	files, err := filepath.Glob(pattern)
	var at time.Time
	for _, file := range files {
		if info, err := os.Stat(file); err == nil && info.ModTime().After(at) {
			name, at = file, info.ModTime()
		}
	}
	if name == "" {
		return "", errors.Join(err, fmt.Errorf("there is no %s", pattern))
	}
	return name, err
}

// isLive asks Envoy's admin interface.
func isLive(ctx context.Context, socket string) bool {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://envoy/ready", nil)
	if err != nil {
		return false
	}
	response, err := client.Do(request)
	if err != nil {
		return false
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return err == nil && strings.TrimSpace(string(text)) == "LIVE"
}
