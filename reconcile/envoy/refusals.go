package envoy

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"mantlet/internal/bind"
	"mantlet/internal/status"
)

// Reason is why a connection came to nothing: a name for metrics, that stays.
type Reason string

// The reasons.
const (
	NoClientCertificate    Reason = "no_client_certificate"
	UnknownCA              Reason = "unknown_ca"
	IncompleteChain        Reason = "incomplete_chain"
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
	EndpointIsSelf         Reason = "endpoint_is_self"
	NoEndpoint             Reason = "no_endpoint"
)

// reasonTexts says reasons to people. PEER is the client or the endpoint, LIST the key of the entry that names who is allowed, NAME the
// upstream's name and ANSWER what name servers say of it.
var reasonTexts = map[Reason]string{
	NoClientCertificate:    "no client certificate",
	UnknownCA:              "unknown CA: the PEER's certificate does not lead to the mesh CA",
	IncompleteChain:        "incomplete chain: the PEER sent its certificate without the intermediate that signed it",
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
	EndpointIsSelf:         "the endpoint is this pod itself, whose own connections do not pass mantlet",
	NoEndpoint:             "the upstream's name has no address: NAME (ANSWER)",
}

// accessLine is a line of the access log, as package render has it written. What Envoy does not know is empty.
type accessLine struct {
	Log         string `json:"log"` // which connections have a line: refused, all
	Direction   string `json:"direction"`
	Peer        string `json:"peer"`
	Destination string `json:"destination"` // that the peer dialled
	Upstream    string `json:"upstream"`    // that Envoy dialled
	Attempts    int64  `json:"attempts"`    // to connect to an upstream; for ingress none is made before the handshake is done
	Certificate string `json:"certificate"` // the peer's, as PEM in URL encoding; for egress only where it verified
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

	leaf *x509.Certificate // Certificate, parsed; nil where there is none, or one that Go does not take
}

// parseAccessLine parses a line of the access log.
func parseAccessLine(text string) (c accessLine, err error) {
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		return c, err
	}
	// The certificate may be malformed: Envoy's parser is not Go's. Then the other fields tell what they can.
	if plain, err := url.PathUnescape(c.Certificate); err == nil {
		if block, _ := pem.Decode([]byte(plain)); block != nil {
			c.leaf, _ = x509.ParseCertificate(block.Bytes)
		}
	}
	return c, nil
}

const egress = "egress" // a direction

