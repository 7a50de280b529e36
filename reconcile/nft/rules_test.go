package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"mantlet/internal/lab"
	"mantlet/render"
	"mantlet/schema"
)

// patience is how long a test waits for what must not happen.
const patience = 200 * time.Millisecond

// trial is a place where something is tried under some rules, in one IP family.
type trial struct {
	*place
	family int
	rules  render.Ruleset
	wait   time.Duration // how long to wait for success
}

// stops proves that whole rules stop an attack and, so that the proof is worth something, that broken ones do not. The attack
// reports whether it came through.
func stops(t *testing.T, whole, broken render.Ruleset, attack func(x *trial) bool) {
	t.Helper()
	try(t, "whole", whole, false, attack)
	try(t, "broken", broken, true, attack)
}

// works proves that traffic passes whole rules and not broken ones.
func works(t *testing.T, whole, broken render.Ruleset, traffic func(x *trial) bool) {
	t.Helper()
	try(t, "whole", whole, true, traffic)
	try(t, "broken", broken, false, traffic)
}

var families = []string{"IPv4", "IPv6"}

func try(t *testing.T, name string, rules render.Ruleset, want bool, attempt func(x *trial) bool) {
	t.Helper()
	for family, familyName := range families {
		t.Run(name+"/"+familyName, func(t *testing.T) {
			t.Parallel()
			x := &trial{place: newPlace(t), family: family, rules: rules, wait: patience}
			if want {
				x.wait = limit
			}
			if got := attempt(x); got != want {
				t.Errorf("came through: %v, want %v\n%s", got, want, nft(t, x.pod, "list", "ruleset"))
			}
		})
	}
}

func (x *trial) apply() {
	x.t.Helper()
	x.replace(x.rules)
}

func (x *trial) target(port uint16) netip.AddrPort { return x.addr(x.family, port) }

// happens reports whether cond comes true in time.
func (x *trial) happens(cond func() bool) bool {
	ctx, cancel := context.WithTimeout(x.t.Context(), x.wait)
	defer cancel()
	return lab.Until(ctx, cond) == nil
}

// certainly gives what must come true the whole limit, whatever the attempt has to show.
func (x *trial) certainly(cond func() bool) bool {
	wait := x.wait
	x.wait = limit
	defer func() { x.wait = wait }()
	return cond()
}

// heard reports whether that is the next thing to be heard, in time.
func (x *trial) heard(conn net.Conn, what string) bool {
	_ = conn.SetReadDeadline(time.Now().Add(x.wait))
	return hear(conn, what) == nil
}

// passes reports whether what goes in at one end comes out at the other, in time.
func (x *trial) passes(in, out net.Conn) bool {
	_, err := io.WriteString(in, "passes")
	return err == nil && x.heard(out, "passes")
}

// listen listens on port 9000 for what lab.Workload does not do.
func (x *trial) listen() net.Listener {
	x.t.Helper()
	listener, err := x.pod.Listen("tcp", ":9000")
	if err != nil {
		x.t.Fatal(err)
	}
	x.t.Cleanup(func() { _ = listener.Close() })
	return listener
}

// wrapped returns both ends of a connection to port 9000 that was let in, as far as one of Envoy's ports.
func (x *trial) wrapped(port uint16) (client, envoy net.Conn) {
	x.t.Helper()
	loopback := []string{"127.0.0.1", "::1"}[x.family]
	listener, err := transparent(x.pod, net.JoinHostPort(loopback, fmt.Sprint(port)))
	if err != nil {
		x.t.Fatal(err)
	}
	x.t.Cleanup(func() { _ = listener.Close() })
	client, envoy = x.pair(listener, x.target(9000))
	x.exchange(client, envoy)
	return client, envoy
}

func (x *trial) sysctl(value string, names ...string) {
	x.t.Helper()
	for _, name := range names {
		if err := x.pod.Sysctl(name, value); err != nil {
			x.t.Fatal(err)
		}
	}
}

// cookies makes the pod answer SYNs with cookies. A listener takes them for two minutes after it gave one out itself, so it is
// connected to from inside.
func (x *trial) cookies(listener netip.AddrPort) {
	x.t.Helper()
	x.sysctl("2", "net.ipv4.tcp_syncookies")
	conn, err := x.pod.Dial(x.t.Context(), "tcp", listener.String())
	if err != nil {
		x.t.Fatal(err)
	}
	_ = conn.Close()
}

// speak dials and says Marker at once.
func (x *trial) speak(to netip.AddrPort) {
	if conn, err := x.dial(to, x.wait); err == nil {
		_, _ = io.WriteString(conn, lab.Marker)
	}
}

// answers reports whether a dialled connection comes about and is echoed.
func (x *trial) answers(to netip.AddrPort) bool {
	conn, err := x.dial(to, x.wait)
	return err == nil && x.passes(conn, conn)
}

func leaks(workload *lab.Workload) func() bool { return func() bool { return workload.Leaked() > 0 } }

// Parts of rules, for without and change.
var (
	aSYN     = render.TCPFlags{Value: syn, Mask: fin | syn | rst | ack}.Text()
	dropSYN  = aSYN + " counter drop"
	mtls     = marked(render.MarkMTLS)
	outbound = marked(render.MarkOutbound)
)

func marked(mark render.Mark) string { return render.Marked{Mark: mark}.Text() }

// without takes the rules out of a chain that contain one of the texts.
func without(t *testing.T, r render.Ruleset, chain string, texts ...string) render.Ruleset {
	t.Helper()
	for _, text := range texts {
		r = change(t, r, chain, text, func(render.Rule) render.Rule { return nil })
	}
	return r
}

// less takes matches of a kind out of the rules of a chain that contain a text.
func less[T render.Statement](t *testing.T, r render.Ruleset, chain, text string) render.Ruleset {
	t.Helper()
	return change(t, r, chain, text, func(rule render.Rule) render.Rule {
		return slices.DeleteFunc(rule, func(s render.Statement) bool { _, is := s.(T); return is })
	})
}

