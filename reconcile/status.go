package reconcile

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"mantlet/render"
	"mantlet/schema"
)

// Status is what a running mantlet says of itself. Its JSON is stable: fields are added, and none changes its meaning.
type Status struct {
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	Ready   bool      `json:"ready"`
	Unready []Reason  `json:"unready"` // why it is not ready; empty if it is
	// Problems are all that is not as it should be, in words; empty when all is well. Those beside Unready do not keep the
	// sidecar from its work: an input that is not good while the last good one is in force, say.
	Problems     []string      `json:"problems"`
	Causes       []Problem     `json:"causes"`  // the same problems with their codes
	Reload       Reload        `json:"reload"`  // of the configuration
	Desired      *Summary      `json:"desired"` // what is wanted; null until there is a good configuration
	Applied      *Summary      `json:"applied"` // what is in force; null until something is
	LastError    *Failure      `json:"lastError"`
	Epochs       []Epoch       `json:"epochs"`       // the Envoys that run: those that drain, then the one that serves
	Envoys       Envoys        `json:"envoys"`       // how many there were
	Certificates []Certificate `json:"certificates"` // what Envoy says that it has
	Applies      []Applies     `json:"applies"`
	Policy       []Policy      `json:"policy"`    // in force for connections from outside, by ports; empty while nothing is let in
	Routes       []Route       `json:"routes"`    // in force for connections of the workload, by egress entry
	Probes       []ProbeStatus `json:"probes"`    // of the workload
	Inbound      []Inbound     `json:"inbound"`   // connections from outside that are open, by entry and mode
	Upstreams    []Upstream    `json:"upstreams"` // of the egress entries
	Traffic      Traffic       `json:"traffic"`
	Capacity     Capacity      `json:"capacity"`
	// Refused counts the packets that the kernel's rules ended and the connections that Envoy did, since mantlet started.
	Refused  []Refused `json:"refused"`
	Refusals []Refusal `json:"refusals"` // the last ones, the newest last
	// Ended counts the connections that changes of the configuration, or of the mesh CAs, ended at once.
	Ended     []Ended   `json:"ended"`
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

// Inbound is how many connections from outside are open at a port.
type Inbound struct {
	Port  uint16      `json:"-"`
	Ports string      `json:"ports"` // of the ingress entry; "other" for ports that none names
	Mode  schema.Mode `json:"mode"`  // that they were let in under
	Open  int         `json:"open"`
}

// Traffic is how many connections there were since mantlet started.
type Traffic struct {
	Ingress []Handshakes `json:"ingress"`
	Egress  []Dialled    `json:"egress"`
	// Shed is how many were closed as they came, since too many were open, by direction. It is told among Refused.
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

// Refused counts what was refused for one reason.
type Refused struct {
	By        string `json:"by"`        // kernel (packets), envoy (connections)
	Direction string `json:"direction"` // ingress, egress
	Reason    string `json:"reason"`    // a name that stays
	Count     uint64 `json:"count"`
}

// Conntrack is how full the kernel's table of connections is: more come in only while it has room.
type Conntrack struct {
	Entries int `json:"entries"`
	Max     int `json:"max"` // 0 where the kernel does not tell
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

// The checks of readiness: places where something can be wrong.
const (
	checkMantlet      = "mantlet"      // it is starting, or stopping
	checkConfig       = "config"       // environment and override file
	checkCertificates = "certificates" // of the TLS directory
	checkEnvoy        = "envoy"        // it runs with the state, and has all listeners
	checkRules        = "rules"        // in the kernel
)

// untried are the checks that there is nothing to try of while nothing is in force.
func untried() []string { return []string{checkEnvoy, checkRules} }

// Checks are the names of all checks.
func Checks() []string {
	return []string{checkMantlet, checkConfig, checkCertificates, checkEnvoy, checkRules}
}

// Why the sidecar is not ready: how each reason begins. docs/operations.md says what to do about it.
const (
	notStarted      = "mantlet is starting"
	notStaying      = "mantlet is stopping"
	notConfigured   = "waiting for a good override file; nothing comes in until then"
	notCertified    = "waiting for certificates; nothing comes in until then"
	notWritable     = "the runtime directory cannot be written to"
	notValid        = "peers do not accept the certificates any more"
	notTaken        = "Envoy does not have the certificates"
	notLive         = "starting Envoy"
	notRunning      = "Envoy is down"
	notServing      = "Envoy does not serve as it should"
	notAlone        = "another process listens where Envoy does"
	notInForce      = "putting the rules in force"
	notAsTheyShould = "the rules are not as they should be"
	notLetIn        = "iptables-legacy drops what comes in over IPv4"
)

// Reasons returns how the reasons of Unready begin.
func Reasons() (all []string) {
	for _, r := range reasons() {
		all = append(all, r.begins)
	}
	return all
}

// reasons are how the reasons of Unready begin, and their codes.
func reasons() []struct{ begins, code string } {
	return []struct{ begins, code string }{
		{notStarted, "starting"},
		{notStaying, "stopping"},
		{notConfigured, "waiting_for_configuration"},
		{notCertified, "waiting_for_certificates"},
		{notWritable, "runtime_directory_not_writable"},
		{notValid, "certificates_not_valid"},
		{notTaken, "certificates_not_taken"},
		{notLive, "envoy_not_started"},
		{notRunning, "envoy_down"},
		{notServing, "envoy_not_serving"},
		{notAlone, "envoy_listener_joined"},
		{notInForce, "rules_not_in_force"},
		{notAsTheyShould, "rules_changed"},
		{notLetIn, "dropped_by_iptables_legacy"},
	}
}

// Reason is why the sidecar is not ready.
type Reason struct {
	Check string `json:"check"`
	Text  string `json:"reason"`
}

func (r Reason) Error() string { return r.Text }

// located is an error that knows its place.
type located struct {
	place string
	error
}

func (l located) Unwrap() error { return l.error }

// placeOf returns where an error is; Envoy is what most is about.
func placeOf(err error) string {
	if l, ok := errors.AsType[located](err); ok {
		return l.place
	}
	return checkEnvoy
}

// checkLimit is when an Envoy that does not answer becomes the reason: less than a probe waits.
const checkLimit = 2 * time.Second

// Unready returns the reasons why the sidecar is not ready; none if it is. Everything is tried, nothing remembered. An input
// that is not good does not count while a good one is in force.
func (d *Daemon) Unready(ctx context.Context) []Reason {
	d.mu.Lock()
	process, have, handover := d.process, d.have, d.handover
	var reasons []Reason
	because := func(check string, err error) {
		if err != nil {
			reasons = append(reasons, Reason{check, err.Error()})
		}
	}
	if d.stopping {
		because(checkMantlet, errors.New(notStaying))
	}
	if d.want == nil {
		because(checkConfig, d.badConfig)
	}
	if d.expires.IsZero() {
		because(checkCertificates, d.badCertificates)
	}
	if process == nil || have == nil {
		because(placeOf(d.down), d.down)
	}
	d.mu.Unlock()
	var checks sync.WaitGroup
	var certificates, held, envoy, joined, rules, denied error
	checks.Go(func() { certificates = d.Secrets.Valid(time.Now()) })
	if process != nil && !handover {
		checks.Go(func() {
			if found, known := d.tryListeners(); known {
				joined = found
			}
		})
		checks.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, checkLimit)
			defer cancel()
			held = d.Secrets.Held(ctx)
		})
		checks.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, checkLimit)
			defer cancel()
			envoy = process.Check(ctx)
		})
	}
	if have != nil {
		checks.Go(func() { rules = d.Kernel.Check() })
		checks.Go(func() { denied = d.denied() })
	}
	checks.Wait()
	d.locked(func() {
		if d.handover || d.process != nil && d.process != process {
			envoy = nil
		}
	})
	because(checkCertificates, about(notValid, certificates))
	because(checkCertificates, about(notTaken, held))
	because(checkEnvoy, about(notServing, envoy))
	because(checkEnvoy, about(notAlone, joined))
	because(checkRules, about(notAsTheyShould, rules))
	because(checkRules, about(notLetIn, denied))
	if len(reasons) == 0 && have == nil {
		because(checkMantlet, errors.New(notStarted))
	}
	return reasons
}

