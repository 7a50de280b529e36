package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"mantlet/internal/lab"
)

// act is something that happens and what mantlet promises then.
type act struct {
	title   string
	happens func(context.Context) error
	claims  []claim
	tells   func(context.Context) (string, error) // what to print then; it may be nil
}

// claim is something to try over each family, and what must happen.
type claim struct {
	to, how string
	try     try
	must    string // the words that must be seen
}

// try tries something over a family.
type try func(context.Context, family) seen

// soon gives up after a short while without a connection.
func (t try) soon() try {
	return func(ctx context.Context, f family) seen {
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		return t(ctx, f)
	}
}

// noAnswer is what must be seen where nothing comes back.
const noAnswer = "no answer"

// The network has no delay, but the machine may be busy.
const (
	dialLimit   = 3 * time.Second // a SYN that was lost is sent again after one
	answerLimit = 5 * time.Second
	closeLimit  = time.Second            // for the other end to notice that a call is over
	patience    = 300 * time.Millisecond // where a SYN must be dropped
)

// seen is what happened, in words.
type seen struct {
	words  string
	detail string // may differ
}

func (s seen) String() string {
	if s.detail == "" {
		return s.words
	}
	return s.words + " (" + s.detail + ")"
}

type family string

const (
	ipv4 family = "IPv4"
	ipv6 family = "IPv6"
)

func (f family) of(h *lab.Host) netip.Addr {
	if f == ipv6 {
		return h.IPv6
	}
	return h.IPv4
}

func (s *stage) acts() []act {
	var ( // what a client shows if it is asked
		plaintext *tls.Certificate
		nobody    = &tls.Certificate{}
		member    = new(s.member.Certificate())
		stranger  = new(s.stranger.Certificate())
	)
	return []act{{
		title: "Without mantlet the pod web is open", claims: []claim{
			{"web:8080", "plaintext", s.into(tlsPort, plaintext, verdict), "answered in plaintext"},
		},
	}, {
		title: "mantlet has started in both pods, and has no certificates yet", happens: s.start, claims: []claim{
			{"web:8080", "plaintext", s.into(tlsPort, plaintext, verdict).soon(), noAnswer},
		},
	}, {
		title: "The certificates are there; from outside into the pod web", happens: s.certify, claims: []claim{
			{"web:8080", "TLS, no certificate", s.into(tlsPort, nobody, request), "answered; asks for no certificate"},
			{"web:8080", "TLS, its certificate chain", s.into(tlsPort, nobody, chain), "web, mesh intermediate"},
			{"web:8080", "plaintext", s.into(tlsPort, plaintext, verdict), "refused"},
			{"web:7890", "plaintext", s.into(plainPort, plaintext, verdict), "answered in plaintext"},
			{"web:9000", "TLS, mesh certificate", s.into(otherPort, member, request), "answered; asks for a certificate"},
			{"web:9000", "TLS, no certificate", s.into(otherPort, nobody, request), "refused; asks for a certificate"},
			{"web:9000", "TLS, foreign certificate", s.into(otherPort, stranger, verdict), "refused"},
			{"web:9000", "plaintext", s.into(otherPort, plaintext, verdict), "refused"},
			{"web, 32 more", "TLS, no certificate", s.intoOthers(32, nobody, request), "refused; asks for a certificate"},
			{"web:8080", "address the workload sees", s.into(tlsPort, nobody, dialled), "the one that the client dialled"},
			{"web:9000", "address the workload sees", s.into(otherPort, member, dialled), "the one that the client dialled"},
		},
	}, {
		title:   "The file of web's configuration is edited: of the mesh, only `frontend` may call port 9000",
		happens: s.edit("ingress:\n  - {port: 9000, allow: [frontend]}\n"), claims: []claim{
			{"web:9000", "TLS, certificate of client", s.until("refused", s.into(otherPort, member, verdict)), "refused"},
			{"web:8080", "TLS, no certificate", s.into(tlsPort, nobody, request), "answered; asks for no certificate"},
		},
		tells: s.explain,
	}, {
		title: "From the pod shop, whose workload speaks plain TCP to loopback addresses", claims: []claim{
			{"127.137.0.1:8081", "plaintext", s.outOf("127.137.0.1:8081", s.billing, answerer), "answered by billing-svc"},
			{"127.137.0.1:8081", "what billing-svc is shown", s.outOf("127.137.0.1:8081", s.billing, shown), "mutual TLS; shop, mesh intermediate"},
			{"127.137.0.2:8081", "plaintext", s.outOf("127.137.0.2:8081", s.cart, answerer), "answered by cart-svc"},
			{"127.137.0.2:8081", "what cart-svc is shown", s.outOf("127.137.0.2:8081", s.cart, shown), "mutual TLS; shop, mesh intermediate"},
		},
	}, {
		title: "An impostor takes cart-svc's place: its address and name, a certificate of another CA", happens: s.replaceCart, claims: []claim{
			{"127.137.0.2:8081", "plaintext", s.outOf("127.137.0.2:8081", s.cart, received), "refused; the impostor got 0 bytes"},
		},
	}, {
		title: "Envoy in the pod web is killed (SIGKILL)", happens: s.killEnvoy, claims: []claim{
			{"web:8080", "TLS until it answers", s.backInto(tlsPort, nobody), "answered again"},
		},
	}, {
		title: "It is killed again, and mantlet stopped (SIGSTOP) so that nobody brings it back", happens: s.keepDown, claims: []claim{
			{"web:8080", "plaintext", s.into(tlsPort, plaintext, verdict).soon(), noAnswer},
			{"web:9000", "plaintext", s.into(otherPort, plaintext, verdict).soon(), noAnswer},
			{"web:9000", "TLS, mesh certificate", s.into(otherPort, member, verdict).soon(), noAnswer},
			{"web:7890", "plaintext", s.into(plainPort, plaintext, verdict), "answered in plaintext"},
		},
	}, {
		title: "mantlet goes on (SIGCONT)", happens: s.letGo, claims: []claim{
			{"web:8080", "TLS until it answers", s.backInto(tlsPort, nobody), "answered again"},
		},
	}}
}

