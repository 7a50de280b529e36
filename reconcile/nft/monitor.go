package nft

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Watch sends, whenever a transaction changed rules in the network namespace, the name of the process that did it: its
// comm, as the kernel tells it. This program's own transactions are among them. Events may be lost; whoever reads them looks
// at the rules from time to time all the same. It must be called on a thread in the table's network namespace.
func (t *Table) Watch(ctx context.Context) <-chan string {
	changes := make(chan string, 1)
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{Groups: 1 << (unix.NFNLGRP_NFTABLES - 1)})
	if err != nil {
		return changes
	}
	go func() {
		stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
		defer stop()
		defer func() { _ = conn.Close() }()
		for ctx.Err() == nil {
			messages, err := conn.Receive()
			who := authorOf(messages)
			switch {
			case err != nil && !errors.Is(err, unix.ENOBUFS):
				return
			case err == nil && who == "":
				continue
			}
			select { // after an overflow too: something changed
			case changes <- who:
			default:
			}
		}
	}()
	return changes
}

// authorOf returns who made the transaction that the messages end with, or "" for a part without its end.
func authorOf(messages []netlink.Message) string {
	const newGeneration = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWGEN
	for _, m := range messages {
		if m.Header.Type != newGeneration {
			continue
		}
		attributes, err := unpack(m.Data[4:])
		if err != nil {
			return ""
		}
		return strings.TrimRight(string(attributes[unix.NFTA_GEN_PROC_NAME]), "\x00")
	}
	return ""
}
