package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"mantlet/internal/lab"
)

var (
	chaosSeed   = flag.Uint64("chaos.seed", 0, "do what the run with this seed did; 0: something new")
	chaosFor    = flag.Duration("chaos.for", 10*time.Second, "how long to go on")
	chaosSettle = flag.Duration("chaos.settle", 2*limit, "how soon after the last action all must be as it is wanted")
)

// TestChaos does random things to a pod, many at a time, while callers and probers of every kind come. Now and then it does
// nothing, and then all must soon be as was asked for last.
func TestChaos(t *testing.T) {
	t.Parallel()
	seed := *chaosSeed
	if seed == 0 {
		seed = rand.Uint64N(1e9) + 1
	}
	for _, owned := range []bool{true, false} {
		t.Run(fmt.Sprintf("owned=%t", owned), func(t *testing.T) {
			c := newChaos(t, seed, owned)
			t.Cleanup(c.report)
			for round := 1; time.Since(c.began) < *chaosFor && !t.Failed(); round++ {
				c.note("round %d", round)
				for range 1 + c.random.IntN(6) {
					c.act()
				}
				c.settle()
			}
			c.must(c.sidecar.Stop())
			if c.badTLS { // then what was good is kept for a mantlet that comes after
				_ = os.Remove(filepath.Join(c.sidecar.RuntimeDirectory, "last-good-certificates.json"))
			}
			c.leavesNothing()
		})
	}
}

// chaos is a pod under random actions, with what was asked of it.
type chaos struct {
	*pod
	owned       bool
	seed        uint64
	random      *rand.Rand // for actions alone: what they are must not depend on what they lead to
	began       time.Time
	config      *mounted
	tls         *mounted
	authorities [2]*lab.Authority
	visitors    []visitor
	regulars    [6]regular
	usual       usual
	held        []hold
	zones       *lab.Nameserver
	names       map[string][]netip.Addr

	badConfig, badTLS bool // what was written last
	amnesia           bool // mantlet was started anew since all was quiet last
	full              bool // the disk was, since then

	traffic sync.RWMutex // held by whoever makes an attempt, and wholly while the suite itself opens the pod

	mu      sync.Mutex
	journal []string
	asked   asked
	settled int // rounds
	calls   [2]int
	slowest struct{ settle, repair time.Duration }
}

// hold is something to be undone when its time has come.
type hold struct {
	until time.Time
	what  string
	undo  func()
}

func newChaos(t *testing.T, seed uint64, owned bool) *chaos {
	stream := uint64(0)
	if owned {
		stream = 1
	}
	p := newPod(t, web, "MANTLET_ENVOY_PARENT_SHUTDOWN_TIME=20s")
	c := &chaos{pod: p, owned: owned, seed: seed, random: rand.New(rand.NewPCG(seed, stream)), config: p.mount(), tls: &mounted{p: p, directory: p.sidecar.TLSDirectory}}
	p.sidecar.Log = terse{p.log}
	other, err := lab.NewAuthority("mesh")
	p.must(err)
	c.authorities = [...]*lab.Authority{p.mesh, other}
	c.small(p.sidecar.RuntimeDirectory)
	if !owned {
		_, err := p.Run("nft", "add", "table", "inet", "mantlet") // one that is there stays without an owner
		p.must(err)
	}
	c.upstreams()
	c.visitors = c.everybody()
	p.sidecar.Env = append(p.sidecar.Env, "MANTLET_CONFIG="+c.config.file())
	c.want(wish{}.plain())
	c.rotate(trust{})
	p.run()
	p.protect(tlsPort)
	p.protect(mtlsPort)
	p.serve(p.Host, lab.Service{Address: fmt.Sprintf(":%d", passthroughPort)})
	p.ready()
	c.probePorts()
	c.began = time.Now()
	c.load()
	c.settle()
	return c
}

// terse is mantlet's log without what the strangers make it say.
type terse struct{ to io.Writer }

func (t terse) Write(text []byte) (int, error) {
	for line := range bytes.Lines(text) {
		if !bytes.Contains(line, []byte("connection rejected")) {
			_, _ = t.to.Write(line)
		}
	}
	return len(text), nil
}

// small makes a directory one that is soon full.
func (c *chaos) small(directory string) {
	c.must(os.MkdirAll(directory, 0o700))
	c.must(syscall.Mount("tmpfs", directory, "tmpfs", 0, "mode=0700,size=1m"))
	c.t.Cleanup(func() { c.check(syscall.Unmount(directory, syscall.MNT_FORCE|2)) })
}

