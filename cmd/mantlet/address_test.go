package main

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"mantlet/internal/lab"
)

// TestAddressGoesAway takes an address away from the pod between the last packet of a client's handshake and Envoy's
// connection to the workload, and gives it to somebody outside. A router advertisement with a short lifetime does the same.
// What Envoy has decrypted must not leave the pod.
func TestAddressGoesAway(t *testing.T) {
	t.Parallel()
	p := start(t, web)
	heir := p.host("heir")
	heard := p.wiretap(heir, fmt.Sprintf(":%d", mtlsPort))
	for _, prefix := range []netip.Prefix{netip.MustParsePrefix("198.51.100.77/24"), netip.MustParsePrefix("2001:db8::77/64")} {
		p.address(netlink.AddrAdd, p.Host, prefix)
		before := p.refused("left_the_pod")
		held := p.hold(netip.AddrPortFrom(prefix.Addr(), mtlsPort))
		envoy := p.envoy()
		p.stop(envoy)
		p.must(held.release())
		p.address(netlink.AddrDel, p.Host, prefix)
		p.address(netlink.AddrAdd, heir, prefix)
		p.must(syscall.Kill(envoy, syscall.SIGCONT))
		p.await("the kernel ends Envoy's connection to "+prefix.String(), func() bool {
			return p.refused("left_the_pod") > before || len(heard.String()) > 0
		})
	}
	if got := heard.String(); got != "" {
		t.Errorf("this left the pod in plaintext: %q", got)
	}
	p.ready()
}

// TestPlaintextIsKnownToTheRules: each connection that mantlet and Envoy make to the workload has the priority by which the rules
// keep it in the pod.
func TestPlaintextIsKnownToTheRules(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, "MANTLET_STATUS_ADDRESS=:9901", "MANTLET_CONFIG_INLINE=probes: [{name: db, tcp: 9090}]")
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.protect(mtlsPort)
	p.protect(tlsPort)
	p.ready()
	file := filepath.Join(t.TempDir(), "count.nft")
	p.must(os.WriteFile(file, []byte(`
		table inet count { chain c {
			type filter hook output priority 0
			tcp dport { 8080, 9090 } tcp flags & (syn|ack) == syn meta priority 0:5 counter comment "known"
			tcp dport { 8080, 9090 } tcp flags & (syn|ack) == syn meta priority != 0:5 counter comment "unknown"
		}
		}`), 0o600))
	p.nft("-f", file)
	for _, addr := range p.Addrs() {
		p.must(p.exchange(netip.AddrPortFrom(addr, mtlsPort), p.client.ClientConfig("pod")))
		p.must(p.exchange(netip.AddrPortFrom(addr, tlsPort), p.anonymous()))
		if code, _, err := p.get(addr, http.MethodGet, "/probe/db"); code != http.StatusOK {
			t.Errorf("the probe answers %d, %v", code, err)
		}
	}
	counted := p.nft("list", "table", "inet", "count")
	for _, want := range []string{`counter packets 6 bytes \d+ comment "known"`, `counter packets 0 bytes 0 comment "unknown"`} {
		if !regexp.MustCompile(want).MatchString(counted) {
			t.Errorf("no %q in\n%s", want, counted)
		}
	}
}

// stop stops a process, and returns once none of its threads runs any more.
func (p *pod) stop(pid int) {
	p.t.Helper()
	p.must(syscall.Kill(pid, syscall.SIGSTOP))
	p.await("the process has stopped", func() bool {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		return err == nil && len(threads) > 0 && !slices.ContainsFunc(threads, func(thread string) bool {
			text, err := os.ReadFile(thread)
			return err != nil || !bytes.Contains(text, []byte(") T ")) // proc_pid_stat(5)
		})
	})
}

// address adds an address to a host's eth0, or deletes it.
func (p *pod) address(do func(netlink.Link, *netlink.Addr) error, host *lab.Host, prefix netip.Prefix) {
	p.t.Helper()
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen())}}
	if prefix.Addr().Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	p.must(host.Do(func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return do(eth0, addr)
	}))
}

// refused returns how many packets the kernel ended for a reason.
func (p *pod) refused(reason string) (count uint64) {
	p.t.Helper()
	for _, r := range p.status().Refused {
		if r.By == "kernel" && r.Reason == reason {
			count += r.Count
		}
	}
	return count
}

// hold makes a connection from outside whose client has done its handshake and made its request, and has sent neither the
// handshake's last flight nor the request.
func (p *pod) hold(to netip.AddrPort) *heldConn {
	p.t.Helper()
	held := &heldConn{Conn: p.dial(p.outside, to)}
	conn := tls.Client(held, only(tls.VersionTLS13, p.client.ClientConfig("pod")))
	p.must(conn.Handshake())
	_, err := io.WriteString(conn, "hello")
	p.must(err)
	return held
}

// heldConn sends what is written first, and holds back the rest.
type heldConn struct {
	net.Conn
	mu      sync.Mutex
	started bool
	rest    []byte
}

func (c *heldConn) Write(data []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.started {
		c.started = true
		return c.Conn.Write(data)
	}
	c.rest = append(c.rest, data...)
	return len(data), nil
}

// release sends what was held back, and returns once the peer's kernel has it.
func (c *heldConn) release() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, err := c.Conn.Write(c.rest); err != nil {
		return err
	}
	raw, err := c.Conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err
	}
	for left := 1; left > 0 && err == nil; {
		var asked error
		err = raw.Control(func(fd uintptr) { left, asked = unix.IoctlGetInt(int(fd), unix.TIOCOUTQ) })
		if err == nil {
			err = asked
		}
	}
	return err
}
