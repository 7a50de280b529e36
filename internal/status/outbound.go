package status

import (
	"net/netip"
	"time"
)

// Spoken is a destination that the pod spoke to past the egress entries, or tried to.
type Spoken struct {
	To       netip.AddrPort // port 0 for a protocol without ports
	Protocol uint8          // IANA's number
	Fate     string         // one of render's fates
	Count    uint64         // of connections since the account began; it may begin again
	Last     time.Time      // when it was spoken to last
}
