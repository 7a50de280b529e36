package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"mantlet/internal/lab"
)

// callers are clients that go on connecting; none of their connections may be refused.
type callers struct {
	stop func()
	done sync.WaitGroup
	good atomic.Int64

	mu    sync.Mutex
	worst time.Duration
	errs  []error
}

func (p *pod) call(port uint16) *callers {
	ctx, cancel := context.WithCancel(context.Background())
	c := &callers{stop: cancel}
	for _, addr := range p.Addrs() {
		c.done.Go(func() {
			for ctx.Err() == nil {
				began := time.Now()
				conn, err := p.outside.Dial(ctx, "tcp", netip.AddrPortFrom(addr, port).String())
				if ctx.Err() != nil {
					return
				}
				c.mu.Lock()
				c.worst = max(c.worst, time.Since(began))
				switch {
				case err == nil:
					c.good.Add(1)
					_ = conn.Close()
				case errors.Is(err, syscall.ECONNRESET): // it was made, and ended with the Envoy that had it
				default:
					c.errs = append(c.errs, err)
				}
				c.mu.Unlock()
			}
		})
	}
	p.t.Cleanup(func() { c.stop(); c.done.Wait() })
	return c
}

func TestEnvoyIsKilled(t *testing.T) {
	t.Parallel()
	p := start(t, web)
	before := p.envoy()
	server := p.host("server")
	far := p.serve(server, lab.Service{Address: ":5432"})
	outbound := p.dial(p.Host, netip.AddrPortFrom(server.IPv4, 5432))
	outbound6 := p.dial(p.Host, netip.AddrPortFrom(server.IPv6, 5432))
	p.must(errors.Join(echo(outbound), echo(outbound6)))
	calls := p.call(mtlsPort)
	p.await("calls come through", func() bool { return calls.good.Load() > 20 })

	for kills := 1; kills <= 3; kills++ {
		old := p.envoy()
		p.must(syscall.Kill(old, syscall.SIGKILL))
		during := p.dial(p.Host, netip.AddrPortFrom(server.IPv6, 5432))
		p.await("Envoy is back", func() bool {
			pids, _ := p.sidecar.Envoys()
			return len(pids) == 1 && pids[0] != old
		})
		p.must(errors.Join(echo(outbound), echo(outbound6), echo(during)))
		p.ready()
		p.besieged()
		for _, addr := range p.Addrs() {
			p.must(p.exchange(netip.AddrPortFrom(addr, mtlsPort), p.client.ClientConfig("pod")))
			p.must(p.exchange(netip.AddrPortFrom(addr, tlsPort), p.anonymous()))
		}
	}
	calls.stop()
	calls.done.Wait()
	if len(calls.errs) > 0 {
		t.Errorf("%d of %d calls were refused: %v", len(calls.errs), calls.good.Load(), calls.errs[0])
	}
	t.Logf("%d calls, the slowest took %v to connect", calls.good.Load(), calls.worst)
	if syscall.Kill(before, 0) == nil {
		t.Errorf("Envoy %d is still there, or was not reaped", before)
	}
	if got := len(far.Connections()); got != 5 {
		t.Errorf("the far end saw %d connections, want 5", got)
	}
}

