package lab

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Marker is what a Prober says. No UTF-8 text contains its one byte, leak. What goes through the mesh in the lab is text; so a single
// such byte, at any place of any connection, is plaintext that came past the mesh.
const (
	Marker = "\xff\xff\xff\xff\xff\xff\xff\xff"
	leak   = '\xff'
)

// Service says what a workload does.
type Service struct {
	Network string      // "tcp" if empty; "udp" answers datagrams
	Address string      // ":8080" is the port on all addresses of both families; else an IP literal and port
	Banner  string      // said first, before the client says anything
	TLS     *tls.Config // none: plaintext, as workloads behind mantlet speak
}

// Workload is a server that echoes and remembers what it was sent.
type Workload struct {
	service Service
	socket  interface{ Close() error }
	done    sync.WaitGroup

	mu          sync.Mutex
	closed      bool
	open        map[net.Conn]struct{}
	connections []*Connection
}

// Connection is one connection that a workload accepted, or one datagram.
type Connection struct {
	Local, Remote netip.AddrPort       // Local is the address that the client dialled; for datagrams, the one listened on
	TLS           *tls.ConnectionState // once the handshake is done
	Received      int                  // bytes; with TLS, of what was inside
	Leaked        int                  // those of them that are a Prober's
	Closed        bool                 // it is over
	Err           error                // how it ended, if not by the client's close
}

// Serve starts a workload on the host.
func (h *Host) Serve(service Service) (*Workload, error) {
	w := &Workload{service: service, open: map[net.Conn]struct{}{}}
	if service.Network == "udp" {
		socket, err := h.ListenPacket("udp", service.Address)
		if err != nil {
			return nil, fmt.Errorf("serving on host %q: %w", h.Name, err)
		}
		w.socket = socket
		w.done.Go(func() { w.answer(socket) })
		return w, nil
	}
	listener, err := h.Listen("tcp", service.Address)
	if err != nil {
		return nil, fmt.Errorf("serving on host %q: %w", h.Name, err)
	}
	w.socket = listener
	w.done.Go(func() { w.accept(listener) })
	return w, nil
}

// accept serves connections until the listener is closed.
func (w *Workload) accept(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		w.mu.Lock()
		record := &Connection{Local: addrPort(conn.LocalAddr()), Remote: addrPort(conn.RemoteAddr())}
		w.connections = append(w.connections, record)
		if w.closed {
			_ = conn.Close()
		}
		w.open[conn] = struct{}{}
		w.mu.Unlock()
		w.done.Go(func() {
			err := w.echo(conn, record)
			_ = conn.Close()
			w.mu.Lock()
			defer w.mu.Unlock()
			delete(w.open, conn)
			record.Closed, record.Err = true, err
		})
	}
}

// echo is one connection from handshake to end.
func (w *Workload) echo(conn net.Conn, record *Connection) error {
	if w.service.TLS != nil {
		secured := tls.Server(conn, w.service.TLS)
		if err := secured.Handshake(); err != nil {
			return err
		}
		state := secured.ConnectionState()
		w.mu.Lock()
		record.TLS = &state
		w.mu.Unlock()
		conn = secured
	}
	if _, err := conn.Write([]byte(w.service.Banner)); err != nil {
		return err
	}
	buffer := make([]byte, 32<<10)
	for {
		n, err := conn.Read(buffer)
		w.mu.Lock()
		record.receive(buffer[:n])
		w.mu.Unlock()
		if err == nil {
			_, err = conn.Write(buffer[:n])
		}
		if err != nil {
			return err
		}
	}
}

// answer echoes datagrams until the socket is closed.
func (w *Workload) answer(socket net.PacketConn) {
	buffer := make([]byte, 64<<10)
	for {
		n, remote, err := socket.ReadFrom(buffer)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error that answers an earlier echo
		}
		record := &Connection{Local: addrPort(socket.LocalAddr()), Remote: addrPort(remote), Closed: true}
		record.receive(buffer[:n])
		w.mu.Lock()
		w.connections = append(w.connections, record)
		w.mu.Unlock()
		_, _ = socket.WriteTo(buffer[:n], remote)
	}
}