// change replaces the rules of a chain that contain a text.
func change(t *testing.T, r render.Ruleset, chain, text string, with func(render.Rule) render.Rule) render.Ruleset {
	t.Helper()
	r.Chains = slices.Clone(r.Chains)
	found := false
	for i, c := range r.Chains {
		if c.Name != chain {
			continue
		}
		var rules []render.Rule
		for _, rule := range c.Rules {
			if strings.Contains(rule.Text(), text) {
				found = true
				rule = with(slices.Clone(rule))
			}
			if rule != nil {
				rules = append(rules, rule)
			}
		}
		r.Chains[i].Rules = rules
	}
	if !found {
		t.Fatalf("no rule of chain %s contains %q", chain, text)
	}
	return r
}

// exposed takes out what stands behind the chains of the modes: their last rule, the policy, and the second line.
func exposed(t *testing.T, r render.Ruleset) render.Ruleset {
	t.Helper()
	r = lenient(without(t, r, "egress", "vmap @answers", "goto mtls_out"))
	for i, c := range r.Chains {
		if last := len(c.Rules) - 1; last >= 0 && c.Rules[last].Text() == "counter drop" {
			r.Chains[i].Rules = c.Rules[:last:last]
		}
	}
	return r
}

// lenient makes the policy accept, also at the second look.
func lenient(r render.Ruleset) render.Ruleset {
	r = unwatched(r)
	r.Chains[0].Hook.Policy = render.Accept
	return r
}

// unwatched takes away the second look at what comes in.
func unwatched(r render.Ruleset) render.Ruleset {
	r.Chains = slices.DeleteFunc(slices.Clone(r.Chains), func(c render.Chain) bool { return c.Name == "input" })
	return r
}

// tproxy ends the rule where no socket listens, and does not drop.
func TestNothingComesInWhileNothingListens(t *testing.T) {
	t.Parallel()
	broken := exposed(t, without(t, rules(), "mtls_in", dropSYN, "reset"))
	stops(t, rules(), broken, func(x *trial) bool {
		workload := x.serve(lab.Service{Address: ":9000"})
		x.apply()
		x.speak(x.target(9000))
		return x.happens(leaks(workload))
	})
}

// A client that dials while Envoy is away gets through by its own retransmission, a second later.
func TestClientsWaitWhileNothingListens(t *testing.T) {
	t.Parallel()
	works(t, rules(), without(t, rules(), "mtls_in", dropSYN), func(x *trial) bool {
		x.apply()
		before := nft(x.t, x.pod, "list", "chain", "inet", "mantlet", "mtls_in")
		dialled := make(chan error, 1)
		var conn net.Conn
		go func() {
			var err error
			conn, err = x.keep(x.outside.Dial(x.t.Context(), "tcp", x.target(9000).String()))
			dialled <- err
		}()
		until(x.t, "the SYN is counted", func() bool {
			return nft(x.t, x.pod, "list", "chain", "inet", "mantlet", "mtls_in") != before
		})
		x.standIn(schema.IngressMTLSPort)
		return <-dialled == nil && x.heard(conn, greeting(schema.IngressMTLSPort))
	})
}

// Connections that are older than the rules are cut, even of a peer that ignores resets.
func TestOlderConnectionsWhereTheClientSpeaks(t *testing.T) {
	t.Parallel()
	stops(t, rules(), exposed(t, without(t, rules(), "mtls_in", "reset")), func(x *trial) bool {
		workload := x.serve(lab.Service{Address: ":9000"})
		s := x.stranger()
		seg := s.connect(x.target(9000))
		until(x.t, "the workload has the connection", func() bool { return len(workload.Connections()) == 1 })
		x.apply()
		return x.happens(func() bool {
			s.send(seg.answer(ack|psh, lab.Marker))
			return workload.Leaked() > 0
		})
	})
}

func TestOlderConnectionsWhereTheWorkloadSpeaks(t *testing.T) {
	t.Parallel()
	stops(t, rules(), without(t, rules(), "egress", "goto mtls_out"), func(x *trial) bool {
		client, server := x.pair(x.listen(), x.target(9000))
		x.apply()
		return x.passes(server, client)
	})
}

// Where somebody else uses conntrack before mantlet comes, the workload's answer has made it the connection's original
// direction, and what the client says a reply.
func TestOlderConnectionsThatConntrackTakesForOutbound(t *testing.T) {
	t.Parallel()
	broken := unwatched(less[render.Marked](t, rules(), "ingress", outbound))
	stops(t, rules(), broken, func(x *trial) bool {
		client, server := x.pair(x.listen(), x.target(9000))
		load(x.t, x.pod, "table inet other { chain c { type filter hook output priority 0; ct state new counter; }; }")
		x.exchange(server, client)
		x.apply()
		return x.passes(client, server)
	})
}

// A port that is passthrough no longer: what it let in ends at the next packet, whoever speaks.
func TestTighteningCutsWhatWasLetIn(t *testing.T) {
	t.Parallel()
	before := rules(port1(9000, schema.ModePassthrough))
	for name, broken := range map[string]render.Ruleset{
		"the client speaks":   exposed(t, without(t, rules(), "mtls_in", "reset")),
		"the workload speaks": without(t, rules(), "mtls_out", "reset"),
	} {
		t.Run(name, func(t *testing.T) {
			stops(t, rules(), broken, func(x *trial) bool {
				x.replace(before)
				in, out := x.pair(x.listen(), x.target(9000))
				x.exchange(in, out)
				x.apply()
				if name == "the workload speaks" {
					in, out = out, in
				}
				return x.passes(in, out)
			})
		})
	}
}

// From one wrapped mode to a stricter one: Envoy would go on with the connection as it began.
func TestChangeOfModeCutsWhatWasLetIn(t *testing.T) {
	t.Parallel()
	stops(t, rules(), exposed(t, without(t, rules(), "mtls_in", "reset")), func(x *trial) bool {
		x.replace(rules(port1(9000, schema.ModeTLS)))
		in, out := x.wrapped(schema.IngressTLSPort)
		x.apply()
		return x.passes(in, out)
	})
}

