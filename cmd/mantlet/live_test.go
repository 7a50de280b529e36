package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// transactions counts how often anybody changes the pod's rules from now on.
func (p *pod) transactions() *atomic.Int64 {
	p.t.Helper()
	var conn *netlink.Conn
	p.must(p.Do(func() (err error) {
		conn, err = netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{Groups: 1 << (unix.NFNLGRP_NFTABLES - 1)})
		return err
	}))
	count, ended := &atomic.Int64{}, make(chan struct{})
	go func() {
		defer close(ended)
		for {
			messages, err := conn.Receive()
			if err != nil {
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					p.t.Error(err)
				}
				return
			}
			for _, m := range messages {
				if m.Header.Type == unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWGEN {
					count.Add(1)
				}
			}
		}
	}()
	p.t.Cleanup(func() {
		_ = conn.SetReadDeadline(time.Unix(1, 0))
		<-ended
		_ = conn.Close()
	})
	return count
}

// overridden runs a pod with an override file.
func overridden(t *testing.T, text string, env ...string) (*pod, *mounted) {
	t.Helper()
	p := newPod(t, env...)
	m := p.mount()
	m.write(text)
	p.sidecar.Env = append(p.sidecar.Env, "MANTLET_CONFIG="+m.file())
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.besiege()
	p.run()
	p.protect(tlsPort)
	p.protect(mtlsPort)
	p.ready()
	return p, m
}

// TestLeastAction: a change does what it takes and nothing else.
func TestLeastAction(t *testing.T) {
	t.Parallel()
	p, m := overridden(t, "{}", web)
	changes := p.transactions()
	var seen int64
	envoy := p.envoy()
	// expect compares what was done since the last call.
	expect := func(what string, transactions int64, restarts bool) {
		t.Helper()
		p.ready()
		if got := changes.Load() - seen; got != transactions {
			t.Errorf("%s: %d transactions, want %d", what, got, transactions)
		}
		pids, err := p.sidecar.Envoys()
		p.must(err)
		if last := slices.Max(pids); (last != envoy) != restarts {
			t.Errorf("%s: Envoys %v after %d, want that one is started: %v", what, pids, envoy, restarts)
		}
		seen, envoy = changes.Load(), slices.Max(pids)
	}

	m.write(fmt.Sprintf("ingress: [{port: %d, mode: mtls}, {port: 7000-7099, mode: passthrough}]", tlsPort))
	p.await("the rules follow", func() bool { return p.log.count(inForce) == 2 })
	expect("port modes", 1, false)

	// The certificates are read after the file.
	m.write(fmt.Sprintf("# other words\ningress: [{name: x, port: 7000-7099, mode: passthrough}, {port: %d, mode: mtls}]", tlsPort))
	p.must(p.sidecar.Signal(syscall.SIGHUP))
	second := p.issue("pod")
	p.must(second.Write(p.sidecar.TLSDirectory))
	p.await("the new certificate is shown", func() bool {
		conn, err := p.handshake(netip.AddrPortFrom(p.IPv4, mtlsPort), p.client.ClientConfig("pod"))
		return err == nil && conn.ConnectionState().PeerCertificates[0].SerialNumber.Cmp(second.Leaf.SerialNumber) == 0
	})
	expect("the same in other words, and certificates", 0, false)

	// Each file lacks what the one before said: that is a part of the change.
	for _, change := range []struct {
		what, text   string
		transactions int64
	}{
		{"egress", "egress: [{listen: '127.137.0.1:8081', upstream: '192.0.2.1:8080', serverNames: [billing]}]", 1},
		{"allow", "ingress: [{port: 9000, mode: mtls, allow: [a]}]", 1},
		{"TLS", "tls: {minVersion: '1.3'}", 1},
		{"access log", "accessLog: none", 0},
		{"drain time", "envoy: {drainTime: 3s}", 0},
		{"log level", "envoy: {logLevel: error}", 0},
		{"concurrency", "envoy: {concurrency: 3}", 0},
		{"parent shutdown time", "envoy: {parentShutdownTime: 9m}", 0},
	} {
		live, rules := p.log.count("Envoy is live"), p.log.count(inForce)
		m.write(change.text)
		p.await(change.what+" is in force", func() bool {
			return p.log.count("Envoy is live") > live && p.log.count(inForce) >= rules+int(change.transactions)
		})
		expect(change.what, change.transactions, true)
	}
	p.besieged()
}
