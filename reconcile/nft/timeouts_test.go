package nft

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"mantlet/render"
	"mantlet/schema"
)

// States of a connection as conntrack numbers them (enum tcp_conntrack, include/uapi/linux/netfilter/nf_conntrack_tcp.h).
const (
	ctCloseWait = 5
	ctTimeWait  = 7
)

// forgotten stands for a connection that conntrack does not have.
const forgotten = -time.Second

// remembers waits until conntrack has a connection in a state, or has it no more, and returns for how long it will keep it.
func (x *trial) remembers(client net.Conn, state uint8) (left time.Duration) {
	x.t.Helper()
	from := netip.MustParseAddrPort(client.LocalAddr().String())
	until(x.t, "conntrack sees the state", func() (seen bool) {
		if err := x.pod.Do(func() error {
			flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, netlink.InetFamily([]int{unix.AF_INET, unix.AF_INET6}[x.family]))
			seen, left = true, forgotten
			for _, f := range flows {
				if f.Forward.SrcPort != from.Port() || !f.Forward.SrcIP.Equal(from.Addr().AsSlice()) {
					continue
				}
				tcp, ok := f.ProtoInfo.(*netlink.ProtoInfoTCP)
				seen, left = ok && tcp.State == state, time.Duration(f.TimeOut)*time.Second
			}
			return err
		}); err != nil {
			x.t.Fatal(err)
		}
		return seen
	})
	return left
}

// TestHalfClosedConnections: an answer that comes long after the client ended its half reaches the client. The kernel's own timeout,
// which applies without mantlet's, is a second here.
func TestHalfClosedConnections(t *testing.T) {
	t.Parallel()
	for name, connect := range map[string]func(x *trial) (client, server net.Conn){
		"from outside": func(x *trial) (client, server net.Conn) { return x.pair(x.listen(), x.target(9000)) },
		"to Envoy":     func(x *trial) (client, server net.Conn) { return x.toEnvoy() },
		"from the pod": func(x *trial) (client, server net.Conn) {
			listener, err := x.outside.Listen("tcp", ":9000")
			if err != nil {
				x.t.Fatal(err)
			}
			x.t.Cleanup(func() { _ = listener.Close() })
			return x.within(listener, netip.AddrPortFrom(x.outside.Addrs()[x.family], 9000))
		},
	} {
		whole := rules(port1(9000, schema.ModePassthrough))
		if name == "to Envoy" {
			whole = rules()
		}
		t.Run(name, func(t *testing.T) {
			works(t, whole, whole.WithoutTimeouts(), func(x *trial) bool {
				x.short("close_wait")
				x.apply()
				client, server := connect(x)
				x.exchange(client, server)
				if err := client.(*net.TCPConn).CloseWrite(); err != nil {
					x.t.Fatal(err)
				}
				if _, err := server.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
					x.t.Fatalf("the server reads %v", err)
				}
				if x.remembers(client, ctCloseWait) < time.Minute {
					until(x.t, "conntrack forgets", func() bool { return x.remembers(client, ctCloseWait) == forgotten })
				}
				_, err := io.WriteString(server, "late")
				return err == nil && x.heard(client, "late")
			})
		})
	}
}

// short sets the kernel's own timeout of a state to a second.
func (x *trial) short(state string) {
	x.t.Helper()
	x.sysctl("1", "net.netfilter.nf_conntrack_tcp_timeout_"+state)
}

// within returns both ends of a connection from the pod.
func (x *trial) within(listener net.Listener, to netip.AddrPort) (client, server net.Conn) {
	x.t.Helper()
	client, err := x.dialAs(netip.Addr{}, to, unix.SO_REUSEADDR, 1, limit)
	if err == nil {
		server, err = x.keep(listener.Accept())
	}
	if err != nil {
		x.t.Fatal(err)
	}
	return client, server
}

