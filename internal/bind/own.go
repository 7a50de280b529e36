package bind

import (
	"net"
	"net/netip"
)

// IsOwn reports whether an address is one of this pod, beside loopback: the kernel then takes it as the source for itself.
func IsOwn(addr netip.Addr) bool {
	if addr.IsLoopback() {
		return false
	}
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, discardPort)))
	if err != nil {
		return false
	}
	defer conn.Close()
	source, ok := conn.LocalAddr().(*net.UDPAddr)
	return ok && source.AddrPort().Addr().Unmap() == addr.Unmap()
}

// discardPort is what nothing is sent to.
const discardPort = 9
