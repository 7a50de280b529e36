package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	"mantlet/internal/lab"
	"mantlet/internal/rundir"
	"mantlet/internal/status"
)

// webServer is one of a workload, which remembers what it was asked. Its answers say secret, and so do its headers.
type webServer struct {
	mu        sync.Mutex
	asked     []string
	unhealthy bool
}

func (s *webServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.asked = append(s.asked, fmt.Sprintf("%s %s %v", r.Method, r.URL.RequestURI(), r.Header))
	unhealthy := s.unhealthy
	s.mu.Unlock()
	w.Header().Set("X-Secret", "secret")
	switch r.URL.Path {
	case "/healthz":
		if unhealthy {
			w.WriteHeader(http.StatusInternalServerError)
		}
		_, _ = io.WriteString(w, "secret")
	case "/moved":
		http.Redirect(w, r, "/secret", http.StatusFound)
	case "/endless":
		for r.Context().Err() == nil {
			if _, err := io.WriteString(w, strings.Repeat("secret", 1000)); err != nil {
				return
			}
		}
	case "/silent":
		<-r.Context().Done()
	case "/headers":
		w.Header().Set("X-Long", strings.Repeat("secret", 10_000))
	default:
		http.NotFound(w, r)
	}
}

// taken returns what was asked since the last call.
func (s *webServer) taken() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	asked := s.asked
	s.asked = nil
	return asked
}

func (s *webServer) set(unhealthy bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unhealthy = unhealthy
}

// serveHTTP starts a web server in the pod.
func (p *pod) serveHTTP(address string) *webServer {
	p.t.Helper()
	listener, err := p.Listen("tcp", address)
	p.must(err)
	s := &webServer{}
	server := &http.Server{Handler: s}
	go func() { _ = server.Serve(listener) }()
	p.t.Cleanup(func() { _ = server.Close() })
	return s
}

// serveGRPC starts a server of gRPC in the pod, without its health protocol where that is nil.
func (p *pod) serveGRPC(address string, h *health.Server) {
	p.t.Helper()
	listener, err := p.Listen("tcp", address)
	p.must(err)
	server := grpc.NewServer()
	if h != nil {
		healthv1.RegisterHealthServer(server, h)
	}
	go func() { _ = server.Serve(listener) }()
	p.t.Cleanup(server.Stop)
}

