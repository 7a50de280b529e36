package bind

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"mantlet/internal/sockdiag"
)

// Listener is a TCP socket that listens.
type Listener struct {
	Address netip.AddrPort // IPv4 addresses are never in IPv6's form
	User    string         // the number of the user whose it is
	Inode   string         // of the socket, as a link of /proc/PID/fd names it
}

// Listeners returns the TCP sockets that listen in the calling thread's network namespace.
func Listeners() (all []Listener, err error) {
	sockets, err := sockdiag.Listeners()
	if err != nil { // a kernel without CONFIG_INET_DIAG
		return listenersOfProc()
	}
	for _, s := range sockets {
		all = append(all, Listener{Address: s.Address, User: fmt.Sprint(s.User), Inode: fmt.Sprint(s.Inode)})
	}
	return all, nil
}

// listenersOfProc reads /proc/net/tcp (proc_net_tcp(5)).
func listenersOfProc() (all []Listener, err error) {
	for _, table := range []string{"tcp", "tcp6"} {
		file, err := os.Open("/proc/thread-self/net/" + table)
		if table == "tcp6" && errors.Is(err, fs.ErrNotExist) { // a kernel without IPv6
			continue
		}
		if err != nil {
			return all, fmt.Errorf("reading the sockets of the network namespace: %w", err)
		}
		all, err = appendListeners(all, bufio.NewScanner(file))
		_ = file.Close()
		if err != nil {
			return all, fmt.Errorf("%s: %w", file.Name(), err)
		}
	}
	return all, nil
}

// appendListeners reads up to the first socket that does not listen: listening ones come first (listening_get_first, net/ipv4/tcp_ipv4.c),
// and there may be many others.
func appendListeners(all []Listener, lines *bufio.Scanner) ([]Listener, error) {
	const listen = "0A" // TCP_LISTEN of include/net/tcp_states.h
	lines.Scan()        // the titles
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 10 || fields[3] != listen {
			break
		}
		at, err := parse(fields[1])
		if err != nil {
			return all, fmt.Errorf("%q is no socket address: %w", fields[1], err)
		}
		all = append(all, Listener{Address: at, User: fields[7], Inode: fields[9]})
	}
	return all, lines.Err()
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
