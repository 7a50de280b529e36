package status

import (
	"net/netip"
	"strconv"
	"time"
)

// Spoken is a destination that the pod spoke to past the egress entries, or tried to, as the kernel tells it.
type Spoken struct {
	To       netip.AddrPort // port 0 for a protocol without ports
	Protocol uint8          // IANA's number
	Fate     string         // one of render's fates
	Count    uint64         // of connections since the account began; it may begin again
	Last     time.Time      // when it was spoken to last
}

// Outbound is a destination that the pod spoke to in the clear, or tried to.
type Outbound struct {
	Destination string    `json:"destination"` // address and port; the address alone for a protocol without ports
	Protocol    string    `json:"protocol"`    // tcp, udp, …; IANA's number for one that is rare
	Count       uint64    `json:"count"`       // of connections; of attempts, where they are refused
	FirstSeen   time.Time `json:"firstSeen"`
	LastSeen    time.Time `json:"lastSeen"`
	Verdict     string    `json:"verdict"`              // allowed: it left; refused: it did not
	Listed      bool      `json:"listed"`               // outbound.allow has it; mode observe allows the others too
	Name        string    `json:"name,omitempty"`       // a name of the address, where one is known
	Suggestion  string    `json:"suggestion,omitempty"` // the egress entry that would cover it, as the override file has it
}

// Fate names what becomes of it: allowed where it is on the list, observed where it left and is not, or refused.
func (o Outbound) Fate() string {
	switch {
	case o.Verdict == OutboundRefused:
		return OutboundRefused
	case o.Listed:
		return OutboundAllowed
	default:
		return OutboundObserved
	}
}

// The fates, as metrics name them.
const (
	OutboundAllowed  = "allowed"
	OutboundObserved = "observed"
	OutboundRefused  = "refused"
)

// OutboundPolicy is what is in force for what the pod sends past the egress entries.
type OutboundPolicy struct {
	Mode  string   `json:"mode"`  // accept, observe or drop
	Allow []string `json:"allow"` // as the override file has it
	// Incomplete tells that there were more destinations than are kept, so that Outbound lacks some.
	Incomplete bool `json:"incomplete"`
}

// OutboundTotal counts what the pod sent past the egress entries since mantlet started.
type OutboundTotal struct {
	Fate, Protocol string // protocol is tcp, udp or other
	Connections    uint64
}

// ProtocolName names a transport protocol by IANA's number.
func ProtocolName(number uint8) string {
	name, ok := map[uint8]string{6: "tcp", 17: "udp", 33: "dccp", 47: "gre", 50: "esp", 51: "ah", 132: "sctp", 136: "udplite"}[number]
	if !ok {
		return strconv.Itoa(int(number))
	}
	return name
}
