// Package proxy puts mantlet and what users would take instead of it between a client and a server, in network namespaces.
package proxy

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"mantlet/internal/bench/load"
	"mantlet/internal/bench/meter"
	"mantlet/internal/lab"
)

// The proxies, and None for a client that speaks to the server itself, in plaintext.
const (
	Mantlet    = "mantlet"
	Envoy      = "envoy"
	HAProxy    = "haproxy"
	Nginx      = "nginx"
	Stunnel    = "stunnel"
	Ghostunnel = "ghostunnel"
	None       = "none"
)

// Programs are the paths of what is measured and of what measures.
type Programs struct {
	Mantlet, Envoy, HAProxy, Nginx, NginxModules, Stunnel, Ghostunnel, IPTables string

	Self string // runs load.Run and load.Serve: `Self load JOB`, `Self serve ADDRESS`
}

// All returns the programs that are to be found, beside the benchmark itself.
func (p *Programs) All() []*string {
	return []*string{&p.Mantlet, &p.Envoy, &p.HAProxy, &p.Nginx, &p.Stunnel, &p.Ghostunnel, &p.IPTables}
}

// Versions returns what each program says that it is.
func (p *Programs) Versions() map[string]string {
	version := regexp.MustCompile(`\d+\.\d+(\.\d+)?`)
	all := map[string]string{}
	for name, command := range map[string][]string{
		Envoy: {p.Envoy, "--version"}, HAProxy: {p.HAProxy, "-v"}, Nginx: {p.Nginx, "-v"},
		Stunnel: {p.Stunnel, "-version"}, "iptables": {p.IPTables, "--version"},
	} {
		text, _ := exec.Command(command[0], command[1:]...).CombinedOutput()
		all[name] = string(version.Find(text))
	}
	// ghostunnel does not tell: it is built as a module.
	text, _ := exec.Command("go", "version", "-m", p.Ghostunnel).Output()
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > 2 && fields[0] == "mod" && strings.HasSuffix(fields[1], "/"+Ghostunnel) {
			all[Ghostunnel] = strings.TrimPrefix(fields[2], "v")
		}
	}
	return all
}

// Options are how a path is laid out.
type Options struct {
	Proxy string
	// Pods lets a proxy share the namespaces of client and server, as a sidecar does. Else it has two of its own, and there are
	// four. mantlet always shares: it is deployed in no other way.
	Pods bool
	// Sessions gives Envoy's client as many session keys as mantlet gives it, where its default is one. Unverified has it verify no
	// certificate beside, which nobody should do: it tells what verification costs where sessions are resumed.
	Sessions, Unverified bool
	Restarts             bool // the server's mantlet has a configuration that Restart changes
	NoResume             bool // the client's side makes a full handshake for each connection
}

// Name is the options' name in results and reports.
func (o Options) Name() string {
	switch {
	case o.Unverified:
		return o.Proxy + "-unverified"
	case o.Sessions:
		return o.Proxy + "-64-sessions"
	}
	if o.Pods && o.Proxy != Mantlet && o.Proxy != None {
		return o.Proxy + "-in-pods"
	}
	return o.Proxy
}

// The sides of a path, as indices.
const (
	Client = iota
	Server
)

// Path is a way from a client to a server: through a proxy beside each of them, as a rule.
type Path struct {
	Options

	programs  Programs
	directory string
	network   *lab.Network
	client    *lab.Host
	pod       *lab.Host // the server's
	to        netip.AddrPort
	server    *exec.Cmd
	sides     [2]int // process ids
	logs      []string
	close     []func() error

	serverSidecar *lab.Sidecar // mantlet's
	config        string       // of that, if it is to be restarted
}

// The ports.
const (
	plainPort   = 8081 // the client's side of the proxy listens
	tlsPort     = 8443 // the server's side of a proxy listens
	workload    = 9000 // the server listens
	startWithin = time.Minute
)

