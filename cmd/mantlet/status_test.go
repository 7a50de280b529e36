package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"mantlet/internal/lab"
	"mantlet/internal/status"
)

const statusPort = 9901

// get asks the status address from outside, and anyone's address does.
func (p *pod) get(addr netip.Addr, method, path string) (code int, said string, err error) {
	return p.getBy("http", addr, method, path)
}

// getMutual asks the status address from outside by mutual TLS.
func (p *pod) getMutual(addr netip.Addr, method, path string) (code int, said string, err error) {
	return p.getBy("https", addr, method, path)
}

func (p *pod) getBy(scheme string, addr netip.Addr, method, path string) (code int, said string, err error) {
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   p.client.ClientConfig("pod"),
		// Some thousand connections later the kernel takes ports again that mantlet's side still has in TIME_WAIT, which the
		// rules let nobody in by. The next attempt has another one.
		DialContext: func(ctx context.Context, network, to string) (conn net.Conn, err error) {
			for err = context.DeadlineExceeded; errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil; {
				once, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
				conn, err = p.outside.Dial(once, network, to)
				cancel()
			}
			return conn, err
		},
	}}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, method, scheme+"://"+netip.AddrPortFrom(addr, statusPort).String()+path, nil)
	if err != nil {
		return 0, "", err
	}
	response, err := client.Do(request)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return response.StatusCode, string(text), err
}

// mantlet runs a command beside the sidecar.
func (p *pod) mantlet(args ...string) (code int, stdout, stderr string) {
	p.t.Helper()
	cmd := p.sidecar.Command(args...)
	var out, err bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &err
	p.must(p.Start(cmd))
	_ = cmd.Wait()
	return cmd.ProcessState.ExitCode(), out.String(), err.String()
}

// status returns what `mantlet status -o json` prints.
func (p *pod) status() (s status.Status) {
	p.t.Helper()
	code, text, said := p.mantlet("status", "-o", "json")
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		p.t.Fatalf("exit code %d, %v: %s%s", code, err, text, said)
	}
	if want := s.Ready && len(s.Problems) == 0; want != (code == 0) || code > 1 {
		p.t.Errorf("exit code %d, of %s", code, text)
	}
	return s
}

// TestStatusAddress: whoever probes from outside gets answers from the first moment on, and nothing else comes in by them.
func TestStatusAddress(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, fmt.Sprintf("MANTLET_STATUS_ADDRESS=:%d", statusPort))
	if code, _, said := p.mantlet("status"); code != 2 || !strings.Contains(said, "does not answer") {
		t.Errorf("status where no mantlet runs: exit code %d: %s", code, said)
	}
	p.besiege()
	p.run()
	p.protect(tlsPort)
	p.protect(mtlsPort)
	asks := func(addr netip.Addr, path string, code int, parts ...string) {
		t.Helper()
		p.await(path+" says "+strings.Join(parts, ", "), func() bool {
			got, said, err := p.get(addr, http.MethodGet, path)
			return err == nil && got == code && !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(said, part) })
		})
	}
	for _, addr := range p.Addrs() {
		asks(addr, "/livez", 200, "ok\n")
		asks(addr, "/livez?verbose", 200, "[+]mantlet ok\nlivez check passed\n")
		asks(addr, "/readyz", 503, "waiting for certificates")
		asks(addr, "/readyz?verbose", 503, "[-]certificates failed: waiting for certificates", "[+]config ok\n",
			"[-]envoy waiting: nothing is in force yet\n[-]rules waiting: nothing is in force yet\nreadyz check failed\n")
		asks(addr, "/readyz?exclude=certificates", 200, "ok\n")
		asks(addr, "/status", 200, `"ready":false`, `"problems":["certificates: waiting`)
	}
	p.besieged()
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.ready()
	for _, addr := range p.Addrs() {
		asks(addr, "/readyz?verbose", 200, "[+]mantlet ok\n[+]config ok\n[+]certificates ok\n[+]envoy ok\n[+]rules ok\nreadyz check passed\n")
		asks(addr, "/status", 200, `"ready":true`, `"problems":[]`)
		for _, path := range []string{"/", "/debug/pprof/", "/server_info", "/status/..", "//"} {
			if code, said, err := p.get(addr, http.MethodGet, path); err != nil || code/100 == 2 {
				t.Errorf("%s: %d, %v: %s", path, code, err, said)
			}
		}
		for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodOptions} {
			if code, said, err := p.get(addr, method, "/status"); err != nil || code != http.StatusMethodNotAllowed {
				t.Errorf("%s: %d, %v: %s", method, code, err, said)
			}
		}
	}
	p.saturated(p.IPv4)
	asks(p.IPv6, "/livez", 200, "ok\n")
	p.besieged()
	for _, path := range []string{"/livez", "/readyz?verbose", "/status"} {
		_, said, err := p.get(p.IPv6, http.MethodGet, path)
		p.must(err)
		for _, secret := range []string{"PRIVATE KEY", "BEGIN"} {
			if strings.Contains(said, secret) {
				t.Errorf("%s says %s", path, secret)
			}
		}
	}
}

