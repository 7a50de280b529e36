package dns

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// Resolver looks names up. It is safe for concurrent use.
type Resolver struct {
	config *file[config]
	hosts  *file[map[string][]netip.Addr]
	turn   atomic.Uint32 // of the server that is asked first, with the option rotate
}

// NewResolver returns a resolver that reads these files, and reads them again when they change: resolv.conf(5) and hosts(5).
func NewResolver(resolvConf, hosts string) *Resolver {
	return &Resolver{
		config: &file[config]{path: resolvConf, parse: parseConfig},
		hosts:  &file[map[string][]netip.Addr]{path: hosts, parse: parseHosts},
	}
}

// System returns a resolver that reads the files of the system.
func System() *Resolver { return NewResolver("/etc/resolv.conf", "/etc/hosts") }

// Servers returns the addresses of the name servers.
func (r *Resolver) Servers() (all []netip.Addr) {
	for _, server := range r.config.get().servers {
		if addr, err := netip.ParseAddrPort(server); err == nil {
			all = append(all, addr.Addr())
		}
	}
	return all
}

// The families of addresses, as places in a Record.
const (
	v4 = iota
	v6
	families
)

// StaleLimit is how long addresses are used that no name server confirms: longer than name servers take to restart, and not as
// long as an address takes to become another workload's that nobody notices.
const StaleLimit = 5 * time.Minute

// Record is what is known of a host. The zero Record knows nothing.
type Record struct {
	Source string        // what named the addresses: a name in DNS without its final dot, or the path of the hosts file
	TTL    time.Duration // of the answers
	Err    error         // why there are no addresses, or why some were not confirmed; nil where all is well
	Asked  time.Time     // when the lookup began; zero before the first

	families [families]family
	searched time.Time // when all names were asked that the host can mean
	list     []string  // those names
}

// family are addresses of one family, and when name servers named them last.
type family struct {
	addrs     []netip.Addr
	confirmed time.Time
}

// Addrs returns the addresses, IPv4 first, each once.
func (r Record) Addrs() []netip.Addr {
	all := slices.Concat(r.families[v4].addrs, r.families[v6].addrs)
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all)
}

// Stale returns since when addresses are used that were not confirmed; false where there are none of that kind.
func (r Record) Stale() (since time.Time, stale bool) {
	for _, f := range r.families {
		if len(f.addrs) > 0 && f.confirmed.Before(r.Asked) && (!stale || f.confirmed.Before(since)) {
			since, stale = f.confirmed, true
		}
	}
	return since, stale
}

// same reports whether there is nothing new in the next record: neither addresses, nor what name servers said of them.
func (r Record) same(next Record) bool {
	if r.Asked.IsZero() || r.Source != next.Source || (r.Err == nil) != (next.Err == nil) || r.Err != nil && r.Err.Error() != next.Err.Error() {
		return false
	}
	for i, f := range r.families {
		other := next.families[i]
		if len(f.addrs) != len(other.addrs) || !slices.Equal(f.addrs, other.addrs) && !slices.Equal(r.Addrs(), next.Addrs()) {
			return false
		}
	}
	_, was := r.Stale()
	_, is := next.Stale()
	return was == is
}

// hostsTTL is how long what the hosts file says is good for. Looking at it again costs little.
const hostsTTL = 5 * time.Second

// searchEvery is how often all names are asked that a host can mean, although one of them has addresses: one that counts more may
// have come.
const searchEvery = time.Minute

