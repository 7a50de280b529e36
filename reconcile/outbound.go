package reconcile

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	"mantlet/internal/status"
	"mantlet/render"
	"mantlet/schema"
)

const (
	// outboundEvery is how often the accounts are read: far more often than what they hold times out.
	outboundEvery = 2 * time.Second
	// maxDestinations is how many are remembered. Of more, those that were spoken to last are.
	maxDestinations = 1024
)

// destination is a line of the account.
type destination struct {
	to       netip.AddrPort
	protocol uint8
	fate     string
}

// seen is what is known of a destination.
type seen struct {
	count       uint64
	first, last time.Time
}

// outboundAccount remembers what the accounts in the kernel tell: those forget what was not spoken to for a time.
type outboundAccount struct {
	mu         sync.Mutex
	kernel     map[destination]uint64 // what they told last
	seen       map[destination]*seen
	totals     map[status.OutboundTotal]uint64 // by fate and protocol
	incomplete bool
	log        *logLimit
	names      outboundNames
}

// init prepares an account that is new. The caller holds mu.
func (a *outboundAccount) init() {
	if a.seen == nil {
		a.seen, a.totals, a.log = map[destination]*seen{}, map[status.OutboundTotal]uint64{}, newLogLimit()
		a.names = outboundNames{map[netip.Addr]string{}, make(chan netip.Addr, maxAsked)}
	}
}

// add takes what the accounts tell, and returns destinations that are new.
func (a *outboundAccount) add(all []status.Spoken, now time.Time) (added []destination) {
	kernel := make(map[destination]uint64, len(all))
	for _, s := range all {
		at := destination{s.To, s.Protocol, s.Fate}
		kernel[at] = s.Count
		more := s.Count
		if before := a.kernel[at]; before <= s.Count { // else the account has begun again
			more -= before
		}
		if more == 0 {
			continue
		}
		a.totals[status.OutboundTotal{Fate: fateName(at.fate), Protocol: commonProtocol(at.protocol)}] += more
		one := a.seen[at]
		if one == nil {
			one = &seen{first: minTime(s.Last, now)}
			a.seen[at], added = one, append(added, at)
		}
		one.count += more
		one.last = minTime(s.Last, now)
	}
	a.kernel = kernel
	a.forget()
	return slices.DeleteFunc(added, func(at destination) bool { return a.seen[at] == nil })
}

// forget keeps the destinations that were spoken to last.
func (a *outboundAccount) forget() {
	if len(a.seen) <= maxDestinations {
		return
	}
	a.incomplete = true
	oldest := slices.SortedFunc(maps.Keys(a.seen), func(x, y destination) int { return a.seen[x].last.Compare(a.seen[y].last) })
	for _, at := range oldest[:len(oldest)-maxDestinations] {
		delete(a.seen, at)
	}
}

func minTime(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// fateName is a fate as the status has it.
func fateName(fate string) string {
	switch fate {
	case render.FateAllowed:
		return status.OutboundAllowed
	case render.FateRefused:
		return status.OutboundRefused
	default:
		return status.OutboundObserved
	}
}

// commonProtocol is the protocol as a label of a metric.
func commonProtocol(number uint8) string {
	if number == render.TCP || number == render.UDP {
		return status.ProtocolName(number)
	}
	return "other"
}

func (at destination) String() string {
	if at.to.Port() == 0 {
		return at.to.Addr().String()
	}
	return at.to.String()
}

// followOutbound keeps account of what the pod sends past the egress entries, until ctx ends.
func (d *Daemon) followOutbound(ctx context.Context) {
	d.outbound.mu.Lock()
	d.outbound.init()
	d.outbound.mu.Unlock()
	if d.NameOf != nil {
		var naming sync.WaitGroup
		defer naming.Wait()
		naming.Go(func() { d.findNames(ctx) })
	}
	look := time.NewTicker(outboundEvery)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
			d.readOutbound()
		}
	}
}

// readOutbound reads the accounts, and logs who is new in them.
func (d *Daemon) readOutbound() {
	all, err := d.Kernel.Spoken()
	if err != nil {
		d.Log.Debug("the accounts of what is sent in the clear can't be read", "error", err)
		return
	}
	a := &d.outbound
	a.mu.Lock()
	defer a.mu.Unlock()
	a.init()
	a.names.learn(d.upstreams())
	for _, at := range a.add(all, time.Now()) {
		a.names.ask(at.to.Addr())
		leftOut, ok := a.log.admit()
		if !ok {
			continue
		}
		text := fmt.Sprintf("%s is spoken to in the clear: %s", at, connections(a.seen[at].count))
		if at.fate == render.FateRefused {
			text = fmt.Sprintf("%s may not be spoken to in the clear: %s refused", at, connections(a.seen[at].count))
		}
		attrs := []any{"destination", at.String(), "protocol", status.ProtocolName(at.protocol), "count", a.seen[at].count, "verdict", fateName(at.fate)}
		if leftOut > 0 {
			attrs = append(attrs, "left_out_before", leftOut)
		}
		level := slog.LevelWarn
		if at.fate == render.FateAllowed {
			level = slog.LevelInfo // as somebody meant it
		}
		d.Log.Log(context.Background(), level, text, attrs...) //nolint:sloglint // people look for the destination at the line's beginning
	}
}

