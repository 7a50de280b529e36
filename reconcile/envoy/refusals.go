package envoy

import (
	"cmp"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"mantlet/reconcile"
)

// Reason is why a connection came to nothing: a name for metrics, that stays.
type Reason string

// The reasons.
const (
	NoClientCertificate    Reason = "no_client_certificate"
	UnknownCA              Reason = "unknown_ca"
	SANNotAllowed          Reason = "san_not_allowed"
	Expired                Reason = "expired"
	NotYetValid            Reason = "not_yet_valid"
	BadCertificate         Reason = "bad_certificate"
	WrongKey               Reason = "wrong_key"
	Plaintext              Reason = "plaintext"
	TLSVersion             Reason = "tls_version"
	NoSharedAlgorithm      Reason = "no_shared_algorithm"
	CertificateNotAccepted Reason = "certificate_not_accepted"
	BrokenOff              Reason = "broken_off"
	HandshakeTimeout       Reason = "handshake_timeout"
	HandshakeFailed        Reason = "handshake_failed"
	WorkloadUnreachable    Reason = "workload_unreachable"
	EndpointUnreachable    Reason = "endpoint_unreachable"
	NoEndpoint             Reason = "no_endpoint"
)

// words says reasons to people. PEER is the client or the endpoint, LIST the key of the entry that names who is allowed.
var words = map[Reason]string{
	NoClientCertificate:    "no client certificate",
	UnknownCA:              "unknown CA: the PEER's certificate is not of the mesh CA",
	SANNotAllowed:          "SAN not in LIST: no name in the PEER's certificate is allowed",
	Expired:                "expired: the PEER's certificate, or the CA's, is not valid any more",
	NotYetValid:            "not yet valid: the PEER's certificate is from the future, or a clock is wrong",
	BadCertificate:         "the PEER's certificate does not verify",
	WrongKey:               "the PEER does not hold the key of its certificate",
	Plaintext:              "no TLS: plaintext",
	TLSVersion:             "the PEER's TLS version is too old",
	NoSharedAlgorithm:      "no TLS cipher, curve or signature in common",
	CertificateNotAccepted: "the PEER does not accept this workload's certificate",
	BrokenOff:              "the PEER broke off the TLS handshake, likely since it does not accept this workload's certificate",
	HandshakeTimeout:       "the TLS handshake was not finished in time",
	HandshakeFailed:        "the TLS handshake failed",
	WorkloadUnreachable:    "the client was let in, but the workload takes no connection at this port",
	EndpointUnreachable:    "the endpoint takes no connection, or does not finish the TLS handshake in time",
	NoEndpoint:             "the upstream's name has no address",
}

// accessLine is a line of the access log, as package render has it written. What Envoy does not know is empty.
type accessLine struct {
	Log         string `json:"log"` // which connections have a line: refused, all
	Direction   string `json:"direction"`
	Peer        string `json:"peer"`
	Destination string `json:"destination"` // that the peer dialled
	Upstream    string `json:"upstream"`    // that Envoy dialled
	Attempts    int64  `json:"attempts"`    // to connect to an upstream; for ingress none is made before the handshake is done
	DNSSANs     string `json:"dns_sans"`    // joined by commas
	URISANs     string `json:"uri_sans"`
	TLSVersion  string `json:"tls_version"`
	Curve       string `json:"curve"`
	Refused     string `json:"refused"` // what failed towards the client
	Failed      string `json:"failed"`  // what failed towards the upstream, at the last attempt that did
	Ended       string `json:"ended"`   // by Envoy
	Flags       string `json:"flags"`
	BytesIn     int64  `json:"bytes_in"`
	BytesOut    int64  `json:"bytes_out"`
	DurationMS  int64  `json:"duration_ms"`
}

const egress = "egress" // a direction

// reason returns why the connection came to nothing; nothing if it did not.
func (c accessLine) reason() Reason {
	flags := strings.Split(c.Flags, ",")
	switch {
	case c.Refused != "" && c.Attempts == 0:
		if c.looked() {
			return ""
		}
		return tlsReason(c.Refused)
	case c.Ended == "transport socket timeout was reached":
		return HandshakeTimeout
	case slices.Contains(flags, "UH"): // no healthy upstream
		return NoEndpoint
	case !slices.Contains(flags, "URX"): // upstream retry limit exceeded: no attempt succeeded
		return ""
	case strings.HasPrefix(c.Failed, "TLS_error:"):
		return tlsReason(c.Failed)
	case c.Direction == egress:
		return EndpointUnreachable
	default:
		return WorkloadUnreachable
	}
}

// reset is the reason in the TLS error of a connection that the peer reset.
const reset = "Connection_reset_by_peer"

