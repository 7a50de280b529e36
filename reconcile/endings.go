package reconcile

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"

	"mantlet/internal/sockdiag"
	"mantlet/internal/status"
)

const (
	// lastEndings is how many are kept, and how many are logged of one change.
	lastEndings = 20
	// sansOfEnding is how many SANs of a certificate are logged.
	sansOfEnding = 10
)

// endings counts the connections that changes ended, and keeps the last ones.
type endings struct {
	counts map[string]map[status.EndReason]uint64 // by direction
	last   []status.Ending                        // the newest last
}

// ended returns the counts.
func (e *endings) ended() (all []status.Ended) {
	for _, direction := range []string{"ingress", "egress", "outbound"} {
		one := status.Ended{Direction: direction}
		for _, reason := range status.EndReasons(direction) {
			n := e.counts[direction][reason]
			one.Reasons = append(one.Reasons, status.EndedReason{Code: reason, Count: n})
			one.Count += n
		}
		all = append(all, one)
	}
	return all
}

// add counts and keeps what a change ended.
func (e *endings) add(all []status.Ending) {
	if e.counts == nil {
		e.counts = map[string]map[status.EndReason]uint64{"ingress": {}, "egress": {}, "outbound": {}}
	}
	for _, one := range all {
		e.counts[one.Direction][one.Code] += uint64(one.Count)
	}
	e.last = append(e.last, all...)
	e.last = slices.Clone(e.last[max(0, len(e.last)-lastEndings):])
}

// logEnded logs, counts and keeps what a change ended.
func (d *Daemon) logEnded(all []status.Ending) {
	if len(all) == 0 {
		return
	}
	for i, one := range all {
		if i == lastEndings {
			d.Log.Info("connections of others, that are forbidden now, were ended too", "peers", len(all)-i)
			break
		}
		d.Log.Info("connections that are forbidden now were ended", "direction", one.Direction, "destination", one.Destination, "upstream", one.Peer,
			"peer_sans", one.SANs, "count", one.Count, "code", one.Code, "reason", one.Reason)
	}
	d.locked(func() { d.endings.add(all) })
}

// sum groups the ended connections by peer and reason, the largest group first.
func (c *change) sum(ended map[sockdiag.Socket]status.EndReason) []status.Ending {
	type key struct {
		direction, destination, names string
		reason                        status.EndReason
	}
	sums := map[key]*status.Ending{}
	for s, reason := range ended {
		one := status.Ending{Time: time.Now().UTC(), Direction: "ingress", Destination: c.to.entry(s.Local.Port()), Code: reason, Reason: reason.Words()}
		if s.Local.Addr().IsLoopback() {
			one.Direction, one.Destination, one.Peer = "egress", s.Local.String(), c.upstreamAt(s.Local)
		}
		if conn, known := c.known[s]; known {
			one.SANs = conn.Peer.Names()
			one.SANs = slices.Clip(one.SANs[:min(len(one.SANs), sansOfEnding)])
		} else if reason == status.EndNotAllowed || reason == status.EndTLSVersion || reason == status.EndCARemoved || reason == status.EndServerNames {
			one.Reason += status.UnknownPeer
		}
		k := key{one.Direction, one.Destination, strings.Join(one.SANs, "\x00"), reason}
		if sums[k] == nil {
			sums[k] = &one
		}
		sums[k].Count++
	}
	all := make([]status.Ending, 0, len(sums))
	for _, one := range sums {
		all = append(all, *one)
	}
	slices.SortFunc(all, func(a, b status.Ending) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Destination, b.Destination), slices.Compare(a.SANs, b.SANs))
	})
	return all
}

// upstreamAt returns the upstream that an egress entry had before the change.
func (c *change) upstreamAt(listen netip.AddrPort) string {
	if c.from == nil {
		return ""
	}
	for _, e := range c.from.mesh.Egress {
		if e.Listen == listen {
			return e.Upstream.String()
		}
	}
	return ""
}