// TestMantletIsKilled: nobody watches any more, so Envoy ends, and the rules that stay let nothing in. The next mantlet
// takes over what is there.
func TestMantletIsKilled(t *testing.T) {
	t.Parallel()
	p := start(t, web)
	server := p.host("server")
	p.serve(server, lab.Service{Address: ":5432"})
	outbound := p.dial(p.Host, netip.AddrPortFrom(server.IPv6, 5432))
	p.must(echo(outbound))
	long, err := p.handshake(netip.AddrPortFrom(p.IPv4, mtlsPort), p.client.ClientConfig("pod"))
	p.must(err)
	p.must(echo(long))

	envoy := p.envoy()
	p.must(p.sidecar.Signal(syscall.SIGKILL))
	_ = p.sidecar.Wait()
	p.await("Envoy ends", func() bool { return syscall.Kill(envoy, 0) != nil })
	if err := cut(long); err != nil {
		t.Errorf("a connection through the Envoy that ended: %v", err)
	}
	if rules := p.rules(); !strings.Contains(rules, "tproxy") {
		t.Errorf("the rules that stay are:\n%s", rules)
	}
	p.besieged()
	for _, addr := range p.Addrs() {
		for _, port := range []uint16{tlsPort, mtlsPort} {
			if conn, err := p.dialBriefly(netip.AddrPortFrom(addr, port)); err == nil {
				_ = conn.Close()
				t.Errorf("%s:%d accepts connections", addr, port)
			}
		}
	}
	p.must(echo(outbound))

	// It may have been killed while it wrote.
	for _, name := range []string{".last-good.json4711", "envoy/.sds-identity.json4711", "envoy/preflight.pb"} {
		p.must(os.WriteFile(filepath.Join(p.sidecar.RuntimeDirectory, name), nil, 0o600))
	}
	p.run()
	p.ready()
	p.besieged()
	for _, addr := range p.Addrs() {
		p.must(p.exchange(netip.AddrPortFrom(addr, mtlsPort), p.client.ClientConfig("pod")))
	}
	p.must(echo(outbound))
	p.must(p.sidecar.Stop())
	p.leavesNothing()
	p.besieged()
	p.must(echo(outbound))
}

// TestEnvoyIsLeftBehind: an Envoy that is stopped when mantlet is killed outlives it. The next mantlet ends it before anything
// comes in, and no other process.
func TestEnvoyIsLeftBehind(t *testing.T) {
	t.Parallel()
	p := start(t, web)
	innocent := exec.Command("sh", "-c", "sleep 86399; exit", "envoy", "--base-id", "1", "--restart-epoch", "0")
	p.must(p.Start(innocent))
	for _, directory := range []string{p.sidecar.RuntimeDirectory, t.TempDir()} {
		left := p.envoy()
		p.must(syscall.Kill(left, syscall.SIGSTOP))
		p.must(p.sidecar.Signal(syscall.SIGKILL))
		_ = p.sidecar.Wait()
		if err := syscall.Kill(left, 0); err != nil {
			t.Fatalf("no Envoy is left behind: %v", err)
		}
		p.besieged()
		p.sidecar.RuntimeDirectory = directory
		p.run()
		p.ready()
		if err := syscall.Kill(left, 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("Envoy %d is still there: %v", left, err)
		}
		for range 10 {
			for _, addr := range p.Addrs() {
				p.must(p.exchange(netip.AddrPortFrom(addr, mtlsPort), p.client.ClientConfig("pod")))
			}
		}
	}
	p.must(innocent.Process.Kill())
	if err := innocent.Wait(); err.Error() != "signal: killed" {
		t.Errorf("another process ended with %v", err)
	}
	if got := p.log.count("left behind"); got != 2 {
		t.Errorf("it was said %d times, want 2", got)
	}
	p.besieged()
}

// TestImpostor: a process that has the command line of an Envoy, and that mantlet may not end, keeps it from nothing.
func TestImpostor(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	impostor := exec.Command("sh", "-c", "sleep 86399; exit", "envoy", "--base-id", strconv.FormatUint(p.baseID(), 10), "--restart-epoch", "0")
	p.must(p.Start(impostor))
	p.start()
	if lab.EnvoyUser() != 0 && syscall.Kill(impostor.Process.Pid, 0) != nil {
		t.Error("another user's process was ended; then the rest proves nothing")
	}
	p.must(p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), p.client.ClientConfig("pod")))
	p.besieged()
	p.must(impostor.Process.Kill())
	_ = impostor.Wait()
}

