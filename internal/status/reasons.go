package status

import (
	"errors"
	"strings"
)

// ErrUntried is wrapped by errors that say nothing about the certificates: there was no Envoy that could try them.
var ErrUntried = errors.New("the certificates can't be tried")

// The checks of readiness. Each looks at one part.
const (
	CheckMantlet      = "mantlet"      // mantlet is neither starting nor stopping
	CheckConfig       = "config"       // the environment and the override file are valid
	CheckCertificates = "certificates" // peers accept the certificates, and Envoy has them
	CheckEnvoy        = "envoy"        // Envoy runs with the wanted state, and has all listeners
	CheckRules        = "rules"        // the kernel has the rules and the policy routes
)

// waitingChecks returns the checks that have nothing to look at while no state is in force.
func waitingChecks() []string { return []string{CheckEnvoy, CheckRules} }

// Checks returns the names of all checks.
func Checks() []string {
	return []string{CheckMantlet, CheckConfig, CheckCertificates, CheckEnvoy, CheckRules}
}

// The reasons why the sidecar is not ready: the text of each begins like this. docs/operations.md says what to do about them.
const (
	Starting                    = "mantlet is starting"
	Stopping                    = "mantlet is stopping"
	WaitingForConfiguration     = "waiting for a good override file; nothing comes in until then"
	WaitingForCertificates      = "waiting for certificates; nothing comes in until then"
	RuntimeDirectoryNotWritable = "the runtime directory cannot be written to"
	CertificatesNotValid        = "peers do not accept the certificates any more"
	CertificatesNotTaken        = "Envoy does not have the certificates"
	EnvoyNotStarted             = "starting Envoy"
	EnvoyDown                   = "Envoy is down"
	EnvoyNotServing             = "Envoy does not serve as it should"
	EnvoyListenerJoined         = "another process listens where Envoy does"
	RulesNotInForce             = "putting the rules in force"
	RulesChanged                = "the rules are not as they should be"
	RoutesNotInForce            = "putting the policy routes in place"
	RoutesChanged               = "the policy routes are not as they should be"
	DroppedByIptablesLegacy     = "iptables-legacy drops what comes in over IPv4"
)

// Reasons returns the beginnings of all reasons why the sidecar is not ready.
func Reasons() (all []string) {
	for _, r := range reasons() {
		all = append(all, r.begins)
	}
	return all
}

// reasons returns the beginnings of all reasons, with their codes.
func reasons() []struct{ begins, code string } {
	return []struct{ begins, code string }{
		{Starting, "starting"},
		{Stopping, "stopping"},
		{WaitingForConfiguration, "waiting_for_configuration"},
		{WaitingForCertificates, "waiting_for_certificates"},
		{RuntimeDirectoryNotWritable, "runtime_directory_not_writable"},
		{CertificatesNotValid, "certificates_not_valid"},
		{CertificatesNotTaken, "certificates_not_taken"},
		{EnvoyNotStarted, "envoy_not_started"},
		{EnvoyDown, "envoy_down"},
		{EnvoyNotServing, "envoy_not_serving"},
		{EnvoyListenerJoined, "envoy_listener_joined"},
		{RulesNotInForce, "rules_not_in_force"},
		{RulesChanged, "rules_changed"},
		{RoutesNotInForce, "routes_not_in_force"},
		{RoutesChanged, "routes_changed"},
		{DroppedByIptablesLegacy, "dropped_by_iptables_legacy"},
	}
}

// Reason is why the sidecar is not ready.
type Reason struct {
	Check string `json:"check"`
	Text  string `json:"reason"`
}

func (r Reason) Error() string { return r.Text }

// Problem is something that somebody should look at, whether or not it makes the sidecar unready.
type Problem struct {
	Code string `json:"code"` // one of ProblemCodes; they are stable
	Text string `json:"text"`
}

// The codes of problems that do not make the sidecar unready.
const (
	ConfigurationRejected  = "configuration_rejected"
	CertificatesRejected   = "certificates_rejected"
	CertificatesExpireSoon = "certificates_expire_soon"
	CertificatesDoubtful   = "certificates_doubtful"
	StateNotInForce        = "state_not_in_force"
	StatusAddressNotServed = "status_address_not_served"
	GateNotServed          = "gate_not_served"
	RulesUndermined        = "rules_undermined"
	LogNotRead             = "log_not_read"
	UpstreamUnresolved     = "upstream_unresolved"
	PortsClosed            = "ports_closed"
	IptablesLegacyNotRead  = "iptables_legacy_not_read"
)

// ProblemCodes returns the codes of all problems.
func ProblemCodes() (all []string) {
	for _, r := range reasons() {
		all = append(all, r.code)
	}
	return append(all, ConfigurationRejected, CertificatesRejected, CertificatesExpireSoon, CertificatesDoubtful, StateNotInForce, StatusAddressNotServed, GateNotServed,
		RulesUndermined, LogNotRead, UpstreamUnresolved, PortsClosed, IptablesLegacyNotRead)
}

// NewProblem returns a problem with the code of the reason that the text begins with; if it begins with none, with the other code.
func NewProblem(text, other string) Problem {
	for _, r := range reasons() {
		if strings.HasPrefix(text, r.begins) {
			return Problem{r.code, text}
		}
	}
	return Problem{other, text}
}

// Problem returns a reason as a problem.
func (r Reason) Problem() Problem {
	other := StateNotInForce
	switch r.Check {
	case CheckConfig:
		other = ConfigurationRejected
	case CheckCertificates:
		other = CertificatesRejected
	}
	return NewProblem(r.Text, other)
}
