package status

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"

	"mantlet/render"
	"mantlet/schema"
)

// Limits of a probe. A kubelet waits for a second, if it is not told otherwise. Whatever the workload answers beyond its
// status is read, as far as this, and thrown away.
const (
	probeLimit  = time.Second
	probeHeader = 16 << 10
	probeBody   = 10 << 10
)

// probe asks the workload what a probe of the configuration asks, and tells whether it is well: 200 or 503, and nothing
// else. Nothing of the request goes on to the workload.
func (s *Server) probe(w http.ResponseWriter, r *http.Request) {
	probes := s.Source.Probes()
	i := slices.IndexFunc(probes, func(p schema.Probe) bool { return p.Name == r.PathValue("name") })
	if i < 0 {
		http.Error(w, "there is no such probe", http.StatusNotFound)
		return
	}
	p, to := probes[i], netip.AddrPortFrom(askedAt(r), probes[i].Port)
	well := once(s, fmt.Sprintf("probe %+v %s", p, to), func(ctx context.Context) bool {
		ctx, cancel := context.WithTimeout(ctx, probeLimit)
		defer cancel()
		err := ask(ctx, p, to)
		s.Source.Probed(p, err)
		return err == nil
	})
	if !well {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
}

// askedAt returns the pod's address that a request came to, since a workload may listen there alone; for one over the unix
// socket, the first that the pod has.
func askedAt(r *http.Request) netip.Addr {
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr); ok {
		return local.AddrPort().Addr().Unmap()
	}
	addrs, _ := net.InterfaceAddrs() // none: loopback
	for _, a := range addrs {
		if prefix, err := netip.ParsePrefix(a.String()); err == nil && prefix.Addr().IsGlobalUnicast() {
			return prefix.Addr()
		}
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1})
}

// ask returns nil if the workload is well.
func ask(ctx context.Context, p schema.Probe, to netip.AddrPort) error {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{Control: stayInside}).DialContext(ctx, "tcp", to.String())
	}
	if p.Kind == schema.ProbeTCP {
		conn, err := dial(ctx, "", "")
		if err != nil {
			return err
		}
		return conn.Close()
	}
	transport := &http.Transport{ // of its own: no proxy, no connection that is kept
		DialContext: dial, DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: probeHeader, Protocols: &http.Protocols{},
	}
	defer transport.CloseIdleConnections()
	url := "http://" + netip.AddrPortFrom(to.Addr().WithZone(""), to.Port()).String()
	if p.Kind == schema.ProbeGRPC {
		transport.Protocols.SetUnencryptedHTTP2(true)
		return askGRPC(ctx, transport, url, p.Target)
	}
	transport.Protocols.SetHTTP1(true)
	return askHTTP(ctx, transport, url+p.Target)
}

// stayInside gives a socket the priority by which the rules keep it from leaving the pod.
func stayInside(_, _ string, raw syscall.RawConn) error {
	var refused error
	err := raw.Control(func(fd uintptr) {
		refused = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PRIORITY, int(render.WorkloadPriority))
	})
	return errors.Join(err, refused)
}

// askHTTP takes what a kubelet takes for good. RoundTrip follows no redirect.
func askHTTP(ctx context.Context, transport http.RoundTripper, url string) error {
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
	_, _ = io.CopyN(io.Discard, response.Body, probeBody) // a workload that can't write its answer may log that
	if code := response.StatusCode; code < 200 || code > 399 {
		return fmt.Errorf("the workload answers with status %d", code)
	}
	return nil
}

// serving is ServingStatus SERVING of grpc.health.v1.
const serving = 1

// askGRPC calls grpc.health.v1.Health/Check, as gRPC's protocol over HTTP/2 has it. A client of gRPC would be a quarter of
// this program.
func askGRPC(ctx context.Context, transport http.RoundTripper, url, service string) error {
	var message []byte
	if service != "" {
		message = protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), service)
	}
	frame := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/grpc.health.v1.Health/Check", strings.NewReader(string(frame)))
	if err != nil {
		return err
	}
	request.Header.Set("User-Agent", "mantlet-probe")
	request.Header.Set("Content-Type", "application/grpc")
	request.Header.Set("TE", "trailers")
	response, err := transport.RoundTrip(request)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(response.Body, probeBody))
	if err != nil {
		return err
	}
	status := response.Trailer.Get("Grpc-Status")
	if status == "" {
		status = response.Header.Get("Grpc-Status") // of an answer that is nothing but an error
	}
	switch {
	case response.StatusCode != http.StatusOK:
		return fmt.Errorf("the workload answers with status %d", response.StatusCode)
	case status == "12":
		return errors.New("the workload does not implement grpc.health.v1")
	case status == "5":
		return fmt.Errorf("the workload does not know the service %q", service)
	case status != "0":
		return errors.New("the workload answers with an error")
	}
	health, err := servingStatus(body)
	if err == nil && health != serving {
		err = fmt.Errorf("the workload is not SERVING, its status is %d", health)
	}
	return err
}

// servingStatus reads a HealthCheckResponse in its frame.
func servingStatus(frame []byte) (status uint64, err error) {
	const head = 5 // whether it is compressed, and the length
	if len(frame) < head || frame[0] != 0 || int64(binary.BigEndian.Uint32(frame[1:])) != int64(len(frame)-head) {
		return 0, errors.New("the workload's answer is no message of gRPC")
	}
	for message := frame[head:]; len(message) > 0; {
		number, kind, n := protowire.ConsumeField(message)
		if n < 0 {
			return 0, errors.New("the workload's answer is no HealthCheckResponse")
		}
		if number == 1 && kind == protowire.VarintType {
			_, _, tag := protowire.ConsumeTag(message)
			status, _ = protowire.ConsumeVarint(message[tag:])
		}
		message = message[n:]
	}
	return status, nil
}