// saturated holds more connections to the status address than it serves, and wants an answer all the same.
func (p *pod) saturated(addr netip.Addr) {
	p.t.Helper()
	for range 200 {
		p.dial(p.outside, netip.AddrPortFrom(addr, statusPort))
	}
	p.await("a probe among silent connections", func() bool {
		code, _, err := p.get(addr, http.MethodGet, "/readyz")
		return err == nil && code == http.StatusOK
	})
}

// TestStatusAddressIsTaken: the mesh goes on without, says so, and takes the port once it is free.
func TestStatusAddressIsTaken(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, fmt.Sprintf("MANTLET_STATUS_ADDRESS=127.0.0.1:%d", statusPort))
	taken, err := p.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", statusPort))
	p.must(err)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.ready()
	p.await("it says that the address is taken", func() bool {
		return slices.ContainsFunc(p.status().Problems, func(text string) bool { return strings.Contains(text, "address already in use") })
	})
	p.must(taken.Close())
	p.await("all is well", func() bool { return len(p.status().Problems) == 0 })
}

// TestStatusPortIsNoWayIn: no plaintext reaches a workload at the status port, which no entry declares, whoever had it first and
// whichever address mantlet's is.
func TestStatusPortIsNoWayIn(t *testing.T) {
	t.Parallel()
	port := fmt.Sprintf(":%d", statusPort)
	nothing := func(*pod) {}
	for name, test := range map[string]struct {
		address               func(*pod) string // mantlet's
		before, closed, ready func(*pod)        // mantlet runs, lets nothing in yet, and is ready
	}{
		"taken by the workload": {
			func(*pod) string { return port },
			func(p *pod) { p.protect(statusPort) },
			func(p *pod) { p.probeStatus(p.Addrs()...) },
			func(p *pod) {
				p.await("it says that the address is taken", func() bool {
					return slices.ContainsFunc(p.status().Problems, func(text string) bool { return strings.Contains(text, "address already in use") })
				})
			},
		},
		"at another address": {
			func(p *pod) string { return netip.AddrPortFrom(p.IPv4, statusPort).String() },
			func(p *pod) {
				p.protected = append(p.protected, p.serve(p.Host, lab.Service{Address: netip.AddrPortFrom(p.IPv6, statusPort).String()}))
			},
			func(p *pod) { p.probeStatus(p.IPv6) },
			func(p *pod) { p.livez(p.IPv4) },
		},
		"mantlet is killed": {
			func(*pod) string { return port }, nothing, nothing,
			func(p *pod) {
				for _, addr := range p.Addrs() {
					p.livez(addr)
				}
				p.must(p.sidecar.Signal(syscall.SIGKILL))
				_ = p.sidecar.Wait()
				p.protect(statusPort)
				p.probeStatus(p.Addrs()...)
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t, web)
			p.sidecar.Env = append(p.sidecar.Env, "MANTLET_STATUS_ADDRESS="+test.address(p))
			p.must(p.identity.Write(p.sidecar.TLSDirectory))
			test.before(p)
			p.run()
			test.closed(p)
			p.ready()
			test.ready(p)
			p.besieged()
		})
	}
}