// into calls the pod web from client.
func (s *stage) into(port uint16, shows *tls.Certificate, look func(outcome) seen) try {
	return func(ctx context.Context, f family) seen {
		return look(s.callWeb(ctx, f, port, shows))
	}
}

// intoOthers calls n ports that no deployment names, up to the last there is, and looks at each, or at the first that differs.
func (s *stage) intoOthers(n int, shows *tls.Certificate, look func(outcome) seen) try {
	return func(ctx context.Context, f family) (first seen) {
		for i := range n {
			port := (i+1)*(1<<16/n) - 1
			now := s.into(uint16(port), shows, look)(ctx, f)
			if i > 0 && now.words != first.words {
				return seen{fmt.Sprintf("%s at port %d", now.words, port), now.detail}
			}
			first = now
		}
		return first
	}
}

// backInto calls the pod web until it answers, and tells how long after the act began that was.
func (s *stage) backInto(port uint16, shows *tls.Certificate) try {
	return func(ctx context.Context, f family) seen {
		ctx, cancel := context.WithTimeout(ctx, startLimit)
		defer cancel()
		for {
			const often = 10 * time.Millisecond
			dialing, cancel := context.WithTimeout(ctx, often)
			last := verdict(s.callWeb(dialing, f, port, shows))
			cancel()
			if last.words == "answered" {
				return seen{"answered again", fmt.Sprintf("%d ms", time.Since(s.moment).Milliseconds())}
			}
			if ctx.Err() != nil {
				return last
			}
		}
	}
}