// upstreams starts an endpoint of each authority, and the DNS server that knows them.
func (c *chaos) upstreams() {
	c.names = map[string][]netip.Addr{}
	pool := c.authorities[0].Pool()
	pool.AppendCertsFromPEM(c.authorities[1].CAPEM())
	for i, authority := range c.authorities {
		name := fmt.Sprintf("upstream-%d", i)
		host := c.host(name)
		identity, err := authority.Issue(lab.Leaf{DNSNames: []string{name}})
		c.must(err)
		config := identity.ServerConfig()
		config.ClientCAs = pool
		c.serve(host, lab.Service{Address: ":8080", TLS: config})
		c.names[name] = host.Addrs()
	}
	c.zones = c.zone(c.names)
}

func (c *chaos) note(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.journal = append(c.journal, fmt.Sprintf("%8.3fs ", time.Since(c.began).Seconds())+fmt.Sprintf(format, args...))
}

// violated fails the run. It may be called from any goroutine.
func (c *chaos) violated(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	c.note("VIOLATED: %s", text)
	c.t.Errorf("%s", text)
}

func (c *chaos) report() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t.Logf("seed %d: %d rounds, %d connections let in and %d refused; settled within %v, drift repaired within %v",
		c.seed, c.settled, c.calls[1], c.calls[0], c.slowest.settle, c.slowest.repair)
	c.t.Logf("to do the same again: go tool task chaos -- -chaos.seed=%d\n%s", c.seed, strings.Join(c.journal, "\n"))
}

// wish is what an override file asks for.
type wish struct {
	doors  map[uint16]door
	tls13  bool
	egress int // which upstream, from 1; 0: none
}

// door is what a port asks of those who come to it.
type door struct {
	mode  string
	allow string // the only name let in; "": any
}

// plain is the wish of a file that says nothing.
func (w wish) plain() wish {
	w.doors = map[uint16]door{tlsPort: {mode: "tls"}, mtlsPort: {mode: "mtls"}, passthroughPort: {mode: "passthrough"}}
	return w
}

func (w wish) String() string {
	var text strings.Builder
	text.WriteString("ingress:")
	for _, port := range []uint16{tlsPort, mtlsPort, passthroughPort} {
		fmt.Fprintf(&text, "\n- {port: %d, mode: %s", port, w.doors[port].mode)
		if allow := w.doors[port].allow; allow != "" {
			fmt.Fprintf(&text, ", allow: [%s]", allow)
		}
		text.WriteString("}")
	}
	if w.tls13 {
		text.WriteString("\ntls: {minVersion: \"1.3\"}")
	}
	if w.egress > 0 {
		fmt.Fprintf(&text, "\negress: [{listen: '%s', upstream: 'upstream-%d:8080'}]", egressListen, w.egress-1)
	}
	return text.String()
}

const egressListen = "127.137.0.1:8081"

// trust is what the TLS directory holds: whose the leaf is, and whose CAs are in the bundle.
type trust struct {
	leaf    int
	without [2]bool // CAs that are not in it
}

// visitor is somebody who tries to get in, or, from inside, out.
type visitor struct {
	who       string
	plain     bool
	out       bool
	authority int // -1: no certificate of the mesh
	name      string
	tls12     bool
	config    *tls.Config
}

// admits is the model: whether a visitor gets through.
func (w wish) admits(t trust, v visitor, port uint16) bool {
	d := w.doors[port]
	switch {
	case v.out:
		return w.egress > 0 && !t.without[w.egress-1]
	case d.mode == "passthrough":
		return v.plain
	case v.plain || w.tls13 && v.tls12:
		return false
	case d.mode == "tls":
		return true
	default:
		return v.authority >= 0 && !t.without[v.authority] && (d.allow == "" || d.allow == v.name)
	}
}

func (c *chaos) everybody() []visitor {
	pool := c.authorities[0].Pool()
	pool.AppendCertsFromPEM(c.authorities[1].CAPEM())
	foreign, err := lab.NewAuthority("mesh")
	c.must(err)
	all := []visitor{
		{who: "plaintext", plain: true},
		{who: "no certificate", authority: -1},
		{who: "stranger", authority: -1, name: "client"},
		{who: "client", name: "client"},
		{who: "client with TLS 1.2", name: "client", tls12: true},
		{who: "other client", name: "other"},
		{who: "client of the other CA", name: "client", authority: 1},
	}
	for i, v := range all {
		from := foreign
		if v.authority >= 0 {
			from = c.authorities[v.authority]
		}
		identity, err := from.Issue(lab.Leaf{DNSNames: []string{v.name}})
		c.must(err)
		config := identity.ClientConfig("pod")
		config.RootCAs = pool
		if v.name == "" {
			config.GetClientCertificate = nil
		}
		if v.tls12 {
			config.MaxVersion = tls.VersionTLS12
		}
		all[i].config = config
	}
	return append(all, visitor{who: "the workload", out: true})
}

