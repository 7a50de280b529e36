package dns

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"mantlet/render"
)

// reply is what name servers say of one name and one family of addresses. Without an error they know what they say: there are
// these addresses, or there are none.
type reply struct {
	addrs  []netip.Addr
	name   string // that an address was asked for
	ttl    time.Duration
	absent bool   // the name does not exist, in any family
	server string // whose answer it is
	err    error  // nobody answers, or nobody can
}

// text says in words why there are no addresses.
func (r reply) text() string {
	switch {
	case r.err != nil:
		return r.err.Error()
	case r.absent:
		return "NXDOMAIN by " + r.server
	default:
		return "NODATA (no A or AAAA record) by " + r.server
	}
}

// firstTimeout is what a server gets at the first attempt, where the configuration does not give it less: a datagram that gets lost
// shall not cost as long as a server may take that is slow.
const firstTimeout = time.Second

// minTimeout is what a server gets at the other attempts, which share the configured time among all servers, as glibc does.
const minTimeout = time.Second

// query asks the servers, one after the other, until one knows.
func (r *Resolver) query(ctx context.Context, c config, name string, kind dnsmessage.Type) reply {
	servers := c.servers
	if c.rotate && len(servers) > 1 {
		first := int(r.turn.Add(1)) % len(servers)
		servers = slices.Concat(servers[first:], servers[:first])
	}
	question, err := newQuestion(name, kind)
	if err != nil {
		return reply{err: err}
	}
	failed := map[string]error{}
	for attempt := range c.attempts {
		timeout := max(c.timeout/time.Duration(len(servers)), minTimeout)
		if attempt == 0 {
			timeout = min(c.timeout, firstTimeout)
		}
		for _, server := range servers {
			if _, answered := errors.AsType[failure](failed[server]); answered {
				continue // it would say the same again
			}
			answer, err := ask(ctx, c.tcp, server, question, timeout)
			if err == nil {
				return answer
			}
			if ctx.Err() != nil && failed[server] != nil {
				continue // what it said before tells more
			}
			failed[server] = err
		}
	}
	var all []string
	for _, server := range servers {
		all = append(all, failed[server].Error())
	}
	return reply{err: errors.New(strings.Join(all, ", "))}
}

// failure is a server's answer that it can't tell.
type failure struct {
	code   dnsmessage.RCode
	server string
}

func (f failure) Error() string {
	name, ok := map[dnsmessage.RCode]string{
		dnsmessage.RCodeSuccess: "a referral", dnsmessage.RCodeFormatError: "FORMERR", dnsmessage.RCodeServerFailure: "SERVFAIL",
		dnsmessage.RCodeNotImplemented: "NOTIMP", dnsmessage.RCodeRefused: "REFUSED",
	}[f.code]
	if !ok {
		name = fmt.Sprintf("RCODE %d", f.code)
	}
	return name + " by " + f.server
}

// ask asks one server, by TCP where its answer does not fit a datagram.
func ask(ctx context.Context, tcp bool, server string, question dnsmessage.Question, timeout time.Duration) (reply, error) {
	host, _, err := net.SplitHostPort(server)
	if err != nil {
		return reply{}, err
	}
	var message dnsmessage.Message
	if !tcp {
		message, err = roundTrip(ctx, "udp", server, question, timeout)
	}
	if err == nil && (tcp || message.Truncated) {
		message, err = roundTrip(ctx, "tcp", server, question, timeout)
	}
	if err != nil {
		return reply{}, unanswered(host, err)
	}
	r := reply{server: host, absent: message.RCode == dnsmessage.RCodeNameError}
	if !r.absent && message.RCode != dnsmessage.RCodeSuccess {
		return reply{}, failure{message.RCode, host}
	}
	first := true
	for _, record := range message.Answers {
		switch body := record.Body.(type) {
		case *dnsmessage.AResource:
			r.add(netip.AddrFrom4(body.A))
		case *dnsmessage.PTRResource:
			r.name = body.PTR.String()
		case *dnsmessage.AAAAResource:
			r.add(netip.AddrFrom16(body.AAAA).Unmap())
		}
		if ttl := time.Duration(record.Header.TTL) * time.Second; first || ttl < r.ttl {
			r.ttl, first = ttl, false
		}
	}
	// RFC 2308, section 2.2: a server that does not know points to others, and that is not to say that there is nothing.
	if len(message.Answers) == 0 && !r.absent && !message.Authoritative && !message.RecursionAvailable {
		return reply{}, failure{message.RCode, host}
	}
	return r, nil
}