// until tries until the words are seen.
func (s *stage) until(words string, t try) try {
	return func(ctx context.Context, f family) (last seen) {
		ctx, cancel := context.WithTimeout(ctx, startLimit)
		defer cancel()
		for last = t(ctx, f); last.words != words && ctx.Err() == nil; last = t(ctx, f) {
		}
		return last
	}
}

// outOf lets the workload of the pod shop call a loopback address until the endpoint was asked over this family, and looks
// at that.
func (s *stage) outOf(listen string, e *endpoint, look func(outcome) seen) try {
	return func(ctx context.Context, f family) seen {
		var o outcome
		// Envoy's threads, two as a rule, each take the endpoint's two addresses in turn.
		for range 8 {
			o = call(ctx, s.shop.Host, netip.MustParseAddrPort(listen), nil, e.Workload)
			if o.err != nil { // after which Envoy avoids an address for a while: what came to it before counts
				o.reached = e.Connections()
			}
			o.reached = slices.DeleteFunc(o.reached, func(c lab.Connection) bool { return c.Local.Addr() != f.of(e.Host) })
			if len(o.reached) > 0 {
				return look(o)
			}
		}
		return seen{words: ending(o).words + ", " + e.Name + " was not asked"}
	}
}

func (s *stage) callWeb(ctx context.Context, f family, port uint16, shows *tls.Certificate) outcome {
	var config *tls.Config
	asked := false
	if shows != nil {
		config = s.member.ClientConfig(s.web.Name)
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			asked = true
			return shows, nil
		}
	}
	o := call(ctx, s.client, netip.AddrPortFrom(f.of(s.web.Host), port), config, s.web.workloads...)
	o.asked = asked
	o.reached = slices.DeleteFunc(o.reached, func(c lab.Connection) bool { return c.Local.Port() != port })
	return o
}

// outcome is all there is to know of a call.
type outcome struct {
	to      netip.AddrPort
	answer  string
	server  *tls.ConnectionState // if there was a handshake
	asked   bool                 // for a certificate
	err     error                // why the call did not succeed
	reached []lab.Connection     // what workloads saw of it
}

const words = "is anybody there?\n"

// call says something and expects to be greeted and to hear it again. The context bounds the dialling.
func call(ctx context.Context, from *lab.Host, to netip.AddrPort, config *tls.Config, workloads ...*lab.Workload) outcome {
	o := outcome{to: to}
	before := make([]int, len(workloads))
	for i, w := range workloads {
		before[i] = len(w.Connections())
	}
	o.answer, o.server, o.err = converse(ctx, from, to, config)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeLimit)
	defer cancel()
	_ = lab.Until(ctx, func() bool { // the call is over at both ends
		o.reached = nil
		for i, w := range workloads {
			o.reached = append(o.reached, w.Connections()[before[i]:]...)
		}
		return !slices.ContainsFunc(o.reached, func(c lab.Connection) bool { return !c.Closed })
	})
	return o
}

func converse(ctx context.Context, from *lab.Host, to netip.AddrPort, config *tls.Config) (string, *tls.ConnectionState, error) {
	ctx, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	conn, err := from.Dial(ctx, "tcp", to.String())
	if err != nil {
		return "", nil, err
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(answerLimit)); err != nil {
		return "", nil, err
	}
	if config == nil {
		answer, err := exchange(conn, "")
		return answer, nil, err
	}
	secured := tls.Client(conn, config)
	if err := secured.Handshake(); err != nil {
		return "", nil, err
	}
	// A server that refuses the certificate says so after the client's part of the handshake. Words on the way to it would make
	// its kernel reset the connection, and what it said could be lost. So be greeted first.
	first := make([]byte, 1)
	if _, err := io.ReadFull(secured, first); err != nil {
		return "", nil, err
	}
	answer, err := exchange(secured, string(first))
	return answer, new(secured.ConnectionState()), err
}

