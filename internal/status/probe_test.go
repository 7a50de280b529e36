package status

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"

	"mantlet/schema"
)

// frame is a message of gRPC, not compressed.
func frame(message string) string {
	return string(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message)))) + message
}

// TestGRPCAnswers asks workloads that answer whatever they like. A real one is asked in cmd/mantlet.
func TestGRPCAnswers(t *testing.T) {
	const served, ill = "\x08\x01", "\x08\x02"
	answers := map[string]struct {
		code          int
		body, trailer string
		refused       string // the reason; "" where the workload is well
	}{
		"serving":                       {200, frame(served), "0", ""},
		"serving, and something newer":  {200, frame("\x12\x03abc" + served + "\x1d\x00\x00\x00\x00"), "0", ""},
		"not serving":                   {200, frame(ill), "0", "not SERVING, its status is 2"},
		"serving, then not":             {200, frame(served + ill), "0", "not SERVING, its status is 2"},
		"nothing":                       {200, frame(""), "0", "not SERVING, its status is 0"},
		"the status as text":            {200, frame("\x0a\x01\x01"), "0", "not SERVING, its status is 0"},
		"serving, with an error":        {200, frame(served), "13", "answers with an error"},
		"serving, without an end":       {200, frame(served), "", "answers with an error"},
		"an error alone":                {200, "", "12", "does not implement grpc.health.v1"},
		"an unknown service":            {200, "", "5", `does not know the service "shop.Orders"`},
		"no answer":                     {200, "", "0", "no message of gRPC"},
		"compressed":                    {200, "\x01" + frame(served)[1:], "0", "no message of gRPC"},
		"shorter than it says":          {200, frame(served)[:6], "0", "no message of gRPC"},
		"longer than it says":           {200, frame(served) + "\x00", "0", "no message of gRPC"},
		"longer than anything":          {200, "\x00\xff\xff\xff\xff" + served, "0", "no message of gRPC"},
		"no protocol buffers":           {200, frame("\x08"), "0", "no HealthCheckResponse"},
		"more than anybody asks":        {200, frame(served + strings.Repeat("\x12\x7f"+strings.Repeat("x", 127), 1000)), "0", "answers with an error"},
		"another status of HTTP":        {404, frame(served), "0", "status 404"},
		"a redirect, which is not gRPC": {302, frame(served), "0", "status 302"},
	}
	var asked, meant string // of one request after another
	server := &http.Server{Protocols: &http.Protocols{}, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		asked = fmt.Sprintf("%s %s %s %q %q %q", r.Proto, r.Method, r.URL.RequestURI(), r.Header.Get("Content-Type"), r.Header.Get("TE"), body)
		answer := answers[meant]
		w.Header().Set("Location", "http://127.0.0.1:1/")
		w.WriteHeader(answer.code)
		_, _ = io.WriteString(w, answer.body)
		if answer.trailer != "" {
			w.Header().Set(http.TrailerPrefix+"Grpc-Status", answer.trailer)
		}
	})}
	server.Protocols.SetUnencryptedHTTP2(true)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(listener) }()
	defer func() { _ = server.Close(); <-done }()
	to := netip.MustParseAddrPort(listener.Addr().String())
	for name, answer := range answers {
		meant = name
		err := runProbe(context.Background(), schema.Probe{Kind: schema.ProbeGRPC, Port: to.Port(), Target: "shop.Orders"}, to)
		if (err == nil) != (answer.refused == "") || err != nil && !strings.Contains(err.Error(), answer.refused) {
			t.Errorf("%s: %v; want %q", name, err, answer.refused)
		}
		if want := `HTTP/2.0 POST /grpc.health.v1.Health/Check "application/grpc" "trailers" "\x00\x00\x00\x00\r\n\vshop.Orders"`; asked != want {
			t.Errorf("it was asked %s, want %s", asked, want)
		}
	}
}

// FuzzServingStatus reads what a workload may answer: as protocol buffers read it, or not at all.
func FuzzServingStatus(f *testing.F) {
	for _, message := range []string{"", "\x08\x01", "\x08\x02", "\x08\x01\x08\x00", "\x0a\x01\x01", "\x08", "\x0b\x08\x02\x0c\x08\x01", "\x08\x81\x80\x80\x80\x80\x01"} {
		f.Add([]byte(frame(message)))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		status, err := servingStatus(data)
		var want healthv1.HealthCheckResponse
		if len(data) < 5 || frame(string(data[5:])) != string(data) || proto.Unmarshal(data[5:], &want) != nil {
			if err == nil {
				t.Fatalf("%q is no answer, and says %d", data, status)
			}
			return
		}
		if err != nil || int32(status) != int32(want.Status) {
			t.Fatalf("%q is %d, %v; want %d", data, status, err, want.Status)
		}
	})
}
