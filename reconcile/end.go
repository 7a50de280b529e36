package reconcile

import (
	"maps"
	"net/netip"
	"reflect"
	"slices"

	"mantlet/internal/peers"
	"mantlet/internal/sockdiag"
	"mantlet/internal/status"
	"mantlet/render"
	"mantlet/schema"
)

// change is what a state forbids that the one before it let in.
type change struct {
	from, to *desired // from is nil if it is not known what was in force
	raised   bool     // the TLS minimum rises
	revoked  bool     // a mesh CA was removed; it may have issued any peer's certificate
	trust    peers.Trust
	leads    map[*peers.Peer]bool
	routes   map[netip.AddrPort]route // by listen address: egress entries that forbid something
	known    map[sockdiag.Socket]peers.Connection

	// What is open before the state's rules: the clients' connections that get a new generation's mark, why the others have to end, and Envoy's
	// connections to the workload.
	moves map[sockdiag.Socket]render.Mark
	ends  map[sockdiag.Socket]status.EndReason
	legs  map[sockdiag.Socket]sockdiag.Cookie
}

// route is what became of an egress entry.
type route struct {
	all      status.EndReason // why all of its connections are forbidden; empty if some may go on
	narrowed bool             // it accepts fewer endpoints
	names    []string
}

// tighten returns what a state forbids; nil for nothing.
func (d *Daemon) tighten(next *desired, revoked bool) *change {
	c := &change{from: d.have, to: next, revoked: revoked, leads: map[*peers.Peer]bool{}, ends: map[sockdiag.Socket]status.EndReason{}}
	if d.have == nil {
		return c
	}
	c.raised = next.enforced().TLS.MinVersion.Compare(d.have.enforced().TLS.MinVersion) > 0
	c.routes = forbidden(d.have.mesh, next.mayOpen(), revoked)
	sameIngress := reflect.DeepEqual(d.have.generations, next.generations) && reflect.DeepEqual(d.have.closedPorts(), next.closedPorts())
	if sameIngress && len(c.routes) == 0 {
		return nil
	}
	c.trust = d.Secrets.Trust()
	d.readPeers(c)
	d.endKnown(c)
	clients, legs, err := d.Kernel.Open()
	if err != nil {
		d.Log.Warn("it can't be told what is open: a change that forbids one client ends the connections of all at its port", "error", err)
	}
	c.moves, c.legs = c.candidates(clients), legs
	for s, mark := range clients {
		if _, moves := c.moves[s]; moves {
			continue
		}
		if reason := c.reasonToEnd(s, mark); reason != "" {
			c.ends[s] = reason
		}
	}
	d.endOpen(c)
	return c
}

// endOpen ends the other connections that are open and that a state forbids, before its rules are put in force. The rules refuse what the pod
// sends on such a connection: its own socket would be gone by that, and a client that waits for an answer would never be told.
func (d *Daemon) endOpen(c *change) {
	if len(c.ends) == 0 && len(c.routes) == 0 {
		return
	}
	d.watchdog.begin(loop, "ending connections", kernelLimit)
	ended, err := d.Kernel.End(func(s sockdiag.Socket, mark render.Mark) status.EndReason {
		if mark == render.MarkNone {
			return c.endpoint(s)
		}
		return c.ends[s]
	}, c.order)
	d.watchdog.begin(loop, "its turn", turnLimit)
	if err != nil {
		d.Log.Debug("connections that are forbidden now are ended later", "error", err)
	}
	for s := range ended {
		delete(c.ends, s)
	}
	d.logEnded(c.sum(ended))
}

// endKnown ends the connections of which it is known that a state forbids them, before its rules are put in force: with 10,000 of them that
// takes a while. An Envoy with the state accepts connections already, as a rule. Where it does not, the forbidden ones that are made
// meanwhile are ended after the rules, as are those that are not known.
func (d *Daemon) endKnown(c *change) {
	var order []sockdiag.Exact
	reasons := map[sockdiag.Socket]status.EndReason{}
	for s, conn := range c.known {
		if reason := c.forbids(s); reason != "" {
			reasons[s] = reason
			order = append(order, conn.Client, conn.Upstream)
		}
	}
	if len(order) == 0 {
		return
	}
	d.watchdog.begin(loop, "ending connections", kernelLimit)
	sockets, err := d.Kernel.EndKnown(order)
	d.watchdog.begin(loop, "its turn", turnLimit)
	if err != nil {
		d.Log.Debug("connections that are forbidden now are ended later", "error", err)
	}
	ended := map[sockdiag.Socket]status.EndReason{}
	for _, s := range sockets {
		if reasons[s] != "" {
			ended[s] = reasons[s]
		}
	}
	d.logEnded(c.sum(ended))
}