// probeStatus starts the prober, at the status port.
func (p *pod) probeStatus(addrs ...netip.Addr) {
	var targets []netip.AddrPort
	for _, addr := range addrs {
		targets = append(targets, netip.AddrPortFrom(addr, statusPort))
	}
	p.prober = p.outside.Probe(targets...)
}

// livez wants mantlet to answer at its status address.
func (p *pod) livez(addr netip.Addr) {
	p.t.Helper()
	p.await("/livez at "+addr.String(), func() bool {
		code, _, err := p.get(addr, http.MethodGet, "/livez")
		return err == nil && code == http.StatusOK
	})
}

// TestStatus: what is said agrees with what is done.
func TestStatus(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, "MANTLET_ENVOY_PARENT_SHUTDOWN_TIME=60s")
	m := p.override("{}")
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.protect(mtlsPort)
	p.ready()
	s := p.status()
	if !s.Ready || len(s.Problems) != 0 || s.Desired == nil || s.Applied == nil || *s.Desired != *s.Applied || s.Applied.Generation != 1 ||
		s.Applied.Ingress != 2 || s.Applied.Source != m.file() || s.LastError != nil {
		t.Errorf("at first: %+v", s)
	}
	if len(s.Epochs) != 1 || !s.Epochs[0].Serving || s.Epochs[0].PID != p.envoy() || s.Epochs[0].Connections == nil || *s.Epochs[0].Connections != 0 {
		t.Errorf("epochs: %+v", s.Epochs)
	}
	leaf := s.Certificates[0]
	if len(s.Certificates) != 3 || leaf.Role != "leaf" || !slices.Equal(leaf.SANs, []string{"pod"}) || leaf.LeftSeconds <= 0 {
		t.Errorf("certificates: %+v", s.Certificates)
	}

	long, err := p.handshake(netip.AddrPortFrom(p.IPv4, mtlsPort), p.client.ClientConfig("pod"))
	p.must(err)
	p.must(echo(long))
	if s := p.status(); *s.Epochs[0].Connections != 1 {
		t.Errorf("with a connection: %+v", s.Epochs)
	}
	m.write("ingress: [{port: 9090, mode: mtsl}]")
	p.await("a bad file is a problem", func() bool { return len(p.status().Problems) == 1 })
	s = p.status()
	if !s.Ready || !strings.Contains(s.Problems[0], "did you mean mtls?") || s.LastError == nil || s.LastError.Place != "config" {
		t.Errorf("with a bad file: %+v", s)
	}
	m.write("ingress: [{port: 9090, allow: [client]}]")
	p.await("a hot restart", func() bool { s = p.status(); return len(s.Epochs) == 2 && s.Epochs[1].Serving && len(s.Problems) == 0 })
	if s.Epochs[0].Serving || s.Epochs[0].LeftSeconds <= 0 || s.Epochs[0].LeftSeconds > 60 || s.Applied.Generation != 2 {
		t.Errorf("after a hot restart: %+v", s)
	}
	code, text, _ := p.mantlet("status")
	for _, part := range []string{": ready,", "drains", "serves", "leaf", m.file(), "last error"} {
		if code != 0 || !strings.Contains(text, part) {
			t.Errorf("exit code %d, and %q is not in:\n%s", code, part, text)
		}
	}
	t.Logf("mantlet status:\n%s", text)
	p.must(p.sidecar.Stop())
	if code, _, _ := p.mantlet("status", "--watch=false"); code != 2 {
		t.Errorf("exit code %d once it has ended", code)
	}
}