// looked reports whether a client reset its connection before the server said anything, as load balancers do to look whether a
// port is open. As long as no curve is agreed on, the server has said nothing.
func (c accessLine) looked() bool {
	return c.Curve == "" && strings.HasSuffix(c.Refused, ":"+reset+":TLS_error_end")
}

// tlsReason returns what a TLS error means here: TLS_error:|NUMBER:LIBRARY:OPENSSL_internal:REASON, and more after a colon
// or a bar. A peer's SANs may be among that, so no more of it is looked at than the beginning.
func tlsReason(detail string) Reason {
	_, text, _ := strings.Cut(detail, ":OPENSSL_internal:")
	reason, more := text, ""
	if end := strings.IndexAny(text, ":|"); end >= 0 {
		reason, more = text[:end], text[end:]
	}
	switch reason {
	case "PEER_DID_NOT_RETURN_A_CERTIFICATE":
		return NoClientCertificate
	case "CERTIFICATE_VERIFY_FAILED":
		return verifierReason(strings.TrimPrefix(more, ":verify_cert_failed:_"))
	case "BAD_SIGNATURE":
		return WrongKey
	case "WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST":
		return Plaintext
	case "UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION":
		return TLSVersion
	case "NO_SHARED_CIPHER", "NO_SHARED_GROUP", "NO_COMMON_SIGNATURE_ALGORITHMS", "WRONG_CURVE", "WRONG_SIGNATURE_TYPE":
		return NoSharedAlgorithm
	case "SSLV3_ALERT_BAD_CERTIFICATE", "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE", "SSLV3_ALERT_CERTIFICATE_REVOKED",
		"SSLV3_ALERT_CERTIFICATE_EXPIRED", "SSLV3_ALERT_CERTIFICATE_UNKNOWN", "TLSV1_ALERT_UNKNOWN_CA", "TLSV1_ALERT_ACCESS_DENIED":
		return CertificateNotAccepted
	case "BAD_PACKET_LENGTH", // a record too short to be encrypted where all are: OpenSSL's clients send alerts so in TLS 1.3, which can't be read
		reset: // as who closes while something that it was sent is unread
		return BrokenOff
	default:
		return HandshakeFailed
	}
}

// verifierReason returns what an error of Envoy's verifier means here.
func verifierReason(text string) Reason {
	if strings.HasPrefix(text, "SAN_matcher,") {
		return SANNotAllowed
	}
	text, _ = strings.CutPrefix(text, "X509_verify_cert:_certificate_verification_error_at_depth_")
	_, text, _ = strings.Cut(text, ":_")
	text, _, _ = strings.Cut(text, ":")
	switch {
	case text == "certificate_has_expired":
		return Expired
	case text == "certificate_is_not_yet_valid":
		return NotYetValid
	case strings.HasPrefix(text, "unable_to_get_"), strings.HasPrefix(text, "self_signed_certificate"),
		strings.HasPrefix(text, "self-signed_certificate"), text == "unable_to_verify_the_first_certificate", text == "certificate_signature_failure":
		return UnknownCA
	default:
		return BadCertificate
	}
}

// What a stranger put into a certificate is neither logged nor kept without a bound.
const (
	maxSANs = 10
	maxText = 256
)

// sans returns the first names in the peer's certificate. Where verifying an endpoint's failed, only the error tells them.
func (c accessLine) sans() []string {
	var all []string
	for _, list := range []string{c.DNSSANs, c.URISANs} {
		if list != "" {
			all = append(all, strings.Split(list, ",")...)
		}
	}
	if _, list, ok := strings.Cut(c.Failed, "_SAN_matcher,_certificate_SANs_are_["); ok && c.Direction == egress {
		list, _, _ = strings.Cut(list, "]:TLS_error_end")
		all = strings.Split(list, ",_")
	}
	if more := len(all) - maxSANs; more > 0 {
		all = append(all[:maxSANs:maxSANs], fmt.Sprintf("and %d more", more))
	}
	for i := range all {
		all[i] = short(all[i])
	}
	return all
}

func short(text string) string {
	if len(text) <= maxText {
		return text
	}
	return strings.Clone(text[:maxText]) + "…" // not to keep the whole
}