// asked is everything that was asked for, the latest last, and what of it was in force when all was quiet last.
type asked struct {
	wishes          []wish
	trusts          []trust
	wished, trusted int
}

// admits reports whether a visitor may get through under anything that may be in force.
func (a asked) admits(v visitor, port uint16) bool {
	return slices.ContainsFunc(a.wishes[a.wished:], func(w wish) bool {
		return slices.ContainsFunc(a.trusts[a.trusted:], func(t trust) bool { return w.admits(t, v, port) })
	})
}

func (c *chaos) want(w wish) {
	c.mu.Lock()
	c.asked.wishes = append(c.asked.wishes, w)
	c.badConfig = false
	c.mu.Unlock()
	c.config.write(w.String())
}

// rotate issues a new leaf.
func (c *chaos) rotate(t trust) {
	c.mu.Lock()
	c.asked.trusts = append(c.asked.trusts, t)
	c.badTLS = false
	c.mu.Unlock()
	c.tls.publish(c.generation(t))
}

// generation returns the files of a new leaf.
func (c *chaos) generation(t trust) map[string][]byte {
	identity, err := c.authorities[t.leaf].Issue(lab.Leaf{DNSNames: []string{"pod"}})
	c.must(err)
	directory := c.t.TempDir()
	c.must(identity.Write(directory))
	files := map[string][]byte{}
	for _, name := range []string{lab.ChainFile, lab.KeyFile} {
		files[name], err = os.ReadFile(filepath.Join(directory, name))
		c.must(err)
	}
	for i, authority := range c.authorities {
		if !t.without[i] {
			files[lab.CAFile] = append(files[lab.CAFile], authority.CAPEM()...)
		}
	}
	return files
}

