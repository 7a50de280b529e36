package nft

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"mantlet/render"
)

// holder is what tells one mantlet of a network namespace from another on kernels that keep no owner of a table: an abstract unix
// socket, which the kernel has per network namespace and which ends with its process. Everybody in the pod may bind to such a name.
// So the name alone proves nothing: the first rule of the table has, as user data, the number of the socket (its inode), and rules
// are made by processes with NET_ADMIN alone.
type holder struct {
	fd        int
	inode     uint64
	contested bool // somebody else has socketName: a mantlet that starts, or a process that means to keep mantlet from it
}

// socketName is the socket's name. Where it is taken, it is followed by a dash and random digits.
const socketName = "@mantlet"

// hold makes the socket. It stays open until release.
func hold() (holder, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return holder{}, os.NewSyscallError("socket", err)
	}
	h := holder{fd: fd}
	err = unix.Bind(fd, &unix.SockaddrUnix{Name: socketName})
	if errors.Is(err, unix.EADDRINUSE) {
		h.contested = true
		err = unix.Bind(fd, &unix.SockaddrUnix{Name: socketName + "-" + rand.Text()})
	}
	const backlog = 16 // nobody accepts: who connects asks the kernel whose socket it is
	if err == nil {
		err = unix.Listen(fd, backlog)
	}
	var stat unix.Stat_t
	if err == nil {
		err = unix.Fstat(fd, &stat)
	}
	if err != nil {
		_ = unix.Close(fd)
		return holder{}, fmt.Errorf("making the socket %s: %w", socketName, err)
	}
	h.inode = stat.Ino
	return h, nil
}

func (h *holder) release() {
	if h.inode != 0 {
		_ = unix.Close(h.fd)
	}
	*h = holder{}
}

// holderData is the type of the user data, of which nft shows only those that it knows (struct nftnl_udata); the rest is the number.
const holderData = 'm'

// userData returns what the first rule of the table has.
func (h *holder) userData() []byte {
	if h.inode == 0 {
		return nil
	}
	return binary.BigEndian.AppendUint64([]byte{holderData, 8}, h.inode)
}

// holderOf returns the number that a rule's user data has; 0 for none.
func holderOf(userData []byte) uint64 {
	if len(userData) != 10 || !bytes.HasPrefix(userData, []byte{holderData, 8}) {
		return 0
	}
	return binary.BigEndian.Uint64(userData[2:])
}

// other returns an error where a mantlet lives that made the table and is not this one: ErrOwned, and who it is as far as the kernel
// says.
func (t *Table) other() error {
	var inode uint64
	err := t.list(unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE, func(a attributes) error {
		inode = max(inode, holderOf(a[unix.NFTA_RULE_USERDATA]))
		return nil
	})
	if err != nil || inode == 0 || inode == t.holder.inode {
		return err
	}
	name, err := socketOf(inode)
	if err != nil || name == "" {
		return err
	}
	return fmt.Errorf("%w%s", ErrOwned, whose(name))
}

// socketOf returns the name of the unix socket with a number in the calling thread's network namespace, if it is one that hold makes.
func socketOf(inode uint64) (name string, err error) {
	text, err := os.ReadFile("/proc/thread-self/net/unix")
	if err != nil {
		return "", fmt.Errorf("reading the unix sockets of the network namespace: %w", err)
	}
	number := strconv.FormatUint(inode, 10)
	for line := range strings.Lines(string(text)) {
		// Num RefCount Protocol Flags Type St Inode Path
		fields := strings.Fields(line)
		if len(fields) == 8 && fields[6] == number && strings.HasPrefix(fields[7], socketName) {
			return fields[7], nil
		}
	}
	return "", nil
}

// whose says which process listens at an abstract socket: " (process 7, user 0)". The kernel knows it as it was when it began to
// listen, and numbers it 0 where it is of another PID namespace. It returns "" where it does not say.
func whose(name string) string {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return ""
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: name}); err != nil {
		return ""
	}
	peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	switch {
	case err != nil:
		return ""
	case peer.Pid == 0:
		return fmt.Sprintf(" (a process of another container, user %d)", peer.Uid)
	default:
		return fmt.Sprintf(" (process %d, user %d)", peer.Pid, peer.Uid)
	}
}

// contest is how long a mantlet that finds its name taken waits for the other one to show itself by the table that it makes.
const contest = 2 * time.Second

// Alone returns nil once it is certain that no other mantlet started in the network namespace at the same time, and otherwise ErrOwned.
// DenyAll must have been called. Where nobody has mantlet's name it does not wait. squatter says who does and is no mantlet.
func (t *Table) Alone() (squatter string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.holder.contested || t.owned {
		return "", nil
	}
	tick := time.NewTicker(contest / 100)
	defer tick.Stop()
	for began := time.Now(); time.Since(began) < contest; <-tick.C {
		if err := t.other(); errors.Is(err, ErrOwned) {
			return "", err
		}
	}
	return strings.TrimPrefix(whose(socketName), " "), nil
}

// Remove takes the table away, and with it all protection. It reports whether there was one. The error is ErrOwned where a mantlet
// runs.
func (t *Table) Remove() (bool, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	there := false
	err := t.list(unix.NFT_MSG_GETTABLE, unix.NFTA_TABLE_NAME, func(attributes) error { there = true; return nil })
	if err == nil {
		err = t.other()
	}
	if err == nil && there {
		err = t.transaction(func(*batch) error { t.conn.DelTable(t.table); return nil })
	}
	if err != nil {
		return false, fmt.Errorf("removing the table inet %s: %w", render.Table, t.explain(err))
	}
	return there, nil
}