// TestProbes asks mantlet, as a kubelet does, how workloads are: real ones, that the kubelet can't ask.
func TestProbes(t *testing.T) {
	t.Parallel()
	p := newPod(t, fmt.Sprintf("MANTLET_STATUS_ADDRESS=:%d", statusPort), `MANTLET_CONFIG_INLINE=
probes:
  - {name: web, http: 8080/healthz}
  - {name: missing, http: "8080/nothing?a=b%20c"}
  - {name: moved, http: 8080/moved}
  - {name: endless, http: 8080/endless}
  - {name: silent, http: 8080/silent}
  - {name: headers, http: 8080/headers}
  - {name: no-http, http: 7}
  - {name: ipv4, http: 8084/healthz}
  - {name: ipv6, http: 8086/healthz}
  - {name: local, http: 8081/healthz}
  - {name: tcp, tcp: 9090}
  - {name: nobody, tcp: 4444}
  - {name: nobody-http, http: 4444}
  - {name: nobody-grpc, grpc: 4444}
  - {name: grpc, grpc: 9000}
  - {name: grpc-well, grpc: 9000/shop.Orders}
  - {name: grpc-unhealthy, grpc: 9000/shop.Carts}
  - {name: grpc-unknown, grpc: 9000/shop.Nothing}
  - {name: grpc-without, grpc: 9001}
  - {name: no-grpc, grpc: 8080}
  - {name: no-http2, grpc: 7}
`)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.besiege()
	p.run()
	p.protect(mtlsPort)
	p.serve(p.Host, lab.Service{Address: ":7"}) // it echoes whatever HTTP says
	server := p.serveHTTP(":8080")
	p.serveHTTP(p.IPv4.String() + ":8084")
	p.serveHTTP("[" + p.IPv6.String() + "]:8086")
	p.serveHTTP("127.0.0.1:8081")
	h := health.NewServer()
	h.SetServingStatus("shop.Orders", healthv1.HealthCheckResponse_SERVING)
	h.SetServingStatus("shop.Carts", healthv1.HealthCheckResponse_NOT_SERVING)
	p.serveGRPC(":9000", h)
	p.serveGRPC(":9001", nil)
	p.ready()

	for _, addr := range p.Addrs() {
		for name, well := range map[string]bool{
			"web": true, "missing": false, "moved": true, "endless": true, "silent": false, "headers": false, "no-http": false,
			"ipv4": addr == p.IPv4, "ipv6": addr == p.IPv6, "local": false,
			"tcp": true, "nobody": false, "nobody-http": false, "nobody-grpc": false,
			"grpc": true, "grpc-well": true, "grpc-unhealthy": false, "grpc-unknown": false, "grpc-without": false, "no-grpc": false, "no-http2": false,
		} {
			want := http.StatusServiceUnavailable
			if well {
				want = http.StatusOK
			}
			if code, said, err := p.get(addr, http.MethodGet, "/probe/"+name); err != nil || code != want || said != "" {
				t.Errorf("%s at %s: %d %q, %v; want %d and no body", name, addr, code, said, err, want)
			}
		}
	}
	if asked := strings.Join(server.taken(), "\n"); strings.Contains(asked, "/secret") || !strings.Contains(asked, "/moved") || !strings.Contains(asked, "/nothing?a=b%20c") {
		t.Errorf("the workload was asked:\n%s", asked)
	}
	p.fixed(server)

	// Over the unix socket the workload is asked at an address of the pod's too.
	socket := status.OverSocket(rundir.Directory(p.sidecar.RuntimeDirectory).StatusSocket())
	for name, want := range map[string]int{"web": 200, "grpc-well": 200, "grpc-unhealthy": 503, "local": 503} {
		response, err := socket.Get("http://mantlet/probe/" + name)
		p.must(err)
		p.must(response.Body.Close())
		if response.StatusCode != want {
			t.Errorf("%s over the socket: %s, want %d", name, response.Status, want)
		}
	}

	// What changes is told once.
	const fails, again = `"msg":"a probe of the workload fails","name":"web"`, `"msg":"a probe of the workload succeeds again","name":"web"`
	for range 2 {
		for _, unhealthy := range []bool{true, true, false, false} {
			server.set(unhealthy)
			if code, _, err := p.get(p.IPv4, http.MethodGet, "/probe/web"); err != nil || (code == 200) == unhealthy {
				t.Errorf("unhealthy is %t: %d, %v", unhealthy, code, err)
			}
		}
	}
	if f, a := p.log.count(fails), p.log.count(again); f != 2 || a != 2 {
		t.Errorf("unhealthy twice, the log says so %d times, and %d times that it is well again", f, a)
	}
	if strings.Contains(p.log.String(), "secret") {
		t.Error("the log has text of the workload's")
	}

	// The workload itself is where it was: behind mutual TLS.
	p.besieged()
	mesh := p.client.ClientConfig("pod")
	p.must(p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), mesh))
	conn := p.dial(p.outside, netip.AddrPortFrom(p.IPv4, 8080))
	_, _ = io.WriteString(conn, "GET /healthz HTTP/1.0\r\n\r\n")
	p.must(cut(conn))
}