// A port that is loosened cuts nothing that was let in before, whoever speaks.
func TestLooseningCutsNothing(t *testing.T) {
	t.Parallel()
	secured, plain := rules(port1(9000, schema.ModeTLS)), rules(port1(9000, schema.ModePassthrough))
	mutual := fmt.Sprintf("== 0x%08x", uint32(render.MarkMTLS))
	for name, c := range map[string]struct {
		before, whole, broken render.Ruleset
		listener              uint16
		workloadSpeaks        bool
	}{
		"mtls to tls, the client speaks":         {rules(), secured, exposed(t, without(t, secured, "tls_in", mutual)), schema.IngressMTLSPort, false},
		"mtls to tls, the workload speaks":       {rules(), secured, without(t, secured, "tls_out", mutual), schema.IngressMTLSPort, true},
		"mtls to plaintext, the client speaks":   {rules(), plain, without(t, plain, "passthrough_in", "accept"), schema.IngressMTLSPort, false},
		"mtls to plaintext, the workload speaks": {rules(), plain, without(t, plain, "passthrough_out", "accept"), schema.IngressMTLSPort, true},
		"tls to plaintext, the client speaks":    {secured, plain, without(t, plain, "passthrough_in", "accept"), schema.IngressTLSPort, false},
		"tls to plaintext, the workload speaks":  {secured, plain, without(t, plain, "passthrough_out", "accept"), schema.IngressTLSPort, true},
	} {
		t.Run(name, func(t *testing.T) {
			works(t, c.whole, c.broken, func(x *trial) bool {
				x.replace(c.before)
				in, out := x.wrapped(c.listener)
				x.apply()
				if c.workloadSpeaks {
					in, out = out, in
				}
				return x.passes(in, out)
			})
		})
	}
}

// A tightening that the mode does not show: a new generation of the port's policy.
func TestChangeOfGenerationCutsWhatWasLetIn(t *testing.T) {
	t.Parallel()
	generation := func(port uint16) render.Ruleset {
		return render.Rules(schema.Mesh{}, render.Generations{
			Ports: []render.PortsGeneration{{Ports: schema.Ports{First: port, Last: port}, Generation: 1}},
		})
	}
	stops(t, generation(9000), generation(9001), func(x *trial) bool {
		x.replace(rules())
		x.standIn(schema.IngressMTLSPort)
		conn := x.greeted(x.target(9000))
		x.apply()
		return x.passes(conn, conn)
	})
}

// What does not concern a connection leaves it alone: other ports' modes, and that Envoy's listener is gone while the process
// drains.
func TestOtherConnectionsLiveOn(t *testing.T) {
	t.Parallel()
	works(t, rules(port1(80, schema.ModePassthrough)), render.Rules(schema.Mesh{}, render.Generations{Default: 1}), func(x *trial) bool {
		x.replace(rules())
		envoy := x.standIn(schema.IngressMTLSPort)
		conn := x.greeted(x.target(9000))
		envoy.deafen()
		x.apply()
		return x.passes(conn, conn)
	})
}

// With SYN cookies a handshake leaves no socket behind until its last packet, which the workload's listener would take.
func TestSYNCookies(t *testing.T) {
	t.Parallel()
	broken := less[render.TProxy](t, rules(), "mtls_in", mtls)
	stops(t, rules(), broken, func(x *trial) bool {
		workload := x.serve(lab.Service{Address: ":9000"})
		x.apply()
		x.standIn(schema.IngressMTLSPort)
		x.cookies(x.target(9000))
		x.speak(x.target(9000))
		return x.happens(leaks(workload))
	})
	works(t, rules(), broken, func(x *trial) bool {
		x.serve(lab.Service{Address: ":9000"})
		x.apply()
		x.standIn(schema.IngressMTLSPort)
		x.cookies(x.target(9000))
		conn, err := x.dial(x.target(9000), x.wait)
		return err == nil && x.heard(conn, greeting(schema.IngressMTLSPort))
	})
}

// That its sockets are transparent gives a process no right to plaintext.
func TestTransparentWorkload(t *testing.T) {
	t.Parallel()
	listen := func(x *trial) *net.TCPListener {
		listener, err := transparent(x.pod, x.target(9000).String())
		if err != nil {
			x.t.Fatal(err)
		}
		x.t.Cleanup(func() { _ = listener.Close() })
		return listener.(*net.TCPListener)
	}
	t.Run("older connection", func(t *testing.T) {
		stops(t, rules(), unwatched(less[render.Marked](t, rules(), "mtls_in", mtls)), func(x *trial) bool {
			client, server := x.pair(listen(x), x.target(9000))
			x.apply()
			return x.passes(client, server)
		})
	})
	t.Run("SYN cookies", func(t *testing.T) {
		broken := change(t, rules(), "mtls_in", mtls, func(render.Rule) render.Rule {
			return render.Rule{render.Marked{Mark: render.MarkMTLS}, render.BoundSocket{}, render.Verdict{Kind: render.Accept}}
		})
		stops(t, rules(), broken, func(x *trial) bool {
			listener := listen(x)
			x.apply()
			x.standIn(schema.IngressMTLSPort)
			x.cookies(x.target(9000))
			if _, err := x.keep(listener.Accept()); err != nil {
				x.t.Fatal(err)
			}
			x.speak(x.target(9000))
			_ = listener.SetDeadline(time.Now().Add(x.wait))
			conn, err := x.keep(listener.Accept())
			return err == nil && x.heard(conn, lab.Marker)
		})
	})
	// A SYN along a connection of another mode must not earn it the mark.
	t.Run("tightening", func(t *testing.T) {
		stops(t, rules(), without(t, rules(), "mtls_in", "!="), func(x *trial) bool {
			x.replace(rules(port1(9000, schema.ModePassthrough)))
			listener, s := listen(x), x.stranger()
			seg := s.connect(x.target(9000))
			conn, err := x.keep(listener.Accept())
			if err != nil {
				x.t.Fatal(err)
			}
			x.apply()
			s.send(s.syn(x.target(9000)))
			s.send(seg.answer(ack|psh, lab.Marker))
			return x.heard(conn, lab.Marker)
		})
	})
}

