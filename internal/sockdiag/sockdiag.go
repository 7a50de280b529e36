package sockdiag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Socket is a TCP socket with a peer.
type Socket struct {
	Local, Remote netip.AddrPort // IPv4 addresses are never in IPv6's form, also where the socket is one of IPv6
}

// Cookie tells a socket from all others that the kernel has or had (sock_gen_cookie, net/core/sock_diag.c), also from a later one with
// the same addresses. 0 is no socket's.
type Cookie uint64

// Details are what is known of a socket besides its addresses.
type Details struct {
	Cookie Cookie
	// Priority is what SO_PRIORITY set. In a net_cls control group it is the group's class instead (inet_diag_msg_attrs_fill,
	// net/ipv4/inet_diag.c).
	Priority uint32
}

// List returns the sockets that have a peer.
func List() (all map[Socket]Details, err error) {
	c, err := connect()
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.close() }()
	all = map[Socket]Details{}
	err = c.dump(connected, func(a answer) { all[a.socket] = a.details() })
	return all, err
}

// Listener is a socket that listens.
type Listener struct {
	Address     netip.AddrPort // IPv4 addresses are never in IPv6's form
	User, Inode uint32
}

// Listeners returns the sockets that listen. For the kernel that is far less work than /proc/net/tcp, where it looks through the table of all
// connections of the machine.
func Listeners() (all []Listener, err error) {
	c, err := connect()
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.close() }()
	err = c.dump(listening, func(a answer) { all = append(all, Listener{a.socket.Local, a.user, a.inode}) })
	return all, err
}

// Exact is one socket, and none that has its addresses later.
type Exact struct {
	Socket
	Cookie Cookie
}

// DestroyExactly is Destroy for sockets that are known, without a list of all. It does not find those that are bound to an interface.
func DestroyExactly(order []Exact) (ended []Socket, err error) {
	c, err := connect()
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.close() }()
	sockets, ids := make([]Socket, 0, len(order)), map[Socket]kernelID{}
	for _, s := range order {
		id := s.id()
		binary.NativeEndian.PutUint64(id[idCookie:], uint64(s.Cookie))
		sockets, ids[s.Socket] = append(sockets, s.Socket), kernelID{s.family(), id}
	}
	return c.destroy(sockets, ids)
}

// Destroy ends sockets, as tcp_abort does: the peer gets a reset, and the owner's next call fails with ECONNABORTED. choose gets those that
// have a peer, and returns which of them to end, in which order. Destroy returns those that it ended. A socket that ends by itself meanwhile
// is no error. The error wraps EOPNOTSUPP or ENOENT where the kernel can't do it, see Supported.
func Destroy(choose func(open map[Socket]Details) []Socket) (ended []Socket, err error) {
	c, err := connect()
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.close() }()
	open, ids := map[Socket]Details{}, map[Socket]kernelID{}
	err = c.dump(connected, func(a answer) {
		open[a.socket], ids[a.socket] = a.details(), kernelID{a.family, [idSize]byte(a.id)}
	})
	ended, failed := c.destroy(choose(open), ids)
	return ended, errors.Join(err, failed)
}