// TestPolicyIsVisible: status shows who may call which port, what came of the workload's probes, and who was refused.
func TestPolicyIsVisible(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, fmt.Sprintf("MANTLET_STATUS_ADDRESS=:%d", statusPort), `MANTLET_CONFIG_INLINE=
ingress: [{name: orders, port: 9000-9099, mode: mtls, allow: [frontend, "spiffe://mesh/cart"]}]
egress: [{name: billing, listen: "127.137.0.1:8081", upstream: "192.0.2.1:8080", serverNames: [billing-svc]}]
probes: [{name: up, tcp: 8080}, {name: down, tcp: 5432}, {name: never, http: 8080/healthz}]`)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.protect(tlsPort)
	p.ready()
	for path, want := range map[string]int{"/probe/up": 200, "/probe/down": 503} {
		if code, _, err := p.get(p.IPv4, http.MethodGet, path); err != nil || code != want {
			t.Errorf("%s: %d, %v", path, code, err)
		}
	}
	config := p.anonymous()
	of(lab.Leaf{DNSNames: []string{"cart"}, URIs: []string{"spiffe://mesh/other"}})(p, config)
	if err := p.exchange(netip.AddrPortFrom(p.IPv4, 9050), config); err == nil {
		t.Error("who is not on the list is let in")
	}
	var s status.Status
	p.await("the refusal is known", func() bool { s = p.status(); return len(s.Refusals) == 1 })
	want := []status.Policy{
		{Ports: "7890", Name: "metrics", Mode: "passthrough"},
		{Ports: "8080", Name: "web", Mode: "tls"},
		{Ports: "9000-9099", Name: "orders", Mode: "mtls", Allow: []string{"frontend", "spiffe://mesh/cart"}},
		{Ports: "status", Mode: "passthrough"},
		{Ports: "other", Mode: "mtls"},
	}
	if diff := cmp.Diff(want, s.Policy); diff != "" {
		t.Error(diff)
	}
	routes := []status.Route{{Listen: "127.137.0.1:8081", Name: "billing", Upstream: "192.0.2.1:8080", ServerNames: []string{"billing-svc"}}}
	if diff := cmp.Diff(routes, s.Routes); diff != "" {
		t.Error(diff)
	}
	probes := map[string]string{}
	for _, probe := range s.Probes {
		switch {
		case probe.OK == nil && probe.Asked == nil && probe.Error == "":
			probes[probe.Name] = "not asked"
		case probe.OK != nil && probe.Asked != nil:
			probes[probe.Name] = fmt.Sprint(*probe.OK, " ", strings.Contains(probe.Error, "connection refused"))
		}
	}
	if diff := cmp.Diff(map[string]string{"up": "true false", "down": "false true", "never": "not asked"}, probes); diff != "" {
		t.Error(diff)
	}
	_, text, _ := p.mantlet("status")
	for _, line := range []string{
		`7890 +passthrough +anyone, unprotected +0 +metrics`,
		`8080 +tls +anyone, by TLS +0 +web`,
		`9000-9099 +mtls +frontend, spiffe://mesh/cart +0 +orders`,
		`status +passthrough +anyone, mantlet itself +\d+`,
		`other +mtls +anyone of the mesh +0`,
		`127\.137\.0\.1:8081 +192\.0\.2\.1:8080 +billing-svc +0 +0 +billing`,
		`up +tcp 8080 +well, \d+s ago`,
		`down +tcp 5432 +failed, \d+s ago: dial tcp .*: connect: connection refused`,
		`never +http 8080/healthz +not asked yet`,
		`\d+s ago +198\.51\.100\.2 +cart, spiffe://mesh/other +198\.51\.100\.1:9050 +.*\(san_not_allowed\)`,
	} {
		if !regexp.MustCompile(`(?m)^` + line).MatchString(text) {
			t.Errorf("mantlet status has no line %s:\n%s", line, text)
		}
	}
}

