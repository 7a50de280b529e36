package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"mantlet/internal/lab"
	"mantlet/internal/status"
)

// The ports of the tests' pods. A test's workload listens on what it needs; those that are not named in the
// configuration demand mutual TLS.
const (
	tlsPort         = 8080
	passthroughPort = 7890
	mtlsPort        = 9090
)

// web is the configuration of the first deployment.
const web = "EDG_INGRESS_PROXY_CONFIG=web#8080#false##metrics#7890#true"

// pod is a host with a mantlet on it, and an outside that means no good: as long as the pod is there, a prober speaks
// plaintext to its protected ports. Not one byte may reach a workload that listens on them, whatever the test does.
type pod struct {
	*lab.Host
	t        testing.TB
	network  *lab.Network
	outside  *lab.Host
	mesh     *lab.Authority
	identity *lab.Identity   // in the TLS directory, once written
	client   *lab.Identity   // somebody else of the mesh
	twin     tls.Certificate // of one of two CAs with the same name, if the mesh has them
	sidecar  *lab.Sidecar
	log      *journal

	prober    *lab.Prober
	protected []*lab.Workload
}

// newPod makes a pod whose mantlet is not started yet, nor are there certificates.
func newPod(t testing.TB, env ...string) *pod {
	t.Helper()
	envoy := os.Getenv("MANTLET_ENVOY_PATH")
	if envoy == "" {
		t.Fatal("MANTLET_ENVOY_PATH names no Envoy to test with; `go tool task test` fetches one")
	}
	p := &pod{t: t, log: &journal{}}
	directory := t.TempDir() // removed after the network, whose end kills what writes here
	var err error
	p.network, err = lab.NewNetwork()
	p.must(err)
	t.Cleanup(func() { p.check(p.network.Close()) })
	p.Host, err = p.network.Host("pod")
	p.must(err)
	p.must(p.Sysctl("net.ipv4.ip_unprivileged_port_start", "0")) // as container runtimes have it
	p.outside = p.host("outside")
	p.mesh, err = lab.NewAuthority("mesh")
	p.must(err)
	p.identity, p.client = p.issue("pod"), p.issue("client")
	// The race detector would make each process wait a second at its end.
	env = append([]string{asMantlet + "=1", "MANTLET_ENVOY_DRAIN_TIME=1s", "GORACE=atexit_sleep_ms=0"}, env...)
	p.sidecar, err = p.Sidecar(directory, "/proc/self/exe", env...)
	p.must(err)
	p.sidecar.Log = p.log
	t.Cleanup(p.examine)
	return p
}

// start runs a pod until it is ready, with workloads on the ports.
func start(t testing.TB, env ...string) *pod {
	t.Helper()
	p := newPod(t, env...)
	p.start()
	return p
}

// start runs a pod that is set up, until it is ready.
func (p *pod) start() {
	p.t.Helper()
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.besiege()
	p.run()
	p.protect(tlsPort)
	p.protect(mtlsPort)
	p.ready()
}

// besiege starts the prober.
func (p *pod) besiege() {
	p.prober = p.outside.Probe(
		netip.AddrPortFrom(p.IPv4, tlsPort), netip.AddrPortFrom(p.IPv6, tlsPort),
		netip.AddrPortFrom(p.IPv4, mtlsPort), netip.AddrPortFrom(p.IPv6, mtlsPort),
	)
}

// run starts mantlet and returns once it says that nothing comes in.
func (p *pod) run() {
	p.t.Helper()
	before := p.log.count(closed)
	p.must(p.sidecar.Start())
	p.await("mantlet closes the pod", func() bool { return p.log.count(closed) > before || p.sidecar.Ended() })
	if p.log.count(closed) == before {
		p.t.Fatalf("mantlet ended: %v", p.sidecar.Wait())
	}
}

// closed is what mantlet logs once the deny-all rules stand.
const closed = "nothing comes in until the desired state is in force"

// protect starts workloads that nothing in plaintext may ever reach, streams and datagrams.
func (p *pod) protect(port uint16) *lab.Workload {
	p.t.Helper()
	address := fmt.Sprintf(":%d", port)
	p.protected = append(p.protected, p.serve(p.Host, lab.Service{Network: "udp", Address: address}))
	stream := p.serve(p.Host, lab.Service{Address: address})
	p.protected = append(p.protected, stream)
	return stream
}

// besieged returns once the prober has made attempts of each kind that began after the call.
func (p *pod) besieged() {
	p.t.Helper()
	ctx, cancel := p.context()
	defer cancel()
	p.must(p.prober.Await(ctx, 6))
}

// examine is the judgement at the end of each test.
func (p *pod) examine() {
	if p.prober != nil {
		total := p.prober.Stop().Total()
		if total.Attempts == 0 || total.Answered > 0 {
			p.t.Errorf("the prober saw %+v, want attempts and no answer", total)
		}
	}
	for _, w := range p.protected {
		if leaked := w.Leaked(); leaked > 0 {
			p.t.Errorf("%d bytes of plaintext reached the workload: %+v", leaked, w.Connections())
		}
	}
	for _, bad := range []string{"DATA RACE", "panic:", "fatal error:"} {
		if strings.Contains(p.log.String(), bad) {
			p.t.Errorf("mantlet's log has %q", bad)
		}
	}
	if p.t.Failed() {
		p.t.Logf("mantlet's log:\n%s", p.log)
	}
}

