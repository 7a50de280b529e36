package sockdiag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// conn is a socket to sock_diag. With some ten thousand sockets each message counts: it reads them where they are received.
type conn struct {
	fd     int
	buffer []byte
}

func connect() (*conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("connecting to sock_diag: %w", err)
	}
	const patience = 2 // s; the kernel answers at once
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: patience}); err != nil {
		return nil, errors.Join(os.NewSyscallError("setsockopt", err), unix.Close(fd))
	}
	return &conn{fd, make([]byte, 64<<10)}, nil // the kernel fills at most 32 KiB of it
}

func (c *conn) close() error { return unix.Close(c.fd) }

func (c *conn) send(requests []byte) error {
	return os.NewSyscallError("sendto", unix.Sendto(c.fd, requests, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}))
}

// message is one of the kernel's. Its data is overwritten by the next ones.
type message struct {
	kind     uint16
	sequence uint32
	data     []byte
}

// err returns the error that a message tells, if it tells one.
func (m message) err() error {
	if m.kind != unix.NLMSG_ERROR && m.kind != unix.NLMSG_DONE || len(m.data) < 4 {
		return nil
	}
	if code := int32(binary.NativeEndian.Uint32(m.data)); code < 0 {
		return unix.Errno(-code)
	}
	return nil
}

// receive waits for messages and calls each for them.
func (c *conn) receive(each func(message) error) error {
	n, _, err := unix.Recvfrom(c.fd, c.buffer, 0)
	for err == unix.EINTR {
		n, _, err = unix.Recvfrom(c.fd, c.buffer, 0)
	}
	if err != nil {
		return os.NewSyscallError("recvfrom", err)
	}
	for rest := c.buffer[:n]; len(rest) > 0; {
		if len(rest) < unix.NLMSG_HDRLEN {
			return errCut
		}
		size := int(binary.NativeEndian.Uint32(rest))
		if size < unix.NLMSG_HDRLEN || size > len(rest) {
			return errCut
		}
		m := message{binary.NativeEndian.Uint16(rest[4:]), binary.NativeEndian.Uint32(rest[8:]), rest[unix.NLMSG_HDRLEN:size]}
		if err := each(m); err != nil {
			return err
		}
		rest = rest[min((size+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1), len(rest)):]
	}
	return nil
}

var errCut = errors.New("a message of sock_diag is cut off")

// dump calls each for the sockets in some states.
func (c *conn) dump(states uint32, each func(answer)) error {
	var errs []error
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		errs = append(errs, c.dumpFamily(family, states, each))
	}
	return errors.Join(errs...)
}

func (c *conn) dumpFamily(family uint8, states uint32, each func(answer)) error {
	if err := c.send(request(unix.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP, 0, family, withPriority, states, nil)); err != nil {
		return err
	}
	for done := false; !done; {
		err := c.receive(func(m message) error {
			done = m.kind == unix.NLMSG_DONE || m.kind == unix.NLMSG_ERROR
			if a, ok := parse(m.data); ok && !done {
				each(a)
			}
			return m.err()
		})
		if err != nil {
			return fmt.Errorf("listing sockets: %w", err)
		}
	}
	return nil
}
