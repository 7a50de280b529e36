package dns

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"mantlet/internal/lab"
	"mantlet/schema"
)

// limit bounds every wait: far longer than anything takes.
const limit = 30 * time.Second

// envoy keeps what it is told.
type envoy struct {
	mu   sync.Mutex
	has  map[schema.Upstream][]netip.Addr
	sets int
	log  bytes.Buffer
}

func (e *envoy) Set(upstream schema.Upstream, addrs []netip.Addr) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.has[upstream] = addrs
	e.sets++
	return nil
}

func (e *envoy) Forget(upstream schema.Upstream) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.has, upstream)
}

func (e *envoy) Write(text []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.log.Write(text)
}

// knows returns the addresses of an upstream, and whether it was told of it.
func (e *envoy) knows(upstream schema.Upstream) ([]netip.Addr, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	addrs, ok := e.has[upstream]
	return addrs, ok
}

func (e *envoy) logged() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.log.String()
}

// logs waits until the log has a text: a line is written once Envoy was told.
func (p *place) logs(e *envoy, part string) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if err := lab.Until(ctx, func() bool { return strings.Contains(e.logged(), part) }); err != nil {
		p.t.Errorf("the log lacks %q:\n%s", part, e.logged())
	}
}

func follower(p *place) (*Follower, *envoy) {
	e := &envoy{has: map[schema.Upstream][]netip.Addr{}}
	f := NewFollower(p.Resolver, e, slog.New(slog.NewTextHandler(e, &slog.HandlerOptions{Level: slog.LevelDebug})))
	p.t.Cleanup(f.Close)
	return f, e
}

// comes waits until Envoy was told that an upstream has these addresses.
func (p *place) comes(e *envoy, upstream schema.Upstream, want ...string) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	var got []netip.Addr
	if err := lab.Until(ctx, func() (ok bool) {
		got, ok = e.knows(upstream)
		return ok && slices.Equal(got, addrs(want...))
	}); err != nil {
		p.t.Fatalf("%s has %v, want %v", upstream, got, want)
	}
}

// TestFollow: Envoy is told of each port of a name, of what changes, and no more of what is not followed any more.
func TestFollow(t *testing.T) {
	p := newPlace(t, 1, cluster)
	f, e := follower(p)
	p.servers[0].SetAddrs(map[string][]netip.Addr{"billing" + inShop: addrs("10.0.0.1"), "cart" + inShop: addrs("10.0.0.2")})
	billing, metrics, cart := schema.Upstream{Host: "billing", Port: 80}, schema.Upstream{Host: "billing", Port: 81}, schema.Upstream{Host: "cart", Port: 80}
	f.Follow([]schema.Upstream{billing, cart, billing, {Host: "10.0.0.9", Port: 80}})
	p.comes(e, billing, "10.0.0.1")
	p.comes(e, cart, "10.0.0.2")
	asked := len(p.servers[0].Asked())
	f.Follow([]schema.Upstream{billing, metrics})
	if got, ok := e.knows(metrics); !ok || !slices.Equal(got, addrs("10.0.0.1")) {
		t.Errorf("another port of a name that is known has %v", got)
	}
	if _, ok := e.knows(cart); ok {
		t.Error("it is followed no more, and Envoy would be told of it")
	}
	p.servers[0].SetAddrs(map[string][]netip.Addr{"billing" + inShop: addrs("10.0.0.3"), "cart" + inShop: addrs("10.0.0.4")})
	p.comes(e, billing, "10.0.0.3")
	p.comes(e, metrics, "10.0.0.3")
	p.servers[0].Set(nil)
	p.comes(e, billing)
	p.comes(e, metrics)
	if got := p.asked(0, asked); slices.Contains(got, "cart"+inShop) {
		t.Error("a name is looked up that is followed no more")
	}
	if r := f.Resolved("billing"); len(r.Addresses) > 0 || !strings.Contains(r.Answer, "NXDOMAIN") {
		t.Errorf("it is %+v", r)
	}
	if r := f.Resolved("cart"); !r.Asked.IsZero() {
		t.Errorf("it is %+v", r)
	}
	f.Follow([]schema.Upstream{cart})
	p.comes(e, cart)
	p.servers[0].SetAddrs(map[string][]netip.Addr{"cart" + inShop: addrs("10.0.0.5")})
	f.Refresh()
	p.comes(e, cart, "10.0.0.5")
	for _, part := range []string{"a name has no address", "host=billing", `answer="NXDOMAIN by `, "a name has addresses again"} {
		p.logs(e, part)
	}
}

// TestFollowMany: more names than are looked up at a time are all looked up, and those that are not answered do not keep the others
// from it.
func TestFollowMany(t *testing.T) {
	p := newPlace(t, 1, "options timeout:1\n")
	f, e := follower(p)
	names := map[string]lab.Answer{}
	var all []schema.Upstream
	for i := range 300 {
		name := fmt.Sprintf("svc-%d.example", i)
		names[name] = lab.Answer{Addrs: addrs("10.0.0.1"), TTL: 1}
		if i%4 == 0 {
			names[name] = lab.Answer{Silent: true}
		}
		all = append(all, schema.Upstream{Host: name, Port: 80})
	}
	p.servers[0].Set(names)
	f.Follow(all)
	for i, u := range all {
		if i%4 != 0 {
			p.comes(e, u, "10.0.0.1")
		}
	}
	gone := map[string]lab.Answer{}
	for name, answer := range names {
		if answer.Silent {
			gone[name] = answer
		}
	}
	began := time.Now()
	p.servers[0].Set(gone)
	for i, u := range all {
		if i%4 != 0 {
			p.comes(e, u)
		}
	}
	t.Logf("all are gone after %v", time.Since(began))
}
