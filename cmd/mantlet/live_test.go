package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"mantlet/internal/lab"
)

// transactions counts how often anybody changes the pod's rules from now on.
func (p *pod) transactions() *atomic.Int64 {
	p.t.Helper()
	var conn *netlink.Conn
	p.must(p.Do(func() (err error) {
		conn, err = netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{Groups: 1 << (unix.NFNLGRP_NFTABLES - 1)})
		return err
	}))
	count, ended := &atomic.Int64{}, make(chan struct{})
	go func() {
		defer close(ended)
		for {
			messages, err := conn.Receive()
			if err != nil {
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					p.t.Error(err)
				}
				return
			}
			for _, m := range messages {
				if m.Header.Type == unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWGEN {
					count.Add(1)
				}
			}
		}
	}()
	p.t.Cleanup(func() {
		_ = conn.SetReadDeadline(time.Unix(1, 0))
		<-ended
		_ = conn.Close()
	})
	return count
}

// overridden runs a pod with an override file.
func overridden(t *testing.T, text string, env ...string) (*pod, *mounted) {
	t.Helper()
	p := newPod(t, env...)
	m := p.override(text)
	p.start()
	return p, m
}

// TestLeastAction: a change does what it takes and nothing else.
func TestLeastAction(t *testing.T) {
	t.Parallel()
	p, m := overridden(t, "{}", web)
	changes := p.transactions()
	var seen int64
	envoy := p.envoy()
	// expect compares what was done since the last call.
	expect := func(what string, transactions int64, restarts bool) {
		t.Helper()
		p.ready()
		if got := changes.Load() - seen; got != transactions {
			t.Errorf("%s: %d transactions, want %d", what, got, transactions)
		}
		pids, err := p.sidecar.Envoys()
		p.must(err)
		if last := slices.Max(pids); (last != envoy) != restarts {
			t.Errorf("%s: Envoys %v after %d, want that one is started: %v", what, pids, envoy, restarts)
		}
		seen, envoy = changes.Load(), slices.Max(pids)
	}

	m.write(fmt.Sprintf("ingress: [{port: %d, mode: mtls}, {port: 7000-7099, mode: passthrough}]", tlsPort))
	p.await("the rules follow", func() bool { return p.log.count(inForce) == 2 })
	expect("port modes", 3, false) // the maps that change are made, the rules that use them put in force, and the maps before them deleted

	// The certificates are read after the file.
	m.write(fmt.Sprintf("# other words\ningress: [{name: x, port: 7000-7099, mode: passthrough}, {port: %d, mode: mtls}]", tlsPort))
	p.must(p.sidecar.Signal(syscall.SIGHUP))
	second := p.issue("pod")
	p.must(second.Write(p.sidecar.TLSDirectory))
	p.await("the new certificate is shown", func() bool {
		conn, err := p.handshake(netip.AddrPortFrom(p.IPv4, mtlsPort), p.client.ClientConfig("pod"))
		return err == nil && conn.ConnectionState().PeerCertificates[0].SerialNumber.Cmp(second.Leaf.SerialNumber) == 0
	})
	expect("the same in other words, and certificates", 0, false)

	// Each file lacks what the one before said: that is a part of the change.
	for _, change := range []struct {
		what, text   string
		transactions int64
	}{
		{"egress", "egress: [{listen: '127.137.0.1:8081', upstream: '192.0.2.1:8080', serverNames: [billing]}]", 3},
		{"allow", "ingress: [{port: 9000, mode: mtls, allow: [a]}]", 3},
		{"TLS", "tls: {minVersion: '1.3'}", 3},
		{"access log", "accessLog: none", 0},
		{"drain time", "envoy: {drainTime: 3s}", 0},
		{"log level", "envoy: {logLevel: error}", 0},
		{"concurrency", "envoy: {concurrency: 3}", 0},
		{"parent shutdown time", "envoy: {parentShutdownTime: 9m}", 0},
	} {
		live, rules := p.log.count("Envoy is live"), p.log.count(inForce)
		m.write(change.text)
		p.await(change.what+" is in force", func() bool {
			return p.log.count("Envoy is live") > live && p.log.count(inForce) >= rules+int(min(change.transactions, 1))
		})
		expect(change.what, change.transactions, true)
	}
	p.besieged()
}

