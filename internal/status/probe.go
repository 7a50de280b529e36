package status

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"mantlet/render"
	"mantlet/schema"
)

// Limits of a probe.
const (
	probeLimit  = time.Second // the kubelet's default timeout
	probeHeader = 16 << 10
	probeBody   = 10 << 10 // that is read and discarded
)

// probe runs a configured probe of the workload, and answers with 200 or 503 and no body. Nothing of the request is passed on to the
// workload.
func (s *Server) probe(w http.ResponseWriter, r *http.Request) {
	probes := s.Source.Probes()
	i := slices.IndexFunc(probes, func(p schema.Probe) bool { return p.Name == r.PathValue("name") })
	if i < 0 {
		http.Error(w, "there is no such probe", http.StatusNotFound)
		return
	}
	p, to := probes[i], netip.AddrPortFrom(probeAddress(r), probes[i].Port)
	well := coalesce(s, fmt.Sprintf("probe %+v %s", p, to), func(ctx context.Context) bool {
		ctx, cancel := context.WithTimeout(ctx, probeLimit)
		defer cancel()
		err := runProbe(ctx, p, to)
		s.Source.Probed(p, err)
		return err == nil
	})
	if !well {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
}

// probeAddress returns the pod's address that a request came to: the workload may listen at that address alone. For a request over the unix
// socket it is the pod's first global address.
func probeAddress(r *http.Request) netip.Addr {
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr); ok {
		return local.AddrPort().Addr().Unmap()
	}
	addrs, _ := net.InterfaceAddrs() // if that fails, loopback is left
	for _, a := range addrs {
		if prefix, err := netip.ParsePrefix(a.String()); err == nil && prefix.Addr().IsGlobalUnicast() {
			return prefix.Addr()
		}
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1})
}

// runProbe returns nil if the probe succeeds.
func runProbe(ctx context.Context, p schema.Probe, to netip.AddrPort) error {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{Control: markWorkloadTraffic}).DialContext(ctx, "tcp", to.String())
	}
	if p.Kind == schema.ProbeTCP {
		conn, err := dial(ctx, "", "")
		if err != nil {
			return err
		}
		return conn.Close()
	}
	transport := &http.Transport{ // a transport for each probe: it uses no proxy, and keeps no connection
		DialContext: dial, DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: probeHeader, Protocols: &http.Protocols{},
	}
	defer transport.CloseIdleConnections()
	url := "http://" + netip.AddrPortFrom(to.Addr().WithZone(""), to.Port()).String()
	if p.Kind == schema.ProbeGRPC {
		transport.Protocols.SetUnencryptedHTTP2(true)
		return runGRPCProbe(ctx, transport, url, p.Target)
	}
	transport.Protocols.SetHTTP1(true)
	return runHTTPProbe(ctx, transport, url+p.Target)
}

// markWorkloadTraffic sets a socket's priority to render.WorkloadPriority. The rules keep such packets inside the pod.
func markWorkloadTraffic(_, _ string, raw syscall.RawConn) error {
	var refused error
	err := raw.Control(func(fd uintptr) {
		refused = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PRIORITY, int(render.WorkloadPriority))
	})
	return errors.Join(err, refused)
}

// runHTTPProbe succeeds where a kubelet's probe does: with a status from 200 to 399. RoundTrip follows no redirect.
func runHTTPProbe(ctx context.Context, transport http.RoundTripper, url string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	request.Header.Set("User-Agent", "mantlet-probe")
	request.Header.Set("Accept", "*/*")
	response, err := transport.RoundTrip(request)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	_, _ = io.CopyN(io.Discard, response.Body, probeBody) // a workload might log that its answer was cut off
	if code := response.StatusCode; code < 200 || code > 399 {
		return fmt.Errorf("the workload answers with status %d", code)
	}
	return nil
}