// reason returns why the connection came to nothing; nothing if it did not.
func (c accessLine) reason() Reason {
	flags := strings.Split(c.Flags, ",")
	switch {
	case c.Refused != "" && c.Attempts == 0:
		if c.isPortCheck() {
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

// connectionReset is the reason in the TLS error of a connection that the peer reset.
const connectionReset = "Connection_reset_by_peer"

// isPortCheck reports whether a client reset its connection before the server said anything, as load balancers do to look whether a
// port is open. As long as no curve is agreed on, the server has said nothing.
func (c accessLine) isPortCheck() bool {
	return c.Curve == "" && strings.HasSuffix(c.Refused, ":"+connectionReset+":TLS_error_end")
}

// tlsReason returns what a TLS error means here: the first of the errors that it is made of, unless the verifier has the last.
func tlsReason(detail string) Reason {
	reasons, more := tlsErrors(detail)
	if len(reasons) == 0 {
		return HandshakeFailed
	}
	if reasons[len(reasons)-1] == "CERTIFICATE_VERIFY_FAILED" { // those before it are what the verifier met
		return verifierReason(strings.TrimPrefix(more, ":verify_cert_failed:_"))
	}
	switch reasons[0] {
	case "PEER_DID_NOT_RETURN_A_CERTIFICATE":
		return NoClientCertificate
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
		connectionReset: // as who closes while something that it was sent is unread
		return BrokenOff
	default:
		return HandshakeFailed
	}
}

// tlsErrors returns the reasons of a TLS error, and what follows them: TLS_error: and for each of them
// |NUMBER:LIBRARY:OPENSSL_internal:REASON. A peer's SANs may be in what follows, so no reason is looked for there.
func tlsErrors(detail string) (reasons []string, more string) {
	more, _ = strings.CutPrefix(detail, "TLS_error:")
	for {
		next, ok := strings.CutPrefix(more, "|")
		fields := strings.SplitN(next, ":", 4)
		if !ok || len(fields) < 4 || fields[2] != "OPENSSL_internal" {
			return reasons, more
		}
		reason := fields[3]
		if end := strings.IndexAny(reason, ":|"); end >= 0 {
			reason = reason[:end]
		}
		reasons, more = append(reasons, reason), fields[3][len(reason):]
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

// What a stranger put into a certificate is neither logged nor kept without a bound. What is cut off is told by words that no
// SAN can have: those of the kinds that are looked at are ASCII (RFC 5280, section 4.2.1.6).
const (
	maxSANs = 10
	maxText = 256
)

// sans returns the first names in the peer's certificate. Where Go does not take the certificate, the names stand as Envoy joins
// them: a comma may be a part of one. Where verifying an endpoint's failed, only the error tells them.
func (c accessLine) sans() []string {
	var all []string
	_, list, failed := strings.Cut(c.Failed, "_SAN_matcher,_certificate_SANs_are_[")
	switch {
	case failed && c.Direction == egress:
		all = strings.Split(strings.TrimSuffix(list, "]:TLS_error_end"), ",_")
	case c.leaf != nil:
		all = sans(c.leaf)
	default:
		all = slices.DeleteFunc([]string{c.DNSSANs, c.URISANs}, func(list string) bool { return list == "" })
	}
	more := len(all) - maxSANs
	all = all[:min(len(all), maxSANs)]
	for i := range all {
		all[i] = truncate(all[i])
	}
	if more > 0 {
		all = append(all, fmt.Sprintf("… and %d more", more))
	}
	return slices.Clip(all)
}

func truncate(text string) string {
	if len(text) <= maxText {
		return text
	}
	return fmt.Sprintf("%s… (%d bytes)", strings.ToValidUTF8(text[:maxText], ""), len(text)) // not to keep the whole
}

// attrs returns what a line of the log says of every connection.
func (c accessLine) attrs() []slog.Attr {
	all := []slog.Attr{slog.String("direction", c.Direction), slog.String("peer", c.Peer), slog.String("destination", c.Destination)}
	if c.Upstream != "" && c.Upstream != c.Destination {
		all = append(all, slog.String("upstream", c.Upstream))
	}
	if sans := c.sans(); len(sans) > 0 {
		all = append(all, slog.Any("peer_sans", sans))
	}
	if c.Curve != "" { // until a curve is agreed on, Envoy calls every connection TLS 1.2
		all = append(all, slog.String("tls_version", strings.TrimPrefix(c.TLSVersion, "TLSv")), slog.String("curve", c.Curve))
	}
	return append(all, slog.Int64("bytes_in", c.BytesIn), slog.Int64("bytes_out", c.BytesOut), slog.Int64("duration_ms", c.DurationMS))
}

// untrustedReason returns why Envoy found no way from a peer's certificate to the mesh CA.
func (c *Certificates) untrustedReason(leaf *x509.Certificate, now time.Time) Reason {
	if c == nil || leaf == nil {
		return UnknownCA
	}
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, anchor := range c.anchors {
		roots.AddCert(anchor)
	}
	for _, cert := range c.chain[1:] {
		intermediates.AddCert(cert)
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	switch {
	case err != nil:
		return UnknownCA
	case slices.ContainsFunc(chains, func(chain []*x509.Certificate) bool { return len(chain) == 2 }):
		return BadCertificate // a mesh CA signed it, and Envoy took another one of that name
	default:
		return IncompleteChain
	}
}

// refusal describes a connection that came to nothing. Of an egress entry the upstream is given.
func (c accessLine) refusal(reason Reason, upstream status.Upstream) status.Refusal {
	peer, list := "client", "allow"
	if c.Direction == egress {
		peer, list = "endpoint", "serverNames"
	}
	r := status.Refusal{
		Time: time.Now(), Count: 1, Direction: c.Direction, Peer: c.Peer, Destination: c.Destination, SANs: c.sans(), Code: string(reason),
		Reason: strings.NewReplacer("PEER", peer, "LIST", list, "NAME", cmp.Or(upstream.Upstream, "?"), "ANSWER", answerOf(upstream)).Replace(reasonTexts[reason]),
		Detail: truncate(cmp.Or(c.Refused, c.Failed, c.Ended)),
	}
	if from, err := netip.ParseAddrPort(c.Peer); err == nil {
		r.Peer = from.Addr().String() // the port of a client is another each time
	}
	return r
}

// answerOf is what name servers say of an upstream that Envoy had no address of.
func answerOf(u status.Upstream) string {
	switch {
	case u.Asked.IsZero():
		return "it was not looked up yet"
	case len(u.Addresses) > 0:
		return "it has one by now"
	default:
		return truncate(u.Answer)
	}
}

// toItself reports whether a connection that came to nothing went to an address of this pod.
func (c accessLine) toItself(reason Reason) bool {
	if c.Direction != egress || reason == "" || reason == NoEndpoint {
		return false
	}
	to, err := netip.ParseAddrPort(c.Upstream)
	return err == nil && bind.IsOwn(to.Addr())
}

// sameRefusal reports whether both are one to people.
func sameRefusal(a, b status.Refusal) bool {
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
	own atomic.Pointer[Certificates] // what Envoy was given; nil for nothing

	mu     sync.Mutex
	last   []status.Refusal            // the newest last
	counts map[status.RefusalCount]int // each with Count 0
	limits map[string]*logLimit        // by direction: strangers outside must not hide what fails on the way out

	followers map[*follower]bool
}

// Bounds of those who follow refusals as they come.
const (
	maxFollowers   = 8
	followerBuffer = 256 // a burst
)

// follower gets refusals as they come.
type follower struct {
	refusals chan status.Followed
	leftOut  int
}

// pass gives a refusal to the follower, unless that is too slow.
func (f *follower) pass(refusal status.Refusal) {
	select {
	case f.refusals <- status.Followed{Refusal: refusal, LeftOut: f.leftOut}:
		f.leftOut = 0
	default:
		f.leftOut++
	}
}

// follow makes a follower until ctx ends.
func (r *refusals) follow(ctx context.Context) (<-chan status.Followed, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.followers) == maxFollowers {
		return nil, fmt.Errorf("%d follow the refusals already", maxFollowers)
	}
	if r.followers == nil {
		r.followers = map[*follower]bool{}
	}
	f := &follower{refusals: make(chan status.Followed, followerBuffer)}
	r.followers[f] = true
	context.AfterFunc(ctx, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.followers, f)
	})
	return f.refusals, nil
}

// Follow returns refusals as they come, until ctx ends; an error where too many follow already. Those that come faster than they are
// taken are left out, and counted.
func (r *Runner) Follow(ctx context.Context) (<-chan status.Followed, error) {
	return r.refused.follow(ctx)
}

// logLimit lets some lines through and counts the others.
type logLimit struct {
	limiter *rate.Limiter
	leftOut int
}

// admit reports whether a line may be logged and, if so, how many were not since the last one that was.
func (r *refusals) admit(direction string, now time.Time) (leftOut int, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.limits == nil {
		r.limits = map[string]*logLimit{}
	}
	l := r.limits[direction]
	if l == nil {
		l = &logLimit{limiter: rate.NewLimiter(refusalsPerSecond, refusalsAtOnce)}
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
func (r *refusals) note(refusal status.Refusal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.counts == nil {
		r.counts = map[status.RefusalCount]int{}
	}
	r.counts[status.RefusalCount{Direction: refusal.Direction, Code: refusal.Code}]++
	for f := range r.followers {
		f.pass(refusal)
	}
	if i := slices.IndexFunc(r.last, func(last status.Refusal) bool { return sameRefusal(last, refusal) }); i >= 0 {
		refusal.Count += r.last[i].Count
		r.last = slices.Delete(r.last, i, i+1)
	}
	if len(r.last) == lastRefusals {
		i := r.mostFrequent()
		r.last = slices.Delete(r.last, i, i+1)
	}
	r.last = append(r.last, refusal)
}

// mostFrequent returns the oldest of those refusals whose reason is kept most often: a flood of one kind leaves the others.
func (r *refusals) mostFrequent() int {
	kept := map[string]int{}
	for _, refusal := range r.last {
		kept[refusal.Code]++
	}
	most := slices.Max(slices.Collect(maps.Values(kept)))
	return slices.IndexFunc(r.last, func(refusal status.Refusal) bool { return kept[refusal.Code] == most })
}

// Refusals returns the connections that came to nothing last, the newest last, and how many there were by reason.
func (r *Runner) Refusals() (last []status.Refusal, counts []status.RefusalCount) {
	r.refused.mu.Lock()
	defer r.refused.mu.Unlock()
	for c, n := range r.refused.counts {
		c.Count = n
		counts = append(counts, c)
	}
	slices.SortFunc(counts, func(a, b status.RefusalCount) int {
		return cmp.Or(cmp.Compare(a.Direction, b.Direction), cmp.Compare(a.Code, b.Code))
	})
	return slices.Clone(r.refused.last), counts
}