// diff runs `mantlet diff` in the pod.
func (p *pod) diff(args ...string) (code int, said, errors string) {
	p.t.Helper()
	var out, errs bytes.Buffer
	cmd := p.sidecar.Command(append([]string{"diff"}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	p.must(p.Start(cmd))
	_ = cmd.Wait()
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// against returns what `mantlet diff --against` says of an override file.
func (p *pod) against(text string) (said string) {
	p.t.Helper()
	file := filepath.Join(p.t.TempDir(), "next.yaml")
	p.must(os.WriteFile(file, []byte(text), 0o600))
	_, said, _ = p.diff("--against", file)
	return said
}

// differs checks what `mantlet diff` says, line by line; a * at the end of a line stands for any text.
func (p *pod) differs(want ...string) {
	p.t.Helper()
	code, said, errs := p.diff()
	lines := strings.Split(strings.TrimSuffix(said, "\n"), "\n")
	same := slices.EqualFunc(want, lines, func(want, line string) bool {
		start, open := strings.CutSuffix(want, "*")
		return want == line || open && strings.HasPrefix(line, start)
	})
	if code != 1 || errs != "" || !same {
		p.t.Errorf("mantlet diff: exit code %d, %q, said\n%swant\n%s", code, errs, said, strings.Join(want, "\n"))
	}
}

// details checks that `mantlet diff -v` has lines that are no steps; a * at the end of a line stands for any text.
func (p *pod) details(want ...string) {
	p.t.Helper()
	_, said, _ := p.diff("-v")
	for _, line := range want {
		start, open := strings.CutSuffix(line, "*")
		if !open {
			start += "\n"
		}
		if !strings.Contains(said, "\n  "+start) {
			p.t.Errorf("mantlet diff -v lacks %q, said\n%s", line, said)
		}
	}
}

// same waits until `mantlet diff` finds nothing: the table holds more for a moment after a change.
func (p *pod) same() {
	p.t.Helper()
	ctx, cancel := p.context()
	defer cancel()
	var code int
	var said, errs string
	if lab.Until(ctx, func() bool { code, said, errs = p.diff(); return code == 0 && said+errs == "" }) != nil {
		p.t.Errorf("mantlet diff: exit code %d, said\n%s%s", code, said, errs)
	}
}

// unowned makes the kernel keep no owner for the table, as one before 6.9 does not: it was made without.
func (p *pod) unowned() { p.nft("add table inet mantlet") }

func (p *pod) nft(args ...string) string {
	p.t.Helper()
	out, err := p.Run("nft", args...)
	p.must(err)
	return out
}

// TestDiffOfWhatIsInForce: diff tells what kernel and Envoy have otherwise than the configuration, and what it takes, while
// the daemon does nothing.
func TestDiffOfWhatIsInForce(t *testing.T) {
	t.Parallel()
	const billing = "egress: [{listen: '127.137.0.1:8081', upstream: 'billing-svc:8080', name: billing}]\n"
	p := newPod(t, web, "MANTLET_STATUS_ADDRESS=:15021")
	p.unowned()
	m := p.override(billing)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.ready()
	p.same()
	p.must(p.sidecar.Signal(syscall.SIGSTOP))
	p.same()

	// The kernel.
	for line := range strings.Lines(p.nft("-a", "-s", "list", "chain", "inet", "mantlet", "mtls_in")) {
		if rule, handle, _ := strings.Cut(strings.TrimSpace(line), " # handle "); strings.HasPrefix(rule, "tcp flags syn") && strings.Contains(rule, "127.0.0.1:15006") {
			p.nft("replace rule inet mantlet mtls_in handle", handle, strings.Replace(rule, "15006", "15999", 1))
		}
	}
	p.nft("delete element inet mantlet modes { 8080 }")
	p.differs("8080: mtls -> tls; no restart", "rules: the kernel has others than the configuration makes; -v lists them; no restart")
	p.details(
		"map modes: `8080 : goto tls_in` missing",
		"chain mtls_in rule 3: have `tcp flags syn / fin,syn,rst,ack meta nfproto ipv4 meta l4proto tcp tproxy ip to 127.0.0.1:15999 socket wildcard 0 *",
	)
	p.nft("flush ruleset")
	p.differs("the table inet mantlet is not there, or empty; no restart")
	p.must(p.sidecar.Signal(syscall.SIGCONT))
	p.await("the table is back", func() bool { return p.log.count("put back") > 0 })
	p.same()
	p.must(p.sidecar.Signal(syscall.SIGSTOP))

	// Envoy.
	m.write("egress: [{listen: '127.137.0.2:8082', upstream: 'cart-svc:8080'}]\nenvoy: {drainTime: 3s}\naccessLog: all\notherProtocols: accept\ningress: [{port: 8080, mode: mtls}]")
	p.differs(
		"8080: tls -> mtls; no restart",
		"egress 127.137.0.2:8082: new, 127.137.0.2:8082 -> cart-svc:8080; hot restart",
		"egress billing: removed, 127.137.0.1:8081; hot restart",
		"envoy.drainTime: 1s -> 3s; hot restart",
		"otherProtocols: drop -> accept; no restart",
		"accessLog: refused -> all; hot restart",
	)
	p.details(
		"map modes: have `8080 : goto tls_in`, want `8080 : goto mtls_in`",
		"map answers: have `8080 : goto tls_out`, want `8080 : goto mtls_out`",
		"chain tls_in: not wanted",
		"Envoy: cluster egress-127.137.0.1:8081 not wanted",
		"Envoy: cluster egress-127.137.0.2:8082 missing",
		"Envoy: listener egress-127.137.0.1:8081 not wanted",
		"Envoy: listener egress-127.137.0.2:8082 missing",
		"Envoy: listener ingress-mtls.filter_chains.ingress-mtls.*",
	)
	m.write(billing + "ingress: [{port: 8000-8999, mode: mtls, allow: [cart]}, {port: 8080, remove: true}]\ntls: {minVersion: '1.3'}")
	p.differs("8000-8079: mtls -> mtls for [cart]; hot restart", "8080: tls -> mtls for [cart]; hot restart",
		"8081-8999: mtls -> mtls for [cart]; hot restart", "tls.minVersion: 1.2 -> 1.3; hot restart")
	m.write(strings.Replace(billing, ":8080'", ":9999'", 1))
	p.differs("egress billing: billing-svc:8080 -> billing-svc:9999; hot restart")
	p.details(`Envoy: cluster egress-127.137.0.1:8081.eds_cluster_config.service_name: have "billing-svc:8080", want "billing-svc:9999"`)
	m.write(billing)

	// Certificates.
	p.must(p.issue("pod").Write(p.sidecar.TLSDirectory))
	p.differs("certificate: Envoy shows serial number *")
	other, err := lab.NewAuthority("mesh")
	p.must(err)
	second, err := other.Issue(lab.Leaf{DNSNames: []string{"pod"}})
	p.must(err)
	p.must(second.Write(p.sidecar.TLSDirectory))
	p.differs("certificate: Envoy shows serial number *", "mesh CA: Envoy trusts CN=mesh (key id *", "mesh CA: Envoy does not trust CN=mesh (key id *")
	p.must(os.Remove(filepath.Join(p.sidecar.TLSDirectory, "key.pem")))
	if code, said, errs := p.diff(); code != 0 || said != "" || !strings.Contains(errs, "the certificates are not good, so they are not published") {
		t.Errorf("beside a bad TLS directory, mantlet diff: exit code %d, said %q, %q", code, said, errs)
	}
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.same()

	// For machines.
	m.write("envoy: {concurrency: 3}\n" + billing)
	code, said, errs := p.diff("-o", "json")
	var plan struct{ Steps []struct{ What, Need string } }
	if err := json.Unmarshal([]byte(said), &plan); err != nil || code != 1 || errs != "" || len(plan.Steps) != 1 ||
		plan.Steps[0].What != "envoy.concurrency: 2 -> 3" || plan.Steps[0].Need != "hot restart" {
		t.Errorf("mantlet diff -o json: exit code %d, %q, said %s", code, errs, said)
	}

	// It can't be told.
	m.write("envoy: {concurrency: many}\n")
	if code, said, errs := p.diff(); code != 2 || said != "" || !strings.Contains(errs, "envoy.concurrency") {
		t.Errorf("beside a bad file, mantlet diff: exit code %d, said %q, %q", code, said, errs)
	}

	// Nothing runs.
	m.write(billing)
	p.must(p.sidecar.Signal(syscall.SIGKILL))
	_ = p.sidecar.Wait()
	p.await("Envoy ends", func() bool { return len(p.processes()) == 0 })
	p.differs("Envoy: none runs; start")
	p.run()
	p.ready()
	p.same()
}

// restart kills mantlet, waits until its Envoy is gone, and starts it anew.
func (p *pod) restart() {
	p.t.Helper()
	p.must(p.sidecar.Signal(syscall.SIGKILL))
	_ = p.sidecar.Wait()
	p.await("Envoy ends", func() bool { return len(p.processes()) == 0 })
	p.run()
	p.ready()
}

// TestGenerationsOutliveMantlet: a mantlet that starts beside rules takes over their generations, and raises those where it
// can't tell that what it wants was in force before.
func TestGenerationsOutliveMantlet(t *testing.T) {
	t.Parallel()
	p, m := overridden(t, fmt.Sprintf("ingress: [{port: %d, mode: mtls, allow: [client]}]", mtlsPort), web)
	in := func(chain string) string { return fmt.Sprintf("%d : goto %s", mtlsPort, chain) }
	has := func(when string, texts ...string) {
		t.Helper()
		p.await("it is as it shall be "+when, func() bool { code, _, _ := p.diff(); return code == 0 })
		rules := p.rules()
		for _, text := range texts {
			if !strings.Contains(rules, text) {
				t.Errorf("%s, the rules lack %q:\n%s", when, text, rules)
			}
		}
	}
	const loose, standard = "8080 : goto tls_in,", "meta l4proto tcp goto mtls_in\n"
	has("first", in("mtls_in }"), loose, standard)

	p.restart()
	has("with a list of clients, and maybe another one before", in("mtls_in_1 }"), loose, standard)
	m.write("{}")
	has("with no list any more", in("mtls_in_1 }"), loose, standard)
	before, changes := p.rules(), p.transactions()
	p.restart()
	has("with what was least strict anyway", in("mtls_in_1 }"), loose, standard)
	if got := p.rules(); got != before {
		t.Errorf("mantlet started anew changes\n%s\nto\n%s", before, got)
	}
	if got := changes.Load(); got != 3 { // it claims the table, puts deny-all there, and what was there
		t.Errorf("mantlet started anew makes %d transactions", got)
	}

	m.write("tls: {minVersion: '1.3'}")
	has("with TLS 1.3", "8080 : goto tls_in_1", in("mtls_in_2"), "tcp goto mtls_in_1\n")
	p.restart()
	has("with TLS 1.3, and maybe 1.2 before", "8080 : goto tls_in_2", in("mtls_in_3"), "tcp goto mtls_in_2\n")
	m.write("{}")
	has("with TLS 1.2", "8080 : goto tls_in_2", in("mtls_in_3"), "tcp goto mtls_in_2\n")

	// Another mesh CA while no mantlet runs.
	mesh, err := lab.NewAuthority("mesh")
	p.must(err)
	p.mesh = mesh
	p.must(p.sidecar.Signal(syscall.SIGKILL))
	_ = p.sidecar.Wait()
	p.must(p.issue("pod").Write(p.sidecar.TLSDirectory))
	p.await("Envoy ends", func() bool { return len(p.processes()) == 0 })
	p.run()
	p.ready()
	has("with another mesh CA", "8080 : goto tls_in_2", in("mtls_in_4"), "tcp goto mtls_in_3\n") // tls asks for no certificate

	// A mantlet that ended before anything was in force passes on what was before it.
	m.write(fmt.Sprintf("ingress: [{port: %d, mode: mtls, allow: [client]}]", mtlsPort))
	p.must(os.Remove(filepath.Join(p.sidecar.TLSDirectory, "key.pem")))
	p.must(p.sidecar.Signal(syscall.SIGKILL))
	_ = p.sidecar.Wait()
	p.await("Envoy ends", func() bool { return len(p.processes()) == 0 })
	p.run()
	p.must(p.sidecar.Signal(syscall.SIGKILL))
	_ = p.sidecar.Wait()
	p.must(p.issue("pod").Write(p.sidecar.TLSDirectory))
	p.run()
	p.ready()
	has("after deny-all", in("mtls_in_5"), "8080 : goto tls_in_2", "tcp goto mtls_in_3\n")
	p.besieged()
}

// putBack is what mantlet says of a repair.
type putBack struct {
	Msg, By string
	Found   []string
}

// repairs returns what mantlet said of repairs.
func (p *pod) repairs() (all []putBack) {
	for line := range strings.Lines(p.log.String()) {
		var said putBack
		if json.Unmarshal([]byte(line), &said) == nil && said.Msg == "rules were changed from outside and are put back" {
			all = append(all, said)
		}
	}
	return all
}

// TestDrift: where the kernel keeps no owner, whatever another process does to the table is put back at once, and the log says
// what was different and who did it. Before and after, nothing comes in.
func TestDrift(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	p.unowned()
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.ready()
	// Not one of those that may never see plaintext: some changes do open the port, for as long as mantlet takes.
	workload := p.serve(p.Host, lab.Service{Address: fmt.Sprintf(":%d", mtlsPort)})
	p.besieger()
	want := p.rules()
	intruder := filepath.Join(t.TempDir(), "intruder")
	nft, err := exec.LookPath("nft")
	p.must(err)
	p.must(os.Symlink(nft, intruder))

	// rule returns the first rule of a chain that has a text, and its handle.
	rule := func(chain, text string) (rule, handle string) {
		for line := range strings.Lines(p.nft("-a", "-s", "list", "chain", "inet", "mantlet", chain)) {
			if rule, handle, _ = strings.Cut(strings.TrimSpace(line), " # handle "); strings.Contains(rule, text) {
				return rule, handle
			}
		}
		t.Fatalf("no rule of chain %s has %q", chain, text)
		return "", ""
	}
	replace := func(chain, old, text string) string {
		rule, handle := rule(chain, old)
		return fmt.Sprintf("replace rule inet mantlet %s handle %s %s", chain, handle, strings.Replace(rule, old, text, 1))
	}
	remove := func(chain, text string) string {
		_, handle := rule(chain, text)
		return fmt.Sprintf("delete rule inet mantlet %s handle %s", chain, handle)
	}
	named := 0
	for _, change := range []struct {
		command func() string
		found   string // the beginning of what differs
	}{
		{func() string { return replace("mtls_in", "127.0.0.1:15006", "127.0.0.1:15999") }, "chain mtls_in rule 3: have `tcp flags syn / fin,syn,rst,ack meta nfproto ipv4 meta l4proto tcp tproxy ip to 127.0.0.1:15999"},
		{func() string { return replace("tls_in", "[::1]:15007", "[::1]:15006") }, "chain tls_in rule 4: have `tcp flags syn / fin,syn,rst,ack meta nfproto ipv6 meta l4proto tcp tproxy ip6 to [::1]:15006"},
		{func() string { return remove("mtls_in", "socket wildcard 0") }, "chain mtls_in rule 3: `tcp flags syn"},
		{func() string { return "delete element inet mantlet modes { 8080 }" }, "map modes: `8080 : goto tls_in` missing"},
		{func() string { return "add element inet mantlet modes { 9090 : goto passthrough_in }" }, "map modes: `9090 : goto passthrough_in` not wanted"},
		{func() string { return "insert rule inet mantlet ingress accept" }, "chain ingress rule 1: `accept` not wanted"},
		{func() string { return "insert rule inet mantlet egress tcp sport 9090 accept" }, "chain egress rule 1: `meta l4proto tcp @th,0,16 == 0x2382 accept` not wanted"},
		{func() string { return "add chain inet mantlet ingress { policy accept; }" }, "chain ingress: have `type filter hook prerouting priority mangle; policy accept;`"},
		{func() string { return "add chain inet mantlet before { type filter hook prerouting priority -300; }" }, "chain before (type filter hook prerouting priority -300; policy accept;): not wanted"},
		{func() string { return "rename chain inet mantlet passthrough_out x" }, "chain passthrough_out: missing"},
		{func() string { return "add set inet mantlet x { type inet_service; }" }, "set x: not wanted"},
		{func() string { return "add table inet mantlet { flags dormant; }" }, "table flag dormant, which switches every rule off: not wanted"},
		{func() string { return "flush chain inet mantlet ports" }, "chain ports rule 1: `meta l4proto { tcp, udp } th dport vmap @modes` missing"},
		{func() string { return "flush table inet mantlet" }, "chain ingress rule 1: `iif \"lo\" accept` missing"},
		{func() string { return "delete table inet mantlet" }, "the table inet mantlet is not there, or empty"},
		{func() string { return "flush ruleset" }, "the table inet mantlet is not there, or empty"},
		{func() string {
			return "delete table inet mantlet; table inet mantlet { chain ingress { type filter hook prerouting priority mangle; policy accept; }; }"
		}, "map modes: missing"},
	} {
		command, before := change.command(), len(p.repairs())
		_, err := p.Run(intruder, command)
		p.must(err)
		p.await("it is put back after "+command, func() bool { return len(p.repairs()) > before && p.rules() == want })
		r := p.repairs()[before]
		if r.By == "intruder" {
			named++
		}
		// The check that finds it may have been under way before the kernel told who it was.
		if r.By != "intruder" && r.By != "" || !slices.ContainsFunc(r.Found, func(line string) bool { return strings.HasPrefix(line, change.found) }) {
			t.Errorf("after %s mantlet says that by %q differed\n\t%s\nwant\n\t%s", command, r.By, strings.Join(r.Found, "\n\t"), change.found)
		}
		p.besieged() // what came in before is over
		leaked := workload.Leaked()
		p.besieged()
		if now := workload.Leaked(); now > leaked {
			t.Errorf("after %s was put back, %d bytes of plaintext came in", command, now-leaked)
		}
		p.same()
	}
	if named == 0 {
		t.Error("mantlet never says who changed the rules")
	}
	p.must(p.exchange(netip.AddrPortFrom(p.IPv6, mtlsPort), p.client.ClientConfig("pod")))

	// What it did not see happen, it finds.
	p.must(p.sidecar.Signal(syscall.SIGSTOP))
	for range 3 {
		p.nft("flush ruleset")
		p.nft("add table inet mantlet")
	}
	p.must(p.sidecar.Signal(syscall.SIGCONT))
	p.await("the rules are back", func() bool { return p.rules() == want })
}

// besieger starts a prober that is no judge.
func (p *pod) besieger() {
	p.besiege()
	p.t.Cleanup(func() {
		p.prober.Stop()
		p.prober = nil
	})
}

// TestForeignTables: rules of other software stay as they are; of those that undermine mantlet's it warns, once of each.
func TestForeignTables(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	p.nft("table inet raw { chain pre { type filter hook prerouting priority -300; udp dport 9999 notrack; }; }")
	p.start()
	const undermine = "rules of another table undermine mantlet's"
	p.await("it warns of what was there", func() bool { return p.log.count(undermine) == 1 })
	p.nft("table inet early { chain pre { type filter hook prerouting priority -400; accept; }; }")
	p.nft("table ip nat { chain pre { type nat hook prerouting priority -100; tcp dport 7890 redirect to :8080; }; }")
	p.await("it warns of what comes", func() bool { return p.log.count(undermine) == 2 })
	for _, finding := range []string{"table inet raw, chain pre: notrack", "table ip nat, chain pre: redir"} {
		if p.log.count(finding) != 1 {
			t.Errorf("%q is not warned of once", finding)
		}
		if code, said := p.probe("ready"); code != 0 || !strings.Contains(said, finding) {
			t.Errorf("probe ready: exit code %d: %s", code, said)
		}
	}
	p.nft("delete table ip nat")
	p.await("it is no more noted", func() bool { _, said := p.probe("ready"); return !strings.Contains(said, "redir") })
	if got := p.nft("list tables"); got != "table inet raw\ntable inet mantlet\ntable inet early\n" {
		t.Errorf("the tables are\n%s", got)
	}
	p.besieged()
}
