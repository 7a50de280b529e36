package reconcile

import (
	"context"
	"net/netip"
	"time"

	"mantlet/internal/peers"
	"mantlet/internal/sockdiag"
	"mantlet/internal/status"
	"mantlet/render"
	"mantlet/schema"
)

// Kernel is the table inet mantlet.
type Kernel interface {
	// Replace makes the table hold the ruleset and nothing else, in one transaction. If it fails, the rules are unchanged. It is
	// idempotent.
	Replace(render.Ruleset) error
	// Exchange is Replace where connections may be open that must not notice: a packet that is on its way meets the rules of before or those
	// of after.
	Exchange(render.Ruleset) error
	// Check returns nil if the table holds what Replace put there last, and otherwise an error that says what differs.
	Check() error
	// Repair puts back what Replace put there last if the table holds something else, and returns what differed.
	Repair() (found []string, err error)
	// Refused returns how many packets the rules ended since the start, by the names of render.Refusals.
	Refused() (map[string]uint64, error)
	// Inbound returns how many connections from outside are open, and how full conntrack's table is.
	Inbound() (open []status.Inbound, entries, most int, err error)
	// Open returns the marks of the open connections from outside, by the socket that the client dialled, and Envoy's own connections to
	// the workload.
	Open() (clients map[sockdiag.Socket]render.Mark, legs map[sockdiag.Socket]sockdiag.Cookie, err error)
	// Move gives connections from outside other marks, and returns those that have them now: the others have ended meanwhile.
	Move(marks map[sockdiag.Socket]render.Mark) (moved []sockdiag.Socket, err error)
	// End ends open connections at once: those from outside, and those of the workload to loopback addresses, for which judge returns a
	// reason. judge gets the socket that was dialled and the connection's mark, MarkNone for one that is not from outside. order gets the
	// connections that end, and all open sockets, and returns the sockets to end, one after the other; the peer of each gets a reset. End
	// returns what it ended, and why.
	End(judge func(sockdiag.Socket, render.Mark) status.EndReason,
		order func(ending map[sockdiag.Socket]status.EndReason, open map[sockdiag.Socket]sockdiag.Details) []sockdiag.Socket,
	) (ended map[sockdiag.Socket]status.EndReason, err error)
	// EndKnown is End for sockets that are known. It is faster.
	EndKnown(order []sockdiag.Exact) (ended []sockdiag.Socket, err error)
	// EndOutbound ends open connections that the pod made past the egress entries to what may not leave any more: those by TCP, of which it
	// tells both ends, and unless onlyTCP the others. It returns how many it ended, by destination.
	EndOutbound(leaves func(to netip.AddrPort) bool, onlyTCP bool) (ended map[netip.AddrPort]int, err error)
	// Outbound returns how many EndOutbound would end.
	Outbound(leaves func(to netip.AddrPort) bool) (int, error)
	// Spoken returns what the accounts of the rules hold now: destinations that the pod spoke to past the egress entries, or tried to.
	Spoken() ([]status.Spoken, error)
	// Conflicts returns the rules of other tables that undermine these, a line each. It changes nothing.
	Conflicts() ([]string, error)
	// Watch sends a note when another process changed rules in the kernel, until ctx ends: the name of the process if it changed the table,
	// else "". It may miss changes. The channel is closed once Watch has ended.
	Watch(ctx context.Context) <-chan string
}

// Secrets are the certificates that Envoy has.
type Secrets interface {
	// Update gives Envoy the set of certificates that is in the TLS directory, if Envoy accepts it, and returns once Envoy has it. revoked
	// says that the set lacks a mesh CA that the one before had. If the set is bad, the error says why, and Envoy keeps what it has. If no
	// Envoy runs, the set is offered to the next one, and Update is to be called again once that runs. It is idempotent.
	Update(ctx context.Context) (revoked bool, err error)
	// Renew gives Envoy what it has once more, which ends all TLS session tickets, and returns once Envoy has it. It does nothing if Envoy
	// has nothing.
	Renew(ctx context.Context) error
	// Offered reports whether an Envoy that starts finds certificates, tried or not.
	Offered() bool
	// Valid returns why peers do not accept what Envoy has at a time; nil if they do, or if Envoy has nothing.
	Valid(now time.Time) error
	// Held returns an error if Envoy reports that it does not have what it was given.
	Held(ctx context.Context) error
	// Trust returns the mesh CAs that Envoy was given last, and the intermediates that are known.
	Trust() peers.Trust
	// Good returns what Envoy accepted last, without LeftSeconds; nothing before it accepted any.
	Good() []status.Certificate
	// Certificates returns what Envoy reports that it has, or reported last, without LeftSeconds. It is safe for concurrent use.
	Certificates(ctx context.Context) []status.Certificate
	// Warnings returns what should be corrected with the certificates although Envoy accepts them.
	Warnings() []string
}

// Process is an Envoy that has become live. It may have ended since.
type Process interface {
	// Check returns nil if it is live with the state that it was started with.
	Check(context.Context) error
	// Exited is closed once it has ended. From then on Err says how it ended.
	Exited() <-chan struct{}
	Err() error
}

// Proxy runs Envoys.
type Proxy interface {
	// Start executes Envoy for a state and returns it once it is live with that state. It takes over from the Envoy that serves. If that
	// fails, the one that served goes on, but it may not answer any more. Start calls Daemon.Progress at each step.
	Start(context.Context, render.State, schema.Envoy) (Process, error)
	// Connections returns how many connections would be cut if all Envoys were stopped now.
	Connections(context.Context) (int, error)
	// Epochs returns the Envoys that run. It is safe for concurrent use.
	Epochs(context.Context) []status.Epoch
	// Traffic returns how many connections there were since the start. It is safe for concurrent use.
	Traffic(context.Context) status.Traffic
	// Statistics returns the statistics of the Envoy that serves, in Prometheus' text format and by Envoy's names. It is safe for
	// concurrent use.
	Statistics(context.Context) ([]byte, error)
	// Joined returns an error that names the listeners which another process has joined; nil if there is none. It is safe for concurrent
	// use, but must not be called during a Start.
	Joined() error
	// Stop ends all Envoys, and returns once they have ended.
	Stop()
	// Peers returns who is connected, by the socket that was dialled, as far as that is known: at ports with a list of clients, and through
	// egress entries with server names.
	Peers() (map[sockdiag.Socket]peers.Connection, error)
	// Refusals returns the last connections that failed, the newest last, and how many there were since the start.
	Refusals() ([]status.Refusal, []status.RefusalCount)
}

// Names resolves the names of upstreams, and gives Envoy their addresses.
type Names interface {
	// Follow replaces the upstreams whose names are resolved again and again. Those that are addresses are skipped. It does not wait for
	// lookups: a name has no address before its first one.
	Follow(upstreams []schema.Upstream)
	// Refresh resolves all names now.
	Refresh()
	// Resolved returns what is known of a name; the zero value before the first lookup.
	Resolved(host string) status.Resolved
}

// Legacy is iptables-legacy in the pod's network namespace. Its rules apply beside mantlet's, and nft does not show them.
type Legacy interface {
	// Read returns its rules for IPv4 that matter to mantlet, in words. It changes nothing.
	Read() (status.LegacyRules, error)
	// Lift removes one of Denies, and touches nothing else.
	Lift(ctx context.Context, rule string) error
}