// TestFollow: refusals are told as they happen, to who asks in the pod alone, until it is interrupted.
func TestFollow(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, fmt.Sprintf("MANTLET_STATUS_ADDRESS=:%d", statusPort))
	if code, _, said := p.mantlet("status", "--follow"); code != 2 || !strings.Contains(said, "mantlet does not answer") {
		t.Errorf("where no mantlet runs: exit code %d: %s", code, said)
	}
	if code, _, said := p.mantlet("status", "--follow", "--watch"); code != 2 || !strings.Contains(said, "watch") {
		t.Errorf("with --watch: exit code %d: %s", code, said)
	}
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.ready()
	text, textCommand := p.follow()
	lines, linesCommand := p.follow("-o", "json")
	refuse := func() {
		t.Helper()
		config := p.anonymous()
		show(config, stranger(p).Certificate())
		if err := p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), config); err == nil {
			t.Error("a stranger is let in")
		}
	}
	p.await("both follow", func() bool {
		refuse()
		return text.count("\n") > 1 && lines.count("\n") > 0
	})
	before := lines.count("\n")
	refuse()
	p.await("one more is told", func() bool { return lines.count("\n") > before })
	for _, cmd := range []*exec.Cmd{textCommand, linesCommand} {
		p.must(cmd.Process.Signal(syscall.SIGINT))
		if err := cmd.Wait(); err != nil {
			t.Errorf("following ended: %v", err)
		}
	}
	line := regexp.MustCompile(`(?m)^\S+ ingress 198\.51\.100\.2 -> 198\.51\.100\.1:9090 unknown_ca: unknown CA: .*; its SANs: stranger\n`)
	if !line.MatchString(text.String()) {
		t.Errorf("it said %q, want %s", text, line)
	}
	for text := range strings.Lines(lines.String()) {
		var refusal status.Followed
		if err := json.Unmarshal([]byte(text), &refusal); err != nil || refusal.Code != "unknown_ca" || refusal.Count != 1 || refusal.Time.IsZero() {
			t.Errorf("a line is %q: %v", text, err)
		}
	}
	if code, said, err := p.get(p.IPv4, http.MethodGet, status.RefusalsPath); err != nil || code != http.StatusNotFound {
		t.Errorf("over TCP: %d, %v: %s", code, err, said)
	}

	last, cmd := p.follow()
	p.await("it follows", func() bool { return last.count("following") == 1 })
	p.must(p.sidecar.Stop())
	if err := cmd.Wait(); err == nil || !strings.Contains(last.String(), "mantlet does not answer") {
		t.Errorf("mantlet ended, and following did so with %v: %s", err, last)
	}
}

// follow runs `mantlet status --follow`.
func (p *pod) follow(args ...string) (said *journal, cmd *exec.Cmd) {
	p.t.Helper()
	said = &journal{}
	cmd = p.sidecar.Command(append([]string{"status", "--follow"}, args...)...)
	cmd.Stdout, cmd.Stderr = said, said
	p.must(p.Start(cmd))
	return said, cmd
}

// TestHungDaemon: status says soon that mantlet hangs, and points to what works without it.
func TestHungDaemon(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.ready()
	p.must(p.sidecar.Signal(syscall.SIGSTOP))
	for _, output := range []string{"text", "json"} {
		began := time.Now()
		code, said, errors := p.mantlet("status", "-o", output)
		const want = "mantlet does not answer; `mantlet diff` reads kernel and Envoy without it (nothing came within 1.5s)\n"
		if took := time.Since(began); code != 2 || said != "" || errors != want || took > 8*time.Second { // far more, for a busy machine
			t.Errorf("after %s, exit code %d: %s%s", took, code, said, errors)
		}
	}
	p.same()
	p.must(p.sidecar.Signal(syscall.SIGCONT))
	p.ready()

	// Envoy hangs: that is told by a mantlet that does not.
	envoy := p.envoy()
	p.must(syscall.Kill(envoy, syscall.SIGSTOP))
	p.await("mantlet says that Envoy hangs", func() bool {
		code, said, _ := p.mantlet("status")
		return code == 1 && strings.Contains(said, "Envoy does not serve as it should")
	})
	p.must(syscall.Kill(envoy, syscall.SIGCONT))
	p.ready()
}

