package envoy

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"sync"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"mantlet/internal/rundir"
	"mantlet/render"
	"mantlet/schema"
)

// Endpoints tells Envoys the addresses of upstreams that are given by name. It is the server of their one discovery stream
// (envoy.service.discovery.v3.AggregatedDiscoveryService), at a unix socket of the runtime directory.
//
// Files would be simpler. But Envoy takes an inotify instance for each file that it watches, and aborts where its user has none left: the
// kernel's default is 128, for all pods of a node together. gRPC's own server would make the binary a third larger, and little of it is
// needed: messages are framed on an HTTP/2 stream.
type Endpoints struct {
	log    *slog.Logger
	server *http.Server
	done   chan struct{} // closed once the server has ended

	mu          sync.Mutex
	assignments map[string]assignment // by service name
	version     uint64                // of the last change
	changed     chan struct{}         // closed at the next change
}

// assignment is a ClusterLoadAssignment as a message, and the version that it changed with.
type assignment struct {
	packed  []byte // google.protobuf.Any
	version uint64
}

// ServeEndpoints serves until Close. Envoys reach the socket by their group, which is the directory's.
func ServeEndpoints(runtimeDirectory string, log *slog.Logger) (*Endpoints, error) {
	socket := rundir.Envoy(runtimeDirectory).DiscoverySocket()
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("removing the discovery socket of a mantlet before this one: %w", err)
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return nil, fmt.Errorf("opening the discovery socket: %w", err)
	}
	if err := os.Chmod(socket, 0o660); err != nil {
		return nil, errors.Join(fmt.Errorf("opening the discovery socket to Envoy: %w", err), listener.Close())
	}
	e := &Endpoints{log: log, done: make(chan struct{}), assignments: map[string]assignment{}, changed: make(chan struct{})}
	e.server = &http.Server{
		Handler: e, Protocols: &http.Protocols{}, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	e.server.Protocols.SetUnencryptedHTTP2(true)
	go func() {
		defer close(e.done)
		_ = e.server.Serve(listener) // returns after Close; it retries an Accept that fails temporarily
	}()
	return e, nil
}

// Close ends the server and all streams. Envoys keep the addresses that they have.
func (e *Endpoints) Close() error {
	err := e.server.Close()
	<-e.done
	return err
}

// Set makes these the addresses of an upstream that is given by name, and sends them to the Envoys that have it. Open connections to
// other addresses go on; no new one is made there. It is idempotent.
func (e *Endpoints) Set(upstream schema.Upstream, addrs []netip.Addr) error {
	packed, err := pack(upstream, addrs)
	if err != nil {
		return fmt.Errorf("marshalling the addresses of %s: %w", upstream, err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	name := render.ServiceName(upstream)
	if bytes.Equal(e.assignments[name].packed, packed) {
		return nil
	}
	e.version++
	e.assignments[name] = assignment{packed, e.version}
	close(e.changed)
	e.changed = make(chan struct{})
	return nil
}

// Forget drops the addresses of an upstream. An Envoy that has the upstream keeps its addresses, so it is meant for upstreams that no
// Envoy has any more.
func (e *Endpoints) Forget(upstream schema.Upstream) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.assignments, render.ServiceName(upstream))
}

// endpointType is the type URL of the only kind of resource that is served.
const endpointType = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"

// pack returns the resource of an upstream.
func pack(upstream schema.Upstream, addrs []netip.Addr) ([]byte, error) {
	assignment := &endpointv3.ClusterLoadAssignment{ClusterName: render.ServiceName(upstream)}
	if len(addrs) > 0 {
		locality := &endpointv3.LocalityLbEndpoints{}
		for _, addr := range addrs {
			locality.LbEndpoints = append(locality.LbEndpoints, render.Endpoint(addr, upstream.Port))
		}
		assignment.Endpoints = []*endpointv3.LocalityLbEndpoints{locality}
	}
	resource := &anypb.Any{}
	if err := anypb.MarshalFrom(resource, assignment, proto.MarshalOptions{Deterministic: true}); err != nil {
		return nil, err
	}
	return proto.Marshal(resource)
}

