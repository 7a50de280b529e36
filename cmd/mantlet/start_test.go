package main

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"mantlet/internal/lab"
	"mantlet/schema"
)

// TestArguments: whatever follows `mantlet run`, the pod is closed first; then mantlet says what is wrong. Help alone touches nothing.
func TestArguments(t *testing.T) {
	t.Parallel()
	tables := func(p *pod) string {
		t.Helper()
		out, err := p.Run("nft", "list", "tables")
		p.must(err)
		return out
	}
	for args, says := range map[string]string{
		"run --nonsense": "unknown flag: --nonsense", "run nonsense": `takes no arguments, but gets \"nonsense\"`, "--nonsense run": "unknown flag: --nonsense",
		"run -x --allow-host-network": "unknown shorthand flag: 'x'", "run help": `takes no arguments, but gets \"help\"`,
		"-l debug --nonsense": "unknown flag: --nonsense", "-l debug nonsense": `takes no arguments, but gets \"nonsense\"`, "-l loud": "must be one of trace, debug, info",
		"-l": "flag needs an argument: 'l' in -l", "run -l debug --port=80": "unknown flag: --port",
	} {
		t.Run(args, func(t *testing.T) {
			t.Parallel()
			p := newPod(t, web)
			p.besiege()
			code, out, said := p.mantlet(strings.Fields(args)...)
			if code != 2 || out != "" || !strings.Contains(said, says) || !strings.Contains(said, `"rules":"they stay"`) || !strings.Contains(said, "mantlet run --help") {
				t.Errorf("exit code %d: %s%s", code, out, said)
			}
			p.protect(tlsPort)
			p.protect(mtlsPort)
			p.besieged()
			if total := p.prober.Stats().Total(); total.Accepted > 0 || !strings.Contains(tables(p), "table inet mantlet") {
				t.Errorf("%+v, want nothing accepted; tables: %s", total, tables(p))
			}
		})
	}
	for _, args := range []string{"run --help", "run -h", "run --nonsense --help", "--help run", "help run", "nonsense", "--nonsense"} {
		t.Run(args, func(t *testing.T) {
			t.Parallel()
			p := newPod(t, web)
			code, out, said := p.mantlet(strings.Fields(args)...)
			if help := !strings.Contains(args, "nonsense") || strings.Contains(args, "help"); help != (code == 0) || help != strings.Contains(out, "allow-host-network") {
				t.Errorf("exit code %d: %s%s", code, out, said)
			}
			if left := tables(p); left != "" {
				t.Errorf("it made tables:\n%s", left)
			}
		})
	}
}

// TestEnvoyLogLevel: what -l says takes the place of the variable, with and without the command's name.
func TestEnvoyLogLevel(t *testing.T) {
	t.Parallel()
	for _, args := range []string{"-l debug", "run -l debug", "--envoy-log-level=debug", "run -ldebug"} {
		t.Run(args, func(t *testing.T) {
			t.Parallel()
			p := newPod(t, web, schema.LogLevelVariable+"=error")
			p.sidecar.Args = strings.Fields(args)
			p.start()
			if code, out, said := p.mantlet("diff", "-l", "debug"); code != 0 {
				t.Errorf("diff -l debug: exit code %d: %s%s", code, out, said)
			}
			if code, out, said := p.mantlet("diff"); code != 1 || !strings.Contains(out, "envoy.logLevel: debug -> error") {
				t.Errorf("diff: exit code %d: %s%s", code, out, said)
			}
		})
	}
}

// TestEqualAddresses: the environment can say that the pod has hostNetwork; that keeps nothing open, nor mantlet from its work, where
// the network namespace is the pod's own.
func TestEqualAddresses(t *testing.T) {
	t.Parallel()
	for host, warned := range map[string]bool{"192.0.2.7": true, "::ffff:192.0.2.7": true, "192.0.2.8": false} {
		t.Run(host, func(t *testing.T) {
			t.Parallel()
			p := start(t, web, "MANTLET_POD_IP=192.0.2.7", "MANTLET_HOST_IP="+host)
			p.besieged()
			if got := p.log.count("the environment says that the pod has hostNetwork") > 0; got != warned {
				t.Errorf("it is said: %v", got)
			}
		})
	}
}

