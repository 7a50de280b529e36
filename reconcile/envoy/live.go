package envoy

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	"google.golang.org/protobuf/encoding/protojson"

	"mantlet/render"
	"mantlet/schema"
)

// Live is what a running Envoy says of itself.
type Live struct {
	Epoch     int
	State     string // LIVE, INITIALIZING, …; "" where none runs
	Digest    string // of what it was started with
	Settings  schema.Envoy
	Bootstrap *bootstrapv3.Bootstrap // what it was started with; Envoy adds to node
	Listeners map[string]bool
	Leaf      string // the serial number of the certificate that it shows, in hex
}

// Read asks the newest Envoy of a runtime directory that answers. It needs no mantlet that runs. Where no Envoy answers it
// returns the zero Live.
func Read(ctx context.Context, runtimeDirectory string) (Live, error) {
	sockets, err := filepath.Glob(filepath.Join(runtimeDirectory, "admin-*.sock"))
	if err != nil {
		return Live{}, err
	}
	epoch := func(path string) int {
		digits := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(path), "admin-"), ".sock")
		n, err := strconv.Atoi(digits)
		if err != nil {
			return -1
		}
		return n
	}
	slices.SortFunc(sockets, func(a, b string) int { return cmp.Compare(epoch(b), epoch(a)) })
	for _, socket := range sockets {
		a := newAdmin(socket)
		l, err := a.live(ctx)
		if err == nil {
			return l, nil
		}
		if ctx.Err() != nil {
			return Live{}, fmt.Errorf("%s: %w", filepath.Base(socket), err)
		}
	}
	return Live{}, nil
}

// live asks for all there is to know.
func (a admin) live(ctx context.Context) (Live, error) {
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
		return Live{}, err
	}
	l := Live{Epoch: info.Options.Epoch, State: info.State}
	l.Digest, _ = info.Node.Metadata[render.DigestKey].(string)
	drain, err := time.ParseDuration(info.Options.DrainTime)
	shutdown, err2 := time.ParseDuration(info.Options.ParentShutdownTime)
	l.Settings = schema.Envoy{
		Concurrency: info.Options.Concurrency, DrainTime: drain, ParentShutdownTime: shutdown, LogLevel: info.Options.LogLevel,
	}
	if err := errors.Join(err, err2); err != nil {
		return Live{}, fmt.Errorf("reading Envoy's options: %w", err)
	}
	if l.Listeners, err = a.listeners(ctx); err != nil {
		return Live{}, err
	}
	if l.Bootstrap, err = a.bootstrap(ctx); err != nil {
		return Live{}, err
	}
	l.Leaf, err = a.leaf(ctx)
	return l, err
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

// leaf asks /certs (envoy.admin.v3.Certificates) for the serial number of the certificate that Envoy shows; "" where it has none.
func (a admin) leaf(ctx context.Context) (string, error) {
	var answer struct {
		Certificates []struct {
			Chain []struct {
				Serial string `json:"serial_number"`
			} `json:"cert_chain"`
		} `json:"certificates"`
	}
	if err := a.get(ctx, "/certs", &answer); err != nil {
		return "", err
	}
	for _, c := range answer.Certificates {
		for _, leaf := range c.Chain {
			return leaf.Serial, nil
		}
	}
	return "", nil
}

// Unpublished returns what of the TLS directory is not published in the runtime directory, or is not what the Envoy that
// runs shows: a line each. The error says why the TLS directory's generation is not good: no such is ever published.
func Unpublished(tlsDirectory, runtimeDirectory string, live Live, now time.Time) ([]string, error) {
	c, err := LoadCertificates(tlsDirectory, now)
	if err != nil {
		return nil, err
	}
	var lines []string
	if serial := fmt.Sprintf("%x", c.certs[0].SerialNumber); live.State != "" && strings.TrimLeft(live.Leaf, "0") != serial {
		lines = append(lines, fmt.Sprintf("certificate: Envoy shows serial number %s, the TLS directory has %s", cmp.Or(live.Leaf, "none"), serial))
	} else if identity := published(runtimeDirectory, render.IdentitySecret); !bytes.Contains(identity, c.chain) || !bytes.Contains(identity, c.key) {
		lines = append(lines, "certificate: the TLS directory has another chain or key than Envoy was given")
	}
	if !bytes.Equal(published(runtimeDirectory, render.MeshCASecret), c.meshCA) {
		lines = append(lines, "mesh CA: the TLS directory has others than Envoy was given")
	}
	return lines, nil
}

// published returns the PEM texts that Publish put into a secret's file; nothing where it did not.
func published(runtimeDirectory, secret string) []byte {
	type source struct {
		Inline string `json:"inlineString"`
	}
	var file struct {
		Resources []struct {
			Certificate struct {
				Chain source `json:"certificateChain"`
				Key   source `json:"privateKey"`
			} `json:"tlsCertificate"`
			Context struct {
				CA source `json:"trustedCa"`
			} `json:"validationContext"`
		} `json:"resources"`
	}
	text, err := os.ReadFile(filepath.Join(runtimeDirectory, render.SecretFile(secret)))
	if err != nil || json.Unmarshal(text, &file) != nil || len(file.Resources) == 0 {
		return nil
	}
	r := file.Resources[0]
	return []byte(r.Certificate.Chain.Inline + r.Certificate.Key.Inline + r.Context.CA.Inline)
}
