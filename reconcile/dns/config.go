package dns

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// config is resolv.conf(5), as far as it matters here.
type config struct {
	servers  []string // addresses, with the port
	search   []string // domains without a dot at the end
	ndots    int
	timeout  time.Duration
	attempts int
	rotate   bool
	tcp      bool // use-vc
}

// The limits are glibc's (resolv/resolv.h, resolv/res_init.c).
const (
	maxServers  = 3
	maxNdots    = 15
	maxTimeout  = 30
	maxAttempts = 5
)

// parseConfig reads resolv.conf as glibc does: what it does not know it passes over, the last search or domain line counts, and
// without a name server it is the one of this machine.
func parseConfig(text []byte) config {
	c := config{ndots: 1, timeout: 5 * time.Second, attempts: 2}
	for line := range bytes.Lines(text) {
		fields := strings.Fields(string(line))
		if len(fields) < 2 || fields[0][0] == '#' || fields[0][0] == ';' {
			continue
		}
		switch fields[0] {
		case "nameserver":
			if _, err := netip.ParseAddr(fields[1]); err == nil && len(c.servers) < maxServers {
				c.servers = append(c.servers, net.JoinHostPort(fields[1], "53"))
			}
		case "domain":
			c.search = domains(fields[1:2])
		case "search":
			c.search = domains(fields[1:])
		case "options":
			for _, option := range fields[1:] {
				c.option(option)
			}
		}
	}
	if len(c.servers) == 0 {
		c.servers = []string{"127.0.0.1:53"}
	}
	return c
}

func domains(fields []string) (all []string) {
	for _, domain := range fields {
		if domain = strings.TrimSuffix(domain, "."); domain != "" {
			all = append(all, domain)
		}
	}
	return all
}

func (c *config) option(text string) {
	name, value, _ := strings.Cut(text, ":")
	n, err := strconv.Atoi(value)
	switch {
	case name == "rotate":
		c.rotate = true
	case name == "use-vc":
		c.tcp = true
	case err != nil || n < 0:
	case name == "ndots":
		c.ndots = min(n, maxNdots)
	case name == "timeout" && n > 0:
		c.timeout = time.Duration(min(n, maxTimeout)) * time.Second
	case name == "attempts" && n > 0:
		c.attempts = min(n, maxAttempts)
	}
}

// maxName is how long a name in DNS can be as text with the dot at its end (RFC 1035, section 3.1).
const maxName = 254

// candidates returns the names, with a dot at the end, that a host can mean, in the order in which they count.
func (c config) candidates(host string) []string {
	if strings.HasSuffix(host, ".") {
		return []string{host}
	}
	var all []string
	for _, domain := range c.search {
		all = append(all, host+"."+domain+".")
	}
	if strings.Count(host, ".") >= c.ndots {
		all = slices.Insert(all, 0, host+".")
	} else {
		all = append(all, host+".")
	}
	return slices.DeleteFunc(all, func(name string) bool { return len(name) > maxName })
}

// parseHosts reads hosts(5): the addresses by name, in lower case and without a dot at the end.
func parseHosts(text []byte) map[string][]netip.Addr {
	all := map[string][]netip.Addr{}
	for line := range bytes.Lines(text) {
		line, _, _ = bytes.Cut(line, []byte("#"))
		fields := strings.Fields(string(line))
		if len(fields) < 2 {
			continue
		}
		addr, err := netip.ParseAddr(fields[0])
		if err != nil {
			continue
		}
		for _, name := range fields[1:] {
			key := hostsKey(name)
			all[key] = append(all[key], addr.Unmap())
		}
	}
	return all
}

func hostsKey(name string) string { return strings.ToLower(strings.TrimSuffix(name, ".")) }

// file is a file that is parsed again once it may have changed. One that can't be read counts as empty.
type file[T any] struct {
	path  string
	parse func([]byte) T

	mu     sync.Mutex
	info   os.FileInfo
	stable bool // what was parsed is older than two changes that the file system's clock could not tell apart
	parsed T
}

// coarse is more than the steps of any file system's clock.
const coarse = 2 * time.Second

func (f *file[T]) get() T {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	info, err := os.Stat(f.path)
	if err == nil && f.stable && os.SameFile(info, f.info) && info.Size() == f.info.Size() && info.ModTime().Equal(f.info.ModTime()) {
		return f.parsed
	}
	var text []byte
	if err == nil {
		text, err = os.ReadFile(f.path)
	}
	f.parsed, f.info = f.parse(text), info
	f.stable = err == nil && now.Sub(info.ModTime()) > coarse
	return f.parsed
}