// readPeers reads who is connected. If that fails, nobody is known.
func (d *Daemon) readPeers(c *change) {
	var err error
	if c.known, err = d.Proxy.Peers(); err != nil {
		d.Log.Warn("it can't be told who is connected: a change that forbids one client ends the connections of all at its port", "error", err)
		c.known = nil
	}
}

// forbidden returns the egress entries with connections that another mesh would not make: the entry is gone or has another upstream,
// accepts fewer endpoints, or requires a newer TLS version. revoked says that a mesh CA was removed, which may have issued any endpoint's
// certificate.
func forbidden(from, to schema.Mesh, revoked bool) map[netip.AddrPort]route {
	routes := map[netip.AddrPort]route{}
	raised := to.TLS.MinVersion.Compare(from.TLS.MinVersion) > 0
	for _, was := range from.Egress {
		i, found := slices.BinarySearchFunc(to.Egress, was.Listen, func(is schema.Egress, at netip.AddrPort) int { return is.Listen.Compare(at) })
		switch {
		case !found:
			routes[was.Listen] = route{all: status.EndEntry}
		case to.Egress[i].Upstream != was.Upstream:
			routes[was.Listen] = route{all: status.EndUpstream}
		case revoked || raised || !was.Within(to.Egress[i]):
			routes[was.Listen] = route{narrowed: !was.Within(to.Egress[i]), names: to.Egress[i].ServerNames}
		}
	}
	return routes
}

// reasonToEnd returns why a connection may not go on; empty if it may. It implements the argument of Kernel.End.
func (c *change) reasonToEnd(s sockdiag.Socket, mark render.Mark) status.EndReason {
	if mark == render.MarkNone {
		return c.endpoint(s)
	}
	port, mesh := s.Local.Port(), c.to.enforced()
	if c.to.isClosed(schema.Ports{First: port, Last: port}) {
		return status.EndClosed
	}
	if render.Admits(mesh, c.to.generations, port, mark) {
		return ""
	}
	if c.from == nil {
		return status.EndOlder
	}
	if mode, _ := render.ModeOf(mark); mode != schema.PolicyOf(mesh.Ingress, port).Mode {
		return status.EndMode
	}
	if reason := c.client(s); reason != "" {
		return reason
	}
	return status.EndOlder // a change before this one forbade it, or it was made while this one was put in force
}

// forbids returns why a connection may not go on of which it is known whose it is.
func (c *change) forbids(s sockdiag.Socket) status.EndReason {
	if s.Local.Addr().IsLoopback() {
		return c.endpoint(s)
	}
	port := s.Local.Port()
	if c.from.generations.At(port) == c.to.generations.At(port) || schema.PolicyOf(c.to.enforced().Ingress, port).Mode != schema.ModeMTLS {
		return ""
	}
	return c.client(s)
}

// client returns why a client at a port of ModeMTLS may not go on. A client that is not known may not.
func (c *change) client(s sockdiag.Socket) status.EndReason {
	port := s.Local.Port()
	was, is := schema.PolicyOf(c.from.enforced().Ingress, port), schema.PolicyOf(c.to.enforced().Ingress, port)
	return c.peer(s, !was.Within(is), status.EndNotAllowed, func(p *peers.Peer) bool { return p.IsListed(is.Allow) })
}

// endpoint returns why a connection of the workload to a loopback address may not go on. Only those to egress entries are ended.
func (c *change) endpoint(s sockdiag.Socket) status.EndReason {
	r, ok := c.routes[s.Local]
	if !ok || r.all != "" {
		return r.all
	}
	return c.peer(s, r.narrowed, status.EndServerNames, func(p *peers.Peer) bool { return p.Serves(r.names) })
}

func (c *change) peer(s sockdiag.Socket, narrowed bool, unlisted status.EndReason, listed func(*peers.Peer) bool) status.EndReason {
	conn, known := c.known[s]
	switch {
	case narrowed && (!known || !listed(conn.Peer)):
		return unlisted
	case c.revoked && (!known || !c.isTrusted(conn.Peer)):
		return status.EndCARemoved
	case c.raised && (!known || conn.TLSVersion.Compare(c.to.enforced().TLS.MinVersion) < 0):
		return status.EndTLSVersion
	default:
		return ""
	}
}