// attrs returns what a line of the log says of every connection.
func (c accessLine) attrs() []slog.Attr {
	all := []slog.Attr{slog.String("direction", c.Direction), slog.String("peer", c.Peer), slog.String("destination", c.Destination)}
	if c.Upstream != "" && c.Upstream != c.Destination {
		all = append(all, slog.String("upstream", c.Upstream))
	}
	if sans := c.sans(); sans != nil {
		all = append(all, slog.Any("peer_sans", sans))
	}
	if c.Curve != "" { // until a curve is agreed on, Envoy calls every connection TLS 1.2
		all = append(all, slog.String("tls_version", strings.TrimPrefix(c.TLSVersion, "TLSv")), slog.String("curve", c.Curve))
	}
	return append(all, slog.Int64("bytes_in", c.BytesIn), slog.Int64("bytes_out", c.BytesOut), slog.Int64("duration_ms", c.DurationMS))
}

func (c accessLine) refusal(reason Reason) reconcile.Refusal {
	peer, list := "client", "allow"
	if c.Direction == egress {
		peer, list = "endpoint", "serverNames"
	}
	r := reconcile.Refusal{
		Time: time.Now(), Count: 1, Direction: c.Direction, Peer: c.Peer, Destination: c.Destination, SANs: c.sans(), Code: string(reason),
		Reason: strings.NewReplacer("PEER", peer, "LIST", list).Replace(words[reason]),
		Detail: short(cmp.Or(c.Refused, c.Failed, c.Ended)),
	}
	if from, err := netip.ParseAddrPort(c.Peer); err == nil {
		r.Peer = from.Addr().String() // the port of a client is another each time
	}
	return r
}

// same reports whether both are one to people.
func same(a, b reconcile.Refusal) bool {
	return a.Direction == b.Direction && a.Peer == b.Peer && a.Destination == b.Destination && a.Code == b.Code && slices.Equal(a.SANs, b.SANs)
}

// A burst of refusals is logged as it comes; a peer that goes on and on gets some lines a second: whoever is refused must
// not be able to fill the log.
const (
	refusalsPerSecond = 5
	refusalsAtOnce    = 50
)

// lastRefusals is how many are kept: a screen of them.
const lastRefusals = 20

// refusals counts and keeps refusals of all epochs. The zero value is ready.
type refusals struct {
	mu     sync.Mutex
	last   []reconcile.Refusal            // the newest last
	counts map[reconcile.RefusalCount]int // each with Count 0
	limits map[string]*valve              // by direction: strangers outside must not hide what fails on the way out
}

// valve lets some lines through and counts the others.
type valve struct {
	limiter *rate.Limiter
	leftOut int
}

// admit reports whether a line may be logged and, if so, how many were not since the last one that was.
func (r *refusals) admit(direction string, now time.Time) (leftOut int, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.limits == nil {
		r.limits = map[string]*valve{}
	}
	l := r.limits[direction]
	if l == nil {
		l = &valve{limiter: rate.NewLimiter(refusalsPerSecond, refusalsAtOnce)}
		r.limits[direction] = l
	}
	if !l.limiter.AllowN(now, 1) {
		l.leftOut++
		return 0, false
	}
	leftOut, l.leftOut = l.leftOut, 0
	return leftOut, true
}

// note counts and keeps a refusal.
func (r *refusals) note(refusal reconcile.Refusal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.counts == nil {
		r.counts = map[reconcile.RefusalCount]int{}
	}
	r.counts[reconcile.RefusalCount{Direction: refusal.Direction, Code: refusal.Code}]++
	if i := slices.IndexFunc(r.last, func(last reconcile.Refusal) bool { return same(last, refusal) }); i >= 0 {
		refusal.Count += r.last[i].Count
		r.last = slices.Delete(r.last, i, i+1)
	}
	if len(r.last) == lastRefusals {
		i := r.commonest()
		r.last = slices.Delete(r.last, i, i+1)
	}
	r.last = append(r.last, refusal)
}

// commonest returns the oldest of those refusals whose reason is kept most often: a flood of one kind leaves the others.
func (r *refusals) commonest() int {
	kept := map[string]int{}
	for _, refusal := range r.last {
		kept[refusal.Code]++
	}
	most := slices.Max(slices.Collect(maps.Values(kept)))
	return slices.IndexFunc(r.last, func(refusal reconcile.Refusal) bool { return kept[refusal.Code] == most })
}

// Refusals returns the connections that came to nothing last, the newest last, and how many there were by reason.
func (r *Runner) Refusals() (last []reconcile.Refusal, counts []reconcile.RefusalCount) {
	r.refused.mu.Lock()
	defer r.refused.mu.Unlock()
	for c, n := range r.refused.counts {
		c.Count = n
		counts = append(counts, c)
	}
	slices.SortFunc(counts, func(a, b reconcile.RefusalCount) int {
		return cmp.Or(cmp.Compare(a.Direction, b.Direction), cmp.Compare(a.Code, b.Code))
	})
	return slices.Clone(r.refused.last), counts
}
