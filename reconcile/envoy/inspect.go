package envoy

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	"google.golang.org/protobuf/encoding/protojson"

	"mantlet/internal/rundir"
	"mantlet/internal/status"
	"mantlet/render"
	"mantlet/schema"
)

// Published is the secrets that a running Envoy has.
type Published struct {
	secrets  secretTexts
	outdated bool // Envoy did not take a secret that it was given
}

// Read asks the newest Envoy of a runtime directory that answers. It needs no mantlet that runs. Where no Envoy answers it
// returns zero values.
func Read(ctx context.Context, runtimeDirectory string) (status.Envoy, *Published, error) {
	sockets, err := rundir.Envoy(runtimeDirectory).AdminSockets()
	if err != nil {
		return status.Envoy{}, nil, err
	}
	for _, socket := range sockets {
		a := newAdmin(socket)
		e, published, err := a.inspect(ctx)
		if err == nil {
			return e, published, nil
		}
		if ctx.Err() != nil {
			return status.Envoy{}, nil, fmt.Errorf("%s: %w", filepath.Base(socket), err)
		}
	}
	return status.Envoy{}, nil, nil
}

// inspect asks for all there is to know.
func (a admin) inspect(ctx context.Context) (status.Envoy, *Published, error) {
	var info struct {
		State   string `json:"state"`
		Options struct {
			Epoch              int                  `json:"restart_epoch"`
			Concurrency        int                  `json:"concurrency"`
			DrainTime          string               `json:"drain_time"`
			ParentShutdownTime string               `json:"parent_shutdown_time"`
			LogLevel           schema.EnvoyLogLevel `json:"log_level"`
		} `json:"command_line_options"`
		Node struct {
			Metadata map[string]any `json:"metadata"`
		} `json:"node"`
	}
	if err := a.get(ctx, "/server_info", &info); err != nil {
		return status.Envoy{}, nil, err
	}
	e, published := status.Envoy{Epoch: info.Options.Epoch, State: info.State}, &Published{}
	e.Digest, _ = info.Node.Metadata[render.DigestKey].(string)
	drain, err := time.ParseDuration(info.Options.DrainTime)
	shutdown, err2 := time.ParseDuration(info.Options.ParentShutdownTime)
	e.Settings = schema.Envoy{
		Concurrency: info.Options.Concurrency, DrainTime: drain, ParentShutdownTime: shutdown, LogLevel: info.Options.LogLevel,
	}
	if err := errors.Join(err, err2); err != nil {
		return status.Envoy{}, nil, fmt.Errorf("reading Envoy's options: %w", err)
	}
	if e.Listeners, err = a.listeners(ctx); err != nil {
		return status.Envoy{}, nil, err
	}
	if e.Bootstrap, err = a.bootstrap(ctx); err != nil {
		return status.Envoy{}, nil, err
	}
	if published.secrets, err = a.secretTexts(ctx); err != nil {
		return status.Envoy{}, nil, err
	}
	states, err := a.secrets(ctx, meshNames())
	published.outdated = published.secrets.outdated(states)
	return e, published, err
}

// bootstrap asks /config_dump (envoy.admin.v3.BootstrapConfigDump). What Envoy adds in a version of its own is left out.
func (a admin) bootstrap(ctx context.Context) (*bootstrapv3.Bootstrap, error) {
	var answer struct {
		Configs []struct {
			Bootstrap json.RawMessage `json:"bootstrap"`
		} `json:"configs"`
	}
	if err := a.get(ctx, "/config_dump?mask=bootstrap", &answer); err != nil {
		return nil, err
	}
	for _, c := range answer.Configs {
		if len(c.Bootstrap) == 0 {
			continue
		}
		b := &bootstrapv3.Bootstrap{}
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(c.Bootstrap, b); err != nil {
			return nil, fmt.Errorf("reading Envoy's bootstrap: %w", err)
		}
		return b, nil
	}
	return nil, errors.New("reading Envoy's bootstrap: there is none in its answer to /config_dump")
}

// Differences returns what an Envoy has otherwise than the TLS directory, a line each; none where nil is given, since no Envoy runs. The error
// says why the TLS directory's set is not good: no such set is ever published.
func (p *Published) Differences(files schema.TLSFiles, now time.Time) ([]string, error) {
	c, err := LoadCertificates(files, now)
	if err != nil || p == nil {
		return nil, err
	}
	has, err := p.secrets.parse()
	if err != nil {
		return nil, err
	}
	chainName, caName := c.fileNames()
	var lines []string
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	switch {
	case len(has.chain) == 0:
		add("certificate: Envoy has none, %s has serial number %x", chainName, c.chain[0].SerialNumber)
	case !has.chain[0].Equal(c.chain[0]):
		add("certificate: Envoy shows serial number %x, %s has %x", has.chain[0].SerialNumber, chainName, c.chain[0].SerialNumber)
	case !slices.EqualFunc(has.chain, c.chain, (*x509.Certificate).Equal):
		add("certificate: Envoy shows other intermediates than %s has", chainName)
	}
	if more := subtract(has.anchors, c.anchors); len(more) > 0 {
		add("mesh CA: Envoy trusts %s, which %s does not have", listCAs(more), caName)
	}
	if missing := subtract(c.anchors, has.anchors); len(missing) > 0 {
		add("mesh CA: Envoy does not trust %s, which %s has", listCAs(missing), caName)
	}
	if p.outdated {
		add("certificate: Envoy did not take all of what it was given last")
	}
	return lines, nil
}

// subtract returns those of all that are not among others.
func subtract(all, others []*x509.Certificate) []*x509.Certificate {
	return slices.DeleteFunc(slices.Clone(all), func(one *x509.Certificate) bool { return slices.ContainsFunc(others, one.Equal) })
}