// add takes an address unless it can be nobody's: a connection to the unspecified address is one to this machine.
func (r *reply) add(addr netip.Addr) {
	if !addr.IsUnspecified() && !addr.IsMulticast() && addr != netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		r.addrs = append(r.addrs, addr)
	}
}

// unanswered says why a server did not answer.
func unanswered(server string, err error) error {
	var late net.Error
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("connection refused by %s", server)
	case errors.As(err, &late) && late.Timeout():
		return fmt.Errorf("no answer from %s (timeout)", server)
	case errors.Is(err, context.Canceled):
		return fmt.Errorf("no answer from %s yet", server)
	default:
		return fmt.Errorf("asking %s: %w", server, err)
	}
}

func newQuestion(name string, kind dnsmessage.Type) (dnsmessage.Question, error) {
	packed, err := dnsmessage.NewName(name)
	return dnsmessage.Question{Name: packed, Type: kind, Class: dnsmessage.ClassINET}, err
}

// maxDatagram is what passes every network whole (the DNS flag day of 2020).
const maxDatagram = 1232

// pack makes the message that asks a question.
func pack(id uint16, question dnsmessage.Question) ([]byte, error) {
	message := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: id, RecursionDesired: true},
		Questions: []dnsmessage.Question{question},
	}
	var options dnsmessage.ResourceHeader
	if err := options.SetEDNS0(maxDatagram, dnsmessage.RCodeSuccess, false); err != nil {
		return nil, err
	}
	message.Additionals = []dnsmessage.Resource{{Header: options, Body: &dnsmessage.OPTResource{}}}
	return message.Pack()
}

// roundTrip sends a question, from a port that was not used for another one, and returns the answer to it. What else comes is
// passed over.
func roundTrip(ctx context.Context, network, server string, question dnsmessage.Question, timeout time.Duration) (answer dnsmessage.Message, err error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	id := uint16(rand.Uint32())
	query, err := pack(id, question)
	if err != nil {
		return answer, err
	}
	conn, err := (&net.Dialer{Control: marked}).DialContext(ctx, network, server)
	if err != nil {
		return answer, err
	}
	defer func() { _ = conn.Close() }()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return answer, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	read := func() ([]byte, error) { return readDatagram(conn) }
	if network == "tcp" {
		query = append(binary.BigEndian.AppendUint16(nil, uint16(len(query))), query...)
		read = func() ([]byte, error) { return readStream(conn) }
	}
	if _, err := conn.Write(query); err != nil {
		return answer, err
	}
	for {
		text, err := read()
		if err != nil {
			return answer, cmp.Or(context.Cause(ctx), err)
		}
		if answers(&answer, text, id, question) {
			return answer, nil
		}
		if network == "tcp" {
			return answer, errors.New("the answer is to another question")
		}
	}
}

// marked lets the rules tell the resolver's sockets from the workload's. Without the capability that it takes, the question is asked all the
// same, as the workload's would be.
func marked(_, _ string, conn syscall.RawConn) error {
	return conn.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(render.ResolverSocket))
	})
}

func readDatagram(conn net.Conn) ([]byte, error) {
	text := make([]byte, maxDatagram)
	n, err := conn.Read(text)
	return text[:n], err
}

func readStream(conn net.Conn) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(conn, size[:]); err != nil {
		return nil, err
	}
	text := make([]byte, binary.BigEndian.Uint16(size[:]))
	_, err := io.ReadFull(conn, text)
	return text, err
}

// answers unpacks a message and reports whether it answers the question.
func answers(message *dnsmessage.Message, text []byte, id uint16, question dnsmessage.Question) bool {
	if message.Unpack(text) != nil || !message.Response || message.ID != id || len(message.Questions) != 1 {
		return false
	}
	asked := message.Questions[0]
	return asked.Type == question.Type && asked.Class == question.Class && strings.EqualFold(asked.Name.String(), question.Name.String())
}