// about says what an error, if there is one, means.
func about(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}

// Problem is something that is not as it should be.
type Problem struct {
	Code string `json:"code"` // one of ProblemCodes, that stay
	Text string `json:"text"`
}

// The codes of problems that do not make the sidecar unready.
const (
	configurationRejected  = "configuration_rejected"
	certificatesRejected   = "certificates_rejected"
	certificatesExpireSoon = "certificates_expire_soon"
	certificatesWarning    = "certificates_doubtful"
	stateNotInForce        = "state_not_in_force"
	statusNotServed        = "status_address_not_served"
	gateNotServed          = "gate_not_served"
	rulesUndermined        = "rules_undermined"
	logNotRead             = "log_not_read"
	upstreamUnresolved     = "upstream_unresolved"
	portsClosed            = "ports_closed"
	legacyNotRead          = "iptables_legacy_not_read"
)

// ProblemCodes returns the codes of all problems.
func ProblemCodes() (all []string) {
	for _, r := range reasons() {
		all = append(all, r.code)
	}
	return append(all, configurationRejected, certificatesRejected, certificatesExpireSoon, certificatesWarning, stateNotInForce, statusNotServed, gateNotServed,
		rulesUndermined, logNotRead, upstreamUnresolved, portsClosed, legacyNotRead)
}