// toEnvoy returns both ends of a connection to port 9000 that Envoy takes.
func (x *trial) toEnvoy() (client, server net.Conn) {
	x.t.Helper()
	loopback := []string{"127.0.0.1", "::1"}[x.family]
	listener, err := transparent(x.pod, net.JoinHostPort(loopback, "15006"))
	if err != nil {
		x.t.Fatal(err)
	}
	x.t.Cleanup(func() { _ = listener.Close() })
	return x.pair(listener, x.target(9000))
}

// TestClosedConnections: a connection that is over leaves conntrack's table within 10 s, from outside or from within the pod.
func TestClosedConnections(t *testing.T) {
	t.Parallel()
	whole := rules()
	works(t, whole, whole.WithoutTimeouts(), func(x *trial) bool {
		x.apply()
		outerClient, outerServer := x.toEnvoy()
		innerClient, innerServer := x.within(x.listen(), x.target(9000))
		for _, pair := range [][2]net.Conn{{outerClient, outerServer}, {innerClient, innerServer}} {
			x.exchange(pair[0], pair[1])
			for _, end := range pair {
				if err := end.Close(); err != nil {
					x.t.Fatal(err)
				}
			}
			if left := x.remembers(pair[0], ctTimeWait); left == forgotten || left > 10*time.Second {
				return false
			}
		}
		return true
	})
}

// TestReplaceKeepsTimeouts: open connections keep their timeouts when other rules are put in place.
func TestReplaceKeepsTimeouts(t *testing.T) {
	t.Parallel()
	modes(t, func(t *testing.T, p *place) {
		for family := range families {
			x := &trial{place: p, family: family, wait: limit}
			x.replace(rules())
			client, server := x.toEnvoy()
			x.exchange(client, server)
			for _, r := range []render.Ruleset{render.DenyAll(true), render.OnlyStatus(statusPort), rules(port1(80, schema.ModePassthrough))} {
				x.replace(r)
			}
			if err := client.(*net.TCPConn).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if left := x.remembers(client, ctCloseWait); left < time.Hour {
				t.Errorf("%s: conntrack forgets a half-closed connection after %v", families[family], left)
			}
			_ = client.Close()
			_ = server.Close()
		}
	})
}

// TestChangedTimeouts: a timeout object with other values is reported, and replaced.
func TestChangedTimeouts(t *testing.T) {
	t.Parallel()
	modes(t, func(t *testing.T, p *place) {
		changed := rules()
		changed.Timeouts = []render.Timeouts{{Name: changed.Timeouts[0].Name, CloseWait: time.Minute, TimeWait: time.Minute}}
		p.replace(changed)
		have, err := p.table.Read()
		if err != nil {
			t.Fatal(err)
		}
		want := "ct timeout tcp_timeouts: have `protocol tcp l3proto ip policy = { close_wait : 60, time_wait : 60 }`, want " +
			"`protocol tcp l3proto ip policy = { close_wait : 432000, time_wait : 10 }`"
		if lines := render.Diff(rules(), have); len(lines) != 1 || lines[0] != want {
			t.Errorf("it differs: %q", lines)
		}
		p.replace(rules())
		p.check()
		if diff := cmp.Diff(rules().Text(), listing(t, p.pod)); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}

// TestKernelWithoutTimeouts: where the kernel refuses the timeout object, the rules are put in place without it.
func TestKernelWithoutTimeouts(t *testing.T) {
	t.Parallel()
	modes(t, func(t *testing.T, p *place) {
		refused := rules()
		name := strings.Repeat("x", 300) // NFT_NAME_MAXLEN is 256
		refused.Timeouts = []render.Timeouts{{Name: name}}
		for range 2 {
			p.replace(refused)
			p.check()
			if diff := cmp.Diff(rules().WithoutTimeouts().Text(), listing(t, p.pod)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		}
		p.replace(render.DenyAll(true))
		if diff := cmp.Diff(render.DenyAll(true).WithoutTimeouts().Text(), listing(t, p.pod)); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
	if text := rules().WithoutTimeouts().Text(); strings.Contains(text, "timeout") || strings.Count(text, "accept") != strings.Count(rules().Text(), "accept") {
		t.Errorf("without timeouts:\n%s", text)
	}
}
