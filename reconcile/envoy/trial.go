package envoy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"
)

// trialSide says which side's certificate a trial checks.
type trialSide int

const (
	bothLeaves trialSide = iota
	serverLeaf           // by the client; the server accepts any
	clientLeaf           // by the server; the client accepts any
)

// verdict says why Envoy does not accept a leaf as a server's, and as a client's certificate; nil where it does.
type verdict struct{ server, client error }

// err returns why the leaf can be used for neither; nil where it can for one.
func (v verdict) err() error {
	switch {
	case v.server == nil || v.client == nil:
		return nil
	case v.server.Error() == v.client.Error():
		return v.server
	default:
		return fmt.Errorf("as a server's: %w; as a client's: %w", v.server, v.client)
	}
}

// try has the process judge a set before it is served with it: Envoy loads the set, and then its TLS client and its TLS server do a
// handshake with each other, both with this chain and these mesh CAs. Where the handshake fails, each side is tried alone: a leaf may be
// usable for one side only.
//
// The error is a rejectedError where Envoy does not load the set. Any other error says that the set could not be tried.
func (p *Process) try(ctx context.Context, c *Certificates, directory string) (verdict, error) {
	refusal, err := p.tryAs(ctx, c, bothLeaves, directory)
	if err != nil || refusal == nil {
		return verdict{}, err
	}
	var v verdict
	if v.server, err = p.tryAs(ctx, c, serverLeaf, directory); err != nil {
		return verdict{}, err
	}
	v.client, err = p.tryAs(ctx, c, clientLeaf, directory)
	return v, err
}

func (p *Process) tryAs(ctx context.Context, c *Certificates, whose trialSide, directory string) (refusal, err error) {
	if _, err := p.deliver(ctx, directory, func(now time.Time, _ bool) publication { return c.trialPublication(now, whose) }); err != nil {
		return nil, err
	}
	return p.handshake(ctx)
}

// reasonLimit bounds how long Envoy may take to log why a handshake failed. It writes its access log every 100 ms.
const reasonLimit = 2 * time.Second

// handshake sends a byte through the trial. It is echoed once each side has accepted the other. refusal is why the handshake failed; err
// is why that is not known.
func (p *Process) handshake(ctx context.Context) (refusal, err error) {
	p.logs.discardAnswers()
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", p.trial)
	if err != nil {
		return nil, fmt.Errorf("trying the certificates: %w", err)
	}
	defer func() { _ = conn.Close() }()
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline)
	}
	one := []byte{1}
	_, err = conn.Write(one)
	if err == nil {
		_, err = conn.Read(one)
	}
	if err == nil {
		return nil, nil
	}
	if refusal := p.logs.handshakeError(); refusal != "" {
		return explainTLSError(refusal), nil
	}
	return nil, fmt.Errorf("trying the certificates: Envoy does not say why its handshake with itself failed: %w", cmp.Or(ctx.Err(), err))
}

// handshakeError waits for the reason why a handshake of the trial failed. The other side's alert says less than what that side logs
// itself.
func (l *logs) handshakeError() (reason string) {
	timeout := time.After(reasonLimit)
	for {
		select {
		case line := <-l.trials:
			reason = cmp.Or(line.Refused, line.Failed)
			if !strings.Contains(reason, "_ALERT_") {
				return reason
			}
		case <-timeout:
			return reason
		}
	}
}

// explainTLSError says what an error of Envoy's TLS means for the certificates that it tried.
func explainTLSError(detail string) error {
	reasons, more := tlsErrors(detail)
	if len(reasons) == 0 || reasons[len(reasons)-1] != "CERTIFICATE_VERIFY_FAILED" {
		return errors.New(cmp.Or(tlsErrorHelp[strings.Join(reasons, "|")], truncate(detail)))
	}
	text := strings.TrimPrefix(more, ":verify_cert_failed:_")
	text, _ = strings.CutPrefix(text, "X509_verify_cert:_certificate_verification_error_at_depth_")
	depth, text, _ := strings.Cut(text, ":_")
	text, _, _ = strings.Cut(text, ":")
	said := strings.ReplaceAll(text, "_", " ")
	if why := tlsErrorHelp[text]; why != "" {
		said += ": " + why
	}
	if depth == "0" {
		return fmt.Errorf("the leaf: %s", said)
	}
	return fmt.Errorf("the CA %s above the leaf: %s", depth, said)
}

// tlsErrorHelp explains errors of BoringSSL (include/openssl/x509.h, ssl.h), and what to do about them.
var tlsErrorHelp = map[string]string{
	"unsupported_certificate_purpose":               "the extended key usage has no serverAuth, or clientAuth; that of a CA holds for what it issues",
	"invalid_or_inconsistent_certificate_extension": "an extension contradicts another, or itself, such as a path length where CA is FALSE",
	"permitted_subtree_violation":                   "the name constraints of a CA do not permit its names",
	"excluded_subtree_violation":                    "the name constraints of a CA exclude its names",
	"path_length_constraint_exceeded":               "a CA above permits fewer intermediates",
	"unable_to_get_local_issuer_certificate":        "no mesh CA issued it, or that one may not issue certificates (key usage without keyCertSign)",
	"certificate_signature_failure":                 "of several mesh CAs with one name Envoy tries the first that has no other key identifier; put the one that issued the leaf first",
	"unhandled_critical_extension":                  "it has a critical extension that Envoy does not know",
	"KEY_USAGE_BIT_INCORRECT":                       "the leaf's key usage lacks digitalSignature",
	"NO_COMMON_SIGNATURE_ALGORITHMS":                "Envoy does not use keys of this type",
	"invalid_CA_certificate":                        "it is not a CA: its basic constraints do not say CA:TRUE",
}