// TestMantletIsKilledWhileEnvoyStarts: Envoy asks for its end itself only once it runs.
func TestMantletIsKilledWhileEnvoyStarts(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "envoy")
	p := newPod(t, "MANTLET_ENVOY_PATH="+path)
	p.must(os.WriteFile(path, []byte("#!/bin/sh\nexec sleep 86399"), 0o755))
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	// In the moment between fork and exec it is not under the signal yet: then the next mantlet ends it.
	p.await("Envoy is started", func() bool {
		pids, err := p.sidecar.Envoys()
		if err != nil || len(pids) != 1 {
			return false
		}
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pids[0]))
		return err == nil && bytes.HasPrefix(line, []byte("sleep\x00"))
	})
	p.must(p.sidecar.Signal(syscall.SIGKILL))
	_ = p.sidecar.Wait()
	p.await("nothing runs", func() bool { return len(p.processes()) == 0 })
}

// rules returns the live table.
func (p *pod) rules() string {
	p.t.Helper()
	rules, err := p.Run("nft", "--stateless", "list", "table", "inet", "mantlet")
	p.must(err)
	return rules
}

// dialBriefly gives a dial less time than its first retransmission takes.
func (p *pod) dialBriefly(to netip.AddrPort) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	return p.outside.Dial(ctx, "tcp", to.String())
}

// leavesNothing checks that mantlet is gone, and with it all but the rules, what belongs to the user and what the next mantlet
// may need.
func (p *pod) leavesNothing() {
	p.t.Helper()
	for _, directory := range []string{"", "envoy"} {
		files, err := os.ReadDir(filepath.Join(p.sidecar.RuntimeDirectory, directory))
		p.must(err)
		for _, f := range files {
			if f.Name() != "envoy" && f.Name() != "last-good.json" {
				p.t.Errorf("%s is left in the runtime directory", f.Name())
			}
		}
	}
	shared, err := filepath.Glob(fmt.Sprintf("/dev/shm/envoy_shared_memory_%d", p.baseID()*10))
	p.must(err)
	if len(shared) > 0 {
		p.t.Errorf("left behind: %v", shared)
	}
	pids := p.processes()
	if len(pids) > 0 {
		p.t.Errorf("processes %v are left", pids)
	}
}

// baseID is what tells this pod's shared memory apart.
func (p *pod) baseID() (id uint64) {
	p.t.Helper()
	p.must(p.Do(func() error {
		var stat syscall.Stat_t
		err := syscall.Stat("/proc/thread-self/ns/net", &stat)
		id = stat.Ino % (1 << 28)
		return err
	}))
	return id
}

// processes returns those that run in the pod's network namespace.
func (p *pod) processes() (pids []string) {
	p.t.Helper()
	var own string
	p.must(p.Do(func() (err error) {
		own, err = os.Readlink("/proc/thread-self/ns/net")
		return err
	}))
	links, err := filepath.Glob("/proc/[0-9]*/ns/net")
	p.must(err)
	for _, link := range links {
		if is, err := os.Readlink(link); err == nil && is == own {
			pids = append(pids, strings.Split(link, "/")[2])
		}
	}
	return pids
}

// TestSIGTERM: mantlet is unready at once and goes on serving, until no connection is left or the drain time is over.
// Nothing is left behind but the rules.
func TestSIGTERM(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		drain       string
		end         func(p *pod, long net.Conn) // nil: no connection is open
		least, most time.Duration
	}{
		"no connection": {"60s", nil, 0, 5 * time.Second},
		"connection ends": {"60s", func(p *pod, long net.Conn) {
			p.besieged() // strangers hold up nothing
			p.must(echo(long))
			p.must(long.Close())
		}, 0, 10 * time.Second},
		"drain time is over": {"2s", func(p *pod, long net.Conn) { p.check(cut(long)) }, 2 * time.Second, 10 * time.Second},
		"second SIGTERM": {"60s", func(p *pod, long net.Conn) {
			p.must(p.sidecar.Signal(syscall.SIGTERM))
			p.check(cut(long))
		}, 0, 10 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := start(t, web, "MANTLET_ENVOY_DRAIN_TIME="+c.drain)
			var long net.Conn
			if c.end != nil {
				conn, err := p.handshake(netip.AddrPortFrom(p.IPv6, mtlsPort), p.client.ClientConfig("pod"))
				p.must(err)
				p.must(echo(conn))
				long = conn
			}
			began := time.Now()
			p.must(p.sidecar.Signal(syscall.SIGTERM))
			if c.end != nil {
				p.unready("mantlet is stopping")
				p.must(echo(long))
				c.end(p, long)
			}
			if err := p.sidecar.Wait(); err != nil {
				t.Errorf("mantlet ended: %v", err)
			}
			if took := time.Since(began); took < c.least || took > c.most {
				t.Errorf("it took %v, want from %v to %v", took, c.least, c.most)
			}
			p.leavesNothing()
			p.besieged()
			for line := range strings.Lines(p.log.String()) {
				var fields struct{ Time, Level, Msg string }
				if err := json.Unmarshal([]byte(line), &fields); err != nil || fields.Time == "" || fields.Level == "" || fields.Msg == "" {
					t.Errorf("a line of the log is not JSON with time, level and msg: %v: %s", err, line)
				}
			}
		})
	}
}

