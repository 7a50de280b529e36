package nft

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"mantlet/render"
)

// Watch sends a note for each transaction in the network namespace that is not the Table's own: the name of the process
// that made it, its comm, where it changed the table, else "". Notes that nobody took become one, and where one may have
// been missed "" is sent. Events may get lost all the same; whoever reads them looks at the rules from time to time. It must
// be called on a thread in the table's network namespace. The channel is closed once ctx and the watch have ended.
func (t *Table) Watch(ctx context.Context) <-chan string {
	m := monitor{subscribe: t.subscribe, own: t.portID(), notes: make(chan string, 1)}
	conn, err := m.subscribe()
	go m.run(ctx, conn, err)
	return m.notes
}

// subscription is a *netlink.Conn that gets the kernel's notes of nftables.
type subscription interface {
	Receive() ([]netlink.Message, error)
	SetReadDeadline(time.Time) error
	Close() error
}

func subscribe() (subscription, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{Groups: 1 << (unix.NFNLGRP_NFTABLES - 1)})
	if err != nil {
		return nil, err
	}
	return conn, buffers(conn)
}

// portID returns the number of the table's socket, which events of its own transactions bear.
func (t *Table) portID() (id uint32) {
	raw, err := t.raw.SyscallConn()
	if err != nil {
		return 0
	}
	_ = raw.Control(func(fd uintptr) {
		if addr, err := unix.Getsockname(int(fd)); err == nil {
			if own, ok := addr.(*unix.SockaddrNetlink); ok {
				id = own.Pid
			}
		}
	})
	return id
}

type monitor struct {
	subscribe func() (subscription, error)
	own       uint32
	notes     chan string // of capacity 1; run alone sends
	touched   bool        // the table, by the transaction whose messages are coming
}

// resubscribe is how long to wait after an error.
const resubscribe = 100 * time.Millisecond

func (m *monitor) run(ctx context.Context, conn subscription, err error) {
	defer close(m.notes)
	for {
		if err == nil {
			m.receive(ctx, conn)
			_ = conn.Close()
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(resubscribe):
		}
		conn, err = m.subscribe()
		m.note("")
	}
}

// receive returns when ctx ends, or at an error that is not of the kind that passes.
func (m *monitor) receive(ctx context.Context, conn subscription) {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		messages, err := conn.Receive()
		switch {
		case err == nil:
			m.take(messages)
		case errors.Is(err, unix.ENOBUFS): // messages were lost; the next ones are of the same transaction, or of a later one
			m.touched = true
			m.note("")
		default:
			return
		}
	}
}

// take reads messages, the last of which need not be a transaction's last.
func (m *monitor) take(messages []netlink.Message) {
	const (
		newGeneration = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWGEN
		table         = 1 // NFTA_CHAIN_TABLE, NFTA_RULE_TABLE and so on
	)
	for _, message := range messages {
		if message.Header.PID == m.own {
			continue
		}
		family, a, err := unpackMessage(message.Data)
		if err != nil {
			continue
		}
		if message.Header.Type != newGeneration {
			m.touched = m.touched || family == unix.NFPROTO_INET && a.text(table) == render.Table
			continue
		}
		who := ""
		if m.touched {
			who = a.text(unix.NFTA_GEN_PROC_NAME)
		}
		m.touched = false
		m.note(who)
	}
}

// note sends a name, with those that nobody took yet.
func (m *monitor) note(who string) {
	select {
	case before := <-m.notes:
		names := strings.Split(before, ", ")
		switch {
		case before == "":
		case who == "" || slices.Contains(names, who):
			who = before
		default:
			who = before + ", " + who
		}
	default:
	}
	m.notes <- who
}
