package reconcile

import (
	"net/netip"
	"testing"
	"time"

	"mantlet/internal/status"
	"mantlet/render"
	"mantlet/schema"
)

// TestOutboundAccount: counts go on where the kernel's account forgets a destination or begins again, and of too many those stay that were
// spoken to last.
func TestOutboundAccount(t *testing.T) {
	var a outboundAccount
	a.init()
	began := time.Now()
	to := netip.MustParseAddrPort("10.0.3.4:5432")
	at := destination{to, render.TCP, render.FateLeft}
	tell := func(after time.Duration, count uint64) []destination {
		var all []status.Spoken
		if count > 0 {
			all = []status.Spoken{{To: to, Protocol: render.TCP, Fate: render.FateLeft, Count: count, Last: began.Add(after)}}
		}
		return a.add(all, began.Add(after))
	}
	for i, step := range []struct{ told, want uint64 }{{3, 3}, {3, 3}, {5, 5}, {2, 7}, {0, 7}, {2, 9}} {
		added := tell(time.Duration(i)*time.Minute, step.told)
		if isNew := len(added) > 0; isNew != (i == 0) {
			t.Errorf("step %d adds %v", i, added)
		}
		if got := a.seen[at].count; got != step.want {
			t.Errorf("step %d: %d connections, want %d", i, got, step.want)
		}
	}
	if one := a.seen[at]; !one.first.Equal(began) || !one.last.Equal(began.Add(5*time.Minute)) {
		t.Errorf("it was seen from %s to %s", one.first, one.last)
	}
	if got := a.totals[status.OutboundTotal{Fate: status.OutboundObserved, Protocol: "tcp"}]; got != 9 {
		t.Errorf("the total is %d", got)
	}
	var many []status.Spoken
	for i := range 3 * maxDestinations {
		many = append(many, status.Spoken{
			To: netip.AddrPortFrom(to.Addr(), uint16(i+1)), Protocol: render.UDP, Fate: render.FateRefused, Count: 1, Last: began.Add(time.Hour + time.Duration(i)),
		})
	}
	for range 2 {
		a.add(many, began.Add(2*time.Hour))
		if a.seen[at] != nil || len(a.seen) != maxDestinations || !a.incomplete {
			t.Errorf("%d destinations are kept, the oldest among them: %v", len(a.seen), a.seen[at] != nil)
		}
	}
	if got := a.totals[status.OutboundTotal{Fate: status.OutboundRefused, Protocol: "udp"}]; got != 3*maxDestinations {
		t.Errorf("the total is %d", got)
	}
}

// TestSuggestion: an entry that is proposed is one that the override file takes beside the others, and none is proposed for what has one.
func TestSuggestion(t *testing.T) {
	mesh := schema.Mesh{Egress: []schema.Egress{
		{Listen: netip.MustParseAddrPort("127.137.0.1:5432"), Upstream: schema.Upstream{Host: "cart", Port: 5432}},
	}}
	all := []status.Outbound{
		{Destination: "192.0.2.1:5432", Protocol: "tcp", Name: "db.example"},
		{Destination: "192.0.2.2:5432", Protocol: "tcp", Name: "other.example"},
		{Destination: "192.0.2.3:5432", Protocol: "tcp", Name: "db.example"},
		{Destination: "192.0.2.4:5432", Protocol: "tcp", Name: "cart"},
		{Destination: "192.0.2.4:53", Protocol: "udp", Name: "cart"},
		{Destination: "192.0.2.5:5432", Protocol: "tcp"},
	}
	suggest(all, mesh)
	db := "{listen: '127.137.0.2:5432', upstream: 'db.example:5432', serverNames: [db.example]}"
	for i, want := range []string{db, "{listen: '127.137.0.3:5432', upstream: 'other.example:5432', serverNames: [other.example]}", db, "", "", ""} {
		if got := all[i].Suggestion; got != want {
			t.Errorf("for %+v it is %q, want %q", all[i], got, want)
		}
	}
}