// Lookup returns what is known of a host now, where it was known before. The time is now's, so that the lookup knows what is stale.
func (r *Resolver) Lookup(ctx context.Context, host string, known Record, now time.Time) Record {
	if addrs := r.hosts.get()[hostsKey(host)]; len(addrs) > 0 {
		return r.fromHosts(addrs, now)
	}
	if known.Source == r.hosts.path {
		known = Record{}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c := r.config.get()
	list := c.candidates(host)
	next := Record{Asked: now, Source: known.Source, families: known.expire(now).families, list: list, searched: now}
	var asked candidate // the one that had the addresses, if it was asked already
	if i := slices.Index(list, known.Source+"."); i > 0 && slices.Equal(list, known.list) && now.Sub(known.searched) < searchEvery {
		next.searched = known.searched
		if asked = r.candidate(ctx, c, list[i]); !asked.gone() {
			return next.merge(asked)
		}
		next.searched = now
	}
	return next.search(list, func(names []string) []<-chan candidate { return r.candidates(ctx, c, names, asked) })
}

func (r *Resolver) fromHosts(addrs []netip.Addr, now time.Time) Record {
	next := Record{Source: r.hosts.path, TTL: hostsTTL, Asked: now, searched: now}
	for _, addr := range addrs {
		f := &next.families[v4]
		if addr.Is6() {
			f = &next.families[v6]
		}
		f.addrs = append(f.addrs, addr)
	}
	for i := range next.families {
		next.families[i].confirmed = now
	}
	return next
}

// expire returns the record without the addresses that were not confirmed for too long.
func (r Record) expire(now time.Time) Record {
	for i, f := range r.families {
		if now.Sub(f.confirmed) > StaleLimit {
			r.families[i] = family{}
		}
	}
	return r
}

// search asks for the names that a host can mean: the first alone, as it is as a rule the right one; then the others, all at once.
// They count in their order.
func (r Record) search(list []string, ask func(names []string) []<-chan candidate) Record {
	answers := ask(list[:min(1, len(list))])
	var without []candidate
	for i, name := range list {
		if i == 1 {
			answers = append(answers, ask(list[1:])...)
		}
		c := <-answers[i]
		isSource := name == r.Source+"."
		if c.found() || isSource && !c.gone() && len(r.Addrs()) > 0 {
			return r.merge(c)
		}
		if isSource { // gone, whatever others do not say
			r = r.forget()
		}
		without = append(without, c)
	}
	r.Err = unresolved(without)
	if !slices.ContainsFunc(without, func(c candidate) bool { return !c.gone() }) || len(r.Addrs()) == 0 {
		return r.forget()
	}
	return r
}

func (r Record) forget() Record {
	r.Source, r.families, r.TTL = "", [families]family{}, 0
	return r
}

// merge takes over what name servers say of a name that has addresses. Where they say nothing of one family, those that this
// name had before stay.
func (r Record) merge(c candidate) Record {
	source := strings.TrimSuffix(c.name, ".")
	if source != r.Source {
		r = r.forget()
	}
	r.Source, r.Err, r.TTL = source, nil, 0
	for i, reply := range c.replies {
		if reply.err != nil {
			if len(r.families[i].addrs) > 0 {
				r.Err = errors.Join(r.Err, reply.err)
			}
			continue
		}
		r.families[i] = family{reply.addrs, r.Asked}
		if len(reply.addrs) > 0 && (r.TTL == 0 || reply.ttl < r.TTL) {
			r.TTL = reply.ttl
		}
	}
	if len(r.Addrs()) == 0 {
		r = r.forget()
		r.Err = errors.New(c.text())
	}
	return r
}

// unresolved says what name servers answered where no name has addresses: those that could not tell first.
func unresolved(all []candidate) error {
	slices.SortStableFunc(all, func(a, b candidate) int {
		switch {
		case !a.gone() && b.gone():
			return -1
		case a.gone() && !b.gone():
			return 1
		default:
			return 0
		}
	})
	if len(all) == 0 {
		return errors.New("the name is too long for DNS")
	}
	var texts []string
	for i, c := range all {
		if j := slices.IndexFunc(all, func(other candidate) bool { return other.text() == c.text() }); i == j {
			texts = append(texts, c.text())
		}
	}
	if len(texts) == 1 {
		return errors.New(texts[0])
	}
	for i, text := range texts {
		j := slices.IndexFunc(all, func(c candidate) bool { return c.text() == text })
		texts[i] = text + " for " + strings.TrimSuffix(all[j].name, ".")
	}
	return errors.New(strings.Join(texts, "; "))
}

// candidate is a name that a host can mean, and what name servers say of it.
type candidate struct {
	name    string
	replies [families]reply
}

// found reports whether it has addresses.
func (c candidate) found() bool { return len(c.replies[v4].addrs)+len(c.replies[v6].addrs) > 0 }

// gone reports whether it has none for certain: it does not exist, or has no address of either family.
func (c candidate) gone() bool {
	a, b := c.replies[v4], c.replies[v6]
	return !c.found() && (a.err == nil && b.err == nil || a.absent || b.absent)
}

// text says why it has no addresses.
func (c candidate) text() string {
	a, b := c.replies[v4], c.replies[v6]
	if a.absent || a.err != nil && !b.absent {
		return a.text()
	}
	return b.text()
}

// candidates asks for several names at once. What was asked already is not asked again.
func (r *Resolver) candidates(ctx context.Context, c config, names []string, asked candidate) []<-chan candidate {
	var all []<-chan candidate
	for _, name := range names {
		answer := make(chan candidate, 1)
		all = append(all, answer)
		if name == asked.name {
			answer <- asked
			continue
		}
		go func() { answer <- r.candidate(ctx, c, name) }()
	}
	return all
}

// familyGrace is what servers get to answer about one family once they named addresses of the other: some never do.
const familyGrace = 500 * time.Millisecond

// candidate asks for both families of a name at once.
func (r *Resolver) candidate(ctx context.Context, c config, name string) candidate {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	answers := [families]chan reply{make(chan reply, 1), make(chan reply, 1)}
	for i, kind := range [families]dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeAAAA} {
		go func() { answers[i] <- r.query(ctx, c, name, kind) }()
	}
	all := candidate{name: name}
	var first, second int
	select {
	case all.replies[v4] = <-answers[v4]:
		first, second = v4, v6
	case all.replies[v6] = <-answers[v6]:
		first, second = v6, v4
	}
	switch {
	case all.replies[first].absent: // so it is in the other family (RFC 8020)
		cancel()
	case len(all.replies[first].addrs) > 0:
		grace := time.AfterFunc(familyGrace, cancel)
		defer grace.Stop()
	}
	all.replies[second] = <-answers[second]
	return all
}
