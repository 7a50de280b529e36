package status

import (
	"net/netip"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"

	"mantlet/schema"
)

// Status is what a running mantlet says of itself. Its JSON is stable: fields are added, and none changes its meaning.
type Status struct {
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	Ready   bool      `json:"ready"`
	Unready []Reason  `json:"unready"` // why it is not ready; empty if it is
	// Problems are all problems in words, the reasons of Unready first. The others do not make the sidecar unready: an input that was
	// rejected while the last good one is in force, for example.
	Problems     []string      `json:"problems"`
	Causes       []Problem     `json:"causes"`  // the same problems with their codes
	Reload       Reload        `json:"reload"`  // of the configuration
	Desired      *Summary      `json:"desired"` // what is wanted; null until there is a good configuration
	Applied      *Summary      `json:"applied"` // what is in force; null until something is
	Waits        *Waits        `json:"waits"`   // of what is wanted; null where it waits for nothing
	LastError    *Failure      `json:"lastError"`
	Epochs       []Epoch       `json:"epochs"`       // the Envoys that run: those that drain, then the one that serves
	Envoys       Envoys        `json:"envoys"`       // how many there were
	Certificates []Certificate `json:"certificates"` // what Envoy says that it has
	Applies      []Applies     `json:"applies"`
	Policy       []Policy      `json:"policy"` // in force for connections from outside, by ports; empty while nothing is let in
	Routes       []Route       `json:"routes"` // in force for connections of the workload, by egress entry
	PolicyRoutes PolicyRoutes  `json:"policyRoutes"`
	Probes       []ProbeStatus `json:"probes"`    // of the workload
	Inbound      []Inbound     `json:"inbound"`   // connections from outside that are open, by entry and mode
	Upstreams    []Upstream    `json:"upstreams"` // of the egress entries
	Traffic      Traffic       `json:"traffic"`
	Capacity     Capacity      `json:"capacity"`
	// Refused counts the packets that the kernel's rules ended and the connections that Envoy did, since mantlet started.
	Refused  []Refused `json:"refused"`
	Refusals []Refusal `json:"refusals"` // the last ones, the newest last
	// Ended counts the connections that changes of the configuration, or of the mesh CAs, ended at once.
	Ended   []Ended  `json:"ended"`
	Endings []Ending `json:"endings"` // the last ones, the newest last
	// Outbound are the destinations that the workload spoke to past the egress entries, or tried to, the last first. None are told in mode accept.
	Outbound       []Outbound      `json:"outbound"`
	OutboundPolicy OutboundPolicy  `json:"outboundPolicy"`
	OutboundTotals []OutboundTotal `json:"-"`

	Repairs   []Repair  `json:"repairs"`  // of the rules: the last ones, the newest last
	Repaired  int       `json:"repaired"` // how many there were
	Conntrack Conntrack `json:"conntrack"`
	// LogDropped counts the lines of the log that were dropped, since nobody read standard error.
	LogDropped uint64 `json:"logDropped"`
}

// Reload is what came of reading the configuration.
type Reload struct {
	Succeeded   bool       `json:"succeeded"`   // the last time
	SucceededAt *time.Time `json:"succeededAt"` // last; null for never
}

// Summary is a desired state in few words.
type Summary struct {
	Generation   uint64 `json:"generation"` // counts the configurations that this mantlet accepted
	Digest       string `json:"digest"`     // of Envoy's bootstrap
	Ingress      int    `json:"ingress"`    // entries
	Egress       int    `json:"egress"`
	IngressOff   bool   `json:"ingressOff,omitempty"`   // nothing that comes in is redirected or dropped
	Source       string `json:"source"`                 // the override file, or "environment"
	SourceDigest string `json:"sourceDigest,omitempty"` // SHA-256 of the file's content
}

// Waits is why what is wanted is not put in force at once.
type Waits struct {
	Until  time.Time `json:"until"`  // it is put in force, or tried again, then
	Code   string    `json:"code"`   // one of the Wait constants
	Reason string    `json:"reason"` // in words that follow "waits for"
}

// The codes of Waits.
const (
	WaitDrain    = "drain"     // a hot restart would cut the connections of the epoch before the one that serves
	WaitTooOften = "too_often" // changes that forbid something come faster than they can be served
	WaitBackoff  = "backoff"   // Envoy, or the last attempt, failed
)

// Failure is something that did not work.
type Failure struct {
	Time  time.Time `json:"time"`
	Place string    `json:"place"` // one of the checks' names
	Text  string    `json:"text"`
}