// Envoy's former connection is in TIME_WAIT, Envoy is gone, and the client dials from the same port anew. tproxy gives the SYN
// to the socket in TIME_WAIT, and that to whoever listens on the port that was dialled.
func TestTimeWait(t *testing.T) {
	t.Parallel()
	again := func(x *trial, gone bool) bool {
		x.serve(lab.Service{Address: ":9000"})
		x.apply()
		envoy, s := x.standIn(schema.IngressMTLSPort), x.stranger()
		s.connect(x.target(9000))
		seg := s.await("the greeting", func(seg segment) bool { return seg.data == greeting(schema.IngressMTLSPort) })
		s.send(seg.answer(ack, ""))
		envoy.hangUp()
		s.send(s.await("a FIN", has(fin)).answer(fin|ack, ""))
		s.await("the last ACK", has(ack))
		if gone {
			envoy.deafen()
		}
		second := s.syn(x.target(9000))
		second.seq += 1 << 20
		s.send(second)
		return x.happens(func() bool { _, answered := s.find(has(syn | ack)); return answered })
	}
	stops(t, rules(), less[render.BoundSocket](t, rules(), "mtls_in", aSYN), func(x *trial) bool { return again(x, true) })
	try(t, "Envoy is there", rules(), true, func(x *trial) bool { return again(x, false) })
}

// echo serves outside.
func (x *trial) echo(network string) netip.AddrPort {
	x.t.Helper()
	server, err := x.outside.Serve(lab.Service{Network: network, Address: ":9000"})
	if err != nil {
		x.t.Fatal(err)
	}
	x.t.Cleanup(func() { _ = server.Close() })
	return netip.AddrPortFrom(x.outside.Addrs()[x.family], 9000)
}

// fromThePod dials from the pod.
func (x *trial) fromThePod(network string, to netip.AddrPort) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(x.t.Context(), x.wait)
	defer cancel()
	return x.keep(x.pod.Dial(ctx, network, to.String()))
}

// What the pod asks outside is answered, while nothing else comes in.
func TestOutboundConnections(t *testing.T) {
	t.Parallel()
	for name, whole := range map[string]render.Ruleset{"mesh": rules(), "deny all": render.DenyAll(true)} {
		for _, network := range []string{"tcp", "udp"} {
			t.Run(name+"/"+network, func(t *testing.T) {
				works(t, whole, without(t, whole, "ingress", outbound), func(x *trial) bool {
					x.apply()
					conn, err := x.fromThePod(network, x.echo(network))
					return err == nil && x.passes(conn, conn)
				})
			})
		}
	}
	// A mantlet that starts again denies everything until it knows the desired state.
	t.Run("all along", func(t *testing.T) {
		works(t, rules(), render.DenyAll(false), func(x *trial) bool {
			x.replace(render.DenyAll(true))
			conn, err := x.fromThePod("tcp", x.echo("tcp"))
			if err != nil {
				return false
			}
			x.apply()
			if !x.passes(conn, conn) {
				return false
			}
			x.replace(render.DenyAll(true))
			return x.passes(conn, conn)
		})
	})
}

// swallow lets the pod dial a stranger, who does not answer, and give up. It returns where the pod dialled from.
func (x *trial) swallow(s *stranger) netip.AddrPort {
	x.t.Helper()
	ctx, cancel := context.WithCancel(x.t.Context())
	defer cancel()
	dialled := make(chan error, 1)
	go func() {
		_, err := x.keep(x.pod.Dial(ctx, "tcp", s.at(x.family).String()))
		dialled <- err
	}()
	var swallowed segment
	until(x.t, "the stranger is sent a SYN", func() (ok bool) {
		if swallowed, ok = s.find(isSYN); ok {
			return true
		}
		select {
		case err := <-dialled:
			x.t.Fatalf("dialling ended: %v", err)
		default:
		}
		return false
	})
	cancel()
	<-dialled //nolint:errcheck // it was cancelled
	return swallowed.from
}

// The stranger later sends a SYN of its own, along the conntrack entry of the one that it swallowed. Conntrack knows the
// sequence number of the pod's. Which others it takes for valid depends on the kernel, so it is told to take all.
func TestSwallowedSYN(t *testing.T) {
	t.Parallel()
	attempt := func(x *trial, cookies bool) bool {
		x.sysctl("1", "net.netfilter.nf_conntrack_tcp_be_liberal")
		x.apply()
		s := x.stranger()
		return x.happens(func() bool {
			target := x.swallow(s)
			var workload *lab.Workload
			// A process that another test starts right now may hold it for a moment.
			until(x.t, "the socket that dialled is gone", func() bool {
				var err error
				workload, err = x.pod.Serve(lab.Service{Address: target.String()})
				return err == nil
			})
			defer func() { _ = workload.Close() }()
			if cookies {
				x.cookies(target)
			}
			s.send(s.syn(target))
			once := *x
			once.wait = min(x.wait, time.Second)
			return once.happens(func() bool { s.insist(); return workload.Leaked() > 0 })
		})
	}
	stops(t, rules(), without(t, rules(), "ingress", aSYN), func(x *trial) bool { return attempt(x, false) })
	// With SYN cookies it may be Envoy who answers, and what follows is no SYN. Two rules stand against that.
	t.Run("cookies", func(t *testing.T) {
		broken := less[render.Marked](t, without(t, rules(), "mtls_in", "!="), "ingress", outbound)
		stops(t, rules(), broken, func(x *trial) bool {
			x.standIn(schema.IngressMTLSPort)
			return attempt(x, true)
		})
	})
}

// forwards makes the pod a router which, as IPv6 has it anyway, does not mind its own address as a source.
func (x *trial) forwards() {
	x.t.Helper()
	x.sysctl("1", "net.ipv4.ip_forward", "net.ipv4.conf.eth0.accept_local", "net.ipv6.conf.all.forwarding")
}