func (c *conn) destroy(order []Socket, ids map[Socket]kernelID) (ended []Socket, err error) {
	var errs []error
	for some := range slices.Chunk(order, atOnce) {
		began := time.Now()
		var requests []byte
		for i, s := range some {
			id := ids[s]
			requests = append(requests, request(unix.SOCK_DESTROY, unix.NLM_F_ACK, uint32(i), id.family, 0, ^uint32(0), id.id[:])...)
		}
		if err := c.send(requests); err != nil {
			return ended, errors.Join(append(errs, err)...)
		}
		for answered := 0; answered < len(some); {
			err := c.receive(func(m message) error {
				answered++
				s := some[min(m.sequence, uint32(len(some)-1))]
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
		if len(some) == atOnce { // the owner has work with each, and with other sockets meanwhile
			time.Sleep(time.Since(began))
		}
	}
	return ended, errors.Join(errs...)
}

// atOnce is how many requests are sent together. Their answers, of some 800 bytes in the kernel, fit into the socket's buffer.
const atOnce = 32

// Supported returns nil if the kernel can end sockets, and otherwise an error that names the option that it lacks.
func Supported() error {
	c, err := connect()
	if err != nil {
		return err
	}
	defer func() { _ = c.close() }()
	if err := c.dumpFamily(unix.AF_INET, connected, func(answer) {}); err != nil {
		return fmt.Errorf("the kernel does not list sockets (CONFIG_INET_DIAG): %w", err)
	}
	// There is no such socket, so ENOENT is the answer of a kernel that can do it.
	if err := c.send(request(unix.SOCK_DESTROY, unix.NLM_F_ACK, 0, unix.AF_INET, 0, ^uint32(0), make([]byte, idSize))); err != nil {
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
	if err := f.conn.send(request(unix.SOCK_DIAG_BY_FAMILY, 0, 0, s.family(), 0, ^uint32(0), id[:])); err != nil {
		return 0, err
	}
	err = f.conn.receive(func(m message) error {
		if err := m.err(); err != nil {
			return err
		}
		// Where there is no such connection the kernel answers with who listens for it, or with what one left in TIME_WAIT.
		if a, ok := parse(m.data); ok && a.socket == s && connected&(1<<a.state) != 0 {
			found = a.cookie()
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
	listening = 1 << 10 // LISTEN

	requestSize = 8  // struct inet_diag_req_v2, up to its id
	idSize      = 48 // struct inet_diag_sockid
	idCookie    = 40 // where the cookie is in it
	answerSize  = 72 // struct inet_diag_msg
	answerID    = 4  // where the id is in it
	answerUser  = 64 // and the user
	answerInode = 68 // and the inode

	// classID is INET_DIAG_CLASS_ID. A request has no bit for it, and asks by that of INET_DIAG_TCLASS.
	classID      = 17
	withPriority = 1 << (6 - 1)
)

// request is a message with struct inet_diag_req_v2. with says which attributes the answer is to have.
func request(kind, flags uint16, sequence uint32, family, with uint8, states uint32, id []byte) []byte {
	const size = unix.NLMSG_HDRLEN + requestSize + idSize
	data := make([]byte, size)
	binary.NativeEndian.PutUint32(data[0:], size)
	binary.NativeEndian.PutUint16(data[4:], kind)
	binary.NativeEndian.PutUint16(data[6:], unix.NLM_F_REQUEST|flags)
	binary.NativeEndian.PutUint32(data[8:], sequence)
	body := data[unix.NLMSG_HDRLEN:]
	body[0], body[1], body[2] = family, unix.IPPROTO_TCP, with
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

// answer is struct inet_diag_msg and its attributes. It is overwritten by the next ones.
type answer struct {
	socket        Socket
	family, state uint8
	user, inode   uint32
	id            []byte // struct inet_diag_sockid
	attributes    []byte
}

func parse(data []byte) (a answer, ok bool) {
	if len(data) < answerSize {
		return a, false
	}
	a = answer{
		family: data[0], state: data[1],
		user: binary.NativeEndian.Uint32(data[answerUser:]), inode: binary.NativeEndian.Uint32(data[answerInode:]),
		id: data[answerID : answerID+idSize], attributes: data[answerSize:],
	}
	address := func(at int) netip.Addr {
		if a.family == unix.AF_INET {
			return netip.AddrFrom4([4]byte(a.id[at:]))
		}
		return netip.AddrFrom16([16]byte(a.id[at:])).Unmap()
	}
	a.socket.Local = netip.AddrPortFrom(address(4), binary.BigEndian.Uint16(a.id[0:]))
	a.socket.Remote = netip.AddrPortFrom(address(20), binary.BigEndian.Uint16(a.id[2:]))
	return a, true
}

func (a answer) cookie() Cookie { return Cookie(binary.NativeEndian.Uint64(a.id[idCookie:])) }

func (a answer) details() Details {
	d := Details{Cookie: a.cookie()}
	for rest := a.attributes; len(rest) >= unix.SizeofNlAttr; {
		size := int(binary.NativeEndian.Uint16(rest))
		if size < unix.SizeofNlAttr || size > len(rest) {
			break
		}
		if kind := binary.NativeEndian.Uint16(rest[2:]); kind == classID && size >= unix.SizeofNlAttr+4 {
			d.Priority = binary.NativeEndian.Uint32(rest[unix.SizeofNlAttr:])
		}
		rest = rest[min((size+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1), len(rest)):]
	}
	return d
}

// kernelID is what the kernel finds a socket by: its addresses, interface and cookie.
type kernelID struct {
	family uint8
	id     [idSize]byte
}
