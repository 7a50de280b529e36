package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"mantlet/internal/sockdiag"
	"mantlet/render"
)

// Move gives connections from outside other marks, and returns those that have theirs now: the others ended meanwhile. It must be called on a
// thread in the table's network namespace.
func (t *Table) Move(marks map[sockdiag.Socket]render.Mark) (moved []sockdiag.Socket, err error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("connecting to conntrack: %w", err)
	}
	defer func() { _ = conn.Close() }()
	for some := range slices.Chunk(slices.Collect(maps.Keys(marks)), atOnce) {
		var requests []netlink.Message
		for i, socket := range some {
			family, data, err := moving(socket, marks[socket])
			if err != nil {
				return nil, err
			}
			request := message(conntrackNew, netlink.Request|netlink.Acknowledge, family, 0, data)
			request.Header.Sequence = uint32(i) + 1
			requests = append(requests, request)
		}
		if _, err := conn.SendMessages(requests); err != nil {
			return nil, fmt.Errorf("changing the marks of connections: %w", err)
		}
		for _, socket := range some {
			switch _, err := conn.Receive(); {
			case err == nil:
				moved = append(moved, socket)
			case !errors.Is(err, unix.ENOENT):
				return nil, fmt.Errorf("changing the mark of a connection: %w", err)
			}
		}
	}
	return moved, nil
}

// atOnce is how many requests are sent together. Their answers fit into the socket's buffer.
const atOnce = 64

// moving is the message that changes mantlet's bits of a connection's mark, and no others.
func moving(s sockdiag.Socket, mark render.Mark) (family byte, data []byte, err error) {
	family, source, destination := byte(unix.NFPROTO_IPV4), uint16(1), uint16(2) // CTA_IP_V4_SRC, CTA_IP_V4_DST
	if s.Local.Addr().Is6() {
		family, source, destination = unix.NFPROTO_IPV6, 3, 4
	}
	number := func(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	e.Nested(tupleOriginal, func(e *netlink.AttributeEncoder) error {
		e.Nested(tupleIP, func(e *netlink.AttributeEncoder) error {
			e.Bytes(source, s.Remote.Addr().AsSlice())
			e.Bytes(destination, s.Local.Addr().AsSlice())
			return nil
		})
		e.Nested(tupleProto, func(e *netlink.AttributeEncoder) error {
			e.Uint8(protoNumber, render.TCP)
			e.Bytes(protoSrcPort, port(s.Remote.Port()))
			e.Bytes(protoDstPort, port(s.Local.Port()))
			return nil
		})
		return nil
	})
	e.Bytes(connectionMark, number(uint32(mark)))
	e.Bytes(markMask, number(uint32(render.MarkMask)))
	data, err = e.Encode()
	return family, data, err
}

// protoNumber is CTA_PROTO_NUM.
const protoNumber = 1
