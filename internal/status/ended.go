package status

import "time"

// EndReason is why a change ended an open connection: a name for metrics, that stays.
type EndReason string

// The reasons.
const (
	EndNotAllowed  EndReason = "not_allowed"      // the client is on no list that its port has now
	EndMode        EndReason = "mode"             // the port has a stricter mode
	EndTLSVersion  EndReason = "tls_version"      // the TLS minimum was raised
	EndCARemoved   EndReason = "ca_removed"       // a mesh CA was taken away
	EndClosed      EndReason = "port_closed"      // for seconds: such changes come too often
	EndEntry       EndReason = "entry_removed"    // the egress entry is gone
	EndUpstream    EndReason = "upstream_changed" // the egress entry leads elsewhere
	EndServerNames EndReason = "server_names"     // the egress entry does not accept the endpoint any more
	EndOutbound    EndReason = "outbound"         // outbound does not allow the destination any more
	EndOlder       EndReason = "older"            // it was let in before this mantlet, and may not be now
)

// EndReasons are the reasons of a direction.
func EndReasons(direction string) []EndReason {
	if direction == "egress" {
		return []EndReason{EndEntry, EndUpstream, EndServerNames, EndTLSVersion, EndCARemoved}
	}
	if direction == "outbound" {
		return []EndReason{EndOutbound}
	}
	return []EndReason{EndNotAllowed, EndMode, EndTLSVersion, EndCARemoved, EndClosed, EndOlder}
}

// Ended counts the connections that changes of the configuration or of the mesh CAs ended.
type Ended struct {
	Direction string        `json:"direction"` // ingress, egress, outbound
	Count     uint64        `json:"count"`
	Reasons   []EndedReason `json:"reasons"` // all that there are
}

// EndedReason counts those that were ended for one reason.
type EndedReason struct {
	Code  EndReason `json:"code"` // a name that stays
	Count uint64    `json:"count"`
}

// Ending is what one change ended of one peer.
type Ending struct {
	Time        time.Time `json:"time"`
	Count       int       `json:"count"`
	Direction   string    `json:"direction"`      // ingress, egress, outbound
	Destination string    `json:"destination"`    // the ingress entry's ports, as Inbound has them, the listen address of the egress entry, or the address that was dialled for outbound
	Peer        string    `json:"peer"`           // the upstream, for egress; else empty
	SANs        []string  `json:"sans,omitempty"` // of the peer's certificate; none where it was not known who is connected
	Code        EndReason `json:"code"`           // a name that stays
	Reason      string    `json:"reason"`         // in words
}

// endWords says reasons to people.
var endWords = map[EndReason]string{
	EndNotAllowed:  "the client is not in allow any more",
	EndMode:        "the port has a stricter mode",
	EndTLSVersion:  "tls.minVersion was raised",
	EndCARemoved:   "a mesh CA was taken away",
	EndClosed:      "the port is closed for seconds: changes that forbid something come too often",
	EndEntry:       "the egress entry was removed",
	EndUpstream:    "the egress entry leads elsewhere",
	EndServerNames: "the endpoint is not in serverNames any more",
	EndOutbound:    "outbound does not allow the destination any more",
	EndOlder:       "it was let in before what is in force now",
}

// Words says a reason to people.
func (r EndReason) Words() string { return endWords[r] }

// UnknownPeer follows the words where others of the port may have ended without need.
const UnknownPeer = "; it is not known who is connected"
