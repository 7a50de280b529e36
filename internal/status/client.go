package status

import (
	"context"
	"net"
	"net/http"
)

// OverSocket returns a client of the HTTP server at a unix socket. It opens a connection for each request: one that is kept could belong to
// a process that listened there before.
func OverSocket(path string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		},
	}}
}
