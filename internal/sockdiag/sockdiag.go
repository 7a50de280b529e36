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

// Cookie tells a socket from all others that the kernel has or had (sock_gen_cookie, net/core/sock_diag.c), also from a later one with
// the same addresses. 0 is no socket's.
type Cookie uint64

// List returns the sockets that have a peer.
func List() (map[Socket]Cookie, error) {
	conn, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		return nil, fmt.Errorf("connecting to sock_diag: %w", err)
	}
	defer func() { _ = conn.Close() }()
	all := map[Socket]Cookie{}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		found, err := conn.Execute(message(unix.SOCK_DIAG_BY_FAMILY, netlink.Request|netlink.Dump, request(family, connected, make([]byte, idSize))))
		if err != nil {
			return nil, fmt.Errorf("listing sockets: %w", err)
		}
		for _, m := range found {
			if socket, id, ok := parse(m.Data); ok {
				all[socket] = cookie(id)
			}
		}
	}
	return all, nil
}

// Finder finds single sockets of the network namespace that it was made in, from any thread. It is not safe for concurrent use.
type Finder struct {
	fd              int
	request, answer []byte
}

// NewFinder makes a Finder. It is to be closed.
func NewFinder() (*Finder, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("connecting to sock_diag: %w", err)
	}
	const patience = 2 // s; the kernel answers at once
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: patience}); err != nil {
		return nil, errors.Join(fmt.Errorf("setting a time-out: %w", err), unix.Close(fd))
	}
	return &Finder{fd: fd, answer: make([]byte, 4<<10)}, nil
}

// Close releases the socket.
func (f *Finder) Close() error { return unix.Close(f.fd) }

// Find returns the cookie of a socket, and 0 where there is none that is connected.
func (f *Finder) Find(s Socket) (Cookie, error) {
	family, id := s.id()
	m := message(unix.SOCK_DIAG_BY_FAMILY, netlink.Request, request(family, ^uint32(0), id))
	m.Header.Length = uint32(unix.NLMSG_HDRLEN + len(m.Data))
	var err error
	if f.request, err = m.MarshalBinary(); err != nil {
		return 0, err
	}
	if err := unix.Sendto(f.fd, f.request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return 0, fmt.Errorf("looking for a socket: %w", err)
	}
	for {
		n, _, err := unix.Recvfrom(f.fd, f.answer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("looking for a socket: %w", err)
		}
		if n < unix.NLMSG_HDRLEN {
			return 0, errors.New("looking for a socket: the answer is cut off")
		}
		if binary.NativeEndian.Uint16(f.answer[4:]) == unix.NLMSG_ERROR {
			return 0, answered(f.answer[unix.NLMSG_HDRLEN:n])
		}
		data := f.answer[unix.NLMSG_HDRLEN:n]
		// Where there is no such connection the kernel answers with who listens for it, or with what one left in TIME_WAIT.
		if found, id, ok := parse(data); ok && found == s && connected&(1<<data[answerState]) != 0 {
			return cookie(id), nil
		}
		return 0, nil
	}
}

// answered returns the error of an answer; none where there is no such socket.
func answered(data []byte) error {
	if len(data) < 4 {
		return errors.New("looking for a socket: the answer is cut off")
	}
	if code := unix.Errno(-int32(binary.NativeEndian.Uint32(data))); code != 0 && code != unix.ENOENT {
		return fmt.Errorf("looking for a socket: %w", code)
	}
	return nil
}

// Destroy ends the sockets that match, as tcp_abort does: the peer gets a reset, and the owner's next call fails with ECONNABORTED. It
// returns those that it ended. A socket that ends by itself meanwhile is no error. The error wraps EOPNOTSUPP or ENOENT where the kernel
// can't do it, see Supported.
func Destroy(match func(Socket) bool) (ended []Socket, err error) {
	conn, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		return nil, fmt.Errorf("connecting to sock_diag: %w", err)
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
				ended = append(ended, socket)
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
	answerState = 1  // and the state
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

// id returns the address family and struct inet_diag_sockid of a socket with any cookie.
func (s Socket) id() (family uint8, id []byte) {
	id = make([]byte, idSize)
	binary.BigEndian.PutUint16(id[0:], s.Local.Port())
	binary.BigEndian.PutUint16(id[2:], s.Remote.Port())
	copy(id[4:], s.Local.Addr().AsSlice())
	copy(id[20:], s.Remote.Addr().AsSlice())
	binary.NativeEndian.PutUint64(id[idCookie:], ^uint64(0)) // INET_DIAG_NOCOOKIE
	if s.Local.Addr().Is4() {
		return unix.AF_INET, id
	}
	return unix.AF_INET6, id
}

const idCookie = 40

func cookie(id []byte) Cookie { return Cookie(binary.NativeEndian.Uint64(id[idCookie:])) }

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
