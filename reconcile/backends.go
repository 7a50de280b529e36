package reconcile

import (
	"context"
	"time"

	"mantlet/internal/peers"
	"mantlet/internal/sockdiag"
	"mantlet/internal/status"
	"mantlet/render"
	"mantlet/schema"
)

// Kernel is the table inet mantlet.
type Kernel interface {
	// Replace makes the table hold the ruleset and nothing else, in one transaction. Where it fails, the rules are as they
	// were. It is idempotent.
	Replace(render.Ruleset) error
	// Check returns nil if the table holds what Replace put there last, and otherwise an error that says what differs.
	Check() error
	// Repair puts back what Replace put there last where the table holds something else, and returns what differed.
	Repair() (found []string, err error)
	// Refused returns how many packets the rules ended since the start, by the names of render.Refusals.
	Refused() (map[string]uint64, error)
	// Inbound returns the connections from outside that are open, and how full conntrack's table is.
	Inbound() (open []status.Inbound, entries, most int, err error)
	// Clients returns the connections from outside that are open, with their marks, by the socket that the client dialled.
	Clients() (map[sockdiag.Socket]render.Mark, error)
	// Move gives connections from outside other marks, and returns those that have theirs now: the others ended meanwhile.
	Move(marks map[sockdiag.Socket]render.Mark) (moved []sockdiag.Socket, err error)
	// End ends open connections at once, and tells both of their ends by resets: of those from outside, and of those of the workload to
	// addresses on loopback, the ones that judge has a reason to end. It gets the socket that was dialled, and the connection's mark,
	// MarkNone where it is not from outside. End returns what it ended, and why.
	End(judge func(sockdiag.Socket, render.Mark) status.EndReason) (ended map[sockdiag.Socket]status.EndReason, err error)
	// Conflicts returns what there is in other tables that would undermine the rules, a line each. Nothing of it is touched.
	Conflicts() ([]string, error)
	// Watch sends a note when another process changed rules in the kernel, until ctx ends: its name where it changed the
	// table, else "". It may miss changes. The channel is closed once all that it takes has ended.
	Watch(ctx context.Context) <-chan string
}

// Secrets are the certificates that Envoy has.
type Secrets interface {
	// Update gives Envoy the generation that is in the TLS directory, if Envoy accepts it, and reports whether it lacks a mesh
	// CA that the one before had. Where the generation is not good the error says why, and Envoy keeps what it has. It returns
	// once Envoy has it. Where no Envoy runs, the generation is offered to the one that starts next: Update is to be called
	// again then. It is idempotent.
	Update(ctx context.Context) (revoked bool, err error)
	// Renew gives Envoy what it has once more, which ends all TLS session tickets, and returns once Envoy has it. Where it has
	// nothing, it does nothing.
	Renew(ctx context.Context) error
	// Offered reports whether an Envoy that is started finds certificates, tried or not.
	Offered() bool
	// Valid returns why peers do not accept, at a time, what Envoy has; nil where they do, or where it has nothing.
	Valid(now time.Time) error
	// Held returns an error if Envoy says that it does not have what it was given.
	Held(ctx context.Context) error
	// Trust returns the mesh CAs that Envoy was given last, and the intermediates that are known.
	Trust() peers.Trust
	// Good returns what Envoy accepted last, without LeftSeconds; nothing where it accepted nothing yet.
	Good() []status.Certificate
	// Certificates returns what Envoy says that it has, or said last, without LeftSeconds. It may be called at any time.
	Certificates(ctx context.Context) []status.Certificate
	// Warnings returns what is not as it should be with what Envoy has, although Envoy accepts it.
	Warnings() []string
}

// Process is an Envoy that is live, or was.
type Process interface {
	// Check returns nil if it is live with the state that it was started with.
	Check(context.Context) error
	// Exited is closed once it has ended. From then on Err says how.
	Exited() <-chan struct{}
	Err() error
}

// Proxy runs Envoys.
type Proxy interface {
	// Start executes Envoy for a state and returns it once it is live with that. It takes over from the one that serves;
	// where that fails, whatever served goes on, but may not answer any more. It calls Daemon.Progress at each step.
	Start(context.Context, render.State, schema.Envoy) (Process, error)
	// Connections returns how many connections would be cut if all that Start made were stopped now.
	Connections(context.Context) (int, error)
	// Epochs returns the Envoys that run. It may be called at any time.
	Epochs(context.Context) []status.Epoch
	// Traffic returns how many connections there were since the start. It may be called at any time.
	Traffic(context.Context) status.Traffic
	// Statistics returns those of the Envoy that serves, in Prometheus' text format and by Envoy's names. It may be called at any time.
	Statistics(context.Context) ([]byte, error)
	// Joined returns an error that names the listeners which another process has joined; nil where there is none. It may be called at
	// any time but that of a Start.
	Joined() error
	// Stop ends all that Start made, and returns when they are gone.
	Stop()
	// Peers returns who is connected, by the socket that was dialled, where that is known: at ports with a list of clients, and through
	// egress entries with server names.
	Peers() (map[sockdiag.Socket]peers.Connection, error)
	// Refusals returns the connections that came to nothing last, the newest last, and how many there were since the start.
	Refusals() ([]status.Refusal, []status.RefusalCount)
}

// Names resolves the names of upstreams, and tells Envoy their addresses.
type Names interface {
	// Follow makes these the upstreams whose names are looked up again and again; those that are addresses are passed over. It
	// waits for no lookup: until the first one is done, there are no addresses.
	Follow(upstreams []schema.Upstream)
	// Refresh looks all names up now.
	Refresh()
	// Resolved returns what is known of a name; the zero value where nothing is yet.
	Resolved(host string) status.Resolved
}

// Legacy is iptables-legacy in the pod's network namespace. Its rules apply beside mantlet's, and nft does not show them.
type Legacy interface {
	// Read returns what is to be said of its rules for IPv4. It changes nothing.
	Read() (status.LegacyRules, error)
	// Lift removes one of Denies, and touches nothing else.
	Lift(ctx context.Context, rule string) error
}