// Where the pod forwards, a stranger could have it forward a packet that pretends to be the pod's own, and then answer it. The
// forgery is not forwarded, and no answer is let in to a connection that did not begin in the pod.
func TestForgedOutboundConnection(t *testing.T) {
	t.Parallel()
	passed := unwatched(without(t, rules(), "forwarded", "fib saddr"))
	broken := less[render.Marked](t, passed, "ingress", outbound)
	t.Run("tcp", func(t *testing.T) {
		stops(t, rules(), broken, func(x *trial) bool { return x.forge(x.target(9000)) })
		stops(t, passed, broken, func(x *trial) bool { return x.forge(x.target(9000)) })
	})
	t.Run("udp", func(t *testing.T) {
		stops(t, rules(), broken, func(x *trial) bool { return x.forgeDatagram(x.target(9000)) })
		stops(t, passed, broken, func(x *trial) bool { return x.forgeDatagram(x.target(9000)) })
	})
	// An address of the pod's that is masqueraded: what answers needs no mark then.
	t.Run("masqueraded", func(t *testing.T) {
		stops(t, rules(), passed, func(x *trial) bool {
			own := []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8:1::1")}[x.family]
			address(x.t, x.pod, netip.PrefixFrom(own, 24))
			load(x.t, x.pod, fmt.Sprintf(
				"table inet other { chain c { type nat hook postrouting priority srcnat; %s saddr %s masquerade; }; }",
				[]string{"ip", "ip6"}[x.family], own))
			return x.forgeDatagram(netip.AddrPortFrom(own, 9000))
		})
	})
}

// forge has a stranger make a TCP connection by a forgery from the target, which the stranger then answers with a SYN cookie.
func (x *trial) forge(target netip.AddrPort) bool {
	x.t.Helper()
	x.forwards()
	workload := x.serve(lab.Service{Address: ":9000"})
	x.cookies(target)
	s := x.stranger()
	s.send(s.syn(target)) // before there are rules, which is the easiest way to a cookie
	cookie := s.await("a cookie", has(syn|ack))
	x.apply()
	s.send(segment{from: target, to: s.at(x.family), flags: syn, seq: 1})
	if !x.happens(func() bool { _, forwarded := s.find(isSYN); return forwarded }) {
		return false
	}
	s.send(cookie.answer(ack, ""))
	s.send(cookie.answer(ack|psh, lab.Marker))
	return x.happens(leaks(workload))
}

// forgeDatagram is forge for UDP, which needs no handshake.
func (x *trial) forgeDatagram(target netip.AddrPort) bool {
	x.t.Helper()
	x.forwards()
	workload := x.serve(lab.Service{Network: "udp", Address: target.String()})
	x.apply()
	s := x.stranger()
	s.send(segment{from: target, to: s.at(x.family), udp: true, data: "forged"})
	var forwarded segment
	if !x.happens(func() (ok bool) {
		forwarded, ok = s.find(func(seg segment) bool { return seg.udp })
		return ok
	}) {
		return false
	}
	s.send(segment{from: forwarded.to, to: forwarded.from, udp: true, data: lab.Marker})
	return x.happens(leaks(workload))
}

// What listens on loopback is nobody's outside, not even on a port that is passthrough and with route_localnet. IPv6 has no
// such setting: the kernel drops packets to ::1 before any rule sees them, so nothing can be broken there.
func TestLoopbackIsNotReachedFromOutside(t *testing.T) {
	t.Parallel()
	whole := rules(port1(9000, schema.ModePassthrough))
	reach := func(x *trial) bool {
		loopback := []string{"127.0.0.1:9000", "[::1]:9000"}[x.family]
		x.sysctl("1", "net.ipv4.conf.eth0.route_localnet")
		workload := x.serve(lab.Service{Address: loopback})
		x.apply()
		s := x.stranger()
		s.send(s.syn(netip.MustParseAddrPort(loopback)))
		return x.happens(func() bool { s.insist(); return workload.Leaked() > 0 })
	}
	stops(t, whole, without(t, whole, "ingress", "127.0.0.0/8"), func(x *trial) bool {
		if x.family == 1 && x.wait != patience {
			return true
		}
		return reach(x)
	})
	try(t, "kernel", without(t, whole, "ingress", "::1"), false, func(x *trial) bool { return x.family == 1 && reach(x) })
}

// Who dials the ports of Envoy's listeners gets the listener that any port leads to.
func TestListenersAreNotReachedByTheirPorts(t *testing.T) {
	t.Parallel()
	for _, port := range []uint16{schema.IngressMTLSPort, schema.IngressTLSPort} {
		works(t, rules(), rules(port1(port, schema.ModeTLS)), func(x *trial) bool {
			x.apply()
			x.standIn(schema.IngressMTLSPort)
			x.standIn(schema.IngressTLSPort)
			conn, err := x.dial(x.target(port), x.wait)
			return err == nil && x.heard(conn, greeting(schema.IngressMTLSPort))
		})
	}
}

// A link-local address is the pod's like any other.
func TestLinkLocalAddress(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	workload := p.serve(lab.Service{Address: ":9000"})
	p.replace(rules())
	p.standIn(schema.IngressMTLSPort)
	linkLocal := netip.MustParseAddr("fe80::1:1")
	for host, addr := range map[*lab.Host]netip.Addr{p.pod: linkLocal, p.outside: linkLocal.Next()} {
		address(t, host, netip.PrefixFrom(addr, 64))
	}
	p.greeted(netip.AddrPortFrom(linkLocal.WithZone("eth0"), 9000))
	if got := workload.Connections(); len(got) > 0 {
		t.Errorf("the workload saw %+v", got)
	}
}

// address adds an address to a host's eth0.
func address(t testing.TB, host *lab.Host, prefix netip.Prefix) {
	t.Helper()
	if err := host.Do(func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		addr := &netlink.Addr{IPNet: ipNet(prefix)}
		if prefix.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		return netlink.AddrAdd(eth0, addr)
	}); err != nil {
		t.Fatal(err)
	}
}

