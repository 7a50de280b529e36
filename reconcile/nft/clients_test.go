package nft

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"mantlet/internal/lab"
	"mantlet/reconcile/routes"
	"mantlet/render"
	"mantlet/schema"
)

// With sourceAddress: client Envoy connects to the workload from the client's address, over lo. What the rules and the kernel do then,
// without an Envoy.

var clientMark = marked(render.MarkClient)

// route puts mantlet's policy routes into the pod, or takes them away.
func (x *trial) route(there bool) {
	x.t.Helper()
	if err := x.pod.Do(func() error {
		_, err := routes.Kernel{}.Repair(render.Routes{IPv4: there, IPv6: there})
		return err
	}); err != nil {
		x.t.Fatal(err)
	}
}

// dialAsClient dials the workload as Envoy does, from a client's address.
func (x *trial) dialAsClient(from, to netip.AddrPort, wait time.Duration) (net.Conn, error) {
	return x.dialWith(from, to, wait, func(network string, fd int) error {
		level, option := unix.SOL_IP, unix.IP_TRANSPARENT
		if network == "tcp6" {
			level, option = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
		}
		return errors.Join(unix.SetsockoptInt(fd, level, option, 1),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PRIORITY, int(render.WorkloadPriority)))
	})
}

// fromClient returns both ends of a connection to the workload from a client's address.
func (x *trial) fromClient(listener net.Listener, from netip.AddrPort) (envoy, workload net.Conn) {
	x.t.Helper()
	envoy, err := x.dialAsClient(from, x.target(9000), limit)
	if err != nil {
		x.t.Fatal(err)
	}
	workload, err = x.keep(listener.Accept())
	if err != nil {
		x.t.Fatal(err)
	}
	if got := netip.MustParseAddrPort(workload.RemoteAddr().String()); got.Addr().Unmap() != from.Addr() {
		x.t.Errorf("the workload sees %s, want %s", got, from.Addr())
	}
	x.exchange(envoy, workload)
	return envoy, workload
}

func TestAnswersToClientsComeBack(t *testing.T) {
	t.Parallel()
	whole := rules()
	works(t, whole, without(t, whole, "egress", "meta mark set"), func(x *trial) bool {
		s, listener := x.stranger(), x.listen()
		x.apply()
		x.route(true)
		envoy, err := x.dialAsClient(s.at(x.family), x.target(9000), x.wait)
		if err != nil {
			return false
		}
		workload, err := x.keep(listener.Accept())
		return err == nil && x.passes(envoy, workload) && x.passes(workload, envoy)
	})
}

// An answer whose route is missing would go to the client.
func TestAnswersWithoutTheirRoute(t *testing.T) {
	t.Parallel()
	whole := rules(port1(9000, schema.ModePassthrough)) // a port where answers leave
	stops(t, whole, without(t, whole, "leaving", clientMark), func(x *trial) bool {
		s, listener := x.stranger(), x.listen()
		x.apply()
		x.route(true)
		_, workload := x.fromClient(listener, netip.AddrPortFrom(s.addrs[x.family], 0))
		x.route(false)
		if _, err := io.WriteString(workload, lab.Marker); err != nil {
			x.t.Fatal(err)
		}
		return x.happens(func() bool {
			_, left := s.find(func(seg segment) bool { return seg.data == lab.Marker })
			return left
		})
	})
}

// An answer whose connection conntrack has forgotten has no mark.
func TestAnswersWithoutTheirConnection(t *testing.T) {
	t.Parallel()
	whole := rules()
	stops(t, whole, without(t, whole, "egress", "vmap @answers", "goto mtls_out"), func(x *trial) bool {
		s, listener := x.stranger(), x.listen()
		x.apply()
		x.route(true)
		_, workload := x.fromClient(listener, netip.AddrPortFrom(s.addrs[x.family], 0))
		if err := x.pod.Do(func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) }); err != nil {
			x.t.Fatal(err)
		}
		if _, err := io.WriteString(workload, lab.Marker); err != nil {
			x.t.Fatal(err)
		}
		return x.happens(func() bool {
			_, left := s.find(func(seg segment) bool { return seg.data == lab.Marker })
			return left
		})
	})
}

// The client itself, or whoever is at its address, pretends to be Envoy.
func TestForgedPartOfAClientsConnection(t *testing.T) {
	t.Parallel()
	whole := rules(ports(1, 65535, schema.ModePassthrough))
	stops(t, whole, without(t, whole, "ingress", clientMark), func(x *trial) bool {
		listener, s, heard := x.listen(), x.stranger(), x.overhear()
		x.apply()
		x.route(true)
		envoy, workload := x.fromClient(listener, s.at(x.family))
		const says = "what is overheard"
		if _, err := io.WriteString(envoy, says); err != nil {
			x.t.Fatal(err)
		}
		last := heard(says)
		last.seq += uint32(len(last.data))
		last.data = lab.Marker
		s.send(last)
		return hear(workload, says) == nil && x.heard(workload, lab.Marker)
	})
}

// Envoy has the port that the client's connection to Envoy has: it must not take over that connection.
func TestPortOfAClient(t *testing.T) {
	t.Parallel()
	whole := rules()
	works(t, whole, without(t, whole, "clients", "!= 0x00000000"), func(x *trial) bool {
		x.listen()
		x.apply()
		x.route(true)
		client, envoy := x.wrapped(schema.IngressMTLSPort)
		from := netip.MustParseAddrPort(client.LocalAddr().String())
		_, err := x.dialAsClient(from, x.target(9000), patience)
		return err != nil && x.passes(client, envoy) && x.passes(envoy, client)
	})
}
