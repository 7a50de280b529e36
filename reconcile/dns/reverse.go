package dns

import (
	"context"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/net/dns/dnsmessage"
)

// Name returns a name of an address, as the hosts file has it, or name servers (RFC 1035, section 3.5; RFC 3596, section 2.5); "" where
// nobody has one. Whoever is asked may say anything: a name is a hint, and nothing to trust.
func (r *Resolver) Name(ctx context.Context, addr netip.Addr) string {
	var all []string
	for name, addrs := range r.hosts.get() {
		if slices.Contains(addrs, addr) {
			all = append(all, name)
		}
	}
	if len(all) > 0 {
		return slices.Max(all) // the same one each time
	}
	answer := r.query(ctx, r.config.get(), reverseName(addr), dnsmessage.TypePTR)
	return strings.TrimSuffix(answer.name, ".")
}

// reverseName is the name in DNS that has an address's names.
func reverseName(addr netip.Addr) string {
	const hex = "0123456789abcdef"
	var labels []string
	for _, b := range slices.Backward(addr.AsSlice()) {
		if addr.Is4() {
			labels = append(labels, strconv.Itoa(int(b)))
		} else {
			labels = append(labels, hex[b&0xf:b&0xf+1], hex[b>>4:b>>4+1])
		}
	}
	if addr.Is4() {
		return strings.Join(labels, ".") + ".in-addr.arpa."
	}
	return strings.Join(labels, ".") + ".ip6.arpa."
}