// Start lays out a path and waits until messages get through. The directory is for its files; it must exist.
func Start(programs Programs, directory string, mesh *lab.Authority, options Options) (p *Path, err error) {
	p = &Path{Options: options, programs: programs, directory: directory}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("starting %s: %w%s", options.Name(), err, p.said()), p.Close())
		}
	}()
	if p.network, err = lab.NewNetwork(); err != nil {
		return p, err
	}
	p.close = append(p.close, p.network.Close)
	server, err := p.host("server")
	if err != nil {
		return p, err
	}
	p.pod = server
	if p.client, err = p.host("client"); err != nil {
		return p, err
	}
	if p.server, err = p.start(server, "server", programs.Self, "serve", fmt.Sprintf("0.0.0.0:%d", workload)); err != nil {
		return p, err
	}
	p.to = netip.AddrPortFrom(server.IPv4, workload)
	switch options.Proxy {
	case None:
	case Mantlet:
		err = p.sidecars(server, mesh)
	default:
		err = p.peers(server, mesh)
	}
	if err != nil {
		return p, err
	}
	return p, p.await()
}

// host makes one whose ports last: thousands of connections a second would use up those of the kernel's default.
func (p *Path) host(name string) (*lab.Host, error) {
	h, err := p.network.Host(name)
	if err != nil {
		return nil, err
	}
	return h, errors.Join(
		h.Sysctl("net.ipv4.ip_local_port_range", "16384 65535"),
		h.Sysctl("net.ipv4.tcp_tw_reuse", "1"),
		h.Sysctl("net.core.somaxconn", "4096"),
	)
}

// start starts a program whose standard error goes to a file of the path's.
func (p *Path) start(host *lab.Host, name, program string, args ...string) (*exec.Cmd, error) {
	file, err := os.Create(filepath.Join(p.directory, name+".log"))
	if err != nil {
		return nil, err
	}
	defer file.Close()
	p.logs = append(p.logs, file.Name())
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = file, file
	if err := host.Start(cmd); err != nil {
		return nil, err
	}
	p.close = append(p.close, func() error {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil
	})
	return cmd, nil
}

// said returns the ends of the logs.
func (p *Path) said() string {
	var all strings.Builder
	for _, name := range p.logs {
		if text, err := os.ReadFile(name); err == nil && len(text) > 0 {
			fmt.Fprintf(&all, "\n%s:\n%s", filepath.Base(name), text[max(0, len(text)-2000):])
		}
	}
	return all.String()
}

// sidecars puts a mantlet into the pods of client and server.
func (p *Path) sidecars(server *lab.Host, mesh *lab.Authority) error {
	entry := fmt.Sprintf(`egress: [{name: server, listen: "127.137.0.1:%d", upstream: "%s", serverNames: [server]}]`, plainPort, p.to)
	env := []string{"MANTLET_CONFIG_INLINE=" + entry}
	if p.NoResume {
		wrapper, err := p.withoutSessions()
		if err != nil {
			return err
		}
		env = append(env, "MANTLET_ENVOY_PATH="+wrapper)
	}
	clients, err := p.sidecar(p.client, mesh, env...)
	if err != nil {
		return err
	}
	var followed []string
	if p.Restarts {
		p.config = filepath.Join(p.directory, "config.yaml")
		if err := os.WriteFile(p.config, []byte("envoy: {drainTime: 1s}"), 0o644); err != nil {
			return err
		}
		followed = append(followed, "MANTLET_CONFIG="+p.config)
	}
	servers, err := p.sidecar(server, mesh, followed...)
	if err != nil {
		return err
	}
	p.serverSidecar = servers
	p.sides = [2]int{Client: clients.PID(), Server: servers.PID()}
	p.to = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 137, 0, 1}), plainPort)
	return nil
}

