package main

import (
	"crypto/tls"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"mantlet/internal/lab"
)

var (
	walkSeed  = flag.Uint64("walk.seed", 0, "walk as the run with this seed did; 0: another way")
	walkSteps = flag.Int("walk.steps", 5, "how many changes a walk has")
)

// The ports of a walk.
const (
	clientsPort = silentPort // has a list of clients
	modalPort   = 7890       // changes its mode
	walkEntry   = "127.137.0.1:8081"
)

// walkState is what a walk changes.
type walkState struct {
	clients     []string // of clientsPort
	mode        string   // of modalPort
	minVersion  uint16
	serverNames []string
}

func (s walkState) String() string {
	return fmt.Sprintf("%s %s TLS %s %s", s.clients, s.mode, versionNames[s.minVersion], s.serverNames)
}

var versionNames = map[uint16]string{tls.VersionTLS12: "1.2", tls.VersionTLS13: "1.3"}

// walkConn is an open connection, and what decides whether a state forbids it.
type walkConn struct {
	net.Conn
	port    uint16 // 0: to the egress entry
	peer    string // the client of clientsPort, the endpoint, or by which mode of modalPort it was let in
	version uint16
	isOld   bool // was made before an earlier change
}

func (c walkConn) String() string {
	return fmt.Sprintf("%s to port %d (TLS %s)", c.peer, c.port, versionNames[c.version])
}

// isForbidden judges by what the documentation says. It knows nothing of how mantlet does it.
func (c walkConn) isForbidden(from, to walkState) bool {
	switch c.port {
	case 0:
		return !slices.Contains(to.serverNames, c.peer) || c.version < to.minVersion
	case clientsPort:
		return !slices.Contains(to.clients, c.peer) || c.version < to.minVersion
	default:
		// Without a list it is not known who is connected, so whatever is stricter ends all.
		looseness := []string{"mtls", "tls", "passthrough"}
		newer := to.minVersion > from.minVersion && to.mode != "passthrough"
		return newer || slices.Index(looseness, to.mode) < slices.Index(looseness, from.mode)
	}
}

// walk is a pod that goes from state to state.
type walk struct {
	*pod
	random    *rand.Rand
	config    *mounted
	billing   *lab.Host
	endpoints *replicas
	names     map[*lab.Identity]string
	clients   map[string]*lab.Identity
	workloads map[uint16]*lab.Workload
	state     walkState
	open      []walkConn
}

func newWalk(t *testing.T) *walk {
	t.Helper()
	seed := *walkSeed
	if seed == 0 {
		seed = rand.Uint64N(1e9) + 1
	}
	t.Logf("-walk.seed=%d", seed)
	w := &walk{
		pod: newPod(t, "MANTLET_ENVOY_PARENT_SHUTDOWN_TIME=120s"), random: rand.New(rand.NewPCG(seed, 0)),
		clients: map[string]*lab.Identity{}, workloads: map[uint16]*lab.Workload{}, names: map[*lab.Identity]string{},
	}
	w.billing = w.host("billing")
	billing, shop := w.issue("billing"), w.issue("shop")
	w.names[billing], w.names[shop] = "billing", "shop"
	w.endpoints = w.replicate(w.billing, nil, billing, shop)
	for _, name := range []string{"cart", "orders", "users"} {
		w.clients[name] = w.issue(name)
	}
	w.state = walkState{clients: []string{"cart", "orders", "users"}, mode: "tls", minVersion: tls.VersionTLS12, serverNames: []string{"billing", "shop"}}
	w.config = w.override(w.text(w.state))
	for _, port := range []uint16{clientsPort, modalPort} {
		w.workloads[port] = w.serve(w.Host, lab.Service{Address: fmt.Sprintf(":%d", port)})
	}
	w.must(w.identity.Write(w.sidecar.TLSDirectory))
	w.run() // without the prober, whose connections would be among those that are counted
	w.ready()
	return w
}

func (w *walk) text(s walkState) string {
	return fmt.Sprintf(`ingress: [{port: %d, allow: [%s]}, {port: %d, mode: %s}]
egress: [{listen: '%s', upstream: '%s', serverNames: [%s]}]
tls: {minVersion: '%s'}
`, clientsPort, strings.Join(s.clients, ", "), modalPort, s.mode,
		replicated, netip.AddrPortFrom(w.billing.IPv4, 8443), strings.Join(s.serverNames, ", "), versionNames[s.minVersion])
}

// next draws another state.
func (w *walk) next() walkState {
	some := func(all ...string) []string { // one at least
		w.random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		return slices.Sorted(slices.Values(all[:1+w.random.IntN(len(all))]))
	}
	for {
		s := w.state
		switch w.random.IntN(5) {
		case 0, 1:
			s.clients = some("cart", "orders", "users")
		case 2:
			s.mode = []string{"mtls", "tls", "passthrough"}[w.random.IntN(3)]
		case 3:
			s.serverNames = some("billing", "shop")
		default:
			s.minVersion = []uint16{tls.VersionTLS12, tls.VersionTLS13}[w.random.IntN(2)]
		}
		if s.String() != w.state.String() {
			return s
		}
	}
}