// attempt is one connection, from dial to close.
func (c *chaos) attempt(ctx context.Context, v visitor, to netip.AddrPort) (net.Conn, error) {
	from := c.outside
	if v.out {
		from = c.Host
	}
	conn, err := from.Dial(ctx, "tcp", to.String())
	if err != nil {
		return nil, err
	}
	if !v.plain && !v.out {
		secured := tls.Client(conn, v.config)
		err, conn = secured.HandshakeContext(ctx), secured
	}
	if deadline, _ := ctx.Deadline(); err == nil {
		err = talk(conn, deadline)
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

// How long visitors wait: for three retransmissions of a SYN, or for one. A tightening that takes away a connection at the
// workload's next answer tells the client nothing until it asks again, and who judges the pod must not wait for that.
const (
	patient   = 8 * time.Second
	impatient = 2 * time.Second
)

// visit makes an attempt and judges it. The error says why the visitor was not let in.
func (c *chaos) visit(v visitor, to netip.AddrPort, patience time.Duration) error {
	conn, err := c.enter(v, to, patience)
	if err == nil {
		_ = conn.Close()
	}
	return err
}

// enter is a visit that does not end.
func (c *chaos) enter(v visitor, to netip.AddrPort, patience time.Duration) (net.Conn, error) {
	c.traffic.RLock()
	defer c.traffic.RUnlock()
	c.mu.Lock()
	before := c.asked
	c.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := c.attempt(ctx, v, to)
	c.mu.Lock()
	after := c.asked
	if err == nil {
		c.calls[1]++
	} else {
		c.calls[0]++
	}
	c.mu.Unlock()
	if err != nil {
		return nil, err
	}
	after.wished, after.trusted = before.wished, before.trusted
	if !after.admits(v, to.Port()) {
		c.violated("%s got through to %s, which nothing that was asked for allows", v.who, to)
	}
	return conn, nil
}

// probePorts is besiege at half the price: what else comes is to have its share of a busy machine. Visitors speak plaintext too.
func (c *chaos) probePorts() {
	c.prober = c.outside.Probe(netip.AddrPortFrom(c.IPv4, tlsPort), netip.AddrPortFrom(c.IPv6, mtlsPort))
}

// load is visitors who come all the time.
func (c *chaos) load() {
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	for range 2 {
		done.Go(func() {
			tick := time.NewTicker(20 * time.Millisecond)
			defer tick.Stop()
			for ctx.Err() == nil {
				v := c.visitors[rand.IntN(len(c.visitors))]
				all := c.doorsOf(v)
				_ = c.visit(v, all[rand.IntN(len(all))], patient)
				select {
				case <-tick.C:
				case <-ctx.Done():
				}
			}
		})
	}
	for i := range c.regulars {
		done.Go(func() { c.stay(ctx, &c.regulars[i]) })
	}
	done.Go(func() { c.watch(ctx) })
	c.t.Cleanup(func() { cancel(); done.Wait() })
}

// regular is a visitor who stays as long as he is let.
type regular struct {
	mu   sync.Mutex
	v    visitor
	to   netip.AddrPort
	conn net.Conn // nil: nobody is there
}

// stay keeps a connection open, and says something on it now and then.
func (c *chaos) stay(ctx context.Context, r *regular) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for ctx.Err() == nil {
		r.mu.Lock()
		if r.conn == nil {
			r.v = c.visitors[rand.IntN(len(c.visitors)-1)] // the last one is not from outside
			all := c.doorsOf(r.v)
			r.to = all[rand.IntN(len(all))]
			r.conn, _ = c.enter(r.v, r.to, patient)
		}
		c.speak(r)
		r.mu.Unlock()
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
	if r.conn != nil {
		_ = r.conn.Close()
	}
}

// speak tells whether the connection lives.
func (c *chaos) speak(r *regular) bool {
	c.traffic.RLock()
	defer c.traffic.RUnlock()
	if r.conn != nil && talk(r.conn, time.Now().Add(3*time.Second)) != nil {
		_ = r.conn.Close()
		r.conn = nil
	}
	return r.conn != nil
}

// overstayed returns who is still there although what is in force would not let him in. A passthrough port takes nobody's
// connection away, also not that of one who speaks TLS since it asked for it.
func (c *chaos) overstayed() string {
	for i := range c.regulars {
		r := &c.regulars[i]
		r.mu.Lock()
		defer r.mu.Unlock()
		c.mu.Lock()
		w, t := c.asked.wishes[c.asked.wished], c.asked.trusts[c.asked.trusted]
		c.mu.Unlock()
		stays := w.doors[r.to.Port()].mode == "passthrough" || w.admits(t, r.v, r.to.Port())
		if r.conn != nil && !stays && c.speak(r) {
			return fmt.Sprintf("%s is still connected to %s", r.v.who, r.to)
		}
	}
	return ""
}

// watch counts Envoys all the time.
func (c *chaos) watch(ctx context.Context) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for ctx.Err() == nil {
		if all := c.all("--restart-epoch"); len(all) > 3 {
			c.violated("%d Envoys run: %v", len(all), all)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// all returns the pod's processes that have a parent there and whose command line has a text.
func (c *chaos) all(text string) (pids []string) {
	for _, pid := range c.processes() {
		line, _ := os.ReadFile(filepath.Join("/proc", pid, "cmdline"))
		status, _ := os.ReadFile(filepath.Join("/proc", pid, "status"))
		if bytes.Contains(line, []byte(text)) && !bytes.Contains(status, []byte("\nPPid:\t1\n")) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// leaks returns what there is too much of once all is quiet.
func (c *chaos) leaks() string {
	for _, pid := range c.children() {
		if status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)); bytes.Contains(status, []byte("\nState:\tZ")) {
			return fmt.Sprintf("%d is a zombie", pid)
		}
	}
	if pids := c.processes(); len(pids) > 4 {
		return fmt.Sprintf("processes %v run", pids)
	}
	pid := c.sidecar.PID()
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	c.must(err)
	routines := c.goroutines()
	if c.usual.pid != pid {
		c.usual = usual{pid, len(files), routines}
	}
	// An Envoy that drains takes three descriptors, and the stand-in for the one before it another and two goroutines; questions
	// that are just asked take more.
	if most := c.usual.descriptors + 5; len(files) > most {
		return fmt.Sprintf("mantlet has %d descriptors open, %d at first", len(files), c.usual.descriptors)
	}
	if most := c.usual.goroutines + 6; routines > most {
		return fmt.Sprintf("mantlet has %d goroutines, %d at first", routines, c.usual.goroutines)
	}
	return c.litter()
}

// usual is what a mantlet has open when it is quiet for the first time.
type usual struct{ pid, descriptors, goroutines int }

// goroutines asks mantlet, as main_test.go answers.
func (c *chaos) goroutines() int {
	count := func() []string { return goroutineCount.FindAllString(c.log.String(), -1) }
	before := len(count())
	c.must(c.sidecar.Signal(syscall.SIGUSR1))
	c.await("mantlet counts its goroutines", func() bool { return len(count()) > before })
	n, err := strconv.Atoi(strings.TrimPrefix(count()[before], "goroutines: "))
	c.must(err)
	return n
}

var goroutineCount = regexp.MustCompile(`goroutines: \d+`)

// litter returns what nobody needs in the runtime directory. Files of an Envoy that ended stay until the next one starts.
func (c *chaos) litter() string {
	files, err := os.ReadDir(c.sidecar.RuntimeDirectory)
	c.must(err)
	envoys, err := os.ReadDir(filepath.Join(c.sidecar.RuntimeDirectory, "envoy"))
	c.must(err)
	files = append(files, envoys...)
	kinds := map[string]int{}
	for _, f := range files {
		kinds[number.ReplaceAllString(f.Name(), "N")]++
	}
	for kind, n := range kinds {
		if n > map[string]int{
			"envoy": 1, "mantlet.sock": 1, "last-good.json": 1, "last-good-certificates.json": 1,
			"sds-identity.json": 1, "sds-mesh-ca.json": 1,
			"sds-trial-identity.json": 1, "sds-trial-client-ca.json": 1, "sds-trial-server-ca.json": 1,
			"admin-N.sock": 3, "trial-client-N.sock": 3, "trial-server-N.sock": 3, "bootstrap-N.json": 3,
			"discovery.sock": 1, "epoch_parent_N": 3, "epoch_child_N": 3, "epoch_udp_parent_N": 3, "epoch_udp_child_N": 3,
		}[kind] {
			return fmt.Sprintf("%d files %s are in the runtime directory: %v", n, kind, files)
		}
	}
	return ""
}

var number = regexp.MustCompile(`\d+`)

// doorsOf returns where a visitor may try.
func (c *chaos) doorsOf(v visitor) (all []netip.AddrPort) {
	if v.out {
		return []netip.AddrPort{listen(egressListen)}
	}
	for _, addr := range c.Addrs() {
		for _, port := range []uint16{tlsPort, mtlsPort, passthroughPort} {
			all = append(all, netip.AddrPortFrom(addr, port))
		}
	}
	return all
}

// settle waits until all is as it was asked for last.
func (c *chaos) settle() {
	c.t.Helper()
	for len(c.held) > 0 {
		c.pause(time.Until(c.held[0].until))
	}
	if c.full {
		c.pause(1500 * time.Millisecond) // until what could not be kept is: mantlet tries each second
	}
	if c.amnesia && c.badTLS && c.full {
		c.note("good certificates, for mantlet was started beside bad ones, and may have had no room to keep the last good ones")
		c.rotate(c.trusted())
	}
	if c.amnesia && c.badConfig && c.full {
		c.note("a good file, for mantlet was started beside a bad one, and may have had no room to keep the last good one")
		c.want(c.asked.wishes[len(c.asked.wishes)-1])
	}
	began := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), *chaosSettle)
	defer cancel()
	var unsettled string
	err := lab.Until(ctx, func() bool {
		before := unsettled
		if unsettled = c.unsettled(); unsettled != before {
			c.note("not settled: %s", unsettled)
		}
		return unsettled == ""
	})
	took := time.Since(began)
	if err == nil {
		unsettled = c.overstayed()
	}
	if unsettled != "" || took > *chaosSettle {
		c.violated("%v after the last action: %s", took, unsettled)
		return
	}
	c.note("all is well after %v", took)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.settled++
	c.slowest.settle = max(c.slowest.settle, took)
	c.amnesia, c.full = false, false
}

// unsettled returns what is not as it should be, or "".
func (c *chaos) unsettled() string {
	c.revive()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	if reason := c.sidecar.Unready(ctx); reason != "" {
		return "unready: " + reason
	}
	return cmp.Or(c.behaves(), c.differs(), c.leaks())
}

// differs returns what `mantlet diff` says, where there is something good to compare with.
func (c *chaos) differs() string {
	if c.badConfig || c.badTLS {
		return ""
	}
	cmd := c.sidecar.Command("diff")
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	c.must(c.Start(cmd))
	if err := cmd.Wait(); err != nil {
		return fmt.Sprintf("mantlet diff: %v: %s", err, &output)
	}
	return ""
}

// trial is one visit, and what came of it last.
type trial struct {
	v   visitor
	to  netip.AddrPort
	err error // nil: he was let in
}

// behaves lets everybody try every door, and wants what happens to be what one and the same state means. A visit that ends
// otherwise is made again: on a busy machine a good one takes too long now and then.
func (c *chaos) behaves() (why string) {
	var trials []*trial
	for _, v := range c.visitors {
		tried := map[uint16]bool{} // by either family
		all := c.doorsOf(v)
		for _, i := range rand.Perm(len(all)) {
			if to := all[i]; !tried[to.Port()] {
				tried[to.Port()] = true
				trials = append(trials, &trial{v: v, to: to})
			}
		}
	}
	again := trials
	for range 3 {
		var wait sync.WaitGroup
		slots := make(chan struct{}, 4)
		for _, t := range again {
			wait.Go(func() {
				slots <- struct{}{}
				t.err = c.visit(t.v, t.to, impatient)
				<-slots
			})
		}
		wait.Wait()
		if again, why = c.matches(trials); len(again) == 0 {
			return ""
		}
		c.note("%d of %d visits went wrong: %s", len(again), len(trials), why)
	}
	return why
}

// matches returns the trials that contradict what was asked for last; where what was written last was bad, what was asked for
// at any time since all was quiet.
func (c *chaos) matches(trials []*trial) (wrong []*trial, why string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := &c.asked
	for wished := a.wished; wished < len(a.wishes); wished++ {
		for trusted := a.trusted; trusted < len(a.trusts); trusted++ {
			if !c.badConfig && wished < len(a.wishes)-1 || !c.badTLS && trusted < len(a.trusts)-1 {
				continue
			}
			w, t := a.wishes[wished], a.trusts[trusted]
			wrong = slices.DeleteFunc(slices.Clone(trials), func(r *trial) bool { return (r.err == nil) == w.admits(t, r.v, r.to.Port()) })
			if len(wrong) == 0 {
				a.wished, a.trusted = wished, trusted
				return nil, ""
			}
			why = fmt.Sprintf("%s at %s: %v; asked for is %q, %+v", wrong[0].v.who, wrong[0].to, wrong[0].err, w, t)
		}
	}
	return wrong, why
}

// revive does kubelet's part.
func (c *chaos) revive() {
	if !c.sidecar.Ended() {
		return
	}
	c.violated("mantlet ended by itself: %v", c.sidecar.Wait())
	c.amnesia = true
	c.must(c.sidecar.Start())
}

// action is something to do to the pod. Its arguments come from c.random alone.
type action struct {
	weight int
	name   string
	do     func(*chaos) (what string)
}

func (c *chaos) act() {
	all := actions()
	total := 0
	for _, a := range all {
		total += a.weight
	}
	n := c.random.IntN(total)
	for _, a := range all {
		if n -= a.weight; n < 0 {
			c.note("%s", a.name)
			c.revive()
			if what := a.do(c); what != "" {
				c.note("%s: %s", a.name, what)
			}
			break
		}
	}
	c.pause([]time.Duration{0, 10 * time.Millisecond, 60 * time.Millisecond, 200 * time.Millisecond, 600 * time.Millisecond}[c.random.IntN(5)])
}

// pause undoes meanwhile what is to be undone.
func (c *chaos) pause(d time.Duration) {
	until := time.Now().Add(d)
	for {
		next := until
		slices.SortStableFunc(c.held, func(a, b hold) int { return a.until.Compare(b.until) })
		if len(c.held) > 0 && c.held[0].until.Before(next) {
			next = c.held[0].until
		}
		<-time.After(time.Until(next))
		if len(c.held) > 0 && !time.Now().Before(c.held[0].until) {
			c.note("over: %s", c.held[0].what)
			c.held[0].undo()
			c.held = c.held[1:]
			continue
		}
		return
	}
}

func (c *chaos) hold(d time.Duration, what string, undo func()) {
	c.held = append(c.held, hold{time.Now().Add(d), what, undo})
}

func actions() []action {
	return []action{
		{8, "good file", (*chaos).goodFile},
		{3, "bad file", (*chaos).badFile},
		{4, "SIGKILL of the Envoy that serves", func(c *chaos) string { return c.kill(func(pids []int) []int { return pids[len(pids)-1:] }) }},
		{3, "SIGKILL of the Envoys that drain", func(c *chaos) string { return c.kill(func(pids []int) []int { return pids[:len(pids)-1] }) }},
		{1, "SIGKILL of all Envoys", func(c *chaos) string { return c.kill(func(pids []int) []int { return pids }) }},
		{3, "SIGKILL of mantlet", (*chaos).killMantlet},
		{1, "SIGTERM to mantlet", (*chaos).endMantlet},
		{1, "SIGHUP to mantlet", (*chaos).hangUp},
		{2, "SIGSTOP of mantlet", func(c *chaos) string { return c.freeze([]int{c.sidecar.PID()}) }},
		{2, "SIGSTOP of all Envoys", func(c *chaos) string { return c.freeze(c.envoys()) }},
		{3, "another leaf", func(c *chaos) string { c.rotate(c.trusted()); return "" }},
		{3, "another trust", (*chaos).trustOthers},
		{2, "bad certificates", (*chaos).badCertificates},
		{2, "no resolver", (*chaos).noResolver},
		{2, "full disk", (*chaos).fullDisk},
		{4, "other rules", (*chaos).tamper},
	}
}

func (c *chaos) goodFile() string {
	pick := func(all ...door) door { return all[c.random.IntN(len(all))] }
	tls, mtls := door{mode: "tls"}, door{mode: "mtls"}
	client, other := door{"mtls", "client"}, door{"mtls", "other"}
	w := wish{
		doors: map[uint16]door{
			tlsPort:         pick(tls, mtls, client, other),
			mtlsPort:        pick(mtls, client, other),
			passthroughPort: pick(door{mode: "passthrough"}, tls, mtls, client),
		},
		tls13:  c.random.IntN(4) == 0,
		egress: c.random.IntN(3),
	}
	c.want(w)
	return w.String()
}

func (c *chaos) badFile() string {
	c.badConfig = true
	bad := []string{"ingress: [{port: 8080, mode: tsl}]", "a: b: c", "\x00", "ingress: [{port: 7890, mode: passthrough}, {port: 7000-8000, mode: tls}]", ""}
	text := bad[c.random.IntN(len(bad))]
	if text == "" {
		c.must(os.RemoveAll(filepath.Join(c.config.directory, "..data")))
		return "none at all"
	}
	c.config.write(text)
	return text
}

func (c *chaos) children() []int {
	all, err := c.sidecar.Envoys()
	c.must(err)
	return all
}

// envoys returns mantlet's Envoys, the oldest first.
func (c *chaos) envoys() []int {
	all := slices.DeleteFunc(c.children(), func(pid int) bool {
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		return err != nil || !strings.Contains(string(line), "--restart-epoch")
	})
	slices.Sort(all)
	return all
}

func (c *chaos) kill(which func([]int) []int) string {
	pids := c.envoys()
	if len(pids) == 0 {
		return "there is none"
	}
	pids = which(pids)
	for _, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGKILL); !errors.Is(err, syscall.ESRCH) {
			c.must(err)
		}
	}
	return fmt.Sprint(pids)
}