// TestSIGTERMAfterHotRestart: connections of an Envoy that drains get their time as all others do, and no more than they need.
func TestSIGTERMAfterHotRestart(t *testing.T) {
	t.Parallel()
	p, m, others, concerned := reloadable(t, "MANTLET_ENVOY_DRAIN_TIME=60s")
	m.write("egress: [{listen: '127.137.0.1:8081', upstream: '192.0.2.1:1'}]")
	p.await("there was a hot restart", func() bool { return p.log.count("Envoy is live") == 2 })
	p.ready()
	began := time.Now()
	p.must(p.sidecar.Signal(syscall.SIGTERM))
	p.unready("mantlet is stopping")
	p.besieged() // many times as long as the count takes
	for _, conn := range append(others, concerned...) {
		p.must(echo(conn))
		p.must(conn.Close())
	}
	if err := p.sidecar.Wait(); err != nil {
		t.Errorf("mantlet ended: %v", err)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("it took %v, and no connection was left", took)
	}
	p.leavesNothing()
}

// TestEnvoyHangs: an Envoy that does nothing any more makes the pod unready, and lets nothing in either.
func TestEnvoyHangs(t *testing.T) {
	t.Parallel()
	p := start(t, web)
	envoy := p.envoy()
	p.must(syscall.Kill(envoy, syscall.SIGSTOP))
	p.unready("asking Envoy for /ready")
	if code, said := p.probe("ready"); code != 1 || !strings.Contains(said, "asking Envoy for /ready") {
		t.Errorf("probe ready: exit code %d: %s", code, said)
	}
	p.besieged()
	p.must(syscall.Kill(envoy, syscall.SIGCONT))
	p.ready()
	p.must(p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), p.client.ClientConfig("pod")))
	if got := p.envoy(); got != envoy {
		t.Errorf("Envoy was %d and is %d", envoy, got)
	}
}

// deaf is a reader of the log that goes away once mantlet is up.
type deaf struct{ journal }

func (d *deaf) Write(text []byte) (int, error) {
	if d.count(inForce) > 0 {
		return 0, errGone
	}
	return d.journal.Write(text)
}

var errGone = errors.New("nobody reads any more")

// inForce is what mantlet logs once the desired rules stand.
const inForce = "rules are in force"

// TestNobodyReadsTheLog: mantlet goes on when the other end of its standard error is gone.
func TestNobodyReadsTheLog(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	log := &deaf{}
	p.sidecar.Log = log
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.must(p.sidecar.Start())
	p.ready()
	p.protect(tlsPort)
	p.protect(mtlsPort)
	p.besiege() // each refusal is logged
	for range 5 {
		p.besieged()
		p.ready()
	}
	p.must(p.exchange(netip.AddrPortFrom(p.IPv6, mtlsPort), p.client.ClientConfig("pod")))
	if err := p.sidecar.Stop(); !errors.Is(err, errGone) {
		t.Errorf("mantlet ended: %v", err)
	}
	p.leavesNothing()
	p.besieged()
}