func ipNet(prefix netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen())}
}

// inner adds a host behind the pod, as nested containers are, and returns it and its address.
func (x *trial) inner() (*lab.Host, netip.Addr) {
	x.t.Helper()
	inner, err := x.network.Host("inner")
	if err != nil {
		x.t.Fatal(err)
	}
	prefix := []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("2001:db8:1::1/64")}[x.family]
	own := netip.PrefixFrom(prefix.Addr().Next(), prefix.Bits())
	address(x.t, x.pod, prefix)
	address(x.t, inner, own)
	route := func(host *lab.Host, to netip.Prefix, via netip.Addr) {
		if err := host.Do(func() error {
			return netlink.RouteAdd(&netlink.Route{Dst: ipNet(to.Masked()), Gw: via.AsSlice()})
		}); err != nil {
			x.t.Fatal(err)
		}
	}
	pod, outside := x.pod.Addrs()[x.family], x.outside.Addrs()[x.family]
	route(inner, netip.PrefixFrom(outside, outside.BitLen()), prefix.Addr())
	route(x.outside, prefix, pod)
	x.forwards()
	return inner, own.Addr()
}

// What the pod forwards is not for the pod.
func TestForwardedTraffic(t *testing.T) {
	t.Parallel()
	works(t, rules(), without(t, rules(), "ingress", "fib daddr"), func(x *trial) bool {
		inner, addr := x.inner()
		server, err := inner.Serve(lab.Service{Address: ":9000"})
		if err != nil {
			x.t.Fatal(err)
		}
		x.t.Cleanup(func() { _ = server.Close() })
		x.apply()
		return x.happens(func() bool { return x.answers(netip.AddrPortFrom(addr, 9000)) })
	})
	t.Run("masqueraded", func(t *testing.T) {
		works(t, rules(), without(t, rules(), "ingress", "snat"), func(x *trial) bool {
			inner, _ := x.inner()
			load(x.t, x.pod, `table inet other { chain c { type nat hook postrouting priority srcnat; masquerade; }; }`)
			x.apply()
			ctx, cancel := context.WithTimeout(x.t.Context(), x.wait)
			defer cancel()
			conn, err := x.keep(inner.Dial(ctx, "tcp", x.echo("tcp").String()))
			return err == nil && x.passes(conn, conn)
		})
	})
}

func TestOtherProtocols(t *testing.T) {
	t.Parallel()
	ask := func(x *trial) bool {
		x.serve(lab.Service{Network: "udp", Address: x.target(9000).String()})
		x.apply()
		conn, err := x.keep(x.outside.Dial(x.t.Context(), "udp", x.target(9000).String()))
		return err == nil && x.passes(conn, conn)
	}
	t.Run("drop", func(t *testing.T) {
		stops(t, rules(), lenient(without(t, rules(), "ports", "counter drop")), ask)
	})
	// The policy helps nobody: it is not in force yet while a transaction is committed.
	for name, c := range map[string]struct {
		whole render.Ruleset
		chain string
	}{
		"mtls":                                {render.Rules(schema.Mesh{Ingress: []schema.Ingress{port1(9000, schema.ModeMTLS)}}, render.Generations{}), "mtls_in"},
		"tls":                                 {rules(port1(9000, schema.ModeTLS)), "tls_in"},
		"status":                              {render.Rules(schema.Mesh{StatusPort: 9000}, render.Generations{}), "status_in"},
		"status, before anything is in force": {render.OnlyStatus(9000), "status_in"},
	} {
		t.Run("drop at a port of mode "+name, func(t *testing.T) {
			stops(t, lenient(c.whole), lenient(change(t, c.whole, c.chain, "counter drop", func(rule render.Rule) render.Rule {
				if rule.Text() == "counter drop" {
					return nil
				}
				return rule
			})), ask)
		})
	}
	t.Run("passthrough", func(t *testing.T) {
		works(t, rules(port1(9000, schema.ModePassthrough)), rules(), ask)
	})
	t.Run("accept", func(t *testing.T) {
		works(t, states()["other protocols"], rules(), ask)
	})
}

// Without ICMP the pod is not found on an IPv6 link, and nobody can ping it.
func TestICMP(t *testing.T) {
	t.Parallel()
	for name, whole := range map[string]render.Ruleset{
		"mesh": rules(), "deny all": render.DenyAll(true), "deny all, bare": render.DenyAll(false),
	} {
		t.Run(name, func(t *testing.T) {
			works(t, whole, without(t, whole, "ingress", "icmp"), func(x *trial) bool {
				x.apply()
				s := x.stranger()
				s.put(ping(s.addrs[x.family], x.target(0).Addr()))
				return x.happens(s.ponged)
			})
		})
	}
	t.Run("neighbours", func(t *testing.T) {
		whole := rules(port1(9000, schema.ModePassthrough))
		works(t, whole, without(t, whole, "ingress", "icmp"), func(x *trial) bool {
			if x.family == 0 {
				return x.wait == limit // IPv4 has ARP
			}
			x.serve(lab.Service{Address: ":9000"})
			unknown := netip.MustParseAddr("2001:db8::77")
			address(x.t, x.pod, netip.PrefixFrom(unknown, 64))
			x.apply()
			return x.happens(func() bool { return x.answers(netip.AddrPortFrom(unknown, 9000)) })
		})
	})
}