// problem gives a text the code of the reason that it begins as, or else the other one.
func problem(text, other string) Problem {
	for _, r := range reasons() {
		if strings.HasPrefix(text, r.begins) {
			return Problem{r.code, text}
		}
	}
	return Problem{other, text}
}

// problem is a reason with its code.
func (r Reason) problem() Problem {
	other := stateNotInForce
	switch r.Check {
	case checkConfig:
		other = configurationRejected
	case checkCertificates:
		other = certificatesRejected
	}
	return problem(r.Text, other)
}

// Notes returns what is not as it should be although it does not make the sidecar unready: an input that was rejected while
// the last good one is in force, or a state that could not be put in force while the one before it serves.
func (d *Daemon) Notes() (all []Problem) {
	unresolved := d.unresolved(time.Now())
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, n := range []struct {
		err  error
		code string
	}{
		{d.badConfig, configurationRejected},
		{d.badCertificates, certificatesRejected},
		{d.expiring, certificatesExpireSoon},
		{d.down, stateNotInForce},
		{d.unserved, statusNotServed},
		{d.ungated, gateNotServed},
		{d.have.whyClosed(), portsClosed},
		{d.unreadLegacy, legacyNotRead},
	} {
		if n.err != nil {
			all = append(all, problem(n.err.Error(), n.code))
		}
	}
	for _, line := range d.Secrets.Warnings() {
		all = append(all, Problem{certificatesWarning, line})
	}
	for _, line := range slices.Concat(d.foreign, d.legacyRules) {
		all = append(all, Problem{rulesUndermined, line})
	}
	if lines, unread := d.logLost(); unread > 0 {
		text := fmt.Sprintf("nobody has read standard error for %s: %d lines of the log were dropped", unread.Round(time.Second), lines)
		all = append(all, Problem{logNotRead, text})
	}
	for _, err := range unresolved {
		all = append(all, Problem{upstreamUnresolved, err.Error()})
	}
	return all
}

func (d *Daemon) logLost() (lines uint64, unread time.Duration) {
	if d.LogLost == nil {
		return 0, 0
	}
	return d.LogLost()
}

// Status tries everything that there is to be said.
func (d *Daemon) Status(ctx context.Context) Status {
	s := Status{
		Version:      d.Version,
		Unready:      append([]Reason{}, d.Unready(ctx)...),
		Problems:     []string{},
		Causes:       []Problem{},
		Epochs:       append([]Epoch{}, d.Proxy.Epochs(ctx)...),
		Certificates: []Certificate{},
	}
	s.Ready = len(s.Unready) == 0
	for _, r := range s.Unready {
		s.Problems = append(s.Problems, r.Check+": "+r.Text)
		s.Causes = append(s.Causes, r.problem())
	}
	for _, note := range d.Notes() {
		if !slices.ContainsFunc(s.Unready, func(r Reason) bool { return r.Text == note.Text }) {
			s.Problems = append(s.Problems, note.Text)
			s.Causes = append(s.Causes, note)
		}
	}
	for _, c := range d.Secrets.Certificates(ctx) {
		c.LeftSeconds = seconds(time.Until(c.NotAfter))
		s.Certificates = append(s.Certificates, c)
	}
	d.count(ctx, &s)
	s.Repairs, s.Repaired = d.Repairs()
	s.Repairs = append([]Repair{}, s.Repairs...)
	s.LogDropped, _ = d.logLost()
	d.locked(func() {
		s.Started = d.since
		s.Desired, s.Applied = d.want.summary(), d.have.summary()
		s.LastError = d.lastError
		s.Policy, s.Routes, s.Probes = d.have.policies(), d.have.routes(), d.probeStatuses()
		s.Reload = d.reloaded
		s.Applies = d.applies.all()
		s.Envoys = d.envoys
	})
	return s
}