// Epoch is an Envoy that runs.
type Epoch struct {
	Epoch       int       `json:"epoch"`
	PID         int       `json:"pid"`
	Serving     bool      `json:"serving"` // else it drains
	Since       time.Time `json:"since"`   // when it began to serve, or to drain
	Digest      string    `json:"digest"`
	Connections *int      `json:"connections"`           // open to the workload and to upstreams; null where it does not say
	LeftSeconds float64   `json:"leftSeconds,omitempty"` // until what still drains is cut
}

// Envoys counts what became of Envoys since mantlet started.
type Envoys struct {
	Started   uint64 `json:"started"`   // they became live
	Failed    uint64 `json:"failed"`    // they did not
	Ended     uint64 `json:"ended"`     // although they served
	Recovered uint64 `json:"recovered"` // of those that started: because none served any more
}

// Add counts an Envoy that was started, or failed to; again because none served any more.
func (e *Envoys) Add(live, again bool) {
	switch {
	case !live:
		e.Failed++
	case again:
		e.Recovered++
		fallthrough
	default:
		e.Started++
	}
}

// Certificate is one that Envoy has.
type Certificate struct {
	Role        string    `json:"role"` // one of the Role constants
	Subject     string    `json:"subject"`
	SANs        []string  `json:"sans"`
	NotBefore   time.Time `json:"notBefore"`
	NotAfter    time.Time `json:"notAfter"`
	LeftSeconds float64   `json:"leftSeconds"` // until it expires; negative once it has
	Needed      bool      `json:"-"`           // the leaf's longest path to a mesh CA leads over it; only Secrets.Good tells
}

// The roles of certificates.
const (
	RoleLeaf         = "leaf"
	RoleIntermediate = "intermediate"
	RoleMeshCA       = "mesh CA"
)

// Applies counts what was applied, by its kind.
type Applies struct {
	Kind      string  `json:"kind"`
	Succeeded uint64  `json:"succeeded"`
	Failed    uint64  `json:"failed"`
	Seconds   float64 `json:"seconds"` // all of them took together
	// Within counts those that took no longer than each of ApplySeconds.
	Within []uint64 `json:"within"`
}

// The kinds of what is applied.
const (
	ApplyRules        = "rules"
	ApplyCertificates = "certificates"
	ApplyStart        = "start" // of an Envoy where none served
	ApplyHotRestart   = "hot_restart"
)

// ApplySeconds returns the bounds that durations of applying are counted by: rules take some milliseconds, Envoy 50 to 100,
// and 20 s are its limit.
func ApplySeconds() []float64 {
	return []float64{0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25}
}

// Policy is what is in force for connections from outside to some ports.
type Policy struct {
	Ports string      `json:"ports"` // a port or a range, as Inbound has it: "other" is all ports that no entry names, "status" mantlet's own
	Name  string      `json:"name,omitempty"`
	Mode  schema.Mode `json:"mode"`
	Allow []string    `json:"allow"` // the SANs of which a client must have one; null for anyone whom the mode lets in
}

// Route is what is in force for connections of the workload to an egress entry.
type Route struct {
	Listen      string   `json:"listen"`
	Name        string   `json:"name,omitempty"`
	Upstream    string   `json:"upstream"`
	ServerNames []string `json:"serverNames"` // the SANs of which the endpoint must have one; null for anyone of the mesh
}

// The names of ports that no entry has.
const (
	OtherPorts = "other"  // all that no entry names
	StatusPort = "status" // where mantlet itself answers
)

// PolicyRoutes are the policy routes by which the workload's answers to clients' addresses come back to Envoy.
type PolicyRoutes struct {
	Families []string `json:"families"`        // IPv4, IPv6: those that shall have one; none with sourceAddress: pod, once no connection needs them
	Error    string   `json:"error,omitempty"` // what differs; empty where the kernel has them
}

// Inbound is how many connections from outside are open at a port.
type Inbound struct {
	Port  uint16      `json:"-"`
	Ports string      `json:"ports"` // of the ingress entry; "other" for ports that none names
	Mode  schema.Mode `json:"mode"`  // that they were let in under
	Open  int         `json:"open"`
}

// ProbeStatus is a probe of the workload and what came of it.
type ProbeStatus struct {
	Name  string     `json:"name"`
	Asks  string     `json:"asks"`            // kind, port and target, as "http 8080/healthz"
	Asked *time.Time `json:"asked"`           // last; null if never
	OK    *bool      `json:"ok"`              // null if it was never asked
	Error string     `json:"error,omitempty"` // why it failed
}

