package peers

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	"mantlet/internal/sockdiag"
	"mantlet/schema"
)

// Connection is what is known of a connection that goes through Envoy.
type Connection struct {
	Peer       *Peer
	TLSVersion schema.TLSVersion

	Client   sockdiag.Exact // the socket that the client dialled, as Envoy has it
	Upstream sockdiag.Exact // Envoy's own, towards the workload or an upstream
}

// Table has the connections that Envoy told of when it made them. The zero value is ready. Its methods may be called concurrently.
//
// A line of Envoy's log is read some time after it was written. By then the connection may have ended, and another one may have its
// addresses. So two sockets must be there: the one that the client dialled, and Envoy's own towards the upstream, whose port nobody
// outside chooses. By their cookies later ones with the same addresses are told apart.
type Table struct {
	mu     sync.Mutex
	finder *sockdiag.Finder
	open   map[sockdiag.Cookie]Connection // by the cookie of the client's socket
	peers  map[string]*Peer               // by their certificates, as Envoy writes them
	sweep  int                            // how many entries there are when those of connections that ended are looked for
	swept  time.Time                      // when that was done last
}

// Bounds of what a table takes: some 15 MiB.
const (
	maxOpen  = 1 << 16
	maxPeers = 1 << 12
	minSweep = 1 << 10
	// sweepEvery keeps a table that is full of open connections from looking for others all the time.
	sweepEvery = time.Second
)

// Open makes the table look for sockets in the calling thread's network namespace. It is idempotent.
func (t *Table) Open() (err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.finder == nil {
		t.finder, err = sockdiag.NewFinder()
	}
	return err
}

// Close releases what Open took.
func (t *Table) Close() (err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.finder != nil {
		err = t.finder.Close()
		t.finder = nil
	}
	return err
}

// Note takes a connection in, by what Envoy writes of it: see render.ConnectedFields. Where the error is not nil, or the table is full, it
// is not known who is connected.
func (t *Table) Note(fields []string) error {
	var at [4]netip.AddrPort
	for i := range at {
		var err error
		if at[i], err = netip.ParseAddrPort(fields[i]); err != nil {
			return fmt.Errorf("reading an address: %w", err)
		}
	}
	version := schema.TLSVersion(strings.TrimPrefix(fields[4], "TLSv"))
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.finder == nil {
		return errors.New("sockets can't be looked for")
	}
	conn := Connection{
		TLSVersion: version,
		Client:     sockdiag.Exact{Socket: sockdiag.Socket{Local: at[1], Remote: at[0]}},
		Upstream:   sockdiag.Exact{Socket: sockdiag.Socket{Local: at[2], Remote: at[3]}},
	}
	for _, s := range []*sockdiag.Exact{&conn.Upstream, &conn.Client} {
		var err error
		if s.Cookie, err = t.finder.Find(s.Socket); err != nil || s.Cookie == 0 {
			return err
		}
	}
	delete(t.open, conn.Client.Cookie)
	if full := len(t.open) >= max(minSweep, t.sweep) || len(t.peers) >= maxPeers; full && time.Since(t.swept) > sweepEvery {
		if _, err := t.known(); err != nil {
			return err
		}
	}
	var err error
	if conn.Peer, err = t.peer(fields[5]); err != nil || conn.Peer == nil || len(t.open) >= maxOpen {
		return err
	}
	if t.open == nil {
		t.open = map[sockdiag.Cookie]Connection{}
	}
	t.open[conn.Client.Cookie] = conn
	return nil
}

// peer returns whom a certificate is for; nil where there are too many.
func (t *Table) peer(text string) (*Peer, error) {
	if p := t.peers[text]; p != nil || len(t.peers) >= maxPeers {
		return p, nil
	}
	p, err := parse(text)
	if err != nil {
		return nil, fmt.Errorf("reading a peer's certificate: %w", err)
	}
	if t.peers == nil {
		t.peers = map[string]*Peer{}
	}
	t.peers[strings.Clone(text)] = p // without the rest of the line
	return p, nil
}

// Known returns the connections that are open, by the socket that the client dialled, as Envoy has it. It must be called on a thread in
// the network namespace.
func (t *Table) Known() (map[sockdiag.Socket]Connection, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.known()
}

func (t *Table) known() (map[sockdiag.Socket]Connection, error) {
	if len(t.open) == 0 {
		return nil, nil
	}
	sockets, err := sockdiag.List()
	if err != nil {
		return nil, err
	}
	live := make(map[sockdiag.Cookie]bool, len(sockets))
	for _, s := range sockets {
		live[s.Cookie] = true
	}
	known := map[sockdiag.Socket]Connection{}
	used := map[*Peer]bool{}
	for cookie, conn := range t.open {
		if live[cookie] && live[conn.Upstream.Cookie] {
			known[conn.Client.Socket], used[conn.Peer] = conn, true
		} else {
			delete(t.open, cookie)
		}
	}
	for text, p := range t.peers {
		if !used[p] {
			delete(t.peers, text)
		}
	}
	t.sweep, t.swept = min(2*len(t.open), maxOpen), time.Now()
	return known, nil
}