// sidecar starts a mantlet and waits until it is ready.
func (p *Path) sidecar(host *lab.Host, mesh *lab.Authority, env ...string) (*lab.Sidecar, error) {
	s, err := host.Sidecar(p.directory, p.programs.Mantlet, append([]string{"MANTLET_ENVOY_PATH=" + p.programs.Envoy}, env...)...)
	if err != nil {
		return nil, err
	}
	identity, err := mesh.Issue(lab.Leaf{DNSNames: []string{host.Name}})
	if err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(p.directory, "mantlet-"+host.Name+".log"))
	if err != nil {
		return nil, err
	}
	p.close = append(p.close, log.Close)
	p.logs = append(p.logs, log.Name())
	s.Log = log
	if err := errors.Join(identity.Write(s.TLSDirectory), s.Start()); err != nil {
		return nil, err
	}
	p.close = append(p.close, func() error {
		if s.Ended() {
			return nil
		}
		return errors.Join(s.Signal(os.Kill), ignore(s.Wait()))
	})
	ctx, cancel := context.WithTimeout(context.Background(), startWithin)
	defer cancel()
	// The log tells it: asking for it all the while would keep mantlet busy.
	err = lab.Until(ctx, func() bool {
		text, err := os.ReadFile(log.Name())
		return err != nil || s.Ended() || bytes.Contains(text, []byte("rules are in force"))
	})
	return s, errors.Join(err, s.Ready(ctx))
}

func ignore(error) error { return nil }

// withoutSessions makes a program that is Envoy, but keeps no sessions: mantlet has no such setting.
func (p *Path) withoutSessions() (string, error) {
	const script = `#!/bin/sh
previous=
for argument; do
  if [ "$previous" = --config-path ]; then
    sed -E 's/"(max_session_keys|maxSessionKeys)": *64/"\1":0/' "$argument" >"$argument.json"
    argument=$argument.json
  fi
  set -- "$@" "$argument"
  previous=$argument
  shift
done
exec %s "$@"
`
	// mantlet lets nothing be executed that lies elsewhere.
	directory := filepath.Join(p.directory, "bin")
	path, envoy := filepath.Join(directory, "envoy-without-sessions"), filepath.Join(directory, "envoy")
	binary, err := os.ReadFile(p.programs.Envoy)
	if err != nil {
		return "", err
	}
	return path, errors.Join(os.Mkdir(directory, 0o755), os.WriteFile(envoy, binary, 0o755), os.WriteFile(path, fmt.Appendf(nil, script, envoy), 0o755))
}

// await waits until a message gets through.
func (p *Path) await() error {
	ctx, cancel := context.WithTimeout(context.Background(), startWithin)
	defer cancel()
	var last error
	err := lab.Until(ctx, func() bool {
		last = p.echo(ctx)
		return last == nil
	})
	return errors.Join(err, last)
}

