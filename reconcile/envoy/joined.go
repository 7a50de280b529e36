package envoy

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
)

// Joined returns an error that names the listeners which another process has joined; nil where there is none. The kernel lets processes
// of Envoy's user do that (SO_REUSEPORT), and gives them a part of the listener's connections. It must be called on a thread in the
// pod's network namespace, and not while an Envoy starts.
//
// Envoy's sockets do not tell whose they are, so they are counted: it has one for each listener and worker, which a hot restart hands
// over.
func (r *Runner) Joined() error {
	names, most := map[netip.AddrPort]string{}, 0
	for _, p := range r.Running() {
		most = max(most, p.workers, 1)
		for _, l := range p.Bootstrap.GetStaticResources().GetListeners() {
			all := []*corev3.Address{l.GetAddress()}
			for _, more := range l.GetAdditionalAddresses() {
				all = append(all, more.GetAddress())
			}
			for _, address := range all {
				at := address.GetSocketAddress()
				if addr, err := netip.ParseAddr(at.GetAddress()); err == nil {
					names[netip.AddrPortFrom(addr, uint16(at.GetPortValue()))] = l.GetName()
				}
			}
		}
	}
	sockets, err := countSockets()
	if err != nil {
		return fmt.Errorf("looking for processes that joined Envoy's listeners: %w", err)
	}
	var errs []error
	for _, at := range slices.SortedFunc(maps.Keys(names), netip.AddrPort.Compare) {
		more := max(0, sockets[at]-most)
		for _, any := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
			if all := netip.AddrPortFrom(any, at.Port()); names[all] == "" {
				more += sockets[all]
			}
		}
		if more > 0 {
			errs = append(errs, fmt.Errorf("listener %s at %s has %d sockets that are not Envoy's: a process of user %d gets a part of its connections",
				names[at], at, more, r.UID))
		}
	}
	return errors.Join(errs...)
}

// countSockets returns how many TCP sockets listen at each address in the calling thread's network namespace.
func countSockets() (map[netip.AddrPort]int, error) {
	sockets := map[netip.AddrPort]int{}
	for _, name := range []string{"tcp", "tcp6"} {
		file, err := os.Open("/proc/thread-self/net/" + name)
		if errors.Is(err, fs.ErrNotExist) { // without IPv6
			continue
		}
		if err != nil {
			return nil, err
		}
		err = countListening(bufio.NewScanner(file), sockets)
		_ = file.Close()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file.Name(), err)
		}
	}
	return sockets, nil
}

// countListening reads up to the first socket that does not listen: listening ones come first (listening_get_first, net/ipv4/tcp_ipv4.c).
func countListening(lines *bufio.Scanner, sockets map[netip.AddrPort]int) error {
	lines.Scan() // the titles
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 4 || fields[3] != listening {
			break
		}
		at, err := parseSocket(fields[1])
		if err != nil {
			return err
		}
		sockets[at]++
	}
	return lines.Err()
}

// parseSocket reads an address as the kernel prints it: words of 32 bits in the machine's byte order, and the port, in hexadecimal.
func parseSocket(text string) (netip.AddrPort, error) {
	words, port, _ := strings.Cut(text, ":")
	bytes, err := hex.DecodeString(words)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is no socket address: %w", text, err)
	}
	for i := 0; i+4 <= len(bytes); i += 4 {
		binary.NativeEndian.PutUint32(bytes[i:], binary.BigEndian.Uint32(bytes[i:]))
	}
	addr, ok := netip.AddrFromSlice(bytes)
	number, err := strconv.ParseUint(port, 16, 16)
	if !ok || err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is no socket address", text)
	}
	return netip.AddrPortFrom(addr.Unmap(), uint16(number)), nil
}
