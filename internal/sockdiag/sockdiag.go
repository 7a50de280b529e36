package sockdiag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Socket is a TCP socket with a peer.
type Socket struct {
	Local, Remote netip.AddrPort // IPv4 addresses are never in IPv6's form, also where the socket is one of IPv6
}

// Cookie tells a socket from all others that the kernel has or had (sock_gen_cookie, net/core/sock_diag.c), also from a later one with
// the same addresses. 0 is no socket's.
type Cookie uint64

// List returns the sockets that have a peer.
func List() (all map[Socket]Cookie, err error) {
	c, err := connect()
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.close() }()
	all = map[Socket]Cookie{}
	err = c.dump(func(s Socket, _ uint8, id []byte) { all[s] = cookie(id) })
	return all, err
}

// Destroy ends the sockets that match, as tcp_abort does: the peer gets a reset, and the owner's next call fails with ECONNABORTED. It
// returns those that it ended. A socket that ends by itself meanwhile is no error. The error wraps EOPNOTSUPP or ENOENT where the kernel
// can't do it, see Supported.
func Destroy(match func(Socket) bool) (ended []Socket, err error) {
	c, err := connect()
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.close() }()
	var sockets []Socket
	var requests [][]byte
	err = c.dump(func(s Socket, family uint8, id []byte) {
		if match(s) {
			place := uint32(len(sockets) % atOnce)
			sockets, requests = append(sockets, s), append(requests, request(unix.SOCK_DESTROY, unix.NLM_F_ACK, place, family, ^uint32(0), id))
		}
	})
	errs := []error{err}
	for len(sockets) > 0 {
		n := min(len(sockets), atOnce)
		if err := c.send(slices.Concat(requests[:n]...)); err != nil {
			return ended, errors.Join(append(errs, err)...)
		}
		for answered := 0; answered < n; {
			err := c.receive(func(m message) error {
				answered++
				s := sockets[min(m.sequence, uint32(n-1))]
				switch err := m.err(); {
				case err == nil:
					ended = append(ended, s)
				case !errors.Is(err, unix.ENOENT):
					errs = append(errs, fmt.Errorf("ending the connection of %s with %s: %w", s.Local, s.Remote, err))
				}
				return nil
			})
			if err != nil {
				return ended, errors.Join(append(errs, err)...)
			}
		}
		sockets, requests = sockets[n:], requests[n:]
	}
	return ended, errors.Join(errs...)
}

// atOnce is how many requests are sent together. Their answers fit into the socket's buffer.
const atOnce = 64

// Supported returns nil if the kernel can end sockets, and otherwise an error that names the option that it lacks.
func Supported() error {
	c, err := connect()
	if err != nil {
		return err
	}
	defer func() { _ = c.close() }()
	if err := c.dumpFamily(unix.AF_INET, func(Socket, uint8, []byte) {}); err != nil {
		return fmt.Errorf("the kernel does not list sockets (CONFIG_INET_DIAG): %w", err)
	}
	// There is no such socket, so ENOENT is the answer of a kernel that can do it.
	if err := c.send(request(unix.SOCK_DESTROY, unix.NLM_F_ACK, 0, unix.AF_INET, ^uint32(0), make([]byte, idSize))); err != nil {
		return err
	}
	if err := c.receive(message.err); !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("the kernel does not end sockets (CONFIG_INET_DIAG_DESTROY): %w", err)
	}
	return nil
}

// Finder finds single sockets of the network namespace that it was made in, from any thread. It is not safe for concurrent use.
type Finder struct{ conn *conn }

// NewFinder makes a Finder. It is to be closed.
func NewFinder() (*Finder, error) {
	c, err := connect()
	return &Finder{c}, err
}

// Close releases what a Finder has.
func (f *Finder) Close() error { return f.conn.close() }

// Find returns the cookie of a socket, and 0 where there is none that is connected.
func (f *Finder) Find(s Socket) (found Cookie, err error) {
	id := s.id()
	if err := f.conn.send(request(unix.SOCK_DIAG_BY_FAMILY, 0, 0, s.family(), ^uint32(0), id[:])); err != nil {
		return 0, err
	}
	err = f.conn.receive(func(m message) error {
		if err := m.err(); err != nil {
			return err
		}
		// Where there is no such connection the kernel answers with who listens for it, or with what one left in TIME_WAIT.
		if is, id, ok := parse(m.data); ok && is == s && connected&(1<<m.data[answerState]) != 0 {
			found = cookie(id)
		}
		return nil
	})
	if errors.Is(err, unix.ENOENT) {
		return 0, nil
	}
	return found, err
}

const (
	// connected are the states of sockets with a peer (include/net/tcp_states.h): ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT.
	connected = 1<<1 | 1<<4 | 1<<5 | 1<<8

	requestSize = 8  // struct inet_diag_req_v2, up to its id
	idSize      = 48 // struct inet_diag_sockid
	idCookie    = 40 // where the cookie is in it
	answerID    = 4  // where the id is in struct inet_diag_msg
	answerState = 1  // and the state
)

// request is a message with struct inet_diag_req_v2.
func request(kind, flags uint16, sequence uint32, family uint8, states uint32, id []byte) []byte {
	const size = unix.NLMSG_HDRLEN + requestSize + idSize
	data := make([]byte, size)
	binary.NativeEndian.PutUint32(data[0:], size)
	binary.NativeEndian.PutUint16(data[4:], kind)
	binary.NativeEndian.PutUint16(data[6:], unix.NLM_F_REQUEST|flags)
	binary.NativeEndian.PutUint32(data[8:], sequence)
	body := data[unix.NLMSG_HDRLEN:]
	body[0], body[1] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(body[4:], states)
	copy(body[requestSize:], id)
	return data
}

func (s Socket) family() uint8 {
	if s.Local.Addr().Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// id returns struct inet_diag_sockid with any cookie.
func (s Socket) id() (id [idSize]byte) {
	binary.BigEndian.PutUint16(id[0:], s.Local.Port())
	binary.BigEndian.PutUint16(id[2:], s.Remote.Port())
	copy(id[4:], s.Local.Addr().AsSlice())
	copy(id[20:], s.Remote.Addr().AsSlice())
	binary.NativeEndian.PutUint64(id[idCookie:], ^uint64(0)) // INET_DIAG_NOCOOKIE
	return id
}

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