// TestLogIsForItsReader: text for a terminal, JSON for all else.
func TestLogIsForItsReader(t *testing.T) {
	t.Parallel()
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	file, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for to, want := range map[*os.File]any{terminal: &slog.TextHandler{}, file: &slog.JSONHandler{}} {
		log, _ := logTo(to, slog.LevelInfo)
		if got := log.Handler().(logHandler).Handler; reflect.TypeOf(got) != reflect.TypeOf(want) {
			t.Errorf("%s gets %T, want %T", to.Name(), got, want)
		}
	}
}

// TestSecondMantlet: it ends before it touches anything, also where the kernel keeps no owner for the table.
func TestSecondMantlet(t *testing.T) {
	t.Parallel()
	for name, unowned := range map[string]bool{"owned": false, "not owned": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t, web)
			if unowned {
				p.unowned()
			}
			p.start()
			envoy, rules := p.envoy(), p.rules()
			long, err := p.handshake(netip.AddrPortFrom(p.IPv4, mtlsPort), p.client.ClientConfig("pod"))
			p.must(err)
			changes := p.transactions()
			for _, runtime := range []string{p.sidecar.RuntimeDirectory, t.TempDir()} {
				second, err := p.Sidecar(t.TempDir(), p.sidecar.Binary, append(p.sidecar.Env, "EDG_INGRESS_PROXY_CONFIG=")...)
				p.must(err)
				log := &journal{}
				second.TLSDirectory, second.RuntimeDirectory, second.Log = p.sidecar.TLSDirectory, runtime, log
				p.must(second.Start())
				says := fmt.Sprintf("another mantlet owns this network namespace (process %d, user 0)", p.sidecar.PID())
				if err := second.Wait(); err == nil || !strings.Contains(log.String(), says) || !strings.Contains(log.String(), `"rules":"they stay"`) {
					t.Errorf("the second mantlet ended with %v and said %s", err, log)
				}
			}
			if n := changes.Load(); n > 0 {
				t.Errorf("the rules changed %d times", n)
			}
			if got := p.envoy(); got != envoy {
				t.Errorf("Envoy was %d and is %d", envoy, got)
			}
			if got := p.rules(); got != rules {
				t.Errorf("the rules were\n%s\nand are\n%s", rules, got)
			}
			p.must(echo(long))
			p.ready()
			p.besieged()
		})
	}
}

func TestBadEnvironment(t *testing.T) {
	t.Parallel()
	p := newPod(t, "EDG_INGRESS_PROXY_CONFIG=a#0#false##b#80#maybe", "EDG_EGRESS_PROXY_CONFIG=c#10.0.0.1:80#x:1",
		"MANTLET_TLS_MIN_VERSION=1.4", "MANTLET_TLS_MINVERSION=1.3")
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.besiege()
	p.run()
	p.protect(tlsPort)
	p.protect(mtlsPort)
	err := p.sidecar.Wait()
	if err == nil {
		t.Error("mantlet ended as if all was well")
	}
	for _, problem := range []string{"entry 1", "entry 2", "10.0.0.1:80", `\"1.4\"`, "MANTLET_TLS_MINVERSION", "did you mean MANTLET_TLS_MIN_VERSION?"} {
		if !strings.Contains(p.log.String(), problem) {
			t.Errorf("the problem of %s is not reported", problem)
		}
	}
	p.besieged()
	if total := p.prober.Stats().Total(); total.Accepted > 0 {
		t.Errorf("%+v, want nothing accepted", total)
	}
}

