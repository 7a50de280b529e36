package dns

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"mantlet/internal/status"
	"mantlet/schema"
)

// Endpoints takes the addresses of upstreams. Set is idempotent; what is forgotten is asked for by nobody any more.
type Endpoints interface {
	Set(upstream schema.Upstream, addrs []netip.Addr) error
	Forget(upstream schema.Upstream)
}

// Follower looks names up again and again, and passes on what addresses they have. It implements reconcile.Names.
type Follower struct {
	resolver  *Resolver
	endpoints Endpoints
	log       *slog.Logger
	said      *rate.Limiter

	ctx     context.Context // the Follower's own, which Close ends
	end     context.CancelFunc
	lookups sync.WaitGroup
	fast    chan struct{} // a place for each lookup that goes on
	slow    chan struct{} // and for each of a name that was not answered last time

	mu    sync.Mutex
	hosts map[string]*host
}

// host is a name that is followed.
type host struct {
	name  string
	stop  context.CancelFunc
	again chan struct{} // looks it up at once

	mu     sync.Mutex
	ports  map[uint16]bool
	record Record
	failed int  // lookups in a row that did not confirm all
	slow   bool // the last one took long
}

// How many lookups go on at a time. Each takes up to eight sockets. Names that are not answered take seconds each: they have few
// places of their own, so that those that are answered never wait for them.
const (
	fastLookups = 48
	slowLookups = 16
)

// Where names have trouble one after another, the first are told at once, and the others not faster than this. The status has all.
const (
	saidAtOnce  = 20
	saidPerHour = 3600
)

// NewFollower returns a Follower of no names.
func NewFollower(resolver *Resolver, endpoints Endpoints, log *slog.Logger) *Follower {
	f := &Follower{
		resolver: resolver, endpoints: endpoints, log: log, said: rate.NewLimiter(rate.Every(time.Hour/saidPerHour), saidAtOnce),
		fast: make(chan struct{}, fastLookups), slow: make(chan struct{}, slowLookups), hosts: map[string]*host{},
	}
	f.ctx, f.end = context.WithCancel(context.Background())
	return f
}

// Close ends all lookups, and returns when they have ended.
func (f *Follower) Close() {
	f.end()
	f.lookups.Wait()
}

// Follow makes these the upstreams whose names are followed; those that are addresses are passed over. It does not wait for
// lookups.
func (f *Follower) Follow(upstreams []schema.Upstream) {
	wanted := map[string]map[uint16]bool{}
	for _, u := range upstreams {
		if !u.IsName() {
			continue
		}
		if wanted[u.Host] == nil {
			wanted[u.Host] = map[uint16]bool{}
		}
		wanted[u.Host][u.Port] = true
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for name, h := range f.hosts {
		if wanted[name] == nil {
			delete(f.hosts, name)
			f.setPorts(h, nil)
			h.stop()
		}
	}
	for name, ports := range wanted {
		if h := f.hosts[name]; h != nil {
			f.setPorts(h, ports)
			continue
		}
		h := &host{name: name, again: make(chan struct{}, 1), ports: ports}
		var ctx context.Context
		ctx, h.stop = context.WithCancel(f.ctx)
		f.hosts[name] = h
		f.lookups.Go(func() { f.follow(ctx, h) })
	}
}

// setPorts makes these the ports that a host's addresses are wanted with.
func (f *Follower) setPorts(h *host, ports map[uint16]bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for port := range h.ports {
		if !ports[port] {
			f.endpoints.Forget(schema.Upstream{Host: h.name, Port: port})
		}
	}
	h.ports = ports
	f.publish(h)
}

// publish passes on the addresses that are known of a host, or that it has none, once it was looked up. Its lock is held.
func (f *Follower) publish(h *host) {
	if h.record.Asked.IsZero() {
		return
	}
	for port := range h.ports {
		if err := f.endpoints.Set(schema.Upstream{Host: h.name, Port: port}, h.record.Addrs()); err != nil {
			f.log.Error("Envoy can't be told addresses", "host", h.name, "error", err)
		}
	}
}

// Refresh looks all names up now.
func (f *Follower) Refresh() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, h := range f.hosts {
		select {
		case h.again <- struct{}{}:
		default:
		}
	}
}

