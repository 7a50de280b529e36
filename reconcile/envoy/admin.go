package envoy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"mantlet/internal/status"
	"mantlet/render"
)

// admin asks the Envoy behind one admin socket.
type admin struct {
	socket string
	client *http.Client
}

func newAdmin(socket string) admin {
	return admin{socket, status.OverSocket(socket)}
}

// maxAnswer bounds how much of an answer is read. The statistics of some thousand listeners take about a MiB.
const maxAnswer = 64 << 20

func (a admin) ask(ctx context.Context, path string, read func(*http.Response) error) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://envoy"+path, nil)
	if err != nil {
		return err
	}
	response, err := a.client.Do(request)
	if err != nil {
		return fmt.Errorf("asking Envoy for %s: %w", path, err)
	}
	defer func() { _ = response.Body.Close() }()
	if err := read(response); err != nil {
		return fmt.Errorf("reading Envoy's answer to %s: %w", path, err)
	}
	return nil
}

func (a admin) get(ctx context.Context, path string, into any) error {
	return a.ask(ctx, path, func(r *http.Response) error {
		if r.StatusCode != http.StatusOK {
			return errors.New(r.Status)
		}
		return json.NewDecoder(io.LimitReader(r.Body, maxAnswer)).Decode(into)
	})
}

// statistics returns all of them in Prometheus' text format.
func (a admin) statistics(ctx context.Context) (text []byte, err error) {
	err = a.ask(ctx, "/stats/prometheus", func(r *http.Response) (err error) {
		if r.StatusCode != http.StatusOK {
			return errors.New(r.Status)
		}
		text, err = io.ReadAll(io.LimitReader(r.Body, maxAnswer))
		return err
	})
	return text, err
}

// isLive is envoy.admin.v3.ServerInfo.State's name for an Envoy that serves.
const isLive = "LIVE"

// ready returns nil if Envoy serves. It asks /ready, which answers with a few words.
func (a admin) ready(ctx context.Context) error {
	var state []byte
	err := a.ask(ctx, "/ready", func(r *http.Response) (err error) {
		state, err = io.ReadAll(io.LimitReader(r.Body, 64))
		return err
	})
	if said := strings.TrimSpace(string(state)); err == nil && said != isLive {
		return fmt.Errorf("Envoy is %s, not %s", said, isLive)
	}
	return err
}

// info asks /server_info (envoy.admin.v3.ServerInfo) for state, epoch and digest, and reads up to the digest: the 120 KB after it list what
// Envoy is built with.
func (a admin) info(ctx context.Context) (info status.Envoy, err error) {
	err = a.ask(ctx, "/server_info", func(r *http.Response) error {
		for from := json.NewDecoder(io.LimitReader(r.Body, maxAnswer)); info.Digest == ""; {
			name, err := from.Token()
			if errors.Is(err, io.EOF) {
				return nil
			}
			switch name {
			case "state":
				err = from.Decode(&info.State)
			case "restart_epoch":
				err = from.Decode(&info.Epoch)
			case render.DigestKey:
				err = from.Decode(&info.Digest)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	return info, err
}

// listeners returns the names of the listeners that Envoy has.
func (a admin) listeners(ctx context.Context) (map[string]bool, error) {
	var answer struct {
		Statuses []struct {
			Name string `json:"name"`
		} `json:"listener_statuses"`
	}
	if err := a.get(ctx, "/listeners?format=json", &answer); err != nil {
		return nil, err
	}
	names := map[string]bool{}
	for _, s := range answer.Statuses {
		names[s.Name] = true
	}
	return names, nil
}

// connections returns how many connections are open to the workload and to upstreams. Connections whose handshake is not finished are not
// counted: strangers must not delay the end of an Envoy.
func (a admin) connections(ctx context.Context) (int, error) {
	return a.sum(ctx, openConnections)
}

// openConnections matches the statistics that count connections which would be cut if the process ended.
const openConnections = `^cluster\.(workload|egress-.*)\.upstream_cx_active$`

// sum adds up the statistics whose names match a regular expression.
func (a admin) sum(ctx context.Context, names string) (int, error) {
	stats, err := a.stats(ctx, names)
	sum := 0
	for _, n := range stats {
		sum += int(n)
	}
	return sum, err
}

// stats returns the statistics whose names match a regular expression.
func (a admin) stats(ctx context.Context, names string) (map[string]uint64, error) {
	var answer struct {
		Stats []struct {
			Name  string `json:"name"`
			Value uint64 `json:"value"`
		} `json:"stats"`
	}
	if err := a.get(ctx, "/stats?format=json&filter="+url.QueryEscape(names), &answer); err != nil {
		return nil, err
	}
	all := map[string]uint64{}
	for _, s := range answer.Stats {
		all[s.Name] = s.Value
	}
	return all, nil
}
