package status

import (
	"context"
	"net"
	"net/http"
)

// OverSocket returns a client of the HTTP server at a unix socket. Connections are not kept: an idle one could stay with
// whoever listened there before.
func OverSocket(path string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		},
	}}
}