func connections(n uint64) string {
	if n == 1 {
		return "1 connection"
	}
	return fmt.Sprintf("%d connections", n)
}

// addOutbound fills in what the pod sends past the egress entries. It asks nobody but the kernel.
func (d *Daemon) addOutbound(s *status.Status) {
	d.readOutbound()
	var have, want *desired
	d.locked(func() { have, want = d.have, d.want })
	policy := render.OutboundOf(d.Found)
	var mesh schema.Mesh
	switch {
	case have != nil:
		mesh = have.enforced()
		policy = mesh.Outbound
	case want != nil:
		mesh = want.mesh
	}
	s.OutboundPolicy = status.OutboundPolicy{Mode: string(policy.Mode), Allow: append([]string{}, policy.List()...)}
	s.Outbound = []status.Outbound{}
	a := &d.outbound
	a.mu.Lock()
	defer a.mu.Unlock()
	s.OutboundPolicy.Incomplete = a.incomplete
	for at, one := range a.seen {
		line := status.Outbound{
			Destination: at.String(), Protocol: status.ProtocolName(at.protocol), Count: one.count, FirstSeen: one.first.UTC(), LastSeen: one.last.UTC(),
			Verdict: status.OutboundAllowed, Listed: at.fate == render.FateAllowed, Name: a.names.of(at.to.Addr()),
		}
		if at.fate == render.FateRefused {
			line.Verdict = status.OutboundRefused
		}
		s.Outbound = append(s.Outbound, line)
	}
	slices.SortFunc(s.Outbound, func(x, y status.Outbound) int {
		return cmp.Or(y.LastSeen.Compare(x.LastSeen), cmp.Compare(x.Destination, y.Destination), cmp.Compare(x.Protocol, y.Protocol), cmp.Compare(x.Fate(), y.Fate()))
	})
	suggest(s.Outbound, mesh)
	for key, n := range a.totals {
		key.Connections = n
		s.OutboundTotals = append(s.OutboundTotals, key)
	}
}

// suggest adds to destinations whose name is known the egress entry that would lead connections there, each at a listen address of its own.
// A destination that has an entry already gets none: the workload need only send to its listen address.
func suggest(all []status.Outbound, mesh schema.Mesh) {
	taken := map[netip.AddrPort]bool{}
	proposed := map[schema.Upstream]string{}
	for _, e := range mesh.Egress {
		taken[e.Listen] = true
		proposed[e.Upstream] = ""
	}
	for i, one := range all {
		to, err := netip.ParseAddrPort(one.Destination)
		if err != nil || one.Name == "" || one.Protocol != status.ProtocolName(render.TCP) {
			continue
		}
		upstream := schema.Upstream{Host: one.Name, Port: to.Port()}
		text, done := proposed[upstream]
		// Loopback addresses that the workload has no service at: an entry at its own port would be refused.
		for last := byte(1); !done && last < 255; last++ {
			if at := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 137, 0, last}), to.Port()); !taken[at] {
				text, done, taken[at] = fmt.Sprintf("{listen: '%s', upstream: '%s', serverNames: [%s]}", at, upstream, one.Name), true, true
			}
		}
		proposed[upstream], all[i].Suggestion = text, text
	}
}

// endsOutbound reports whether rules may forbid connections that were let out before. have is nil if it is not known what was in force.
func endsOutbound(have *desired, rules render.Ruleset) bool {
	is := render.OutboundOf(rules)
	return is.Mode == schema.OutboundDrop && (have == nil || !reflect.DeepEqual(is, render.OutboundOf(have.rules())))
}

// endOutbound ends the connections that were let out before and that a state forbids. Its rules refuse what they send by themselves, so those
// by TCP are ended before they are put in force, as by endOpen. The others would begin again.
func (d *Daemon) endOutbound(next *desired, onlyTCP bool) {
	rules := next.rules()
	if !endsOutbound(d.have, rules) {
		return
	}
	d.watchdog.begin(loop, "ending connections", kernelLimit)
	ended, err := d.Kernel.EndOutbound(rules.Leaves, onlyTCP)
	d.watchdog.begin(loop, "its turn", turnLimit)
	if err != nil {
		d.Log.Warn("connections in the clear that are forbidden now end when the workload sends something", "error", err)
	}
	var all []status.Ending
	for to, n := range ended {
		all = append(all, status.Ending{
			Time: time.Now().UTC(), Count: n, Direction: "outbound", Destination: to.String(), Code: status.EndOutbound, Reason: status.EndOutbound.Words(),
		})
	}
	slices.SortFunc(all, func(a, b status.Ending) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Destination, b.Destination))
	})
	d.logEnded(all)
}
