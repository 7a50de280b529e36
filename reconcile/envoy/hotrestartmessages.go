package envoy

import (
	"encoding/binary"
	"errors"
	"net"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// The messages between Envoys while one takes over from the other: a child asks its parent and waits for the answer, over a socket
// each (source/server/hot_restart.proto, hot_restarting_base.cc). An answer has no mark of what it answers.

// Field numbers of a HotRestartMessage.
const (
	requestField = 1
	replyField   = 2
	statsField   = 3 // of either

	countersField = 3 // of a Reply's Stats
	gaugesField   = 4
)

// ask sends a question that the child never asks, and returns once it is answered: all earlier questions are answered then, too.
func ask(from *net.UnixConn, socket string) error {
	if err := from.SetDeadline(time.Now().Add(answerLimit)); err != nil {
		return err
	}
	if err := askForStats(from, socket); err != nil {
		return err
	}
	for {
		message, err := receive(from)
		if err != nil {
			return err
		}
		if _, ok := statsOf(message); ok {
			return nil
		}
	}
}

// askForStats asks an Envoy for its statistics, as a child does to add them to its own.
func askForStats(from *net.UnixConn, socket string) error {
	request := protowire.AppendBytes(protowire.AppendTag(nil, statsField, protowire.BytesType), nil)
	message := protowire.AppendBytes(protowire.AppendTag(nil, requestField, protowire.BytesType), request)
	message = append(binary.BigEndian.AppendUint64(nil, uint64(len(message))), message...)
	_, err := from.WriteToUnix(message, &net.UnixAddr{Name: socket, Net: "unixgram"})
	return err
}

// statsOf returns the statistics in a message; false where it has none.
func statsOf(message []byte) (stats []byte, ok bool) {
	return within(message, replyField, statsField)
}

// within returns the bytes of a field that is nested in other fields.
func within(message []byte, path ...protowire.Number) ([]byte, bool) {
	for _, field := range path {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 || number != field || kind != protowire.BytesType {
			return nil, false
		}
		inner, m := protowire.ConsumeBytes(message[n:])
		if m < 0 {
			return nil, false
		}
		message = inner
	}
	return message, true
}

// eachStat calls do for each counter and gauge. A counter's value is how much it grew since it was last sent.
func eachStat(stats []byte, do func(name string, value uint64)) error {
	for len(stats) > 0 {
		number, kind, n := protowire.ConsumeTag(stats)
		if n < 0 {
			return protowire.ParseError(n)
		}
		m := protowire.ConsumeFieldValue(number, kind, stats[n:])
		if m < 0 {
			return protowire.ParseError(m)
		}
		if entry, ok := within(stats, number); ok && (number == countersField || number == gaugesField) {
			do(mapEntry(entry))
		}
		stats = stats[n+m:]
	}
	return nil
}

// mapEntry reads an entry of a protobuf map of strings to numbers.
func mapEntry(entry []byte) (name string, value uint64) {
	for len(entry) > 0 {
		number, kind, n := protowire.ConsumeTag(entry)
		m := -1
		switch {
		case n < 0:
		case kind == protowire.BytesType:
			name, m = protowire.ConsumeString(entry[n:])
		case kind == protowire.VarintType:
			value, m = protowire.ConsumeVarint(entry[n:])
		default:
			m = protowire.ConsumeFieldValue(number, kind, entry[n:])
		}
		if m < 0 {
			return name, value
		}
		entry = entry[n+m:]
	}
	return name, value
}

// receive reads one message. It comes in datagrams of 4096 bytes at most; the first 8 bytes are its length.
func receive(from *net.UnixConn) ([]byte, error) {
	var message []byte
	for datagram := make([]byte, 4096); ; {
		n, err := from.Read(datagram)
		if err != nil {
			return nil, err
		}
		message = append(message, datagram[:n]...)
		if len(message) < 8 {
			return nil, errors.New("an answer without its length")
		}
		if uint64(len(message)-8) >= binary.BigEndian.Uint64(message) {
			return message[8:], nil
		}
	}
}
