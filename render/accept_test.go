package render_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"mantlet/internal/lab"
	"mantlet/internal/rundir"
	"mantlet/render"
	"mantlet/schema"
)

// nft loads rules with the real nft into a network namespace of their own, after `nft -c` had its say, and returns how nft
// prints them there.
func nft(t testing.TB, rules []byte) (string, error) {
	t.Helper()
	cmd := exec.Command("sh", "-ec", "nft -c -f $0; nft -f $0; nft -s list table inet mantlet", file(t, rules))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	return run(cmd)
}

// validator asks the real Envoy what it thinks of bootstraps.
type validator struct {
	path  string
	place render.Place // the secrets are there
}

func newValidator(t testing.TB) validator {
	t.Helper()
	v := validator{os.Getenv("MANTLET_ENVOY_PATH"), render.Place{RuntimeDirectory: t.TempDir()}}
	if v.path == "" {
		t.Fatal("MANTLET_ENVOY_PATH names no Envoy to test with; `go tool task test` fetches one")
	}
	identity, err := lab.NewIdentity("pod")
	if err != nil {
		t.Fatal(err)
	}
	directory := t.TempDir()
	if err := identity.Write(directory); err != nil {
		t.Fatal(err)
	}
	const (
		identitySecret = `"tls_certificate": {"certificate_chain": {"filename": "%[1]s/certChain.pem"}, "private_key": {"filename": "%[1]s/key.pem"}}`
		caSecret       = `"validation_context": {"trusted_ca": {"filename": "%[1]s/mesh-ca.pem"}}`
	)
	for secret, content := range map[string]string{
		render.IdentitySecret: identitySecret, render.TrialIdentitySecret: identitySecret,
		render.MeshCASecret: caSecret, render.TrialClientCASecret: caSecret, render.TrialServerCASecret: caSecret,
	} {
		const form = `{"resources": [{"@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret", "name": %q, %s}]}`
		text := fmt.Sprintf(form, secret, fmt.Sprintf(content, directory))
		if err := os.WriteFile(rundir.Envoy(v.place.RuntimeDirectory).Secret(secret), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return v
}

func (v validator) validate(t testing.TB, state render.State) error {
	t.Helper()
	text, err := render.JSON(state.Bootstrap)
	if err != nil {
		t.Fatal(err)
	}
	_, err = run(exec.Command(v.path, "--mode", "validate", "--log-level", "error", "-c", file(t, text)))
	return err
}

func file(t testing.TB, content []byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "file.json")
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// run returns a command's standard output; the error has its standard error.
func run(cmd *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", cmd, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.String(), nil
}

// TestAccepted puts what is rendered of the golden cases to those that it is meant for: whatever differs, once.
func TestAccepted(t *testing.T) {
	validator := newValidator(t)
	seen := map[string]bool{}
	for name, g := range goldenCases(t) {
		mesh, err := load(g.inputs(t))
		if err != nil {
			continue
		}
		state, err := render.Render(mesh, validator.place)
		if err != nil {
			t.Fatal(err)
		}
		if want := state.Ruleset.Text(); !seen[want] {
			seen[want] = true
			t.Run("nft/"+name, func(t *testing.T) {
				t.Parallel()
				if got, err := nft(t, []byte(want)); err != nil || got != want {
					t.Errorf("%v\ngot:\n%swant:\n%s", err, got, want)
				}
			})
		}
		if !seen[state.Digest] {
			seen[state.Digest] = true
			t.Run("envoy/"+name, func(t *testing.T) {
				t.Parallel()
				if err := validator.validate(t, state); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestGenerationsAreAccepted puts chains of several generations to nft.
func TestGenerationsAreAccepted(t *testing.T) {
	mesh, err := load(nil, []byte("ingress: [{port: 8000-8099, mode: tls}, {port: 9000, allow: [a]}, {port: 9001, mode: passthrough}]"))
	if err != nil {
		t.Fatal(err)
	}
	want := render.Rules(mesh, render.Generations{Default: render.MaxGeneration, Ports: []render.PortsGeneration{
		{Ports: schema.Ports{First: 1, Last: 8050}, Generation: 1},
		{Ports: schema.Ports{First: 8090, Last: 9000}, Generation: 0},
		{Ports: schema.Ports{First: 9001, Last: 65535}, Generation: 7},
	}}).Text()
	if got, err := nft(t, []byte(want)); err != nil || got != want {
		t.Errorf("nft: %v\ngot:\n%swant:\n%s", err, got, want)
	}
}

// TestBrokenIsRefused shows that those whom TestAccepted asks do say no, and to what no Go type would have found.
func TestBrokenIsRefused(t *testing.T) {
	mesh, err := load(nil, []byte("ingress: [{port: 8080, mode: tls}]"))
	if err != nil {
		t.Fatal(err)
	}
	rules, _ := rendered(t, mesh)
	for _, c := range []struct{ old, broken, says string }{
		{"goto tls_in", "goto tls_inn", "No such file or directory"},
		{"8080 : goto tls_in", "8080 : goto tls_in, 8080 : goto mtls_in", "File exists"},
		{"hook output priority mangle", "hook output priority dstnat", "invalid priority"},
	} {
		_, err := nft(t, bytes.Replace(rules, []byte(c.old), []byte(c.broken), 1))
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("nft says of %q: %v", c.broken, err)
		}
	}

	validator := newValidator(t)
	elsewhere := render.Place{RuntimeDirectory: t.TempDir()}
	for _, c := range []struct {
		says  string
		place render.Place
		fault func(*bootstrapv3.Bootstrap_StaticResources)
	}{
		{"must be set when", validator.place, func(r *bootstrapv3.Bootstrap_StaticResources) {
			edit(t, r.Listeners[0].FilterChains[0].Filters[1].GetTypedConfig(), func(p *tcpproxyv3.TcpProxy) { p.MaxEarlyDataBytes = nil })
		}},
		{"ConnectTimeout: value must be greater than", validator.place, func(r *bootstrapv3.Bootstrap_StaticResources) {
			r.Clusters[0].ConnectTimeout = durationpb.New(0)
		}},
		{"duplicate cluster", validator.place, func(r *bootstrapv3.Bootstrap_StaticResources) { r.Clusters = append(r.Clusters, r.Clusters[0]) }},
		{".json' does not exist", elsewhere, func(*bootstrapv3.Bootstrap_StaticResources) {}},
	} {
		state, err := render.Render(mesh, c.place)
		if err != nil {
			t.Fatal(err)
		}
		c.fault(state.Bootstrap.StaticResources)
		if err := validator.validate(t, state); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("Envoy does not say %q: %v", c.says, err)
		}
	}
}

// edit changes a packed message.
func edit[M proto.Message](t testing.TB, packed *anypb.Any, change func(M)) {
	t.Helper()
	m, err := packed.UnmarshalNew()
	if err != nil {
		t.Fatal(err)
	}
	change(m.(M))
	if err := packed.MarshalFrom(m); err != nil {
		t.Fatal(err)
	}
}
