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

// Reason is the stable code of why a connection failed, for metrics and logs.
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

// reasonTexts are the reasons in words. PEER stands for the client or the endpoint, LIST for the key of the entry that names who is
// allowed, NAME for the upstream's name, and ANSWER for what name servers say of it.
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

// accessLine is a line of the access log, as package render configures it. Fields that Envoy does not know are empty.
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

// reason returns why the connection failed; empty if it did not.
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

// isPortCheck reports whether a client reset its connection before the server sent anything, as load balancers do to check that a port is
// open. The server has sent nothing as long as no curve is agreed on.
func (c accessLine) isPortCheck() bool {
	return c.Curve == "" && strings.HasSuffix(c.Refused, ":"+connectionReset+":TLS_error_end")
}

// tlsReason returns the Reason of a TLS error. Of several errors the first one decides, unless the last one is the verifier's.
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

// tlsErrors splits a TLS error into its reasons and what follows them. Its form is TLS_error: and for each reason
// |NUMBER:LIBRARY:OPENSSL_internal:REASON. What follows may contain a peer's SANs, so no reason is looked for there.
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

// verifierReason returns the Reason of an error of Envoy's certificate verifier.
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

// Bounds of what is logged and kept of a stranger's certificate. What is cut off is marked by characters that no SAN can have: DNS names and
// URIs are ASCII (RFC 5280, section 4.2.1.6).
const (
	maxSANs = 10
	maxText = 256
)

// sans returns the first SANs of the peer's certificate. Where crypto/x509 does not parse the certificate, they are as Envoy joins them,
// by commas, which may also be a part of one. Where an endpoint's certificate did not verify, only the error has them.
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
	return fmt.Sprintf("%s… (%d bytes)", strings.ToValidUTF8(text[:maxText], ""), len(text)) // a copy: the whole text is not kept
}

// attrs returns the attributes of the log line of any connection.
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

// untrustedReason returns why Envoy found no chain from a peer's certificate to the mesh CA.
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

// refusal describes a connection that failed. upstream is that of the egress entry, if it is one's.
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
		r.Peer = from.Addr().String() // a client's port differs each time
	}
	return r
}

// answerOf returns what name servers say of an upstream of which Envoy had no address.
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

// toItself reports whether a failed connection went to an address of this pod.
func (c accessLine) toItself(reason Reason) bool {
	if c.Direction != egress || reason == "" || reason == NoEndpoint {
		return false
	}
	to, err := netip.ParseAddrPort(c.Upstream)
	return err == nil && bind.IsOwn(to.Addr())
}

// sameRefusal reports whether two refusals are one to people: they differ in time and detail at most.
func sameRefusal(a, b status.Refusal) bool {
	return a.Direction == b.Direction && a.Peer == b.Peer && a.Destination == b.Destination && a.Code == b.Code && slices.Equal(a.SANs, b.SANs)
}

// Limits of what is logged: a burst of refusals as it comes, and after that some lines a second. Whoever is refused must not be able to fill
// the log.
const (
	refusalsPerSecond = 5
	refusalsAtOnce    = 50
)

// lastRefusals is how many refusals are kept: as many as fit on a screen.
const lastRefusals = 20

// refusals counts and keeps refusals of all epochs. The zero value is ready to use.
type refusals struct {
	own atomic.Pointer[Certificates] // what Envoy was given; nil for nothing

	mu     sync.Mutex
	last   []status.Refusal            // the newest last
	counts map[status.RefusalCount]int // each with Count 0
	limits map[string]*logLimit        // by direction: strangers outside must not hide failures of outgoing connections

	followers map[*follower]bool
}

// Limits of followers.
const (
	maxFollowers   = 8
	followerBuffer = 256 // a burst
)

// follower gets refusals as they come.
type follower struct {
	refusals chan status.Followed
	leftOut  int
}

// pass gives a refusal to the follower if its buffer has room.
func (f *follower) pass(refusal status.Refusal) {
	select {
	case f.refusals <- status.Followed{Refusal: refusal, LeftOut: f.leftOut}:
		f.leftOut = 0
	default:
		f.leftOut++
	}
}

// follow adds a follower until ctx ends.
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

// Follow returns refusals as they come, until ctx ends; an error where too many follow already. Refusals that come faster than they are
// received are left out and counted.
func (r *Runner) Follow(ctx context.Context) (<-chan status.Followed, error) {
	return r.refused.follow(ctx)
}

// logLimit lets some lines through and counts the others.
type logLimit struct {
	limiter *rate.Limiter
	leftOut int
}

// admit reports whether a line may be logged and, if so, how many were left out since the last one.
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

// mostFrequent returns the oldest of those refusals whose code is kept most often: so a flood of one kind does not displace the others.
func (r *refusals) mostFrequent() int {
	kept := map[string]int{}
	for _, refusal := range r.last {
		kept[refusal.Code]++
	}
	most := slices.Max(slices.Collect(maps.Values(kept)))
	return slices.IndexFunc(r.last, func(refusal status.Refusal) bool { return kept[refusal.Code] == most })
}

// Refusals returns the last failed connections, the newest last, and how many there were by code.
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