// ServeHTTP implements http.Handler for StreamAggregatedResources.
func (e *Endpoints) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost || r.URL.Path != "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources" {
		http.NotFound(w, r)
		return
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	w.Header().Set("Content-Type", "application/grpc")
	w.WriteHeader(http.StatusOK)
	flush := http.NewResponseController(w).Flush
	if flush() != nil {
		return
	}
	requests := make(chan request)
	go func() {
		defer close(requests)
		for {
			next, err := readRequest(r.Body)
			if err != nil {
				return
			}
			select {
			case requests <- next:
			case <-ctx.Done():
				return
			}
		}
	}()
	s := subscription{}
	for nonce := uint64(1); ; {
		resources, version, changed := e.due(s)
		if len(resources) > 0 {
			if _, err := w.Write(response(resources, version, nonce)); err != nil || flush() != nil {
				return
			}
			nonce++
			continue
		}
		select {
		case next, ok := <-requests:
			if !ok {
				return
			}
			if next.rejected != "" {
				e.log.Error("Envoy does not take the addresses of upstreams", "error", next.rejected)
			}
			if next.kind == endpointType {
				s.take(next.names)
			}
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// subscription is what a stream asks for: the version of each name that was sent last; 0 for none.
type subscription map[string]uint64

// take replaces the names that the stream asks for.
func (s subscription) take(names []string) {
	before := map[string]uint64{}
	for name, version := range s {
		before[name] = version
	}
	clear(s)
	for _, name := range names {
		s[name] = before[name]
	}
}

// batch is how many resources one message has. They stay far below the 4 MiB that Envoy accepts.
const batch = 500

// due returns resources that have changed since they were sent, marks them as sent, and returns a channel that is closed at the next
// change. It leaves out a name that was not looked up yet: an Envoy that starts waits for it, for a time.
func (e *Endpoints) due(s subscription) (resources [][]byte, version uint64, changed <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for name, sent := range s {
		a, known := e.assignments[name]
		if !known || a.version == sent || len(resources) == batch {
			continue
		}
		resources = append(resources, a.packed)
		s[name] = a.version
	}
	return resources, e.version, e.changed
}

// response returns an envoy.service.discovery.v3.DiscoveryResponse as a gRPC message. The Go type of the message would link gRPC into the
// binary.
func response(resources [][]byte, version, nonce uint64) []byte {
	const versionInfo, resource, typeURL, nonceField = 1, 2, 4, 5
	text := make([]byte, 5) // one byte for no compression, four for the length
	field := func(number protowire.Number, value []byte) {
		text = protowire.AppendTag(text, number, protowire.BytesType)
		text = protowire.AppendBytes(text, value)
	}
	field(versionInfo, strconv.AppendUint(nil, version, 10))
	for _, r := range resources {
		field(resource, r)
	}
	field(typeURL, []byte(endpointType))
	field(nonceField, strconv.AppendUint(nil, nonce, 10))
	binary.BigEndian.PutUint32(text[1:], uint32(len(text)-5))
	return text
}

// request holds the fields that are needed of an envoy.service.discovery.v3.DiscoveryRequest.
type request struct {
	kind     string // type URL
	names    []string
	rejected string // why Envoy rejected the last response; empty if it did not
}

// maxRequest is enough for the names of many thousand upstreams.
const maxRequest = 16 << 20

// readRequest reads a gRPC message that holds a request.
func readRequest(from io.Reader) (request, error) {
	var head [5]byte
	if _, err := io.ReadFull(from, head[:]); err != nil {
		return request{}, err
	}
	size := binary.BigEndian.Uint32(head[1:])
	if head[0] != 0 || size > maxRequest {
		return request{}, fmt.Errorf("a message of %d bytes, compressed %d", size, head[0])
	}
	var text bytes.Buffer
	if _, err := io.CopyN(&text, from, int64(size)); err != nil {
		return request{}, err
	}
	return parseRequest(text.Bytes())
}

func parseRequest(text []byte) (r request, err error) {
	const names, typeURL, errorDetail, statusMessage = 3, 4, 6, 2
	err = eachField(text, func(number protowire.Number, value []byte) error {
		switch number {
		case names:
			r.names = append(r.names, string(value))
		case typeURL:
			r.kind = string(value)
		case errorDetail:
			r.rejected = "it does not say why"
			return eachField(value, func(number protowire.Number, value []byte) error {
				if number == statusMessage {
					r.rejected = truncate(string(value))
				}
				return nil
			})
		default: // the other fields are not needed
		}
		return nil
	})
	return r, err
}

// eachField calls fn for each field of a message that holds bytes, a string or a message.
func eachField(text []byte, fn func(number protowire.Number, value []byte) error) error {
	for len(text) > 0 {
		number, kind, n := protowire.ConsumeTag(text)
		if n < 0 {
			return protowire.ParseError(n)
		}
		text = text[n:]
		if kind != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(number, kind, text); n < 0 {
				return protowire.ParseError(n)
			}
			text = text[n:]
			continue
		}
		value, n := protowire.ConsumeBytes(text)
		if n < 0 {
			return protowire.ParseError(n)
		}
		if err := fn(number, value); err != nil {
			return err
		}
		text = text[n:]
	}
	return nil
}
