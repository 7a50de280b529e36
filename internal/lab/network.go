package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The addresses are those set aside for documentation (RFC 5737, RFC 3849); host n has the nth of each.
var (
	prefix4 = netip.MustParsePrefix("198.51.100.0/24")
	prefix6 = netip.MustParsePrefix("2001:db8::/64")
)

// Network is a bridge in the lab's own network namespace. All its hosts are on one link; the lab's own namespace has no address
// on it, so whoever wants to speak to a host does so from another host. Networks know nothing of each other.
type Network struct {
	bridge *netlink.Bridge

	mu    sync.Mutex
	hosts []*Host
}

// NewNetwork makes a network without hosts. It is called in the lab's own namespace, not within a Do.
func NewNetwork() (*Network, error) {
	// With snooping a bridge learns who wants which multicast, IPv6's neighbour discovery included; without, it just works.
	bridge := &netlink.Bridge{LinkAttrs: netlink.NewLinkAttrs(), MulticastSnooping: new(false)}
	err := error(unix.EEXIST)
	for number := 1; errors.Is(err, unix.EEXIST); number++ {
		bridge.Name = fmt.Sprintf("lab%d", number)
		err = netlink.LinkAdd(bridge)
	}
	if err == nil {
		err = netlink.LinkSetUp(bridge)
	}
	if err != nil {
		return nil, fmt.Errorf("making bridge %s: %w", bridge.Name, err)
	}
	return &Network{bridge: bridge}, nil
}

// Close kills what runs on the hosts and removes hosts and bridge. Nothing may be in a Do any more. Connections and listeners
// that are still open keep their namespace until they are closed.
func (n *Network) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	var errs []error
	for _, h := range n.hosts {
		errs = append(errs, h.close())
	}
	n.hosts = nil
	return errors.Join(append(errs, netlink.LinkDel(n.bridge))...)
}

// Host is a network namespace with lo and eth0 up, both addresses usable, and no routes but to its own network.
type Host struct {
	Name       string
	IPv4, IPv6 netip.Addr

	namespace *os.File
	mounts    *os.File    // the mount namespace of what is started on the host; nil: the lab's
	port      string      // the bridge's end of eth0
	starter   chan func() // runs what it is sent on the host's one lasting thread
}

// Host adds a host. The name is for messages; it need not be unique.
func (n *Network) Host(name string) (*Host, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	number := len(n.hosts) + 1
	if number > 254 {
		return nil, fmt.Errorf("adding host %q: %s is full", name, prefix4)
	}
	h := &Host{
		Name: name, IPv4: nth(prefix4, number), IPv6: nth(prefix6, number),
		port: fmt.Sprintf("%s.%d", n.bridge.Name, number), starter: make(chan func()),
	}
	if err := h.open(); err != nil {
		return nil, fmt.Errorf("adding host %q: %w", name, err)
	}
	n.hosts = append(n.hosts, h)
	if err := h.connect(n.bridge); err != nil {
		return nil, fmt.Errorf("connecting host %q: %w", name, err)
	}
	return h, nil
}

// nth returns the address with this last byte.
func nth(prefix netip.Prefix, n int) netip.Addr {
	bytes := prefix.Addr().AsSlice()
	bytes[len(bytes)-1] = byte(n)
	addr, _ := netip.AddrFromSlice(bytes)
	return addr
}

// Addrs returns the host's addresses, IPv4 first.
func (h *Host) Addrs() []netip.Addr { return []netip.Addr{h.IPv4, h.IPv6} }

// open makes the namespace, by the thread that stays in it and starts the host's processes.
func (h *Host) open() error {
	opened := make(chan error)
	onThread(func() {
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			h.namespace, err = os.Open("/proc/thread-self/ns/net")
		}
		if opened <- err; err != nil {
			return
		}
		for start := range h.starter {
			start()
		}
	})
	return <-opened
}

// connect joins the host to the bridge by a veth pair and waits until packets pass.
func (h *Host) connect(bridge *netlink.Bridge) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MasterIndex = h.port, bridge.Index
	port := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(h.namespace.Fd())}
	if err := netlink.LinkAdd(port); err != nil {
		return fmt.Errorf("making veth %s: %w", h.port, err)
	}
	if err := h.Do(h.configure); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(port); err != nil {
		return fmt.Errorf("bringing up %s: %w", h.port, err)
	}
	return errors.Join(awaitCarrier(h.port), h.Do(func() error {
		return errors.Join(awaitCarrier("eth0"), awaitAddress(h.IPv6))
	}))
}

// configure brings up the host's interfaces, from inside.
func (h *Host) configure() error {
	if err := raiseLoopback(); err != nil {
		return err
	}
	eth0, err := netlink.LinkByName("eth0")
	if err != nil {
		return fmt.Errorf("finding eth0: %w", err)
	}
	for _, prefix := range []netip.Prefix{netip.PrefixFrom(h.IPv4, prefix4.Bits()), netip.PrefixFrom(h.IPv6, prefix6.Bits())} {
		addr := &netlink.Addr{IPNet: &net.IPNet{
			IP:   prefix.Addr().AsSlice(),
			Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen()),
		}}
		if prefix.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD // duplicate address detection would keep it from use for a second or two
		}
		if err := netlink.AddrAdd(eth0, addr); err != nil {
			return fmt.Errorf("adding %s: %w", prefix, err)
		}
	}
	if err := netlink.LinkSetUp(eth0); err != nil {
		return fmt.Errorf("bringing up eth0: %w", err)
	}
	return nil
}