// fixed checks that nothing of a probe's request reaches the workload, and nothing of the workload who asks.
func (p *pod) fixed(server *webServer) {
	p.t.Helper()
	server.taken()
	var dialer http.Transport
	dialer.DisableKeepAlives = true
	dialer.DialContext = func(ctx context.Context, network, to string) (net.Conn, error) {
		return p.outside.Dial(ctx, network, to)
	}
	at := "http://" + netip.AddrPortFrom(p.IPv4, statusPort).String()
	request, err := http.NewRequest(http.MethodGet, at+"/probe/web?path=/secret&q=1", strings.NewReader("body"))
	p.must(err)
	request.Header.Set("Authorization", "Bearer x")
	request.Header.Set("X-Forwarded-For", "10.0.0.1")
	request.Host = "evil"
	response, err := dialer.RoundTrip(request)
	p.must(err)
	p.must(response.Body.Close())
	if response.StatusCode != http.StatusOK || response.Header.Get("X-Secret") != "" || response.ContentLength != 0 {
		p.t.Errorf("it answers %s with %v", response.Status, response.Header)
	}
	if asked := server.taken(); len(asked) != 1 || asked[0] != "GET /healthz map[Accept:[*/*] Connection:[close] User-Agent:[mantlet-probe]]" {
		p.t.Errorf("the workload was asked %q", asked)
	}
	for _, path := range []string{"/probe", "/probe/", "/probe/web/", "/probe/web/secret", "/probe/Web", "/probe/..%2fsecret", "/probe/8080", "/probe/%00"} {
		if code, _, err := p.get(p.IPv4, http.MethodGet, path); err != nil || code != http.StatusNotFound {
			p.t.Errorf("%s: %d, %v", path, code, err)
		}
	}
	if code, _, err := p.get(p.IPv4, http.MethodPost, "/probe/web"); err != nil || code != http.StatusMethodNotAllowed {
		p.t.Errorf("POST: %d, %v", code, err)
	}
	if asked := server.taken(); asked != nil {
		p.t.Errorf("the workload was asked %q", asked)
	}
}

// TestProbesAreReloaded: a change of probes is in force at once, and touches neither rules nor Envoy.
func TestProbesAreReloaded(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, fmt.Sprintf("MANTLET_STATUS_ADDRESS=:%d", statusPort))
	m := p.override("probes: [{name: web, tcp: 4444}]")
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.besiege()
	p.run()
	p.protect(mtlsPort)
	p.protect(tlsPort)
	p.serveHTTP(":80")
	p.ready()
	asks := func(name string, want int) {
		t.Helper()
		p.await(fmt.Sprintf("probe %s answers %d", name, want), func() bool {
			code, _, err := p.get(p.IPv6, http.MethodGet, "/probe/"+name)
			return err == nil && code == want
		})
	}
	asks("web", 503)
	before, rules := p.status(), p.rules()
	m.write("probes: [{name: web, http: 80/healthz}, {name: new, tcp: 9090}]")
	asks("web", 200)
	asks("new", 200)
	m.write("probes: [{name: web, http: 80/nothing}]")
	asks("web", 503)
	asks("new", 404)
	m.write("probes: [{name: web}]")
	p.await("a bad file is said to be bad", func() bool { return p.log.count("needs one of http, tcp and grpc") > 0 })
	asks("web", 503)
	after := p.status()
	if p.rules() != rules {
		t.Errorf("the rules were\n%s\nand are\n%s", rules, p.rules())
	}
	was, _ := json.Marshal(before.Applies)
	is, _ := json.Marshal(after.Applies)
	if string(was) != string(is) || before.Epochs[0].PID != after.Epochs[0].PID || len(after.Epochs) != 1 {
		t.Errorf("what was applied, before and after:\n%s %+v\n%s %+v", was, before.Epochs, is, after.Epochs)
	}
	if before.Desired.Digest != after.Desired.Digest || after.Desired.Generation != before.Desired.Generation+2 || *after.Applied != *after.Desired {
		t.Errorf("desired was %+v, is %+v, and applied is %+v", before.Desired, after.Desired, after.Applied)
	}
}

// TestProbesWhileClosed: how the workload is has nothing to do with whether anybody may come in.
func TestProbesWhileClosed(t *testing.T) {
	t.Parallel()
	p := newPod(t, fmt.Sprintf("MANTLET_STATUS_ADDRESS=:%d", statusPort), "MANTLET_CONFIG_INLINE=probes: [{name: web, http: 8080/healthz}]")
	p.besiege()
	p.run() // and no certificates come
	p.serveHTTP(":8080")
	p.protect(mtlsPort)
	p.await("the workload is well", func() bool {
		code, _, err := p.get(p.IPv4, http.MethodGet, "/probe/web")
		return err == nil && code == http.StatusOK
	})
	p.unready("waiting for certificates")
	p.besieged()
}
