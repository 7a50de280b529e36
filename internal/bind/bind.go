package bind

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
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
	sockets, _ := Listeners() // what can't be read is out of sight
	return processes(sockets)
}

// At says who listens at an address: the process's id and its name, as "pid 12 (python3)", or else whose it is.
func (p Processes) At(address netip.AddrPort) string {
	sockets, _ := Listeners() // what can't be read is out of sight
	sockets = slices.DeleteFunc(sockets, func(s Listener) bool {
		at := s.Address
		return at.Port() != address.Port() || at.Addr() != address.Addr() && !at.Addr().IsUnspecified() && !address.Addr().IsUnspecified()
	})
	now := processes(sockets)
	var all []string
	for _, s := range sockets {
		name := cmp.Or(p[s.Inode], now[s.Inode])
		if name == "" {
			name = fmt.Sprintf("a process of user %s that is out of sight", s.User)
		}
		all = append(all, name)
	}
	slices.Sort(all)
	if all = slices.Compact(all); len(all) == 0 {
		return "a process that is out of sight"
	}
	return strings.Join(all, " and ")
}

// processes names the processes that have the sockets. What none is seen to have is left out.
func processes(sockets []Listener) Processes {
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
		if !isSocket || all[inode] != "" || !slices.ContainsFunc(sockets, func(s Listener) bool { return s.Inode == inode }) {
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
