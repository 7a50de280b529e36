package render

import (
	"reflect"
	"slices"
	"strings"
)

// Reasons why the kernel ends packets: names for metrics, that stay.
const (
	refusedClosed     = "not_in_force"         // nothing is let in until the desired state is in force
	refusedProtocol   = "other_protocol"       // UDP, SCTP, … cannot be wrapped in TLS
	refusedPort       = "client_port_in_use"   // the client and Envoy, from the client's address, use the same port to the workload
	refusedForged     = "forged_source"        // it claims to come from the pod
	refusedRedirect   = "redirect"             // ICMP that names another router
	refusedElsewhere  = "not_for_the_pod"      // it was for another host when it came
	refusedLeft       = "left_the_pod"         // it belongs inside the pod, and its address is the pod's no more
	refusedLoop       = "own_listener"         // from Envoy, or from the workload, to a listener of Envoy's that is not for it
	refusedInvalid    = "invalid_segment"      // of no connection that conntrack knows, or out of its window
	refusedOver       = "policy_changed"       // the connection was let in under what holds no more
	refusedNoListener = "envoy_not_listening"  // a SYN, which the client will repeat
	refusedNoStatus   = "status_not_mantlets"  // at the status port, where mantlet does not listen or somebody else does
	refusedUnknown    = "unknown_connection"   // the rules did not see it begin
	refusedAround     = "not_through_envoy"    // the workload answers somebody who did not come through Envoy
	refusedOutbound   = "outbound_not_allowed" // it would leave in the clear, and outbound does not allow it
)

// Refusals returns the names of all that Refusal returns.
func Refusals() []string {
	return []string{
		refusedClosed, refusedProtocol, refusedPort, refusedForged, refusedRedirect, refusedElsewhere, refusedLeft, refusedLoop, refusedInvalid, refusedOver,
		refusedNoListener, refusedNoStatus, refusedUnknown, refusedAround, refusedOutbound,
	}
}

// RefusesOutbound reports whether a name of Refusals is of packets that the pod sends of its own accord. The others are of those that come
// in, or answer them.
func RefusesOutbound(refusal string) bool { return refusal == refusedOutbound }

// Refusal names why packets end at a rule of a chain that counts them; it returns "" for a rule that does not count.
func Refusal(chain string, rule Rule) string {
	has := func(s Statement) bool {
		return slices.ContainsFunc(rule, func(other Statement) bool { return reflect.DeepEqual(s, other) })
	}
	switch {
	case !has(Count{}):
		return ""
	case chain == outboundChain, chain == portlessChain, has(Prohibit{}):
		return refusedOutbound
	case chain == egressChain && has(Reset{}):
		return refusedUnknown
	case has(Invalid{}):
		return refusedInvalid
	case chain == icmpChain:
		return refusedRedirect
	case chain == inputChain:
		return refusedElsewhere
	case chain == beginsChain, chain == loopsChain:
		return refusedLoop
	case chain == clientsChain, chain == ingressChain && has(Marked{Mark: MarkClient}):
		return refusedPort
	case chain == leavingChain, has(Marked{Mark: MarkClient}), has(Marked{Mark: MarkInside}) && chain == egressChain, has(SocketPriority{WorkloadPriority}),
		has(Destination{loopback4}), has(Destination{loopback6}):
		return refusedLeft
	case has(OwnSource{}), has(Marked{Mark: MarkInside}):
		return refusedForged
	case chain == statusIn && has(firstSYN), has(MarkedSocket{NotEqual, StatusSocket}), chain == statusOut:
		return refusedNoStatus
	case has(firstSYN):
		return refusedNoListener
	case has(Marked{NotEqual, MarkNone}), has(Marked{Mark: MarkOutbound}):
		return refusedOver
	case chain == portsChain:
		return refusedProtocol
	case chain == ingressChain || chain == egressChain:
		return refusedClosed
	case strings.Contains(chain, "_out"):
		return refusedAround
	case !has(Reset{}):
		return refusedProtocol
	default:
		return refusedUnknown
	}
}