// TestForeignContent: a table by mantlet's name that another process filled neither ends mantlet nor stays in force.
func TestForeignContent(t *testing.T) {
	t.Parallel()
	for name, commands := range map[string]string{
		"catch-all element": "add chain inet mantlet ports; add chain inet mantlet mtls_in; add rule inet mantlet ports goto mtls_in; " +
			"add map inet mantlet modes { type inet_service : verdict; flags interval; elements = { 80 : goto mtls_in, * : accept }; }",
		"open": "add chain inet mantlet ingress { type filter hook prerouting priority mangle; policy accept; }; add rule inet mantlet ingress accept; " +
			"add counter inet mantlet c; add set inet mantlet s { type ipv4_addr . inet_service; }",
		"objects and sets": `add counter inet mantlet c; add map inet mantlet modes { type inet_service : counter; elements = { 80 : "c" }; }`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t, web)
			p.nft("add table inet mantlet; " + commands)
			p.start()
			p.besieged()
			p.same()
		})
	}
}

// squat takes a name of an abstract socket, as any process of the pod may.
func (p *pod) squat(name string) net.Listener {
	p.t.Helper()
	var listener net.Listener
	p.must(p.Do(func() (err error) {
		listener, err = net.Listen("unix", name)
		return err
	}))
	p.t.Cleanup(func() { _ = listener.Close() })
	return listener
}

// TestSquatter: a process that takes the name of mantlet's socket keeps mantlet from nothing.
func TestSquatter(t *testing.T) {
	t.Parallel()
	const says = "a process that is not mantlet has the name of mantlet's socket"
	for name, unowned := range map[string]bool{"owned": false, "not owned": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t, web)
			if unowned {
				p.unowned()
			}
			squatter := p.squat("@mantlet")
			p.start()
			if got := p.log.count(says) == 1 && p.log.count(fmt.Sprintf(`"by":"(process %d, user 0)"`, os.Getpid())) == 1; got != unowned {
				t.Errorf("it is said: %v", got)
			}
			// Nor does what takes the name of a mantlet that has ended pass for it.
			p.must(squatter.Close())
			p.restart()
			p.must(p.sidecar.Signal(syscall.SIGKILL))
			_ = p.sidecar.Wait()
			p.squat("@mantlet")
			p.await("Envoy ends", func() bool { return len(p.processes()) == 0 })
			p.run()
			p.ready()
			p.besieged()
		})
	}
}

// TestMantletsStartTogether: of mantlets that start at the same time one goes on, and the others end.
func TestMantletsStartTogether(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	p.unowned()
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	var all []*lab.Sidecar
	for range 3 {
		s, err := p.Sidecar(t.TempDir(), p.sidecar.Binary, p.sidecar.Env...)
		p.must(err)
		s.TLSDirectory, s.Log = p.sidecar.TLSDirectory, p.log
		all = append(all, s)
	}
	for _, s := range all {
		p.must(s.Start())
	}
	alive := func() (alive []*lab.Sidecar) {
		for _, s := range all {
			if !s.Ended() {
				alive = append(alive, s)
			}
		}
		return alive
	}
	p.await("one is left", func() bool { return len(alive()) == 1 })
	p.sidecar = alive()[0]
	p.protect(mtlsPort)
	p.ready()
	if got := p.log.count("another mantlet owns this network namespace (process "); got != 2 {
		t.Errorf("it was said %d times that another mantlet is there", got)
	}
	p.must(p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), p.client.ClientConfig("pod")))
}

// TestCleanup: what a mantlet left is removed, and one that runs is not disturbed.
func TestCleanup(t *testing.T) {
	t.Parallel()
	for name, unowned := range map[string]bool{"owned": false, "not owned": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t, web)
			cleanup := func(want int, says string) {
				t.Helper()
				if code, out, said := p.mantlet("cleanup"); code != want || !strings.Contains(out+said, says) {
					t.Errorf("exit code %d: %s%s", code, out, said)
				}
			}
			cleanup(0, "there is no table inet mantlet")
			if unowned {
				p.unowned()
			}
			p.nft("add table inet other")
			p.must(p.identity.Write(p.sidecar.TLSDirectory))
			p.run()
			p.ready()
			cleanup(2, fmt.Sprintf("another mantlet owns this network namespace (process %d, user 0)", p.sidecar.PID()))
			p.same()
			p.must(p.sidecar.Signal(unix.SIGKILL))
			_ = p.sidecar.Wait()
			p.await("Envoy ends", func() bool { return len(p.processes()) == 0 })
			cleanup(0, "removed the table inet mantlet")
			cleanup(0, "there is no table inet mantlet")
			if tables := p.nft("list", "tables"); tables != "table inet other\n" {
				t.Errorf("there are tables\n%s", tables)
			}
		})
	}
}