func (c *chaos) killMantlet() string {
	c.must(c.sidecar.Signal(syscall.SIGKILL))
	_ = c.sidecar.Wait()
	c.amnesia = true
	c.pause(time.Duration(c.random.IntN(3)) * 50 * time.Millisecond)
	c.must(c.sidecar.Start())
	return ""
}

// freeze stops processes for a second.
func (c *chaos) freeze(pids []int) string {
	for _, pid := range pids {
		_ = syscall.Kill(pid, syscall.SIGSTOP)
	}
	what := fmt.Sprintf("stopped %v", pids)
	c.hold(time.Second, what, func() {
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGCONT)
		}
	})
	return what
}

// trusted returns what was put into the TLS directory last.
func (c *chaos) trusted() trust { return c.asked.trusts[len(c.asked.trusts)-1] }

// trustOthers takes a step of a change from one mesh CA to another, or back: both in the bundle, then one.
func (c *chaos) trustOthers() string {
	t := c.trusted()
	if t.without != [2]bool{} {
		t.without = [2]bool{}
	} else {
		t.leaf = c.random.IntN(2)
		t.without[1-t.leaf] = true
	}
	c.rotate(t)
	return fmt.Sprintf("%+v", t)
}

func (c *chaos) badCertificates() string {
	files := c.generation(c.trusted())
	c.badTLS = true
	what := "key of another"
	switch c.random.IntN(4) {
	case 0:
		files[lab.KeyFile] = c.generation(c.trusted())[lab.KeyFile]
	case 1:
		what, files[lab.ChainFile] = "half a chain", files[lab.ChainFile][:len(files[lab.ChainFile])/2]
	case 2:
		what, files[lab.CAFile] = "an empty CA file", nil
	case 3:
		what = "no key"
		delete(files, lab.KeyFile)
	}
	c.tls.publish(files)
	return what
}