// awaitCarrier waits until the kernel's link watch has seen the interface's carrier: it works at its own pace, and only then does
// the bridge forward.
func awaitCarrier(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err := Until(ctx, func() bool {
		link, err := netlink.LinkByName(name)
		return err == nil && link.Attrs().OperState == netlink.OperUp
	})
	if err != nil {
		return fmt.Errorf("waiting for carrier on %s: %w", name, err)
	}
	return nil
}

// awaitAddress waits until the kernel takes an IPv6 address for the host's own: a work queue adds its route once there is a
// carrier.
func awaitAddress(addr netip.Addr) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err := Until(ctx, func() bool {
		routes, err := netlink.RouteGet(addr.AsSlice())
		return err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL
	})
	if err != nil {
		return fmt.Errorf("waiting until %s is the host's own: %w", addr, err)
	}
	return nil
}

// close ends what runs in the namespace and gives it up.
func (h *Host) close() error {
	err := h.kill()
	// The namespace would take the pair with it, but in its own time.
	if port, missing := netlink.LinkByName(h.port); missing == nil {
		err = errors.Join(err, netlink.LinkDel(port))
	}
	close(h.starter)
	if h.mounts != nil {
		err = errors.Join(err, h.mounts.Close())
	}
	return errors.Join(err, h.namespace.Close())
}

// Do calls fn in the host's network namespace and returns its error. Sockets, netlink connections and processes that fn itself
// makes belong to the host, and go on doing so afterwards; goroutines that it starts are elsewhere. Any number may be under way
// at once; each holds an OS thread.
func (h *Host) Do(fn func() error) error {
	result := make(chan error, 1)
	onThread(func() {
		err := h.enter()
		defer func() { result <- err }()
		if err == nil {
			err = errors.New("function ended its goroutine") // t.Fatal, as a rule: only the test's own goroutine may call it
			err = fn()
		}
	})
	return <-result
}

// ResolvConf gives what is started on the host from now on an /etc/resolv.conf of its own. What runs already sees it too, if it was
// started after an earlier call.
func (h *Host) ResolvConf(content string) error {
	done := make(chan error)
	h.starter <- func() {
		err := error(nil)
		if h.mounts == nil {
			if err = unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err == nil {
				h.mounts, err = os.Open("/proc/thread-self/ns/mnt")
			}
		}
		if err == nil {
			err = cover("/etc/resolv.conf", content)
		}
		done <- err
	}
	return <-done
}

// enterMounts puts the calling thread into the host's mount namespace.
func (h *Host) enterMounts() error {
	if h.mounts == nil {
		return nil
	}
	if err := errors.Join(unix.Unshare(unix.CLONE_FS), unix.Setns(int(h.mounts.Fd()), unix.CLONE_NEWNS)); err != nil {
		return fmt.Errorf("entering the mounts of host %q: %w", h.Name, err)
	}
	return nil
}

// enter puts the calling thread into the host's network namespace.
func (h *Host) enter() error {
	if err := unix.Setns(int(h.namespace.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("entering host %q: %w", h.Name, err)
	}
	return nil
}

// onThread calls fn in a goroutine that has an OS thread to itself, which ends with it: the lock is never given back, so that no
// other goroutine ever finds itself on a thread whose namespace fn changed.
//
// The process's first thread cannot end, and /proc/self shows its namespace as the process's: on that one fn is not called.
func onThread(fn func()) {
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			fn()
			return
		}
		done := make(chan struct{})
		onThread(func() { defer close(done); fn() })
		<-done
		runtime.UnlockOSThread() //nolint:forbidigo // fn was not called here, so this thread's namespace is as it was
	}()
}

// Dial connects from the host. The address is an IP literal: a resolver would look elsewhere.
func (h *Host) Dial(ctx context.Context, network, addr string) (conn net.Conn, err error) {
	if err := literal(addr); err != nil {
		return nil, err
	}
	var dialer net.Dialer
	dialer.SetMultipathTCP(false)
	err = h.Do(func() error {
		conn, err = dialer.DialContext(ctx, network, addr)
		return err
	})
	return conn, err
}

// Listen listens on the host: plain TCP, where Go's default is an MPTCP socket. A missing host (":8080") stands for all
// addresses of both families.
func (h *Host) Listen(network, addr string) (listener net.Listener, err error) {
	if err := literal(addr); err != nil {
		return nil, err
	}
	var config net.ListenConfig
	config.SetMultipathTCP(false)
	err = h.Do(func() error {
		listener, err = config.Listen(context.Background(), network, addr)
		return err
	})
	return listener, err
}

// ListenPacket is Listen for datagrams.
func (h *Host) ListenPacket(network, addr string) (conn net.PacketConn, err error) {
	if err := literal(addr); err != nil {
		return nil, err
	}
	err = h.Do(func() error {
		conn, err = net.ListenPacket(network, addr)
		return err
	})
	return conn, err
}

// literal refuses names.
func literal(addr string) error {
	host, _, err := net.SplitHostPort(addr)
	if err == nil && host != "" {
		_, err = netip.ParseAddr(host)
	}
	return err
}

// Sysctl sets a variable of the host's namespace, such as net.ipv4.tcp_syncookies.
func (h *Host) Sysctl(name, value string) error {
	path := filepath.Join("/proc/sys", strings.ReplaceAll(name, ".", "/"))
	return h.Do(func() error { return os.WriteFile(path, []byte(value), 0) })
}

// Until returns nil once cond holds, or the context's error. It asks every two milliseconds.
func Until(ctx context.Context, cond func() bool) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
	return nil
}