func (c *Connection) receive(data []byte) {
	c.Received += len(data)
	c.Leaked += bytes.Count(data, []byte{leak})
}

// addrPort returns IPv4 addresses as such, also those of sockets that serve both families.
func addrPort(addr net.Addr) netip.AddrPort {
	ap := netip.MustParseAddrPort(addr.String())
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// Connections returns what was accepted up to now, the oldest first.
func (w *Workload) Connections() []Connection {
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []Connection
	for _, c := range w.connections {
		all = append(all, *c)
	}
	return all
}

// Leaked returns how many bytes of plaintext came past the mesh: of those that a Prober sends, any. The invariant is 0.
func (w *Workload) Leaked() int {
	leaked := 0
	for _, c := range w.Connections() {
		leaked += c.Leaked
	}
	return leaked
}

// Close stops listening, cuts the connections and returns when all is over. Records stay.
func (w *Workload) Close() error {
	err := w.socket.Close()
	w.mu.Lock()
	w.closed = true
	for conn := range w.open {
		_ = conn.Close()
	}
	w.mu.Unlock()
	w.done.Wait()
	return err
}

// How a Prober paces itself. In-flight attempts at one target: those of one attempt's longest life, so that the pace holds
// while every packet is dropped: (300 + 2*100) / 25 = 20.
const (
	probeEvery    = 25 * time.Millisecond
	probeDial     = 300 * time.Millisecond // a dropped SYN is not sent again before one second
	probeAnswer   = 100 * time.Millisecond
	probeInFlight = 20
)

// Prober is the adversary: it speaks plaintext to protected ports, over and over, until it is stopped. What it found out is on the
// workload's side (Leaked); what it saw itself is a Tally per target.
type Prober struct {
	host   *Host
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu      sync.Mutex
	begun   map[netip.AddrPort]int
	tallies Stats
}

// Stats is what a Prober saw, by target.
type Stats map[netip.AddrPort]Tally

// Tally counts attempts at one target that are over. Each is Accepted (of datagrams: answered), Refused, a Timeout or Failed.
type Tally struct {
	Attempts int
	Accepted int
	Refused  int
	Timeouts int
	Failed   int // otherwise: unreachable, …
	Returned int // bytes that came back
	Answered int // attempts to which something came back that is no TLS record, so not from the mesh
}

// Total returns the sum over all targets.
func (s Stats) Total() Tally {
	var total Tally
	for _, t := range s {
		total = total.plus(t)
	}
	return total
}

func (t Tally) plus(o Tally) Tally {
	return Tally{
		t.Attempts + o.Attempts, t.Accepted + o.Accepted, t.Refused + o.Refused, t.Timeouts + o.Timeouts,
		t.Failed + o.Failed, t.Returned + o.Returned, t.Answered + o.Answered,
	}
}

// Probe starts a prober on the host. Every 25 ms each target gets another attempt, whether or not the last is over, in turn: one that
// speaks at once, one that waits to be spoken to first, a datagram.
func (h *Host) Probe(targets ...netip.AddrPort) *Prober {
	ctx, cancel := context.WithCancel(context.Background())
	p := &Prober{host: h, cancel: cancel, begun: map[netip.AddrPort]int{}, tallies: Stats{}}
	for _, target := range targets {
		p.begun[target], p.tallies[target] = 0, Tally{}
	}
	for _, target := range targets {
		p.done.Go(func() { p.probe(ctx, target) })
	}
	return p
}

// probe keeps the pace at one target.
func (p *Prober) probe(ctx context.Context, target netip.AddrPort) {
	attempts := []func(context.Context, netip.AddrPort) Tally{p.speak, p.listen, p.datagram}
	slots := make(chan struct{}, probeInFlight)
	tick := time.NewTicker(probeEvery)
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case slots <- struct{}{}:
		}
		p.mu.Lock()
		p.begun[target]++
		p.mu.Unlock()
		p.done.Go(func() {
			tally := attempts[n%len(attempts)](ctx, target)
			<-slots
			if ctx.Err() != nil && tally.Accepted == 0 {
				return // Stop cut it short
			}
			p.mu.Lock()
			defer p.mu.Unlock()
			p.tallies[target] = p.tallies[target].plus(tally)
		})
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

// speak says Marker as soon as it is connected.
func (p *Prober) speak(ctx context.Context, target netip.AddrPort) Tally {
	return p.attempt(ctx, "tcp", target, func(conn net.Conn) (answer []byte) {
		_, _ = conn.Write([]byte(Marker))
		return read(conn)
	})
}

// listen waits to be spoken to before it says Marker: workloads that speak first answer to no more than a connection.
func (p *Prober) listen(ctx context.Context, target netip.AddrPort) Tally {
	return p.attempt(ctx, "tcp", target, func(conn net.Conn) (answer []byte) {
		answer = read(conn)
		_, _ = conn.Write([]byte(Marker))
		return append(answer, read(conn)...)
	})
}

// datagram says Marker over UDP. Nothing is connected, so what happened shows only in what comes back.
func (p *Prober) datagram(ctx context.Context, target netip.AddrPort) Tally {
	var err error
	tally := p.attempt(ctx, "udp", target, func(conn net.Conn) []byte {
		_, _ = conn.Write([]byte(Marker))
		answer := make([]byte, len(Marker))
		var n int
		_ = conn.SetReadDeadline(time.Now().Add(probeAnswer))
		n, err = conn.Read(answer)
		return answer[:n]
	})
	if err != nil {
		return outcome(err)
	}
	return tally
}

// attempt dials, lets talk do the talking and counts.
func (p *Prober) attempt(ctx context.Context, network string, target netip.AddrPort, talk func(net.Conn) []byte) Tally {
	dialing, cancel := context.WithTimeout(ctx, probeDial)
	defer cancel()
	conn, err := p.host.Dial(dialing, network, target.String())
	if err != nil {
		return outcome(err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	tally := Tally{Attempts: 1, Accepted: 1}
	if answer := talk(conn); len(answer) > 0 {
		tally.Returned = len(answer)
		// RFC 8446, 5.1: alert is 21, handshake 22.
		if !slices.Contains([]byte{21, 22}, answer[0]) {
			tally.Answered = 1
		}
	}
	return tally
}

// outcome counts an attempt that came to nothing.
func outcome(err error) Tally {
	var timeout net.Error
	switch {
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ECONNRESET):
		return Tally{Attempts: 1, Refused: 1}
	case errors.As(err, &timeout) && timeout.Timeout():
		return Tally{Attempts: 1, Timeouts: 1}
	default:
		return Tally{Attempts: 1, Failed: 1}
	}
}

// read returns what comes until the peer is done or probeAnswer is over.
func read(conn net.Conn) []byte {
	_ = conn.SetReadDeadline(time.Now().Add(probeAnswer))
	var all []byte
	buffer := make([]byte, 512)
	for {
		n, err := conn.Read(buffer)
		all = append(all, buffer[:n]...)
		if err != nil {
			return all
		}
	}
}

// Await returns when n attempts at each target that began after the call are over, or with the context's error.
func (p *Prober) Await(ctx context.Context, n int) error {
	goals := map[netip.AddrPort]int{}
	p.mu.Lock()
	for target, begun := range p.begun {
		goals[target] = begun + n // all but the first begun of them must have begun since
	}
	p.mu.Unlock()
	return Until(ctx, func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		for target, goal := range goals {
			if p.tallies[target].Attempts < goal {
				return false
			}
		}
		return true
	})
}

// Stats returns what the prober saw up to now.
func (p *Prober) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	stats := Stats{}
	for target, tally := range p.tallies {
		stats[target] = tally
	}
	return stats
}

// Stop ends the prober, attempts under way included, and returns what it saw.
func (p *Prober) Stop() Stats {
	p.cancel()
	p.done.Wait()
	return p.Stats()
}