// One segment out of the window, late or forged, resets no connection.
func TestSegmentOutOfTheWindow(t *testing.T) {
	t.Parallel()
	const far = 1 << 30
	inbound := func(x *trial) bool {
		x.apply()
		x.standIn(schema.IngressMTLSPort)
		x.standIn(schema.IngressTLSPort)
		x.serve(lab.Service{Address: ":9000"})
		s := x.stranger()
		bad := s.connect(x.target(9000)).answer(ack|psh, "x")
		bad.seq += far
		s.send(bad)
		return x.happens(func() bool { _, reset := s.find(has(rst)); return reset })
	}
	for _, mode := range []schema.Mode{schema.ModeMTLS, schema.ModeTLS} {
		t.Run(string(mode), func(t *testing.T) {
			whole := rules(port1(9000, mode))
			stops(t, whole, without(t, whole, string(mode)+"_in", "invalid"), inbound)
		})
	}
	try(t, "passthrough", rules(port1(9000, schema.ModePassthrough)), false, inbound)
	t.Run("egress", func(t *testing.T) {
		stops(t, rules(), without(t, rules(), "egress", "invalid"), func(x *trial) bool {
			x.apply()
			s := x.stranger()
			dialled := make(chan net.Conn, 1)
			go func() {
				conn, _ := x.keep(x.pod.Dial(x.t.Context(), "tcp", s.at(x.family).String()))
				dialled <- conn
			}()
			answer := s.await("a SYN", isSYN).answer(syn|ack, "")
			s.send(answer)
			bad := answer.answer(ack|psh, "x")
			bad.seq += far
			conn := <-dialled
			x.fromInside(bad)
			_ = conn.SetReadDeadline(time.Now().Add(x.wait))
			_, err := conn.Read(make([]byte, 1))
			return errors.Is(err, unix.ECONNRESET)
		})
	})
}

// fromInside sends a segment as if the pod's kernel did.
func (x *trial) fromInside(seg segment) {
	x.t.Helper()
	if err := x.pod.Do(func() error {
		domain := []int{unix.AF_INET, unix.AF_INET6}[x.family]
		fd, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW) // takes packets with their header
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		var to unix.Sockaddr = &unix.SockaddrInet6{Addr: seg.to.Addr().As16()}
		if x.family == 0 {
			to = &unix.SockaddrInet4{Addr: seg.to.Addr().As4()}
		}
		return unix.Sendto(fd, seg.packet(), 0, to)
	}); err != nil && !errors.Is(err, unix.EPERM) { // which says that a rule stopped it
		x.t.Fatal(err)
	}
}

// A hole in the first line does not do: what answers on a protected port without Envoy does not get out.
func TestSecondLine(t *testing.T) {
	t.Parallel()
	hole := unwatched(rules())
	hole.Chains[0].Rules = []render.Rule{{render.Verdict{Kind: render.Accept}}}
	for mode, whole := range map[string]render.Ruleset{"mtls": hole, "tls": rules(port1(9000, schema.ModeTLS))} {
		t.Run(mode, func(t *testing.T) {
			whole := unwatched(whole)
			whole.Chains[0].Rules = hole.Chains[0].Rules
			stops(t, whole, without(t, whole, mode+"_out", "reset"), func(x *trial) bool {
				workload := x.serve(lab.Service{Address: ":9000"})
				x.apply()
				x.speak(x.target(9000))
				return x.happens(leaks(workload))
			})
		})
	}
}

func TestDenyAll(t *testing.T) {
	t.Parallel()
	for name, whole := range map[string]render.Ruleset{
		"answers": render.DenyAll(true), "bare": render.DenyAll(false),
		"remembering": render.DenyAll(true).Remembering(rules(ports(1, 65535, schema.ModePassthrough))),
	} {
		t.Run(name, func(t *testing.T) {
			broken := lenient(without(t, whole, "ingress", "counter drop"))
			if name != "bare" {
				broken = without(t, broken, "egress", "counter drop")
			}
			t.Run("new connections", func(t *testing.T) {
				stops(t, whole, broken, func(x *trial) bool {
					workload := x.serve(lab.Service{Address: ":9000"})
					x.apply()
					x.speak(x.target(9000))
					return x.happens(leaks(workload))
				})
			})
			t.Run("older connections", func(t *testing.T) {
				stops(t, whole, broken, func(x *trial) bool {
					client, server := x.pair(x.listen(), x.target(9000))
					x.apply()
					return x.passes(client, server)
				})
			})
			t.Run("loopback", func(t *testing.T) {
				works(t, whole, without(t, whole, "ingress", "iif"), func(x *trial) bool {
					x.serve(lab.Service{Address: ":9000"})
					x.apply()
					conn, err := x.fromThePod("tcp", x.target(9000))
					return err == nil && x.passes(conn, conn)
				})
			})
		})
	}
	t.Run("the workload speaks", func(t *testing.T) {
		stops(t, render.DenyAll(true), without(t, render.DenyAll(true), "egress", "counter drop"), func(x *trial) bool {
			client, server := x.pair(x.listen(), x.target(9000))
			x.apply()
			return x.passes(server, client)
		})
	})
	// The one port that may be open while nothing else is.
	t.Run("status", func(t *testing.T) {
		whole := render.OnlyStatus(statusPort)
		works(t, whole, without(t, without(t, whole, "ingress", "vmap"), "egress", "vmap"), reachesStatus)
		stops(t, whole, rules(port1(9000, schema.ModePassthrough)), func(x *trial) bool {
			x.serve(lab.Service{Address: ":9000"})
			x.apply()
			return x.happens(func() bool { return x.answers(x.target(9000)) })
		})
	})
	// It drops and does not reset: what an earlier mantlet let in waits, and goes on where the desired state allows it still.
	t.Run("connections of the mesh wait", func(t *testing.T) {
		works(t, rules(), render.Rules(schema.Mesh{}, render.Generations{Default: 1}), func(x *trial) bool {
			x.replace(rules())
			x.standIn(schema.IngressMTLSPort)
			conn := x.greeted(x.target(9000))
			x.replace(render.DenyAll(true))
			if _, err := io.WriteString(conn, "waits"); err != nil {
				x.t.Error(err)
			}
			until(x.t, "it is dropped", func() bool {
				return !strings.Contains(nft(x.t, x.pod, "list", "chain", "inet", "mantlet", "ingress"), "packets 0")
			})
			x.apply()
			return x.heard(conn, "waits")
		})
	})
}

// reachesStatus asks mantlet's status from outside.
func reachesStatus(x *trial) bool {
	x.status(fmt.Sprintf(":%d", statusPort))
	x.apply()
	conn, err := x.dial(x.target(statusPort), x.wait)
	return err == nil && x.heard(conn, greeting(statusPort)) && x.passes(conn, conn)
}

