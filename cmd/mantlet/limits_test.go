package main

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"mantlet/internal/lab"
	"mantlet/internal/status"
)

// limited makes mantlet start after some lines of a shell script.
func (p *pod) limited(lines string) {
	p.t.Helper()
	binary, err := os.Executable()
	p.must(err)
	script := filepath.Join(p.t.TempDir(), "limited")
	p.must(os.WriteFile(script, fmt.Appendf(nil, "#!/bin/sh\n%sexec %s \"$@\"\n", lines, binary), 0o755))
	p.sidecar.Binary = script
}

// descriptors makes mantlet start with a hard limit of open files.
func (p *pod) descriptors(hard int) {
	p.t.Helper()
	p.limited(fmt.Sprintf("ulimit -Sn %d\nulimit -Hn %d\n", hard, hard))
}

// memory makes mantlet start with a limit of memory.
func (p *pod) memory(bytes uint64) *lab.MemoryGroup {
	p.t.Helper()
	group, err := lab.NewMemoryGroup(strings.ReplaceAll(p.t.Name(), "/", "-"), bytes)
	if err != nil {
		p.t.Skipf("this machine gives no control group of its own: %v", err)
	}
	p.t.Cleanup(func() {
		_ = p.sidecar.Signal(syscall.SIGKILL)
		p.await("all have ended", func() bool { return group.Remove() == nil })
	})
	p.limited(group.Script())
	return group
}

// unfinished is a TLS handshake from outside of which the client's last flight is still to be sent.
type unfinished struct {
	conn net.Conn
	last []byte
}

// almost makes a handshake up to its last flight.
func (p *pod) almost(to netip.AddrPort) unfinished {
	p.t.Helper()
	conn := p.dial(p.outside, to)
	p.must(conn.SetDeadline(time.Now().Add(limit)))
	held := &held{Conn: conn}
	config := p.anonymous()
	config.MinVersion = tls.VersionTLS13 // in which the client's flights are two
	held.let = 1
	p.must(tls.Client(held, config).Handshake())
	return unfinished{conn, held.kept.Bytes()}
}

// held is a connection that lets some writes through, and keeps the others.
type held struct {
	net.Conn

	let  int
	kept bytes.Buffer
}

func (h *held) Write(text []byte) (int, error) {
	if h.let > 0 {
		h.let--
		return h.Conn.Write(text)
	}
	return h.kept.Write(text)
}

// limitLine is how a connection that was too much is logged.
const limitLine = `"msg":"connections rejected","code":"connection_limit","direction":"ingress"`

// TestDescriptorsRunOut: strangers who open more connections than Envoy has descriptors for are refused. Envoy and all that was
// open before them go on, and so does the workload's way out.
func TestDescriptorsRunOut(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, "EDG_EGRESS_PROXY_CONFIG=billing#127.137.0.1:80#billing-svc:8080")
	upstream := p.host("upstream")
	p.zone(map[string][]netip.Addr{"billing-svc": upstream.Addrs()})
	p.endpoint(upstream, p.issue("billing-svc"))
	p.descriptors(1024)
	p.start()
	envoy := p.envoy()
	capacity := p.served().Capacity
	if capacity.By != "descriptors" || capacity.Descriptors != 1024 || capacity.Ingress < 64 || capacity.Ingress > 512 || capacity.Egress > 256 {
		t.Fatalf("it says that it takes %+v", capacity)
	}
	to := netip.AddrPortFrom(p.IPv4, tlsPort)
	long, err := p.handshake(to, p.anonymous())
	p.must(err)
	p.must(echo(long))

	var handshakes []unfinished
	for range 20 {
		handshakes = append(handshakes, p.almost(to))
	}
	var strangers sync.WaitGroup
	for range 8 {
		strangers.Go(func() {
			for range 100 {
				p.dial(p.outside, to)
			}
		})
	}
	strangers.Wait()
	for _, h := range handshakes {
		_, err := h.conn.Write(h.last)
		p.check(err)
	}
	p.await("connections are refused", func() bool { return p.shed("ingress") > 0 })
	p.await("it is logged", func() bool { return p.log.count(limitLine) > 0 })
	p.must(echo(long))
	for range 20 {
		p.must(echo(p.reach("127.137.0.1:80")))
	}
	if got := p.envoy(); got != envoy {
		t.Errorf("Envoy was %d, and is %d", envoy, got)
	}
	if n := p.shed("egress"); n > 0 {
		t.Errorf("%d of the workload's connections were refused", n)
	}
	p.ready()
	p.await("who comes later is let in", func() bool { return p.exchange(to, p.anonymous()) == nil }) // the silent ones are cut
}

// shed returns how many connections were refused since they were too many.
func (p *pod) shed(direction string) (n uint64) {
	p.t.Helper()
	for _, r := range p.served().Refused {
		if r == (status.Refused{By: "envoy", Direction: direction, Reason: "connection_limit", Count: r.Count}) {
			n += r.Count
		}
	}
	return n
}