func (p *Path) echo(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	conn, err := p.client.Dial(ctx, "tcp", p.to.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	return errors.Join(conn.SetDeadline(deadline), load.Exchange(conn))
}

// Close ends what runs on the path and removes it.
func (p *Path) Close() error {
	var errs []error
	for i := range p.close {
		errs = append(errs, p.close[len(p.close)-1-i]())
	}
	return errors.Join(errs...)
}

// Use is CPU time.
type Use struct {
	Sides          [2]time.Duration // of the proxies
	Client, Server time.Duration
}

// Sum is that of all processes of the path.
func (u Use) Sum() time.Duration { return u.Sides[Client] + u.Sides[Server] + u.Client + u.Server }

// use reads the CPU clocks.
func (p *Path) use(client int) (u Use, err error) {
	var errs [4]error
	for side, pid := range p.sides {
		if pid != 0 {
			u.Sides[side], errs[side] = meter.CPU(meter.Tree(pid)...)
		}
	}
	u.Client, errs[2] = meter.CPU(client)
	u.Server, errs[3] = meter.CPU(p.server.Process.Pid)
	return u, errors.Join(errs[:]...)
}

// Measured is what a job came to.
type Measured struct {
	load.Result
	Use Use
}

// Run has a client do a job and measures from when it begins to count until it ends.
func (p *Path) Run(job load.Job) (m Measured, err error) {
	err = p.during(job, func(client int) error {
		before, err := p.use(client)
		m.Use = before
		return err
	}, func(client int) error {
		after, err := p.use(client)
		m.Use = Use{
			Sides:  [2]time.Duration{after.Sides[Client] - m.Use.Sides[Client], after.Sides[Server] - m.Use.Sides[Server]},
			Client: after.Client - m.Use.Client, Server: after.Server - m.Use.Server,
		}
		return err
	}, &m.Result)
	return m, err
}

// Hold has a client hold its connections and returns what each side takes of memory, before and then.
func (p *Path) Hold(job load.Job) (before, held [2]uint64, result load.Result, err error) {
	if before, err = p.Memory(); err != nil {
		return before, held, result, err
	}
	err = p.during(job, func(int) error { return nil }, func(int) (err error) {
		held, err = p.settled()
		return err
	}, &result)
	return before, held, result, err
}

// settled returns what each side takes of memory once that grows no more: all buffers on the way are full.
func (p *Path) settled() (held [2]uint64, err error) {
	last := uint64(0)
	for calm, polls := 0, 0; calm < 3 && polls < 60; polls++ {
		time.Sleep(300 * time.Millisecond)
		if held, err = p.Memory(); err != nil {
			return held, err
		}
		calm++
		if sum := held[Client] + held[Server]; sum > last+last/200 {
			last, calm = sum, 0
		}
	}
	return held, nil
}

// Memory returns what each side takes of memory, in bytes.
func (p *Path) Memory() (bytes [2]uint64, err error) {
	var errs [2]error
	for side, pid := range p.sides {
		if pid != 0 {
			bytes[side], errs[side] = meter.Memory(meter.Tree(pid)...)
		}
	}
	return bytes, errors.Join(errs[:]...)
}

// Restart has the server's mantlet restart its Envoy so many times, one after the other.
func (p *Path) Restart(times int) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(times)*startWithin)
	defer cancel()
	for n := range times {
		next := p.config + ".next"
		// An egress entry that nobody uses: the change tightens nothing. It waits until the last Envoy but one has drained.
		text := fmt.Sprintf("envoy: {drainTime: 1s}\negress: [{listen: \"127.1.0.1:8080\", upstream: \"192.0.2.1:%d\"}]", 8000+n)
		if err := errors.Join(os.WriteFile(next, []byte(text), 0o644), os.Rename(next, p.config)); err != nil {
			return err
		}
		bootstrap := filepath.Join(p.serverSidecar.RuntimeDirectory, "envoy", fmt.Sprintf("bootstrap-%d.json", n+1))
		admin := filepath.Join(p.serverSidecar.RuntimeDirectory, "envoy", fmt.Sprintf("admin-%d.sock", n+1))
		err := lab.Until(ctx, func() bool {
			_, err := os.Stat(bootstrap)
			return err == nil && isLive(ctx, admin)
		})
		if err != nil {
			return fmt.Errorf("waiting for hot restart %d: %w%s", n+1, err, p.said())
		}
	}
	return nil
}

// RunUntil has a client do a job until something else is done.
func (p *Path) RunUntil(job load.Job, do func() error) (result load.Result, err error) {
	err = p.during(job, func(int) error { return do() }, nil, &result)
	return result, err
}

// during calls began and ended when a client that does the job says so.
func (p *Path) during(job load.Job, began, ended func(client int) error, result *load.Result) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s: %s of %d workers: %w%s", p.Name(), job.Kind, job.Workers, err, p.said())
		}
	}()
	job.To = p.to.String()
	text, err := json.Marshal(job)
	if err != nil {
		return err
	}
	cmd := exec.Command(p.programs.Self, "load", string(text))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := p.client.Start(cmd); err != nil {
		return err
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	lines := bufio.NewReader(out)
	for _, step := range []struct {
		line string
		then func(int) error
	}{{load.Began, began}, {load.Ended, ended}} {
		if step.then == nil { // the job ends when it is told
			if err := in.Close(); err != nil {
				return err
			}
			step.then = func(int) error { return nil }
		}
		line, err := lines.ReadString('\n')
		if err != nil {
			return err
		}
		if line = strings.TrimSpace(line); line != step.line {
			return fmt.Errorf("the client said %q, not %q", line, step.line)
		}
		if err := step.then(cmd.Process.Pid); err != nil {
			return err
		}
	}
	_ = in.Close()
	if err := json.NewDecoder(lines).Decode(result); err != nil {
		return err
	}
	_, _ = io.Copy(io.Discard, lines)
	if result.Count == 0 {
		return fmt.Errorf("nothing got through: %d failed: %s", result.Failed, result.Error)
	}
	return nil
}