func (p *pod) ready() {
	p.t.Helper()
	ctx, cancel := p.context()
	defer cancel()
	p.must(p.sidecar.Ready(ctx))
}

// unready waits until mantlet is not ready for a reason that has this text.
func (p *pod) unready(reason string) {
	p.t.Helper()
	var said string
	p.await("unready: "+reason, func() bool {
		ctx, cancel := p.context()
		defer cancel()
		said = p.sidecar.Unready(ctx)
		return strings.Contains(said, reason) && !strings.HasPrefix(said, "Get ") // it does not answer yet
	})
	if !slices.ContainsFunc(status.Reasons(), func(begins string) bool { return strings.HasPrefix(said, begins) }) {
		p.t.Errorf("docs/operations.md does not have what it says: %s", said)
	}
}

// envoy returns the process id of the one Envoy that runs.
func (p *pod) envoy() int {
	p.t.Helper()
	pids, err := p.sidecar.Envoys()
	p.must(err)
	if len(pids) != 1 {
		p.t.Fatalf("mantlet has children %v, want one", pids)
	}
	return pids[0]
}

func (p *pod) host(name string) *lab.Host {
	p.t.Helper()
	host, err := p.network.Host(name)
	p.must(err)
	return host
}

func (p *pod) issue(names ...string) *lab.Identity {
	p.t.Helper()
	identity, err := p.mesh.Issue(lab.Leaf{DNSNames: names})
	p.must(err)
	return identity
}

func (p *pod) serve(on *lab.Host, service lab.Service) *lab.Workload {
	p.t.Helper()
	w, err := on.Serve(service)
	p.must(err)
	p.t.Cleanup(func() { _ = w.Close() })
	return w
}

// dial connects from a host. The connection is closed when the test ends.
func (p *pod) dial(from *lab.Host, to netip.AddrPort) net.Conn {
	p.t.Helper()
	ctx, cancel := p.context()
	defer cancel()
	conn, err := from.Dial(ctx, "tcp", to.String())
	p.must(err)
	p.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// handshake makes a connection from outside whose TLS handshake is done.
func (p *pod) handshake(to netip.AddrPort, config *tls.Config) (*tls.Conn, error) {
	ctx, cancel := p.context()
	defer cancel()
	raw, err := p.outside.Dial(ctx, "tcp", to.String())
	if err != nil {
		return nil, err
	}
	p.t.Cleanup(func() { _ = raw.Close() })
	conn := tls.Client(raw, config)
	return conn, conn.HandshakeContext(ctx)
}

// exchange is a connection from outside through the mesh, from dial to close: the workload must echo what is said.
func (p *pod) exchange(to netip.AddrPort, config *tls.Config) error {
	conn, err := p.handshake(to, config)
	if err != nil {
		return err
	}
	defer conn.Close()
	return echo(conn)
}

// echo says something and wants to hear the same.
func echo(conn net.Conn) error { return talk(conn, time.Now().Add(limit)) }

func talk(conn net.Conn, deadline time.Time) error {
	const text = "hello"
	if err := conn.SetDeadline(deadline); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, text); err != nil {
		return err
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(conn, got); err != nil {
		return err
	}
	if string(got) != text {
		return fmt.Errorf("%q came back", got)
	}
	return nil
}

// cut waits until a connection is over. Whatever comes before is an error.
func cut(conn net.Conn) error { return cutUntil(conn, time.Now().Add(limit)) }

func cutUntil(conn net.Conn, deadline time.Time) error {
	_, err := howItEnds(conn, deadline)
	return err
}

// howItEnds waits until a connection is over. It returns io.EOF for one that ends in good order, or what the kernel says of it instead.
func howItEnds(conn net.Conn, deadline time.Time) (how, err error) {
	if err := conn.SetReadDeadline(deadline); err != nil {
		return nil, err
	}
	n, how := conn.Read(make([]byte, 64))
	var late net.Error
	switch {
	case n > 0:
		return nil, fmt.Errorf("%d bytes came", n)
	case errors.As(how, &late) && late.Timeout():
		return nil, errors.New("the connection lives on")
	default:
		return how, nil
	}
}

// limit bounds every wait: far longer than anything takes, so that a busy machine fails nothing.
const limit = 30 * time.Second

func (p *pod) context() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), limit)
}

func (p *pod) await(what string, cond func() bool) {
	p.t.Helper()
	ctx, cancel := p.context()
	defer cancel()
	if err := lab.Until(ctx, cond); err != nil {
		p.t.Fatalf("waiting until %s: %v", what, err)
	}
}

func (p *pod) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *pod) check(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Error(err)
	}
}

// journal is a log that grows while it is read.
type journal struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (j *journal) Write(text []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(text)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.String()
}

func (j *journal) count(text string) int { return strings.Count(j.String(), text) }