// TestLimitsAreTold: check and status say how many connections there can be, and why no more.
func TestLimitsAreTold(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	p.descriptors(600)
	p.start()
	_, said, _ := p.mantlet("status")
	if !strings.Contains(said, "from outside at a time, as an Envoy may have 600 open files") {
		t.Errorf("status:\n%s", said)
	}
	_, said, _ = p.mantlet("check")
	if !strings.Contains(said, "from outside at a time, as an Envoy may have 600 open files") || !strings.Contains(said, "raise the hard limit of open files") {
		t.Errorf("check:\n%s", said)
	}
}

// TestTooManyEntries: a configuration for which Envoy has too few descriptors is refused, and the last good one goes on.
func TestTooManyEntries(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	m := p.override("{}")
	p.descriptors(600)
	p.start()
	var text strings.Builder
	text.WriteString("egress:\n")
	for i := range 300 {
		fmt.Fprintf(&text, "  - {listen: '127.%d.%d.1:80', upstream: '10.0.0.1:80'}\n", 1+i/256, i%256)
	}
	m.write(text.String())
	p.await("it is refused", func() bool {
		return strings.Contains(strings.Join(p.served().Problems, "\n"), "need 808 file descriptors, and Envoy can have 600")
	})
	p.must(p.exchange(netip.AddrPortFrom(p.IPv4, tlsPort), p.anonymous()))
}

// hose is a workload that writes without end to whoever says something. What it can't write it holds little of.
func (p *pod) hose(port uint16) {
	p.t.Helper()
	listener, err := p.Listen("tcp", fmt.Sprintf(":%d", port))
	p.must(err)
	p.t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_ = conn.(*net.TCPConn).SetWriteBuffer(32 << 10)
				chunk := make([]byte, 32<<10)
				if _, err := conn.Read(chunk); err != nil {
					return
				}
				for err == nil {
					_, err = conn.Write(chunk)
				}
			}()
		}
	}()
}

// TestStalledClients: strangers who ask for much and stop reading take no more of Envoy's memory than there is. It goes on, with
// what was open before them, and so does the workload's way out.
func TestStalledClients(t *testing.T) {
	t.Parallel()
	const most = 176 << 20
	p := newPod(t, "EDG_INGRESS_PROXY_CONFIG=web#8080#false##hose#8081#false", "EDG_EGRESS_PROXY_CONFIG=billing#127.137.0.1:80#billing-svc:8080")
	upstream := p.host("upstream")
	p.zone(map[string][]netip.Addr{"billing-svc": upstream.Addrs()})
	p.endpoint(upstream, p.issue("billing-svc"))
	group := p.memory(most)
	p.hose(8081)
	p.start()
	envoy := p.envoy()
	capacity := p.served().Capacity
	if capacity.By != "memory" || capacity.Memory != most || capacity.Ingress <= 64 || capacity.Ingress > 1000 {
		t.Fatalf("it says that it takes %+v", capacity)
	}
	long, err := p.handshake(netip.AddrPortFrom(p.IPv4, tlsPort), p.anonymous())
	p.must(err)
	p.must(echo(long))

	jobs := make(chan struct{}, capacity.Ingress*2)
	for range capacity.Ingress * 2 {
		jobs <- struct{}{}
	}
	close(jobs)
	var strangers sync.WaitGroup
	for range 8 {
		strangers.Go(func() {
			for range jobs {
				raw := p.dial(p.outside, netip.AddrPortFrom(p.IPv4, 8081))
				_ = raw.(*net.TCPConn).SetReadBuffer(2 << 10)
				conn := tls.Client(raw, p.anonymous())
				_ = conn.SetDeadline(time.Now().Add(limit))
				_, _ = conn.Write([]byte("all of it")) // which those that are refused can't
			}
		})
	}
	strangers.Wait()
	p.await("connections are refused", func() bool { return p.shed("ingress") > 0 })
	used := uint64(0)
	for steady := 0; steady < 20; { // until nothing more comes
		now, err := group.Used()
		p.must(err)
		if steady++; now > used {
			used, steady = now, 0
		}
		p.besieged()
	}
	t.Logf("%d MiB of %d MiB are used", used>>20, uint64(most)>>20)
	p.must(echo(long))
	p.must(echo(p.reach("127.137.0.1:80")))
	if got := p.envoy(); got != envoy {
		t.Errorf("Envoy was %d, and is %d", envoy, got)
	}
	p.ready()
}

// TestOutOfMemory: where Envoy is killed for lack of memory, the log names the limit.
func TestOutOfMemory(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	group := p.memory(160 << 20)
	p.start()
	envoy := p.envoy()
	// Envoy is killed first, then what takes the memory, and not mantlet.
	p.must(os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", envoy), []byte("1000"), 0o600))
	hog := p.Command("sh", "-c", group.Script()+"echo 300 >/proc/self/oom_score_adj\nexec dd if=/dev/zero of=/dev/null bs=512M count=1")
	hog.Stdout, hog.Stderr = nil, nil
	p.must(p.Start(hog))
	p.await("mantlet tells why Envoy ended", func() bool { return p.log.count("exited: signal: killed, out of memory: memory.") > 0 })
	_ = hog.Process.Kill() // it may have been killed
	_ = hog.Wait()
	if !strings.Contains(p.log.String(), " is 160 MiB") {
		t.Error("the log does not tell the limit")
	}
	p.ready()
}