// connect opens a connection of each kind that the state lets in.
func (w *walk) connect() {
	w.t.Helper()
	addrs := w.Addrs()
	addr := func() netip.Addr { return addrs[w.random.IntN(len(addrs))] }
	add := func(c walkConn, config *tls.Config) {
		if config == nil {
			c.Conn = w.dial(w.outside, netip.AddrPortFrom(addr(), c.port))
		} else {
			conn, err := w.handshake(netip.AddrPortFrom(addr(), c.port), only(c.version, config))
			w.must(err)
			c.Conn = conn
		}
		w.must(echo(c.Conn))
		w.open = append(w.open, c)
	}
	for version := w.state.minVersion; version <= tls.VersionTLS13; version++ {
		for _, name := range w.state.clients {
			add(walkConn{port: clientsPort, peer: name, version: version}, w.clients[name].ClientConfig("pod"))
		}
		modal := walkConn{port: modalPort, peer: w.state.mode, version: version}
		switch w.state.mode {
		case "passthrough":
			add(modal, nil)
		case "tls":
			add(modal, w.anonymous())
		default:
			add(modal, w.client.ClientConfig("pod"))
		}
	}
	var accepted []*lab.Identity
	for identity, name := range w.names {
		if slices.Contains(w.state.serverNames, name) {
			accepted = append(accepted, identity)
		}
	}
	w.endpoints.only(accepted...)
	for identity, conns := range w.endpoints.connect(w.pod, 1) {
		for _, conn := range conns {
			w.open = append(w.open, walkConn{Conn: conn, peer: w.names[identity], version: tls.VersionTLS13})
		}
	}
}

var ends = regexp.MustCompile(`; ends (\d+) open connection`)

// foretells reports whether mantlet says that a change would end so many connections, and what it says.
func (w *walk) foretells(to walkState, want int) (said string, ok bool) {
	w.t.Helper()
	said = w.against(w.text(to))
	n := 0
	for _, match := range ends.FindAllStringSubmatch(said, -1) {
		count, err := strconv.Atoi(match[1])
		w.must(err)
		n += count
	}
	return said, n == want
}

// comes reports whether a condition comes true.
func (w *walk) comes(cond func() bool) bool {
	ctx, cancel := w.context()
	defer cancel()
	return lab.Until(ctx, cond) == nil
}

// served returns how many connections the workloads and the endpoint have open.
func (w *walk) served() (n int) {
	for _, workload := range slices.Concat(slices.Collect(maps.Values(w.workloads)), []*lab.Workload{w.endpoints.Workload}) {
		for _, c := range workload.Connections() {
			if !c.Closed {
				n++
			}
		}
	}
	return n
}

// TestExactlyTheForbiddenEnd walks through random states with connections of each kind open. After a change those that it forbids are over
// at both ends, and all others exchange bytes; as many as mantlet foretold.
func TestExactlyTheForbiddenEnd(t *testing.T) {
	t.Parallel()
	w := newWalk(t)
	for step := range *walkSteps {
		w.connect()
		to := w.next()
		var forbidden, others []walkConn
		for _, c := range w.open {
			if c.isForbidden(w.state, to) {
				forbidden = append(forbidden, c)
			} else {
				others = append(others, c)
			}
		}
		t.Logf("step %d: %s -> %s, %d of %d are forbidden", step, w.state, to, len(forbidden), len(w.open))
		said := ""
		if !w.comes(func() (ok bool) { said, ok = w.foretells(to, len(forbidden)); return ok }) {
			t.Fatalf("%d connections are forbidden, and mantlet diff says\n%s", len(forbidden), said)
		}
		const closed = "ports are closed until"
		closures := w.log.count(closed)
		w.config.write(w.text(to))
		for _, c := range forbidden {
			if err := cut(c.Conn); err != nil {
				t.Errorf("%v, which is forbidden: %v", c, err)
			}
		}
		w.await("it is in force", func() bool { code, _, _ := w.diff(); return code == 0 })
		isClosed := w.log.count(closed) > closures // such changes came too often: then all at the ports that it is about end
		var living []walkConn
		for _, c := range others {
			err := echo(c.Conn)
			if err == nil {
				living = append(living, c)
			} else if c.isOld || isClosed && c.port != 0 { // an Envoy ends when the second one after it starts, and what is open there with it
				_ = c.Close()
			} else {
				t.Errorf("%v, which nothing forbids: %v", c, err)
			}
		}
		w.await("the other ends of the forbidden are over", func() bool { return w.served() == len(living) })
		if t.Failed() {
			return
		}
		w.state, w.open = to, living
		for i := range w.open {
			w.open[i].isOld = true
		}
	}
}

// TestKilledInAChange kills mantlet in the middle of changes. Whatever of a change was in force by then, once the next mantlet is ready
// nothing that the change forbids passes a byte.
func TestKilledInAChange(t *testing.T) {
	t.Parallel()
	w := newWalk(t)
	moments := []string{"configuration changed", "Envoy says", "Envoy is live", inForce}
	for step := range *walkSteps {
		w.connect()
		to := w.next()
		moment := moments[w.random.IntN(len(moments))]
		t.Logf("step %d: %s -> %s, killed at %q", step, w.state, to, moment)
		before := w.log.count(moment)
		w.config.write(w.text(to))
		w.await("the moment has come", func() bool {
			if w.log.count(moment) > before {
				return true
			}
			code, _, _ := w.diff() // not every change comes by every moment
			return code == 0
		})
		w.must(w.sidecar.Signal(syscall.SIGKILL))
		_ = w.sidecar.Wait()
		w.await("Envoy ends", func() bool { return len(w.processes()) == 0 })
		w.run()
		w.ready()
		for _, c := range w.open {
			if c.peer == "passthrough" && to.mode == "passthrough" {
				w.must(echo(c.Conn))
				_ = c.Close()
				continue
			}
			if err := cut(c.Conn); err != nil {
				t.Errorf("%v: %v", c, err)
			}
		}
		w.await("the other ends are over", func() bool { return w.served() == 0 })
		if t.Failed() {
			return
		}
		w.state, w.open = to, nil
	}
}