// scrape returns the metrics as Prometheus gets them, by name and labels.
func (p *pod) scrape() map[string]float64 {
	p.t.Helper()
	code, text, err := p.get(p.IPv4, http.MethodGet, "/metrics")
	if err != nil || code != http.StatusOK {
		p.t.Fatalf("scraping: %d, %v: %s", code, err, text)
	}
	all := map[string]float64{}
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		value, err := strconv.ParseFloat(strings.TrimSpace(line[i:]), 64)
		p.must(err)
		all[line[:i]] = value
	}
	return all
}

// counts matches the metrics that must never fall.
var counts = regexp.MustCompile(`_(total|bucket|count|sum)(\{|$)`)

// TestMetricsUnderLoad: scraped all the while, the counters move as the traffic says, and only up: also over a hot restart,
// another table and a crash.
func TestMetricsUnderLoad(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, fmt.Sprintf("MANTLET_STATUS_ADDRESS=:%d", statusPort),
		"EDG_EGRESS_PROXY_CONFIG=billing#127.137.0.1:8081#127.0.0.1:9")
	m := p.override("{}")
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.protect(tlsPort)
	p.protect(mtlsPort)
	p.ready()
	last := p.scrape()
	look := func() map[string]float64 {
		t.Helper()
		now := p.scrape()
		for name, was := range last {
			if is, ok := now[name]; counts.MatchString(name) && (!ok || is < was) {
				t.Errorf("%s was %v and is %v", name, was, is)
			}
		}
		last = now
		return now
	}
	shows := func(name string, value float64) {
		t.Helper()
		p.await(fmt.Sprintf("%s is %v", name, value), func() bool { return look()[name] == value })
	}
	shows("mantlet_ready", 1)
	shows("mantlet_config_last_reload_successful", 1)
	for _, name := range []string{"process_resident_memory_bytes", "process_open_fds", "process_cpu_seconds_total", "go_goroutines"} {
		if last[name] <= 0 {
			t.Errorf("%s is %v", name, last[name])
		}
	}
	shows(`mantlet_certificate_expiry_timestamp_seconds{role="leaf"}`, float64(p.identity.Leaf.NotAfter.Unix()))
	shows(`mantlet_applies_total{kind="start",result="success"}`, 1)

	mesh := p.client.ClientConfig("pod")
	made := 0.0
	traffic := func() {
		t.Helper()
		for range 10 {
			for _, addr := range p.Addrs() {
				p.must(p.exchange(netip.AddrPortFrom(addr, mtlsPort), mesh))
				p.must(p.exchange(netip.AddrPortFrom(addr, tlsPort), p.anonymous()))
				made++
			}
			look()
		}
		shows(`mantlet_handshakes_total{mode="mtls"}`, made)
		shows(`mantlet_handshakes_total{mode="tls"}`, made)
	}
	traffic()
	for range 7 {
		if err := echo(p.dial(p.outside, netip.AddrPortFrom(p.IPv6, mtlsPort))); err == nil {
			t.Error("plaintext is answered")
		}
		if err := p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), p.anonymous()); err == nil {
			t.Error("a stranger is answered")
		}
	}
	for range 2 {
		_ = cut(p.dial(p.Host, netip.MustParseAddrPort("127.137.0.1:8081")))
	}
	shows(`mantlet_egress_connections_total{listen="127.137.0.1:8081"}`, 2)
	shows(`mantlet_refused_total{by="envoy",direction="egress",reason="endpoint_unreachable"}`, 2)
	shows(`mantlet_refused_total{by="envoy",direction="ingress",reason="plaintext"}`, 7)
	shows(`mantlet_refused_total{by="envoy",direction="ingress",reason="no_client_certificate"}`, 7)
	long, err := p.handshake(netip.AddrPortFrom(p.IPv4, mtlsPort), mesh)
	p.must(err)
	p.must(echo(long))
	made++
	shows(`mantlet_connections{mode="mtls",ports="other"}`, 1)
	shows(`mantlet_envoy_connections{state="serving"}`, 1)

	m.write("ingress: [{port: 9091, allow: [nobody]}]")
	shows(`mantlet_applies_total{kind="hot_restart",result="success"}`, 1)
	shows(`mantlet_envoy_connections{state="draining"}`, 1)
	shows("mantlet_applied_generation", 2)
	p.must(long.Close())
	shows(`mantlet_connections{mode="mtls",ports="other"}`, 0)
	for range 3 {
		p.must(p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), mesh))
		made++
	}
	shows(`mantlet_handshakes_total{mode="mtls"}`, made)

	envoy := p.status().Epochs
	p.must(syscall.Kill(envoy[len(envoy)-1].PID, syscall.SIGKILL))
	shows("mantlet_envoy_epochs_ended_total", 1)
	shows("mantlet_envoy_epochs_recovered_total", 1)
	p.ready()
	look()
	m.write("ingress: [{port: 9091, allow: nobody}]")
	shows("mantlet_problems", 1)
	shows(`mantlet_problem{problem="configuration_rejected"}`, 1)
	shows(`mantlet_problem{problem="certificates_rejected"}`, 0)
	shows("mantlet_config_last_reload_successful", 0)
	if at := time.Unix(int64(last["mantlet_config_last_reload_success_timestamp_seconds"]), 0); time.Since(at) > 10*time.Minute {
		t.Errorf("the configuration was taken last at %s", at)
	}
	shows("mantlet_ready", 1)
}