// The status port leads to mantlet, and never to a workload that listens there.
func TestStatusPort(t *testing.T) {
	t.Parallel()
	for name, whole := range map[string]render.Ruleset{
		"before anything is known": render.OnlyStatus(statusPort),
		"in force":                 render.Rules(schema.Mesh{StatusPort: statusPort}, render.Generations{}),
	} {
		unmarked := less[render.MarkedSocket](t, without(t, whole, "status_in", "socket mark !="), "status_in", "socket mark")
		t.Run(name, func(t *testing.T) {
			t.Run("mantlet", func(t *testing.T) {
				works(t, whole, without(t, whole, "status_in", "=="), reachesStatus)
			})
			t.Run("workload alone", func(t *testing.T) {
				stops(t, whole, unmarked, func(x *trial) bool {
					workload := x.serve(lab.Service{Address: fmt.Sprintf(":%d", statusPort)})
					x.apply()
					x.speak(x.target(statusPort))
					return x.happens(leaks(workload))
				})
			})
			t.Run("workload at another address", func(t *testing.T) {
				stops(t, whole, unmarked, func(x *trial) bool {
					x.status(x.addr(1-x.family, statusPort).String())
					workload := x.serve(lab.Service{Address: x.target(statusPort).String()})
					x.apply()
					x.speak(x.target(statusPort))
					return x.happens(leaks(workload))
				})
			})
			t.Run("another user with mantlet's mark", func(t *testing.T) {
				if lab.EnvoyUser() == 0 {
					t.Skip("an ordinary user's lab has no other user")
				}
				stops(t, whole, without(t, whole, "status_out", "skuid"), func(x *trial) bool {
					x.statusOf(lab.Stranger, fmt.Sprintf(":%d", statusPort))
					x.apply()
					conn, err := x.dial(x.target(statusPort), x.wait)
					return err == nil && x.heard(conn, greeting(statusPort))
				})
			})
			t.Run("handshake that outlives mantlet", func(t *testing.T) {
				stops(t, whole, without(t, whole, "status_in", "socket mark !="), func(x *trial) bool {
					mantlet := x.status(fmt.Sprintf(":%d", statusPort))
					x.apply()
					x.cookies(x.target(statusPort))
					s := x.stranger()
					s.send(s.syn(x.target(statusPort)))
					answer := s.await("a SYN's answer", has(syn|ack))
					mantlet.close()
					workload := x.serve(lab.Service{Address: fmt.Sprintf(":%d", statusPort)})
					x.cookies(x.target(statusPort))
					s.send(answer.answer(ack, ""))
					s.send(answer.answer(ack|psh, lab.Marker))
					return x.happens(leaks(workload))
				})
			})
		})
	}
}

// A SYN is one in whatever it comes wrapped.
func TestCraftedSYNs(t *testing.T) {
	t.Parallel()
	whole, broken := rules(), rules(port1(9000, schema.ModePassthrough))
	for name, craft := range map[string]func(packet []byte) [][]byte{
		"fragments": fragments,
		"options":   func(packet []byte) [][]byte { return [][]byte{options(packet)} },
	} {
		t.Run(name, func(t *testing.T) {
			stops(t, whole, broken, func(x *trial) bool {
				x.serve(lab.Service{Address: ":9000"})
				x.apply()
				s := x.stranger()
				seg := s.syn(x.target(9000))
				seg.data = lab.Marker
				for _, packet := range craft(seg.packet()) {
					s.put(packet)
				}
				return x.happens(func() bool { _, answered := s.find(has(syn | ack)); return answered })
			})
		})
	}
}

// fragments splits a packet as early as the kernel takes it: of IPv4 behind the ports, of IPv6 behind the TCP header (RFC 791,
// 3.2; RFC 8200, 4.5; RFC 7112).
func fragments(packet []byte) (all [][]byte) {
	const id = 7
	if packet[0]>>4 == 4 {
		const unit = 8
		header, payload := packet[:20], packet[20:]
		for i, part := range [][]byte{payload[:unit], payload[unit:]} {
			h := slices.Clone(header)
			binary.BigEndian.PutUint16(h[2:], uint16(len(h)+len(part)))
			binary.BigEndian.PutUint16(h[4:], id)
			binary.BigEndian.PutUint16(h[6:], uint16(i)|uint16(1-i)<<13) // offset in units; more fragments
			binary.BigEndian.PutUint16(h[10:], 0)
			binary.BigEndian.PutUint16(h[10:], checksum(h))
			all = append(all, append(h, part...))
		}
		return all
	}
	const unit = 24
	header, payload := packet[:40], packet[40:]
	for i, part := range [][]byte{payload[:unit], payload[unit:]} {
		h := append(slices.Clone(header), header[6], 0)
		h = binary.BigEndian.AppendUint16(h, uint16(i*unit)|uint16(1-i))
		h = binary.BigEndian.AppendUint32(h, id)
		h[6] = unix.IPPROTO_FRAGMENT
		binary.BigEndian.PutUint16(h[4:], uint16(len(h)-40+len(part)))
		all = append(all, append(h, part...))
	}
	return all
}

// options puts four no-operations into an IPv4 header, and destination options of padding behind an IPv6 header.
func options(packet []byte) []byte {
	if packet[0]>>4 == 4 {
		h := append(slices.Clone(packet[:20]), 1, 1, 1, 1)
		h[0]++
		binary.BigEndian.PutUint16(h[2:], uint16(len(packet)+4))
		binary.BigEndian.PutUint16(h[10:], 0)
		binary.BigEndian.PutUint16(h[10:], checksum(h))
		return append(h, packet[20:]...)
	}
	h := append(slices.Clone(packet[:40]), packet[6], 0, 1, 4, 0, 0, 0, 0)
	h[6] = unix.IPPROTO_DSTOPTS
	binary.BigEndian.PutUint16(h[4:], uint16(len(packet)-40+8))
	return append(h, packet[40:]...)
}