// exchange says the words and reads, after what was heard already, until they come back.
func exchange(conn net.Conn, heard string) (string, error) {
	if _, err := conn.Write([]byte(words)); err != nil {
		return heard, err
	}
	buffer := make([]byte, 4<<10)
	for !strings.HasSuffix(heard, words) {
		n, err := conn.Read(buffer)
		heard += string(buffer[:n])
		if err != nil {
			return heard, err
		}
	}
	return heard, nil
}

// verdict says how a call to a pod ended. One that failed must not have been noticed by the workload.
func verdict(o outcome) seen {
	s := ending(o)
	if o.err != nil && len(o.reached) > 0 {
		s.words += "; the workload was connected"
	}
	return s
}

func ending(o outcome) seen {
	var timeout net.Error
	_, alert, alerted := strings.Cut(fmt.Sprint(o.err), "remote error: tls: ")
	switch {
	case o.err == nil && o.server == nil:
		return seen{words: "answered in plaintext"}
	case o.err == nil:
		return seen{words: "answered"}
	case strings.Contains(o.answer, "hello"):
		return seen{words: "answered, but not in full", detail: o.err.Error()}
	case alerted:
		return seen{words: "refused", detail: alert}
	case errors.Is(o.err, io.EOF), errors.Is(o.err, unix.ECONNRESET), errors.Is(o.err, unix.ECONNREFUSED), errors.Is(o.err, unix.EPIPE):
		return seen{words: "refused"}
	case errors.As(o.err, &timeout) && timeout.Timeout():
		return seen{words: noAnswer}
	case errors.As(o.err, new(tls.RecordHeaderError)):
		return seen{words: "answered, not in TLS"}
	default:
		return seen{words: o.err.Error()}
	}
}

// request says whether the server asked for a certificate.
func request(o outcome) seen {
	words := verdict(o).words
	switch {
	case o.asked:
		words += "; asks for a certificate"
	case o.server != nil:
		words += "; asks for no certificate"
	}
	return seen{words: words}
}

// chain says what the server showed, whose chain the client verified to the mesh CA.
func chain(o outcome) seen {
	if o.server == nil {
		return verdict(o)
	}
	return seen{words: names(o.server.PeerCertificates)}
}

// dialled says where the workload thinks that it was called.
func dialled(o outcome) seen {
	switch {
	case o.err != nil:
		return verdict(o)
	case len(o.reached) != 1:
		return seen{words: fmt.Sprintf("%d connections to it", len(o.reached))}
	case o.reached[0].Local != o.to:
		return seen{words: o.reached[0].Local.String()}
	default:
		return seen{words: "the one that the client dialled"}
	}
}

// answerer says who answered.
func answerer(o outcome) seen {
	_, who, _ := strings.Cut(o.answer, "hello from ")
	who, _, _ = strings.Cut(who, "\n")
	if o.err != nil {
		return ending(o)
	}
	return seen{words: "answered by " + who}
}

// shown says what the endpoint was shown, which it verified to the mesh CA.
func shown(o outcome) seen {
	if o.err != nil {
		return ending(o)
	}
	if o.reached[0].TLS == nil {
		return seen{words: "nothing: it was called in plaintext"}
	}
	return seen{words: "mutual TLS; " + names(o.reached[0].TLS.PeerCertificates)}
}

// received says how much of the workload's data the endpoint got.
func received(o outcome) seen {
	s, bytes := ending(o), 0
	for _, c := range o.reached {
		bytes += c.Received
	}
	s.words += fmt.Sprintf("; the impostor got %d bytes", bytes)
	return s
}

func names(chain []*x509.Certificate) string {
	var all []string
	for _, c := range chain {
		name := c.Subject.CommonName
		switch {
		case c.IsCA && bytes.Equal(c.RawIssuer, c.RawSubject):
			name += " root"
		case c.IsCA:
			name += " intermediate"
		}
		all = append(all, name)
	}
	return strings.Join(all, ", ")
}