// TestWatch: a terminal has one screen, drawn anew; a pipe gets one text after another; neither ends before it is told to.
func TestWatch(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	watch := func(output *os.File) (end func()) {
		cmd := p.sidecar.Command("status", "--watch")
		cmd.Stdout, cmd.Stderr = output, output
		p.must(p.Start(cmd))
		return func() {
			p.must(cmd.Process.Signal(syscall.SIGINT))
			if err := cmd.Wait(); err != nil {
				t.Errorf("it ended: %v", err)
			}
		}
	}
	file, err := os.Create(filepath.Join(t.TempDir(), "screens"))
	p.must(err)
	defer file.Close()
	end := watch(file)
	text := func() string {
		said, err := os.ReadFile(file.Name())
		p.must(err)
		return string(said)
	}
	p.await("it waits for mantlet", func() bool { return strings.Contains(text(), "does not answer") })
	p.run()
	p.await("several screens", func() bool { return strings.Count(text(), ": ready,") >= 2 })
	end()
	if strings.Contains(text(), "\x1b") {
		t.Errorf("no terminal, and it is drawn on:\n%q", text())
	}

	terminal, screen := pty(t)
	end = watch(screen)
	said := &journal{}
	go func() { _, _ = io.Copy(said, terminal) }() // until both are closed
	p.await("several screens", func() bool { return said.count("\x1b[H\x1b[2Jmantlet ") >= 2 })
	end()
}

// pty returns both ends of a pseudo-terminal.
func pty(t *testing.T) (terminal, screen *os.File) {
	t.Helper()
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	check(t, err)
	t.Cleanup(func() { _ = terminal.Close() })
	check(t, unix.IoctlSetPointerInt(int(terminal.Fd()), unix.TIOCSPTLCK, 0))
	number, err := unix.IoctlGetInt(int(terminal.Fd()), unix.TIOCGPTN)
	check(t, err)
	screen, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	check(t, err)
	t.Cleanup(func() { _ = screen.Close() })
	return terminal, screen
}
