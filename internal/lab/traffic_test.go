package lab_test

import (
	"context"
	"crypto/tls"
	"io"
	"net/netip"
	"testing"
	"time"

	"mantlet/internal/lab"
)

// await lets the prober make some attempts of each kind.
func await(t *testing.T, prober *lab.Prober) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := prober.Await(ctx, 6); err != nil {
		t.Fatalf("%v: %+v", err, prober.Stats())
	}
}

func targets(host *lab.Host, port uint16) (all []netip.AddrPort) {
	for _, addr := range host.Addrs() {
		all = append(all, netip.AddrPortFrom(addr, port))
	}
	return all
}

func TestProberFindsPlaintext(t *testing.T) {
	network := newNetwork(t)
	pod, outside := addHost(t, network, "pod"), addHost(t, network, "outside")
	stream := serve(t, pod, lab.Service{Address: ":8080", Banner: "220 ready\r\n"})
	datagrams := serve(t, pod, lab.Service{Network: "udp", Address: ":8080"})
	prober := outside.Probe(targets(pod, 8080)...)
	await(t, prober)
	stats := prober.Stats() // Stop cuts short what is under way
	prober.Stop()
	if stream.Leaked() == 0 || datagrams.Leaked() == 0 {
		t.Errorf("leaked %d bytes of streams and %d of datagrams, want both", stream.Leaked(), datagrams.Leaked())
	}
	for target, tally := range stats {
		if tally.Answered != tally.Attempts || tally.Accepted != tally.Attempts || tally.Returned < len(lab.Marker)*tally.Attempts {
			t.Errorf("%s: %+v, want each attempt answered", target, tally)
		}
	}
}

func TestProberFindsNothing(t *testing.T) {
	network := newNetwork(t)
	pod, outside := addHost(t, network, "pod"), addHost(t, network, "outside")
	elsewhere := serve(t, pod, lab.Service{Address: ":8081"})
	prober := outside.Probe(targets(pod, 8080)...)
	await(t, prober)
	for target, tally := range prober.Stop() {
		if tally.Refused != tally.Attempts || tally.Returned != 0 {
			t.Errorf("%s: %+v, want each attempt refused", target, tally)
		}
	}
	if got := elsewhere.Connections(); len(got) > 0 {
		t.Errorf("another port was connected to: %+v", got)
	}
}

func TestProberKeepsPaceWhilePacketsAreDropped(t *testing.T) {
	network := newNetwork(t)
	pod, outside := addHost(t, network, "pod"), addHost(t, network, "outside")
	workload := serve(t, pod, lab.Service{Address: ":8080"})
	if _, err := pod.Run("nft", `table inet t { chain c { type filter hook input priority 0; th dport 8080 drop; }; }`); err != nil {
		t.Fatal(err)
	}
	prober := outside.Probe(targets(pod, 8080)...)
	started := time.Now()
	await(t, prober)
	took := time.Since(started)
	for target, tally := range prober.Stop() {
		if tally.Timeouts != tally.Attempts {
			t.Errorf("%s: %+v, want all timeouts", target, tally)
		}
	}
	if one := 200 * time.Millisecond; took > 6*one { // one after the other they would take 1.4 s and more
		t.Errorf("six attempts took %v", took)
	}
	if workload.Leaked() != 0 || len(workload.Connections()) != 0 {
		t.Errorf("workload has %+v", workload.Connections())
	}
}

func TestProberTellsTLSFromPlaintext(t *testing.T) {
	network := newNetwork(t)
	pod, outside := addHost(t, network, "pod"), addHost(t, network, "outside")
	mesh := newAuthority(t, "mesh")
	endpoint := serve(t, pod, lab.Service{
		Address: ":8080", TLS: issue(t, mesh, lab.Leaf{DNSNames: []string{"web"}}).ServerConfig(),
	})
	prober := outside.Probe(targets(pod, 8080)...)
	await(t, prober)
	if total := prober.Stop().Total(); total.Answered != 0 {
		t.Errorf("%+v, want no answer", total)
	}
	if endpoint.Leaked() != 0 {
		t.Errorf("endpoint got %d bytes", endpoint.Leaked())
	}

	serve(t, pod, lab.Service{Address: ":8081", Banner: "\x15\x03\x01\x00\x02\x02\x46"})
	prober = outside.Probe(targets(pod, 8081)...)
	await(t, prober)
	if total := prober.Stop().Total(); total.Returned == 0 || total.Answered != 0 {
		t.Errorf("%+v, want alerts", total)
	}

	raw, err := outside.Dial(t.Context(), "tcp", targets(pod, 8080)[0].String())
	if err != nil {
		t.Fatal(err)
	}
	conn := tls.Client(raw, issue(t, mesh, lab.Leaf{DNSNames: []string{"client"}}).ClientConfig("web"))
	defer conn.Close()
	got := make([]byte, 5)
	_, _ = conn.Write([]byte("hello"))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "hello" {
		t.Fatalf("echo %q: %v", got, err)
	}
	all := endpoint.Connections()
	if last := all[len(all)-1]; last.TLS == nil || len(last.TLS.PeerCertificates) != 2 || last.Received != 5 || last.Closed {
		t.Errorf("endpoint recorded %+v", last)
	}
}

func TestWorkloadCloseCutsConnections(t *testing.T) {
	network := newNetwork(t)
	pod, outside := addHost(t, network, "pod"), addHost(t, network, "outside")
	workload := serve(t, pod, lab.Service{Address: ":8080"})
	conn, err := outside.Dial(t.Context(), "tcp", targets(pod, 8080)[1].String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := workload.Close(); err != nil {
		t.Error(err)
	}
	if n, err := conn.Read(make([]byte, 1)); err == nil {
		t.Errorf("read %d bytes after the end", n)
	}
}