// count fills in what is counted. What can't be read now is left out, and is no problem of the mesh.
func (d *Daemon) count(ctx context.Context, s *Status) {
	s.Upstreams = d.upstreams()
	s.Traffic = d.Proxy.Traffic(ctx)
	s.Refused = []Refused{}
	packets, err := d.Kernel.Refused()
	if err != nil {
		d.Log.Debug("the rules' counters can't be read", "error", err)
	}
	for _, reason := range render.Refusals() {
		s.Refused = append(s.Refused, Refused{"kernel", "ingress", reason, packets[reason]})
	}
	last, counts := d.Proxy.Refusals()
	s.Refusals = append([]Refusal{}, last...)
	for _, c := range counts {
		s.Refused = append(s.Refused, Refused{"envoy", c.Direction, c.Code, uint64(c.Count)})
	}
	for _, direction := range slices.Sorted(maps.Keys(s.Traffic.Shed)) {
		if n := s.Traffic.Shed[direction]; n > 0 {
			s.Refused = append(s.Refused, Refused{"envoy", direction, connectionLimit, n})
		}
	}
	d.locked(func() { s.Ended = []Ended{{"ingress", d.endedInbound}, {"egress", d.endedEgress}} })
	s.Capacity = d.capacity()
	open, entries, most, err := d.Kernel.Inbound()
	if err != nil {
		d.Log.Debug("connections can't be counted", "error", err)
	}
	s.Conntrack = Conntrack{entries, most}
	var have *desired
	d.locked(func() { have = d.have })
	s.Inbound = have.entries(open)
}

// entries sums up the connections at the ports of each entry: however many ports a stranger connects to.
func (w *desired) entries(open []Inbound) []Inbound {
	sums := map[Inbound]int{}
	for _, in := range open {
		sums[Inbound{Ports: w.entry(in.Port), Mode: in.Mode}] += in.Open
	}
	all := []Inbound{}
	for in, open := range sums {
		in.Open = open
		all = append(all, in)
	}
	slices.SortFunc(all, func(a, b Inbound) int { return cmp.Or(cmp.Compare(a.Ports, b.Ports), cmp.Compare(a.Mode, b.Mode)) })
	return all
}

// entry returns the ports of the entry that a port belongs to.
func (w *desired) entry(port uint16) string {
	if w == nil {
		return otherPorts
	}
	i, _ := slices.BinarySearchFunc(w.mesh.Ingress, port, func(e schema.Ingress, port uint16) int { return cmp.Compare(e.Ports.Last, port) })
	switch {
	case i < len(w.mesh.Ingress) && w.mesh.Ingress[i].Ports.Contains(port):
		return w.mesh.Ingress[i].Ports.String()
	case port == w.mesh.StatusPort:
		return statusPort
	default:
		return otherPorts
	}
}

// seconds is a duration as JSON has it: in whole milliseconds.
func seconds(d time.Duration) float64 { return d.Round(time.Millisecond).Seconds() }

func (w *desired) summary() *Summary {
	if w == nil {
		return nil
	}
	return &Summary{
		Generation: w.number, Digest: w.state.Digest, Ingress: len(w.mesh.Ingress), Egress: len(w.mesh.Egress), IngressOff: w.mesh.IngressOff,
		Source: w.source, SourceDigest: w.sourceDigest,
	}
}

// failed takes note of the last thing that did not work.
func (d *Daemon) failed(place string, err error) {
	d.locked(func() { d.lastError = &Failure{time.Now(), place, err.Error()} })
}

// add counts an Envoy that was started, or failed to; again because none served any more.
func (e *Envoys) add(live, again bool) {
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

// The kinds of what is applied.
const (
	applyRules        = "rules"
	applyCertificates = "certificates"
	applyStart        = "start" // of an Envoy where none served
	applyHotRestart   = "hot_restart"
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

// ApplySeconds returns the bounds that durations of applying are counted by: rules take some milliseconds, Envoy 50 to 100,
// and 20 s are its limit.
func ApplySeconds() []float64 {
	return []float64{0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25}
}

// applies counts by kind.
type applies map[string]*Applies

func (a applies) all() []Applies {
	all := []Applies{}
	for _, kind := range []string{applyRules, applyCertificates, applyStart, applyHotRestart} {
		one := Applies{Kind: kind, Within: make([]uint64, len(ApplySeconds()))}
		if counted := a[kind]; counted != nil {
			one = *counted
			one.Within = slices.Clone(counted.Within)
		}
		all = append(all, one)
	}
	return all
}

// applied counts something that was applied, or could not be.
func (d *Daemon) applied(kind string, took time.Duration, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.applies == nil {
		d.applies = applies{}
	}
	a := d.applies[kind]
	if a == nil {
		a = &Applies{Kind: kind, Within: make([]uint64, len(ApplySeconds()))}
		d.applies[kind] = a
	}
	if err != nil {
		a.Failed++
	} else {
		a.Succeeded++
	}
	a.Seconds += took.Seconds()
	for i, bound := range ApplySeconds() {
		if took.Seconds() <= bound {
			a.Within[i]++
		}
	}
}
