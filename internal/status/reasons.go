package status

import (
	"errors"
	"strings"
)

// ErrUntried is what Secrets.Update's error wraps where it says nothing of the certificates: no Envoy could try them now.
var ErrUntried = errors.New("the certificates can't be tried")

// The checks of readiness: places where something can be wrong.
const (
	CheckMantlet      = "mantlet"      // it is starting, or stopping
	CheckConfig       = "config"       // environment and override file
	CheckCertificates = "certificates" // of the TLS directory
	CheckEnvoy        = "envoy"        // it runs with the state, and has all listeners
	CheckRules        = "rules"        // in the kernel, with the policy routes
)

// waitingChecks are the checks that there is nothing to try of while nothing is in force.
func waitingChecks() []string { return []string{CheckEnvoy, CheckRules} }

// Checks are the names of all checks.
func Checks() []string {
	return []string{CheckMantlet, CheckConfig, CheckCertificates, CheckEnvoy, CheckRules}
}

// Why the sidecar is not ready: how each reason begins. docs/operations.md says what to do about it.
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

// Problem is something that is not as it should be.
type Problem struct {
	Code string `json:"code"` // one of ProblemCodes, that stay
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

// NewProblem gives a text the code of the reason that it begins as, or else the other one.
func NewProblem(text, other string) Problem {
	for _, r := range reasons() {
		if strings.HasPrefix(text, r.begins) {
			return Problem{r.code, text}
		}
	}
	return Problem{other, text}
}

// Problem is a reason with its code.
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