// isTrusted reports whether a peer's certificate chains to one of the remaining mesh CAs. It verifies each certificate once.
func (c *change) isTrusted(p *peers.Peer) bool {
	leads, asked := c.leads[p]
	if !asked {
		leads = p.Leads(c.trust)
		c.leads[p] = leads
	}
	return leads
}

// moveAllowed moves the connections that a change allows to the new generations of their ports, and returns how many it moved. Meanwhile
// the rules admit the old and the new generation. The rules after that admit only the new one, and end what was not moved.
//
// A connection is identified by its addresses, which another connection can have the next moment. So the peers of moved connections are
// read again afterwards. A connection that begins later has the old generation again.
func (d *Daemon) moveAllowed(c *change) (spared int) {
	if c == nil || len(c.moves) == 0 {
		return 0
	}
	d.watchdog.begin(loop, "looking whom a change forbids", kernelLimit)
	defer d.watchdog.begin(loop, "its turn", turnLimit)
	spared, err := d.moveAll(c, c.moves)
	if err != nil {
		d.Log.Warn("a change ends all connections at the ports that it is about", "error", err)
	}
	return spared
}

// candidates returns the connections to move, with their new marks.
func (c *change) candidates(clients map[sockdiag.Socket]render.Mark) map[sockdiag.Socket]render.Mark {
	to := map[sockdiag.Socket]render.Mark{}
	for s, mark := range clients {
		port := s.Local.Port()
		was, is := c.from.generations.At(port), c.to.generations.At(port)
		if _, known := c.known[s]; known && was != is && mark == render.MarkOf(schema.ModeMTLS, was) && c.client(s) == "" {
			to[s] = render.MarkOf(schema.ModeMTLS, is)
		}
	}
	return to
}

// moveAll moves connections. If it returns an error, all that were moved are ended.
func (d *Daemon) moveAll(c *change, to map[sockdiag.Socket]render.Mark) (spared int, err error) {
	both := *d.have
	both.moving = true
	if err := d.Kernel.Exchange(both.rules()); err != nil {
		return 0, err
	}
	d.locked(func() { d.have = &both })
	back := map[sockdiag.Socket]render.Mark{}
	moved, err := d.Kernel.Move(to)
	if err == nil {
		d.readPeers(c)
	} else {
		c.known, moved = nil, nil
		for s := range to {
			moved = append(moved, s)
		}
	}
	for _, s := range moved {
		if _, known := c.known[s]; !known || c.client(s) != "" {
			back[s] = render.MarkOf(schema.ModeMTLS, c.from.generations.At(s.Local.Port()))
		}
	}
	if _, failed := d.Kernel.Move(back); failed != nil {
		d.loop.exhausted = true
		return len(to), failed
	}
	return len(moved) - len(back), err
}

// order returns the sockets to end: those that were dialled, each with the one that Envoy has towards the other side, as far as that is
// known, and then the rest of Envoy's to ports at which all are ended. Once Envoy finds one side reset it ends the other in good order, so
// they follow each other closely.
func (c *change) order(ending map[sockdiag.Socket]status.EndReason, open map[sockdiag.Socket]sockdiag.Details) (order []sockdiag.Socket) {
	for s := range ending {
		order = append(order, s)
		if conn, known := c.known[s]; known {
			order = append(order, conn.Upstream.Socket)
		}
	}
	paired := map[sockdiag.Socket]bool{}
	for _, conn := range c.known {
		paired[conn.Upstream.Socket] = true
	}
	for leg, cookie := range c.legs {
		port := leg.Remote.Port()
		all := c.from.generations.At(port) != c.to.generations.At(port) || c.to.isClosed(schema.Ports{First: port, Last: port})
		if all && !paired[leg] && open[leg].Cookie == cookie {
			order = append(order, leg)
		}
	}
	return order
}

// end ends the open connections that a state forbids whose rules are in force. Without it the rules would end those from outside at their
// next packet; end resets both sides at once. If it fails, the rules still do their part.
func (d *Daemon) end(c *change) {
	if c == nil {
		return
	}
	d.watchdog.begin(loop, "ending connections", kernelLimit)
	ended, err := d.Kernel.End(c.reasonToEnd, c.order)
	d.watchdog.begin(loop, "its turn", turnLimit)
	if err != nil {
		d.Log.Warn("connections that are forbidden now end at their next packet, and those to egress entries with the Envoy that has them", "error", err)
	} else {
		maps.Copy(ended, c.ends) // those that had a packet in between were ended by the rules
	}
	d.logEnded(c.sum(ended))
}
