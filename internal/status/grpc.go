package status

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
)

// serving is SERVING of ServingStatus in grpc.health.v1.
const serving = 1

// runGRPCProbe calls grpc.health.v1.Health/Check by gRPC's protocol over HTTP/2. The library's client would make up a quarter of this
// program.
func runGRPCProbe(ctx context.Context, transport http.RoundTripper, url, service string) error {
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
		status = response.Header.Get("Grpc-Status") // an answer without a body has it there
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

// servingStatus returns the status in a HealthCheckResponse, which is in a gRPC frame.
func servingStatus(frame []byte) (status uint64, err error) {
	const head = 5 // one byte for compression, four for the length
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