// Resolved returns what is known of a host; the zero value of one that is not followed, or not looked up yet.
func (f *Follower) Resolved(name string) status.Resolved {
	f.mu.Lock()
	h := f.hosts[name]
	f.mu.Unlock()
	if h == nil {
		return status.Resolved{}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.record.Resolved()
}

// Resolved is a record in words.
func (r Record) Resolved() status.Resolved {
	said := status.Resolved{Asked: r.Asked, Addresses: append([]netip.Addr{}, r.Addrs()...), Source: r.Source}
	if r.Err != nil {
		said.Answer = r.Err.Error()
	}
	if since, stale := r.Stale(); stale {
		said.StaleSince = &since
	}
	return said
}

// follow looks a host up until ctx ends.
func (f *Follower) follow(ctx context.Context, h *host) {
	for ctx.Err() == nil {
		if !f.lookup(ctx, h) {
			return
		}
		timer := time.NewTimer(f.pause(h))
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-h.again:
		}
		timer.Stop()
	}
}

// lookup looks a host up once. It reports false where ctx ended before.
func (f *Follower) lookup(ctx context.Context, h *host) bool {
	places := f.fast
	h.mu.Lock()
	known := h.record
	if h.slow {
		places = f.slow
	}
	h.mu.Unlock()
	select {
	case places <- struct{}{}:
		defer func() { <-places }()
	case <-ctx.Done():
		return false
	}
	began := time.Now()
	next := f.resolver.Lookup(ctx, h.name, known, began)
	h.mu.Lock()
	defer h.mu.Unlock()
	if ctx.Err() != nil {
		return false
	}
	h.record, h.slow = next, time.Since(began) > firstTimeout
	h.failed++
	if next.Err == nil {
		h.failed = 0
	}
	if !known.same(next) { // as a rule: with a thousand names the rest would take more than the lookups
		f.publish(h)
		f.tell(h.name, known, next)
	}
	return true
}

// tell logs what changed about a host.
func (f *Follower) tell(name string, was, is Record) {
	before, now := was.Resolved(), is.Resolved()
	_, wasStale := was.Stale()
	since, stale := is.Stale()
	good := len(now.Addresses) > 0 && !stale
	switch {
	case good && (was.Asked.IsZero() || len(before.Addresses) > 0 && !wasStale):
		f.log.Debug("a name has addresses", "host", name, "addresses", now.Addresses, "source_name", now.Source)
	case !f.said.Allow():
	case good:
		f.log.Info("a name has addresses again", "host", name, "addresses", now.Addresses, "source_name", now.Source)
	case stale:
		f.log.Warn("the addresses of a name are not confirmed; they are used for a time", "host", name, "addresses", now.Addresses,
			"since", since.Format(time.RFC3339), "answer", now.Answer, "limit", StaleLimit.String())
	default:
		f.log.Warn("a name has no address; connections to it are refused", "host", name, "answer", now.Answer)
	}
}

// When names are looked up again: as soon as they may have other addresses, by their time to live, but a name that is gone must not
// be used for longer than a few seconds; and after a failure soon at first.
const (
	minRefresh = time.Second
	maxRefresh = 5 * time.Second
	minRetry   = 250 * time.Millisecond
	maxRetry   = 2 * time.Second
	// perName keeps many names from keeping mantlet, the name server and conntrack's table busy: a thousand are looked up within
	// ten seconds, not five.
	perName = 10 * time.Millisecond
)

// pause returns when a host is to be looked up again, with jitter: those that were looked up at once shall not stay together.
func (f *Follower) pause(h *host) time.Duration {
	f.mu.Lock()
	least := time.Duration(len(f.hosts)) * perName
	f.mu.Unlock()
	h.mu.Lock()
	defer h.mu.Unlock()
	pause := min(max(h.record.TTL, minRefresh), maxRefresh)
	if h.failed > 0 {
		pause = min(minRetry<<min(h.failed-1, 10), maxRetry)
	}
	pause = max(pause, least)
	return pause - rand.N(pause/5)
}
