// Package bind tells whether addresses are free to listen at and, where one is not, which process has it.
package bind

import (
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"
)

// Conflict is an address that mantlet is to listen at and another process has.
type Conflict struct {
	Address netip.AddrPort
	Holder  string // as Processes.At returns it
	For     string // what mantlet wants the address for
}

// Conflicts are an error, a line each.
type Conflicts []Conflict

func (c Conflicts) Error() string {
	var lines []string
	for _, one := range c {
		line := fmt.Sprintf("%s is held by %s", one.Address, one.Holder)
		if one.For != "" {
			line += "; " + one.For
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

// Try binds, for a moment, to each of the addresses, as Envoy does: beside sockets of the same user that share their port. It does
// not listen, so no connection gets lost. The error is Conflicts where processes have some of them, else that of the first that
// can't be bound to.
func Try(known Processes, addresses ...netip.AddrPort) error {
	var conflicts Conflicts
	for _, address := range addresses {
		err := try(address)
		switch {
		case errors.Is(err, unix.EADDRINUSE):
			conflicts = append(conflicts, Conflict{Address: address, Holder: known.At(address)})
		case err != nil:
			return fmt.Errorf("listening at %s: %w", address, err)
		}
	}
	if conflicts != nil {
		return conflicts
	}
	return nil
}

func try(address netip.AddrPort) error {
	family, to := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Addr: address.Addr().As16(), Port: int(address.Port())})
	if address.Addr().Is4() {
		family, to = unix.AF_INET, &unix.SockaddrInet4{Addr: address.Addr().As4(), Port: int(address.Port())}
	}
	socket, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(socket) }()
	return errors.Join(
		unix.SetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		unix.SetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1),
		unix.Bind(socket, to),
	)
}

// Processes are the names of processes by the inodes of sockets that they listen with.
type Processes map[string]string

// Listening returns the processes that listen in this network namespace, as far as the caller may see them. Whose descriptors a
// process may look at, proc(5) says: without privileges those of its own user alone.
func Listening() Processes {
	return processes(listeners(func(netip.AddrPort) bool { return true }))
}

// At says who listens at an address: the process's id and its name, as "pid 12 (python3)", or else whose it is.
func (p Processes) At(address netip.AddrPort) string {
	sockets := listeners(func(at netip.AddrPort) bool {
		return at.Port() == address.Port() && (at.Addr() == address.Addr() || at.Addr().IsUnspecified() || address.Addr().IsUnspecified())
	})
	now := processes(sockets)
	var all []string
	for _, s := range sockets {
		name := cmp.Or(p[s.inode], now[s.inode])
		if name == "" {
			name = fmt.Sprintf("a process of user %s that is out of sight", s.user)
		}
		all = append(all, name)
	}
	slices.Sort(all)
	if all = slices.Compact(all); len(all) == 0 {
		return "a process that is out of sight"
	}
	return strings.Join(all, " and ")
}

// listener is a socket as the kernel lists it.
type listener struct{ inode, user string }

// listeners returns the sockets of this network namespace that listen, at the addresses that are wanted. They come from
// /proc/net/tcp (proc_net_tcp(5)).
func listeners(wanted func(netip.AddrPort) bool) (all []listener) {
	const listen = "0A" // TCP_LISTEN of include/net/tcp_states.h
	for _, table := range []string{"tcp", "tcp6"} {
		text, err := os.ReadFile("/proc/thread-self/net/" + table)
		if err != nil {
			continue // a kernel without IPv6 has one of them
		}
		for line := range strings.Lines(string(text)) {
			fields := strings.Fields(line)
			if len(fields) < 10 || fields[3] != listen {
				continue
			}
			if at, err := parse(fields[1]); err == nil && wanted(at) {
				all = append(all, listener{inode: fields[9], user: fields[7]})
			}
		}
	}
	return all
}

// parse reads an address as /proc/net/tcp has it: words of four bytes in the host's order, and the port, all in hex.
func parse(text string) (netip.AddrPort, error) {
	host, port, _ := strings.Cut(text, ":")
	bytes, err := hex.DecodeString(host)
	if err != nil {
		return netip.AddrPort{}, err
	}
	number, err := strconv.ParseUint(port, 16, 16)
	if err != nil {
		return netip.AddrPort{}, err
	}
	for i := 0; i+4 <= len(bytes); i += 4 {
		binary.BigEndian.PutUint32(bytes[i:], binary.NativeEndian.Uint32(bytes[i:]))
	}
	addr, ok := netip.AddrFromSlice(bytes)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("%q is no address", text)
	}
	return netip.AddrPortFrom(addr.Unmap(), uint16(number)), nil
}

// processes names the processes that have the sockets. What none is seen to have is left out.
func processes(sockets []listener) Processes {
	if len(sockets) == 0 {
		return nil
	}
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return nil
	}
	all := Processes{}
	for _, link := range links {
		to, err := os.Readlink(link)
		if err != nil {
			continue // it is closed, or out of sight
		}
		inode, isSocket := strings.CutPrefix(strings.TrimSuffix(to, "]"), "socket:[")
		if !isSocket || all[inode] != "" || !slices.ContainsFunc(sockets, func(s listener) bool { return s.inode == inode }) {
			continue
		}
		pid := strings.Split(link, "/")[2]
		if name, err := os.ReadFile("/proc/" + pid + "/comm"); err == nil { // else it has ended
			all[inode] = fmt.Sprintf("pid %s (%s)", pid, printable(strings.TrimSuffix(string(name), "\n")))
		}
	}
	return all
}

func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, text)
}
