package routes

import (
	"context"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// resubscribe is how long to wait after an error.
const resubscribe = 100 * time.Millisecond

// Watch sends a note when routing rules or routes changed in the calling thread's network namespace, until ctx ends. Notes that nobody
// took become one. It may miss changes: whoever reads them looks from time to time. The channel is closed once all that it takes has
// ended.
func (k Kernel) Watch(ctx context.Context) <-chan struct{} {
	notes := make(chan struct{}, 1)
	conn, err := subscribe()
	go func() {
		defer close(notes)
		for {
			if err == nil {
				receive(ctx, conn, notes)
				_ = conn.Close()
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(resubscribe):
			}
			conn, err = subscribe()
			note(notes)
		}
	}()
	return notes
}

func subscribe() (*netlink.Conn, error) {
	const groups = 1<<(unix.RTNLGRP_IPV4_ROUTE-1) | 1<<(unix.RTNLGRP_IPV4_RULE-1) | 1<<(unix.RTNLGRP_IPV6_ROUTE-1) | 1<<(unix.RTNLGRP_IPV6_RULE-1)
	return netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{Groups: groups})
}

// receive returns when ctx ends, or at an error: messages may have been lost.
func receive(ctx context.Context, conn *netlink.Conn, notes chan<- struct{}) {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		if _, err := conn.Receive(); err != nil {
			return
		}
		note(notes)
	}
}

func note(notes chan<- struct{}) {
	select {
	case notes <- struct{}{}:
	default:
	}
}
