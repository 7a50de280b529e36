package main

import (
	"net/netip"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
)

// TestIPv6ComesAndGoes: IPv6 that is switched on later is served, and once it is switched off Envoy can be started all the same.
func TestIPv6ComesAndGoes(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	disable := func(value string) {
		t.Helper()
		p.must(p.Sysctl("net.ipv6.conf.all.disable_ipv6", value))
		p.must(p.Sysctl("net.ipv6.conf.lo.disable_ipv6", value))
	}
	disable("1")
	p.start()
	mtls := p.client.ClientConfig("pod")
	p.must(p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), mtls))

	disable("0")
	p.address(netlink.AddrAdd, p.Host, netip.PrefixFrom(p.IPv6, 64))
	for _, port := range []uint16{mtlsPort, tlsPort} {
		p.await("IPv6 is served", func() bool {
			conn, err := p.dialBriefly(netip.AddrPortFrom(p.IPv6, port))
			if err != nil {
				return false
			}
			return conn.Close() == nil
		})
		p.must(p.exchange(netip.AddrPortFrom(p.IPv6, port), mtls))
	}
	p.besieged()
	p.ready()

	disable("1")
	p.await("Envoy is started without IPv6", func() bool {
		epochs := p.told().Epochs
		return len(epochs) > 0 && epochs[len(epochs)-1].Epoch == 2
	})
	envoys, err := p.sidecar.Envoys()
	p.must(err)
	for _, pid := range envoys {
		p.must(syscall.Kill(pid, syscall.SIGKILL))
	}
	p.await("another Envoy", func() bool { return p.told().Envoys.Recovered == 1 })
	p.must(p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), mtls))
	p.ready()
}