// TestEnvoyDoesNotStart: whatever keeps Envoy from running, readiness says what, nothing comes in, and once it is repaired
// mantlet goes on by itself.
func TestEnvoyDoesNotStart(t *testing.T) {
	t.Parallel()
	egress := "EDG_EGRESS_PROXY_CONFIG=billing#127.137.0.1:8081#192.0.2.1:8080"
	envoy := os.Getenv("MANTLET_ENVOY_PATH") // not linked to: mantlet executes nothing from where Envoy was not when it started
	for name, c := range map[string]struct {
		says    string
		prepare func(p *pod, path string) (repair func())
	}{
		"missing": {"no such file or directory", func(p *pod, path string) func() {
			return func() { p.install(envoy, path) }
		}},
		"not executable": {"permission denied", func(p *pod, path string) func() {
			p.install(envoy, path+"-proper")
			p.must(os.WriteFile(path, []byte("#!/bin/sh\nexec "+path+`-proper "$@"`), 0o644))
			return func() { p.must(os.Chmod(path, 0o755)) }
		}},
		"ends at once": {"exit status 3", func(p *pod, path string) func() {
			p.must(os.WriteFile(path, []byte("#!/bin/sh\nexit 3"), 0o755))
			return func() {
				p.must(os.Remove(path))
				p.install(envoy, path)
			}
		}},
		"port is taken": {"127.137.0.1:8081 is held by a process of user 0 that is out of sight; egress entry billing", func(p *pod, path string) func() {
			p.install(envoy, path)
			listener, err := p.Listen("tcp", "127.137.0.1:8081") // by a process with more privileges than mantlet
			p.must(err)
			return func() { p.must(listener.Close()) }
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "envoy")
			p := newPod(t, egress, "MANTLET_ENVOY_PATH="+path)
			repair := c.prepare(p, path)
			p.must(p.identity.Write(p.sidecar.TLSDirectory))
			p.besiege()
			p.run()
			p.protect(mtlsPort)
			p.unready(c.says)
			p.await("mantlet tried again", func() bool { return p.failedStarts() > 2 })
			p.besieged()
			if total := p.prober.Stats().Total(); total.Accepted > 0 {
				t.Errorf("%+v, want nothing accepted", total)
			}
			if n := p.log.count("the desired state is not in force"); n > 2 { // while Envoy takes its time to end, the first error can be another
				t.Errorf("it is said %d times", n)
			}
			repair()
			p.ready()
			p.must(p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), p.client.ClientConfig("pod")))
			p.must(p.sidecar.Stop())
			p.leavesNothing()
		})
	}
}

// failedStarts returns how many starts of Envoy failed.
func (p *pod) failedStarts() (n uint64) {
	p.t.Helper()
	for _, a := range p.status().Applies {
		if a.Kind == "start" {
			n = a.Failed
		}
	}
	return n
}

// TestPortIsTaken: run and check name the process that has a port, and the entry that wants it; one that comes to be wanted later
// costs nothing of what is in force.
func TestPortIsTaken(t *testing.T) {
	t.Parallel()
	const entry = "egress: [{name: billing, listen: '127.137.0.1:8081', upstream: '192.0.2.1:8080'}]"
	p := newPod(t, web, fmt.Sprintf("MANTLET_STATUS_ADDRESS=:%d", statusPort))
	m := p.override(entry)
	billing, mtls, status := p.holder("127.137.0.1:8081"), p.holder("127.0.0.1:15006"), p.holder(fmt.Sprintf(":%d", statusPort))
	held := func(address string, by *exec.Cmd) string {
		return fmt.Sprintf("%s is held by pid %d (holder)", address, by.Process.Pid)
	}
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	said := p.needs("")["listen addresses"].Detail
	for _, want := range []string{
		held("127.137.0.1:8081", billing) + "; egress entry billing", held("127.0.0.1:15006", mtls), held(fmt.Sprintf("[::]:%d", statusPort), status),
	} {
		if !strings.Contains(said, want) {
			t.Errorf("check says %q, and not %q", said, want)
		}
	}
	p.besiege()
	p.run()
	p.protect(tlsPort)
	p.unready(held("127.137.0.1:8081", billing) + "; egress entry billing")
	p.unready(held("127.0.0.1:15006", mtls))
	p.await("it is told of the status address", func() bool {
		return p.log.count(fmt.Sprintf("address already in use: it is held by pid %d (holder)", status.Process.Pid)) == 1
	})
	p.await("mantlet tried again", func() bool { return p.failedStarts() > 2 })
	if n := p.log.count("egress entry billing"); n != 1 || p.log.count("Envoy says") > 0 {
		t.Errorf("it is said %d times, or Envoy was started", n)
	}
	for _, holder := range []*exec.Cmd{billing, mtls, status} {
		p.must(holder.Process.Kill())
		_ = holder.Wait()
	}
	p.ready()
	if f, ok := p.needs("")["listen addresses"]; ok {
		t.Errorf("beside mantlet, check says %+v", f)
	}

	late := p.holder("127.137.0.2:8081")
	m.write("egress: [{name: cart, listen: '127.137.0.2:8081', upstream: '192.0.2.1:8080'}]")
	p.await("it is told of the egress entry", func() bool { // mantlet can't see any more who it is
		return slices.ContainsFunc(p.status().Problems, func(problem string) bool {
			return strings.Contains(problem, "127.137.0.2:8081 is held by ") && strings.Contains(problem, "; egress entry cart")
		})
	})
	p.ready()
	p.must(p.exchange(netip.AddrPortFrom(p.IPv4, tlsPort), p.anonymous()))
	p.must(late.Process.Kill())
	_ = late.Wait()
	p.await("all is well", func() bool { return len(p.status().Problems) == 0 })
}