func (c *chaos) noResolver() string {
	c.zones.SetAll(lab.Answer{RCode: dnsmessage.RCodeServerFailure})
	what := "broken"
	if c.random.IntN(2) == 0 {
		c.zones.SetAll(lab.Answer{Silent: true})
		what = "silent"
	}
	c.hold(time.Duration(c.random.IntN(2000))*time.Millisecond, "resolver is "+what, func() { c.zones.SetAddrs(c.names) })
	return what
}

// fullDisk leaves no byte in the runtime directory, for a while.
func (c *chaos) fullDisk() string {
	path := filepath.Join(c.sidecar.RuntimeDirectory, "filler")
	file, err := os.Create(path)
	c.must(err)
	for err == nil {
		_, err = file.Write(make([]byte, 4096))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		c.must(err)
	}
	c.must(file.Close())
	c.full = true
	c.hold(time.Duration(c.random.IntN(2000))*time.Millisecond, "full disk", func() {
		if err := os.Remove(path); !errors.Is(err, os.ErrNotExist) { // twice full
			c.must(err)
		}
	})
	return ""
}

// endMantlet is a graceful end, and kubelet's next start.
func (c *chaos) endMantlet() string {
	c.must(c.sidecar.Signal(syscall.SIGCONT))
	began := time.Now()
	err := c.sidecar.Stop()
	c.amnesia = true
	c.must(c.sidecar.Start())
	return fmt.Sprintf("ended after %v: %v", time.Since(began), err)
}