// Upstream is where an egress entry's connections go.
type Upstream struct {
	Listen   string `json:"listen"`
	Upstream string `json:"upstream"`
	Resolved
}

// Resolved is what is known of a name.
type Resolved struct {
	Asked      time.Time    `json:"-"`          // the last time; zero before the first
	Addresses  []netip.Addr `json:"addresses"`  // that connections go to
	Source     string       `json:"source"`     // what has them: a name in DNS, where a search domain was added, or the hosts file
	Answer     string       `json:"answer"`     // why there are none, or why they are not confirmed: "NXDOMAIN by 10.96.0.10"; else empty
	StaleSince *time.Time   `json:"staleSince"` // when addresses that are not confirmed now were confirmed last; null where all are
}

// Traffic is how many connections there were since mantlet started.
type Traffic struct {
	Ingress []Handshakes `json:"ingress"`
	Egress  []Dialled    `json:"egress"`
	// Shed is how many connections were closed at once since too many were open, by direction. Refused counts them, too.
	Shed map[string]uint64 `json:"-"`
}

// Handshakes counts the TLS handshakes with clients that were finished.
type Handshakes struct {
	Mode  schema.Mode `json:"mode"`
	Total uint64      `json:"total"`
}

// Dialled counts the workload's connections to an egress entry.
type Dialled struct {
	Listen string `json:"listen"`
	Total  uint64 `json:"total"`
	Failed uint64 `json:"failed"` // those that reached no endpoint: as many as are refused
	// FailedAttempts counts attempts to reach an address of the upstream. The next one may have succeeded.
	FailedAttempts uint64 `json:"failedAttempts"`
}

// Capacity is how many connections are open at most. Those that are too many are closed as they come.
type Capacity struct {
	Ingress uint64 `json:"ingress"` // of clients
	// By names what the limit of clients follows from: memory, descriptors, or conntrack where neither limits it.
	By          string `json:"by"`
	Egress      uint64 `json:"egress"`      // of the workload, at each egress entry
	Memory      uint64 `json:"memory"`      // bytes that the container may have; 0 for no limit
	Descriptors uint64 `json:"descriptors"` // that each Envoy may have; 0 for no limit
}

// Refused counts what was refused for one reason.
type Refused struct {
	By        string `json:"by"`        // kernel (packets), envoy (connections)
	Direction string `json:"direction"` // ingress, egress, outbound
	Reason    string `json:"reason"`    // a name that stays
	Count     uint64 `json:"count"`
}

// Refusal is a connection that came to nothing; Count of them if the same happened to the same peer again.
type Refusal struct {
	Time        time.Time `json:"time"` // of the last one
	Count       int       `json:"count"`
	Direction   string    `json:"direction"`   // ingress or egress
	Peer        string    `json:"peer"`        // the address that dialled
	Destination string    `json:"destination"` // the address and port that it dialled
	SANs        []string  `json:"sans,omitempty"`
	Code        string    `json:"code"`   // a name that stays, as san_not_allowed
	Reason      string    `json:"reason"` // in words
	Detail      string    `json:"detail"` // as Envoy says it
}

// Followed is a refusal as it comes.
type Followed struct {
	Refusal
	LeftOut int `json:"leftOutBefore,omitempty"` // refusals before it that came faster than they were taken
}

// RefusalCount is how many connections came to nothing for one reason.
type RefusalCount struct {
	Direction string `json:"direction"`
	Code      string `json:"code"`
	Count     int    `json:"count"`
}

// Repair is one time that somebody changed the rules in the kernel, and they were put back.
type Repair struct {
	Time  time.Time `json:"time"`
	By    string    `json:"by,omitempty"`    // the name of the process, from the kernel's event; "" where there was none
	Found []string  `json:"found"`           // what differed, a line each; at most maxFound
	Error string    `json:"error,omitempty"` // why they could not be put back; it is tried again
}

// Conntrack is how full the kernel's table of connections is: more come in only while it has room.
type Conntrack struct {
	Entries int `json:"entries"`
	Max     int `json:"max"` // 0 where the kernel does not tell
}

// Envoy is what a running Envoy says of itself.
type Envoy struct {
	Epoch     int
	State     string // LIVE, INITIALIZING, …; "" where none runs
	Digest    string
	Settings  schema.Envoy
	Bootstrap *bootstrapv3.Bootstrap
	Listeners map[string]bool
}

// LegacyRules are rules of iptables-legacy, in words.
type LegacyRules struct {
	Denies []string // rules, as iptables writes them, that drop whatever comes in and belongs to no connection: some guests boot with one
	Others []string // what else there is, a line each
}
