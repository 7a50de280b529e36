package envoy

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"mantlet/internal/lab"
	"mantlet/internal/rundir"
	"mantlet/schema"
)

// serveEndpoints tells this Runner's Envoys addresses until the test ends.
func serveEndpoints(t testing.TB, r *Runner) *Endpoints {
	t.Helper()
	endpoints, err := ServeEndpoints(r.RuntimeDirectory, r.Log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := endpoints.Close(); err != nil {
			t.Error(err)
		}
	})
	return endpoints
}

// greeter is an endpoint of the mesh at an address of loopback. It says the address to whoever connects, and then what it hears.
func greeter(t testing.TB, identity *lab.Identity, addr string) netip.AddrPort {
	t.Helper()
	listener, err := tls.Listen("tcp", addr, identity.ServerConfig())
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer conn.Close()
				_, _ = fmt.Fprintln(conn, listener.Addr())
				_, _ = io.Copy(conn, conn)
			})
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		serving.Wait()
	})
	return netip.MustParseAddrPort(listener.Addr().String())
}

// greeted connects to a listener of Envoy's and returns what is said first, without the line break; "" where nothing is.
func greeted(t testing.TB, listen string) (net.Conn, string) {
	t.Helper()
	conn, err := net.Dial("tcp", listen)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(limit)); err != nil {
		t.Fatal(err)
	}
	var said []byte
	for one := make([]byte, 1); ; said = append(said, one[0]) {
		if _, err := conn.Read(one); err != nil || one[0] == '\n' {
			return conn, string(said)
		}
	}
}

// TestEndpoints: Envoy goes to the addresses that it was told last, at once, and so does the next Envoy from its first moment on.
func TestEndpoints(t *testing.T) {
	r, _ := runner(t)
	identity := identity(t, r)
	endpoints := serveEndpoints(t, r)
	t.Cleanup(func() { r.Stop(); nothingRuns(t) })
	first := greeter(t, identity, "127.0.77.1:0")
	second := greeter(t, identity, fmt.Sprintf("127.0.77.2:%d", first.Port()))
	upstream := schema.Upstream{Host: "billing-svc", Port: first.Port()}
	const one, two = "127.0.0.1:15094", "127.0.0.1:15095"
	state, settings := state(t, r, fmt.Sprintf("EDG_EGRESS_PROXY_CONFIG=a#%s#%s##b#%s#%s", one, upstream, two, upstream))
	start := func() {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		if _, err := r.Start(ctx, state, settings); err != nil {
			t.Fatal(err)
		}
	}
	set := func(addrs ...netip.Addr) {
		t.Helper()
		if err := endpoints.Set(upstream, addrs); err != nil {
			t.Fatal(err)
		}
	}
	comes := func(want string) {
		t.Helper()
		for _, listen := range []string{one, two} {
			until(t, listen+" leads to "+want, func() bool { _, said := greeted(t, listen); return said == want })
		}
	}
	start() // although nothing is known
	for _, listen := range []string{one, two} {
		if _, said := greeted(t, listen); said != "" {
			t.Errorf("it leads to %q, and nothing is known", said)
		}
	}
	set(first.Addr())
	comes(first.String())
	old, _ := greeted(t, one)
	set(second.Addr())
	comes(second.String())
	if err := talk(old); err != nil {
		t.Errorf("a connection to an address that was taken away: %v", err)
	}

	start() // a hot restart
	for _, listen := range []string{one, two} {
		if _, said := greeted(t, listen); said != second.String() {
			t.Errorf("after a hot restart %s leads to %q, want %s", listen, said, second)
		}
	}
	if err := talk(old); err != nil {
		t.Errorf("a connection of the old Envoy: %v", err)
	}
	set(first.Addr(), second.Addr())
	comes(first.String())
	comes(second.String())
	set()
	comes("")
	set(first.Addr())
	comes(first.String())

	kill(r.serving())
	start()
	if _, said := greeted(t, one); said != first.String() {
		t.Errorf("after a crash it leads to %q, want %s", said, first)
	}
	open, err := r.Connections(t.Context())
	if _ = old.Close(); err != nil {
		t.Error(err)
	}
	t.Logf("%d connections", open)
	endpoints.Forget(upstream)
	set(second.Addr())
	comes(second.String())
}

// TestRefusedEndpoints: what Envoy does not take stands in the log.
func TestRefusedEndpoints(t *testing.T) {
	directory, log := t.TempDir(), &journal{}
	endpoints, err := ServeEndpoints(directory, log.logger())
	if err != nil {
		t.Fatal(err)
	}
	if err := endpoints.Set(schema.Upstream{Host: "a", Port: 1}, nil); err != nil {
		t.Fatal(err)
	}
	protocols := &http.Protocols{}
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", rundir.Envoy(directory).DiscoverySocket())
	}}
	body, requests := io.Pipe()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	asked, err := http.NewRequestWithContext(ctx, http.MethodPost,
		"http://mantlet/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources", body)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := transport.RoundTrip(asked)
	if err != nil {
		t.Fatal(err)
	}
	bytesField := func(number protowire.Number, value string) []byte {
		return protowire.AppendString(protowire.AppendTag(nil, number, protowire.BytesType), value)
	}
	detail := append(protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), 13), bytesField(2, "no such port")...)
	message := bytes.Join([][]byte{bytesField(3, "a:1"), bytesField(4, endpointType), bytesField(6, string(detail))}, nil)
	_, err = requests.Write(append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...))
	if err != nil {
		t.Fatal(err)
	}
	head := make([]byte, 5)
	if _, err := io.ReadFull(answer.Body, head); err != nil {
		t.Fatalf("no answer about the name: %v", err)
	}
	if !strings.Contains(log.String(), "no such port") {
		t.Errorf("the log does not say why:\n%s", log)
	}
	for _, broken := range [][]byte{{1, 0, 0, 0, 0}, {0, 0xff, 0xff, 0xff, 0xff}, {0, 0, 0, 0, 1, 0xff}} {
		if _, err := readRequest(bytes.NewReader(broken)); err == nil {
			t.Errorf("%v is a request", broken)
		}
	}
	_ = requests.Close()
	_ = answer.Body.Close()
	transport.CloseIdleConnections()
	if err := endpoints.Close(); err != nil {
		t.Error(err)
	}
}