// hangUp waits for a mantlet that was just started: until Go's runtime calls main, a signal is its end.
func (c *chaos) hangUp() string {
	c.listens()
	c.must(c.sidecar.Signal(syscall.SIGHUP))
	return ""
}

// listens waits until mantlet does.
func (c *chaos) listens() {
	c.await("mantlet listens", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		return !strings.Contains(c.sidecar.Unready(ctx), "connect:")
	})
}

// tampering is a change to the rules by somebody else.
type tampering struct {
	text  string // for nft; %s is the handle of a rule with tproxy
	opens bool   // until it is repaired
	shows string // what nft lists until then; "": no hook
}

func tamperings() []tampering {
	return []tampering{
		{"flush ruleset", true, ""},
		{"delete table inet mantlet", true, ""},
		{"flush chain inet mantlet ingress", false, "policy drop;\n\t}"},
		{`insert rule inet mantlet ingress accept comment "chaos"`, true, "chaos"},
		{`add rule inet mantlet ingress counter comment "chaos"`, false, "chaos"},
		{`insert rule inet mantlet ingress drop comment "chaos"`, false, "chaos"},
		{"add table inet mantlet { flags dormant; }", true, "dormant"},
		{"add chain inet mantlet chaos", false, "chaos"},
		{"add element inet mantlet modes { 4711 : accept }", true, "4711"},
		{"replace rule inet mantlet %s meta nfproto ipv4 meta l4proto tcp tproxy ip to 127.0.0.1:1 accept", false, "127.0.0.1:1 "},
	}
}