// holder starts a process without privileges that listens at an address, and returns once it does.
func (p *pod) holder(address string) *exec.Cmd {
	p.t.Helper()
	self, err := os.Executable()
	p.must(err)
	named := filepath.Join(p.t.(*testing.T).TempDir(), "holder")
	p.must(os.Symlink(self, named))
	cmd := exec.Command("setpriv", "--bounding-set=-all", "--inh-caps=-all", named)
	cmd.Env = append(os.Environ(), asHolder+"="+address)
	p.must(p.Start(cmd))
	to := address
	if strings.HasPrefix(to, ":") {
		to = "127.0.0.1" + to
	}
	p.await("somebody listens at "+address, func() bool {
		conn, err := p.Dial(context.Background(), "tcp", to)
		if err == nil {
			_ = conn.Close()
		}
		return err == nil
	})
	return cmd
}

// TestHangUpAtStart: a SIGHUP that comes before there is anything to read anew is not mantlet's end.
func TestHangUpAtStart(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.must(p.sidecar.Signal(syscall.SIGHUP))
	p.ready()
}

// TestRuntimeDirectory: mantlet takes one that is there for it, a fresh volume in memory as kubelet mounts it for one, or makes
// it as Envoy's user can reach it. What others use it leaves as it is, and ends.
func TestRuntimeDirectory(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		mode os.FileMode // 0: none is there
		uid  int
		file string // that is in it
		says string // "" if mantlet takes it
	}{
		"none":          {},
		"emptyDir":      {mode: 0o777},
		"in memory":     {mode: 0o777 | os.ModeSticky},
		"disk":          {mode: 0o755, file: "lost+found"},
		"one before it": {mode: 0o777, file: ".last-good.json1234"},
		"closed":        {mode: 0o710, file: "filler"},
		"like /tmp":     {mode: 0o777 | os.ModeSticky, file: "other", says: `(dtrwxrwxrwx) and holds \"other\"`},
		"like /run":     {mode: 0o755, file: "other", says: `(drwxr-xr-x) and holds \"other\"`},
		"another's":     {mode: 0o700, uid: 1337, says: "belongs to user 1337"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t, web)
			p.must(p.identity.Write(p.sidecar.TLSDirectory))
			directory := filepath.Join(p.sidecar.RuntimeDirectory, "a", "b")
			p.sidecar.RuntimeDirectory = directory
			if c.mode != 0 {
				p.must(os.MkdirAll(directory, 0o755))
				p.must(errors.Join(os.Chmod(directory, c.mode), os.Chown(directory, c.uid, c.uid)))
			}
			if c.file != "" {
				p.must(os.WriteFile(filepath.Join(directory, c.file), nil, 0o644))
			}
			p.run()
			if c.says == "" {
				p.ready()
				return
			}
			if err := p.sidecar.Wait(); err == nil || p.log.count(c.says) != 1 || p.log.count("MANTLET_RUNTIME_DIRECTORY") != 1 {
				t.Errorf("mantlet ended with %v, without a word of %s", err, c.says)
			}
			if info, err := os.Stat(directory); err != nil || info.Mode() != c.mode|os.ModeDir {
				t.Errorf("%v, %v", info.Mode(), err)
			}
		})
	}
}
