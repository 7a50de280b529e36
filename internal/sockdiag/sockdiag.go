package sockdiag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Socket is a TCP socket with a peer.
type Socket struct {
	Local, Remote netip.AddrPort // IPv4 addresses are never in IPv6's form
}

// Destroy ends the sockets that match, as tcp_abort does: the peer gets a reset, and the owner's next call fails with ECONNABORTED. It
// returns how many it ended. A socket that ends by itself meanwhile is no error. The error wraps EOPNOTSUPP or ENOENT where the kernel
// can't do it, see Supported.
func Destroy(match func(Socket) bool) (ended int, err error) {
	conn, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		return 0, fmt.Errorf("connecting to sock_diag: %w", err)
	}
	defer func() { _ = conn.Close() }()
	var errs []error
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		found, err := conn.Execute(message(unix.SOCK_DIAG_BY_FAMILY, netlink.Request|netlink.Dump, request(family, connected, make([]byte, idSize))))
		if err != nil {
			errs = append(errs, fmt.Errorf("listing sockets: %w", err))
			continue
		}
		for _, m := range found {
			socket, id, ok := parse(m.Data)
			if !ok || !match(socket) {
				continue
			}
			switch _, err := conn.Execute(message(unix.SOCK_DESTROY, netlink.Request|netlink.Acknowledge, request(family, ^uint32(0), id))); {
			case err == nil:
				ended++
			case !errors.Is(err, unix.ENOENT):
				errs = append(errs, fmt.Errorf("ending the connection of %s with %s: %w", socket.Local, socket.Remote, err))
			}
		}
	}
	return ended, errors.Join(errs...)
}

// Supported returns nil if the kernel can end sockets, and otherwise an error that names the option that it lacks.
func Supported() error {
	conn, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		return fmt.Errorf("connecting to sock_diag: %w", err)
	}
	defer func() { _ = conn.Close() }()
	nobody := make([]byte, idSize)
	if _, err := conn.Execute(message(unix.SOCK_DIAG_BY_FAMILY, netlink.Request|netlink.Dump, request(unix.AF_INET, connected, nobody))); err != nil {
		return fmt.Errorf("the kernel does not list sockets (CONFIG_INET_DIAG): %w", err)
	}
	// There is no such socket, so ENOENT is the answer of a kernel that can do it.
	if _, err := conn.Execute(message(unix.SOCK_DESTROY, netlink.Request|netlink.Acknowledge, request(unix.AF_INET, ^uint32(0), nobody))); !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("the kernel does not end sockets (CONFIG_INET_DIAG_DESTROY): %w", err)
	}
	return nil
}

const (
	// connected are the states of sockets with a peer (include/net/tcp_states.h): ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT.
	connected = 1<<1 | 1<<4 | 1<<5 | 1<<8

	requestSize = 8  // struct inet_diag_req_v2, up to its id
	idSize      = 48 // struct inet_diag_sockid
	answerID    = 4  // where the id is in struct inet_diag_msg
)

func message(kind netlink.HeaderType, flags netlink.HeaderFlags, data []byte) netlink.Message {
	return netlink.Message{Header: netlink.Header{Type: kind, Flags: flags}, Data: data}
}

func request(family uint8, states uint32, id []byte) []byte {
	data := make([]byte, requestSize, requestSize+idSize)
	data[0], data[1] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(data[4:], states)
	return append(data, id...)
}

// parse reads struct inet_diag_msg.
func parse(data []byte) (s Socket, id []byte, ok bool) {
	if len(data) < answerID+idSize {
		return s, nil, false
	}
	id = data[answerID : answerID+idSize]
	address := func(at int) netip.Addr {
		if data[0] == unix.AF_INET {
			return netip.AddrFrom4([4]byte(id[at:]))
		}
		return netip.AddrFrom16([16]byte(id[at:])).Unmap()
	}
	s.Local = netip.AddrPortFrom(address(4), binary.BigEndian.Uint16(id[0:]))
	s.Remote = netip.AddrPortFrom(address(20), binary.BigEndian.Uint16(id[2:]))
	return s, id, true
}
