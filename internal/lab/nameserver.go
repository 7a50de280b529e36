package lab

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"golang.org/x/net/dns/dnsmessage"
)

// Nameserver is a DNS server on a host, at port 53 by UDP and TCP. It answers from what Set was told last; every other name
// does not exist (NXDOMAIN).
type Nameserver struct {
	mu    sync.Mutex
	names map[string]Answer
	all   *Answer
	asked []Query
	loses int

	packets net.PacketConn
	streams net.Listener
	serving sync.WaitGroup
}

// Answer is what a Nameserver says of a name.
type Answer struct {
	Addrs  []netip.Addr // none of a family: NODATA
	PTR    string       // the name of the address that the name stands for
	CNAME  string       // what the name is an alias of
	TTL    uint32       // in seconds
	RCode  dnsmessage.RCode
	Silent bool            // no answer at all
	Mute   dnsmessage.Type // no answer to questions of this type
	Cut    bool            // truncated over UDP
}

// Query is one that a Nameserver got.
type Query struct {
	Name string // without the final dot
	Type dnsmessage.Type
	TCP  bool
}

// NewNameserver starts a DNS server at an address of the lab's own namespace.
func NewNameserver(addr string) (*Nameserver, error) {
	return startNameserver(addr, net.ListenPacket, net.Listen)
}

// Nameserver starts a DNS server at an address of the host.
func (h *Host) Nameserver(addr string) (*Nameserver, error) {
	return startNameserver(addr, h.ListenPacket, h.Listen)
}

func startNameserver(
	addr string, packets func(network, addr string) (net.PacketConn, error), streams func(network, addr string) (net.Listener, error),
) (*Nameserver, error) {
	n := &Nameserver{}
	address := net.JoinHostPort(addr, "53")
	var err error
	if n.packets, err = packets("udp", address); err != nil {
		return nil, err
	}
	if n.streams, err = streams("tcp", address); err != nil {
		return nil, errors.Join(err, n.packets.Close())
	}
	n.serving.Go(n.serveUDP)
	n.serving.Go(n.serveTCP)
	return n, nil
}

// Close ends the server.
func (n *Nameserver) Close() error {
	err := errors.Join(n.packets.Close(), n.streams.Close())
	n.serving.Wait()
	return err
}

// Set makes the server answer, from now on, that this is all there is. Names have no final dot.
func (n *Nameserver) Set(names map[string]Answer) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.names, n.all = names, nil
}

// SetAddrs is Set for names that have addresses and nothing else of note.
func (n *Nameserver) SetAddrs(names map[string][]netip.Addr) {
	all := map[string]Answer{}
	for name, addrs := range names {
		all[name] = Answer{Addrs: addrs, TTL: 1}
	}
	n.Set(all)
}

// SetAll makes the server say the same of all names, until the next Set.
func (n *Nameserver) SetAll(answer Answer) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.all = &answer
}

// Lose makes the server take no notice of the next queries.
func (n *Nameserver) Lose(count int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.loses = count
}

// Asked returns the queries up to now, those that were lost included.
func (n *Nameserver) Asked() []Query {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.asked)
}

func (n *Nameserver) serveUDP() {
	query := make([]byte, 1500)
	for {
		size, from, err := n.packets.ReadFrom(query)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if answer, ok := n.answer(query[:size], false); ok {
			_, _ = n.packets.WriteTo(answer, from)
		}
	}
}

func (n *Nameserver) serveTCP() {
	for {
		conn, err := n.streams.Accept()
		if err != nil {
			return
		}
		n.serving.Go(func() {
			defer func() { _ = conn.Close() }()
			var size [2]byte
			if _, err := io.ReadFull(conn, size[:]); err != nil {
				return
			}
			query := make([]byte, binary.BigEndian.Uint16(size[:]))
			if _, err := io.ReadFull(conn, query); err != nil {
				return
			}
			if answer, ok := n.answer(query, true); ok {
				_, _ = conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...))
			}
		})
	}
}

// answer returns the answer to a query, and false for none.
func (n *Nameserver) answer(query []byte, tcp bool) ([]byte, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var message dnsmessage.Message
	if message.Unpack(query) != nil || len(message.Questions) != 1 {
		return nil, false
	}
	question := message.Questions[0]
	name := strings.ToLower(strings.TrimSuffix(question.Name.String(), "."))
	n.asked = append(n.asked, Query{name, question.Type, tcp})
	if n.loses > 0 {
		n.loses--
		return nil, false
	}
	said, known := n.names[name]
	if n.all != nil {
		said, known = *n.all, true
	}
	if said.Silent || said.Mute != 0 && said.Mute == question.Type {
		return nil, false
	}
	message = dnsmessage.Message{
		Header:    dnsmessage.Header{ID: message.ID, Response: true, RecursionAvailable: true, RCode: said.RCode},
		Questions: message.Questions,
	}
	if !known {
		message.RCode = dnsmessage.RCodeNameError
	}
	message.Answers = n.records(question, said)
	if said.Cut && !tcp {
		message.Truncated, message.Answers = true, nil
	}
	packed, err := message.Pack()
	if err == nil && len(packed) > 1232 && !tcp {
		message.Truncated, message.Answers = true, nil
		packed, err = message.Pack()
	}
	return packed, err == nil
}

// records returns the resource records of an answer, along the aliases.
func (n *Nameserver) records(question dnsmessage.Question, said Answer) (all []dnsmessage.Resource) {
	owner := question.Name
	add := func(body dnsmessage.ResourceBody, ttl uint32) {
		all = append(all, dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: owner, Class: question.Class, TTL: ttl}, Body: body})
	}
	for said.CNAME != "" {
		target := dnsmessage.MustNewName(said.CNAME + ".")
		add(&dnsmessage.CNAMEResource{CNAME: target}, said.TTL)
		owner, said = target, n.names[said.CNAME]
	}
	if said.PTR != "" && question.Type == dnsmessage.TypePTR {
		add(&dnsmessage.PTRResource{PTR: dnsmessage.MustNewName(said.PTR + ".")}, said.TTL)
	}
	for _, addr := range said.Addrs {
		switch {
		case addr.Is4() && question.Type == dnsmessage.TypeA:
			add(&dnsmessage.AResource{A: addr.As4()}, said.TTL)
		case addr.Is6() && question.Type == dnsmessage.TypeAAAA:
			add(&dnsmessage.AAAAResource{AAAA: addr.As16()}, said.TTL)
		}
	}
	return all
}