// tamper changes the rules from outside: in vain, where they are owned, and else not for long. What opens the pod until it
// is repaired is done while nobody comes.
func (c *chaos) tamper() string {
	f := tamperings()[c.random.IntN(len(tamperings()))]
	for len(c.held) > 0 { // nobody repairs while mantlet is stopped
		c.pause(time.Until(c.held[0].until))
	}
	c.listens()
	if f.opens {
		c.traffic.Lock()
		defer c.traffic.Unlock()
		if total := c.prober.Stop().Total(); total.Answered > 0 {
			c.violated("the prober saw %+v", total)
		}
		defer c.probePorts()
	}
	text := f.text
	if strings.Contains(text, "%s") {
		rule := tproxyRule.FindStringSubmatch(c.nft("-a", "list", "table", "inet", "mantlet"))
		if rule == nil {
			return "there is no tproxy"
		}
		text = fmt.Sprintf(text, rule[1]+" handle "+rule[2])
	}
	_, err := c.Run("nft", text)
	began := time.Now()
	if c.owned {
		if err == nil && text != "flush ruleset" { // which passes it by
			c.violated("nft %s succeeded", text)
		}
	}
	c.await("the rules are put back after "+text, func() bool {
		rules := c.nft("-s", "list", "ruleset")
		return strings.Contains(rules, "hook prerouting") && (f.shows == "" || !strings.Contains(rules, f.shows))
	})
	took := time.Since(began)
	c.slowest.repair = max(c.slowest.repair, took)
	return fmt.Sprintf("%s: %v; put back after %v", text, err, took)
}

var tproxyRule = regexp.MustCompile(`(?s)chain (mtls_in\S*) \{.*?tproxy ip .*?# handle (\d+)`)

func (c *chaos) nft(args ...string) string {
	out, err := c.Run("nft", args...)
	c.must(err)
	return out
}
