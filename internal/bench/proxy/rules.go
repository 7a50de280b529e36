package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"mantlet/internal/lab"
)

// Rules are what a packet goes through on its way to a server that is no proxy.
type Rules struct {
	Kind    string // Mantlet, IPTables or None
	Entries int    // ports that are exempt
	Inside  bool   // the client is in the server's own namespace: its packets take lo
}

// IPTables stands for rules of the kind that iptables-based sidecars make: a rule for each exempt port, and TPROXY for the rest.
const IPTables = "iptables"

// proxyPort is where both kinds of rules send connections.
const proxyPort = 15006

// Exempt returns the nth exempt port. No two are neighbours, so that ranges would not help.
func Exempt(n int) int { return 20000 + 2*n }

// StartRules lays out a client and a server between which there are only rules.
func StartRules(programs Programs, directory string, mesh *lab.Authority, rules Rules) (p *Path, err error) {
	p = &Path{Options: Options{Proxy: rules.Kind}, programs: programs, directory: directory}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("starting with rules of %s: %w%s", rules.Kind, err, p.said()), p.Close())
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
	p.client, p.pod = server, server
	listen, serve := fmt.Sprintf("0.0.0.0:%d", workload), "serve"
	p.to = netip.AddrPortFrom(server.IPv4, workload)
	if !rules.Inside {
		if p.client, err = p.host("client"); err != nil {
			return p, err
		}
		if rules.Kind != None {
			listen, serve = fmt.Sprintf("127.0.0.1:%d", proxyPort), "serve-transparently"
		}
	}
	switch rules.Kind {
	case Mantlet:
		err = p.leaveRules(server, mesh, rules.Entries)
	case IPTables:
		err = p.iptables(server, rules.Entries)
	}
	if err != nil {
		return p, err
	}
	if p.server, err = p.start(server, "server", programs.Self, serve, listen); err != nil {
		return p, err
	}
	return p, p.await()
}

// leaveRules has mantlet make its rules, and ends it: they stay, and the server takes Envoy's place.
func (p *Path) leaveRules(server *lab.Host, mesh *lab.Authority, entries int) error {
	var config strings.Builder
	config.WriteString("ingress:\n")
	for n := range entries {
		fmt.Fprintf(&config, "  - {port: %d, mode: passthrough}\n", Exempt(n))
	}
	file := filepath.Join(p.directory, "config.yaml")
	if err := os.WriteFile(file, []byte(config.String()), 0o644); err != nil {
		return err
	}
	sidecar, err := p.sidecar(server, mesh, "MANTLET_CONFIG="+file)
	if err != nil {
		return err
	}
	envoys, err := sidecar.Envoys()
	if err != nil {
		return err
	}
	if err := errors.Join(sidecar.Signal(os.Kill), ignore(sidecar.Wait())); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), startWithin)
	defer cancel()
	return lab.Until(ctx, func() bool {
		for _, pid := range envoys {
			if unix.Kill(pid, 0) == nil {
				return false
			}
		}
		return true
	})
}

// iptables makes the rules: of connections that are new, a rule for each exempt port decides.
func (p *Path) iptables(server *lab.Host, entries int) error {
	var rules bytes.Buffer
	rules.WriteString("*mangle\n:INBOUND - [0:0]\n-A PREROUTING -p tcp -j INBOUND\n")
	rules.WriteString("-A INBOUND -i lo -j RETURN\n-A INBOUND -m conntrack --ctstate RELATED,ESTABLISHED -j RETURN\n")
	for n := range entries {
		fmt.Fprintf(&rules, "-A INBOUND -p tcp --dport %d -j RETURN\n", Exempt(n))
	}
	fmt.Fprintf(&rules, "-A INBOUND -p tcp -j TPROXY --on-port %d --on-ip 127.0.0.1\nCOMMIT\n", proxyPort)
	// A lock of the lab's own: another user's can't be taken.
	cmd := exec.Command("env", "XTABLES_LOCKFILE="+filepath.Join(p.directory, "xtables.lock"), p.programs.IPTables+"-restore")
	cmd.Stdin = &rules
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	err := server.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return fmt.Errorf("%w: %s", err, said.Bytes())
	}
	return nil
}

// Transparent lets a socket take connections that are to other addresses.
func Transparent(_, _ string, conn syscall.RawConn) error {
	var err error
	return errors.Join(conn.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1) }), err)
}

// Conntrack returns for how many seconds conntrack will go on keeping an entry of the server's pod, in the mean of those of connections
// that have ended, and how many entries its table has room for.
func (p *Path) Conntrack() (seconds, room float64, err error) {
	// The longest of the kernel's time-outs of a connection that has ended is 120 s, the shortest of one that has not is 300 s.
	const ended = 120
	err = p.pod.Do(func() error {
		flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		if err != nil {
			return err
		}
		count := 0
		for _, flow := range flows {
			if flow.TimeOut <= ended {
				seconds += float64(flow.TimeOut)
				count++
			}
		}
		seconds /= float64(max(1, count))
		text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_max")
		if err != nil {
			return err
		}
		room, err = strconv.ParseFloat(strings.TrimSpace(string(text)), 64)
		return err
	})
	return seconds, room, err
}
