package envoy

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/google/renameio/v2"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"

	"mantlet/internal/files"
	"mantlet/internal/rundir"
	"mantlet/render"
)

// publication is a version of some secrets. It is written as SDS files into the runtime directory.
type publication struct {
	version string // Envoy reports it once a secret is in all its TLS contexts
	secrets []*tlsv3.Secret
}

// meshNames returns the names of the secrets that the mesh is served with.
func meshNames() []string { return []string{render.MeshCASecret, render.IdentitySecret} }

// trialNames returns the names of the trial's secrets.
func trialNames() []string {
	return []string{render.TrialClientCASecret, render.TrialServerCASecret, render.TrialIdentitySecret}
}

// versionLayout makes versions that sort by time.
const versionLayout = "2006-01-02T15:04:05.000000000Z"

// publish returns the set under the names that the mesh is served with.
//
// The chain differs each time, by a line before the PEM. New content ends all TLS session tickets; nothing else ends them when a client's
// certificate expires. The mesh CAs differ only where anew asks for it: each change of a secret costs Envoy a new TLS context for each
// listener and upstream.
func (c *Certificates) publish(now time.Time, anew bool) publication {
	p := publication{version: now.UTC().Format(versionLayout)}
	stamp := ""
	if anew {
		stamp = p.version
	}
	p.add(caSecret(render.MeshCASecret, c.orderedAnchors(now), stamp), identitySecret(render.IdentitySecret, c, p.version))
	return p
}

// trialPublication returns the set under the trial's names. The side whose certificate is not tried accepts any certificate of the other.
func (c *Certificates) trialPublication(now time.Time, whose trialSide) publication {
	p := publication{version: now.UTC().Format(versionLayout)}
	client := caSecret(render.TrialClientCASecret, c.orderedAnchors(now), p.version)
	server := caSecret(render.TrialServerCASecret, c.orderedAnchors(now), p.version)
	if whose == serverLeaf {
		server.GetValidationContext().TrustChainVerification = tlsv3.CertificateValidationContext_ACCEPT_UNTRUSTED
	}
	if whose == clientLeaf {
		client.GetValidationContext().TrustChainVerification = tlsv3.CertificateValidationContext_ACCEPT_UNTRUSTED
	}
	p.add(client, server, identitySecret(render.TrialIdentitySecret, c, p.version))
	return p
}

func (p publication) names() []string {
	var names []string
	for _, s := range p.secrets {
		names = append(names, s.Name)
	}
	return names
}

func (p *publication) add(secrets ...*tlsv3.Secret) { p.secrets = append(p.secrets, secrets...) }

func identitySecret(name string, c *Certificates, stamp string) *tlsv3.Secret {
	return &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: inline(withStamp(stamp, encode(c.chain))), PrivateKey: inline(pem.EncodeToMemory(c.key)),
	}}}
}

func caSecret(name string, cas []*x509.Certificate, stamp string) *tlsv3.Secret {
	return &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_ValidationContext{
		ValidationContext: &tlsv3.CertificateValidationContext{TrustedCa: inline(withStamp(stamp, encode(cas)))},
	}}
}

// withStamp puts a line before a PEM text.
func withStamp(stamp string, text []byte) []byte {
	if stamp == "" {
		return text
	}
	return append([]byte("published "+stamp+"\n"), text...)
}

func inline(data []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: string(data)}}
}

// write replaces the files in a directory, each by a rename: Envoy reads a file again on no other event. A key and its chain are one
// secret, so they never mix with those of another set. All files are written before the first one is replaced: if the disk is full,
// nothing changes.
func (p publication) write(directory string) error {
	var pending []*renameio.PendingFile
	defer func() {
		for _, f := range pending {
			_ = f.Cleanup()
		}
	}()
	for _, s := range p.secrets {
		text, err := discoveryResponse(p.version, s)
		if err != nil {
			return fmt.Errorf("marshalling secret %s: %w", s.Name, err)
		}
		file, err := prepareFile(rundir.Envoy(directory).Secret(s.Name), text)
		if err != nil {
			return fmt.Errorf("publishing secret %s: %w", s.Name, err)
		}
		pending = append(pending, file)
	}
	for i, f := range pending {
		path := rundir.Envoy(directory).Secret(p.secrets[i].Name)
		if err := files.Replacing(path, f.CloseAtomicallyReplace()); err != nil {
			return fmt.Errorf("publishing secret %s: %w", p.secrets[i].Name, err)
		}
	}
	return nil
}

// discoveryResponse returns an envoy.service.discovery.v3.DiscoveryResponse with one resource, as JSON. The Go type of the message would
// link gRPC into the binary.
func discoveryResponse(version string, s *tlsv3.Secret) ([]byte, error) {
	resource, err := anypb.New(s)
	if err != nil {
		return nil, err
	}
	text, err := protojson.Marshal(resource)
	if err != nil {
		return nil, err
	}
	return json.Marshal(struct {
		Version   string            `json:"versionInfo"`
		Resources []json.RawMessage `json:"resources"`
	}{version, []json.RawMessage{text}})
}

// rejectedError is why Envoy rejects a secret, in its own words.
type rejectedError struct{ error }

func (r rejectedError) Unwrap() error { return r.error }

// deliver writes a publication and waits until the process has taken all of it. The error is a rejectedError where Envoy rejects it.
//
// Envoy builds TLS contexts from all secrets together, each time that one of them changes. A secret that it rejected before therefore
// makes it reject the next change of another secret as well. So all secrets are written a second time, with other content, before a
// rejection counts.
func (p *Process) deliver(ctx context.Context, directory string, publish func(now time.Time, anew bool) publication) (version string, err error) {
	for round := range 2 {
		pub := publish(time.Now(), round > 0)
		before, err := p.admin.secrets(ctx, pub.names())
		if err != nil {
			return "", err
		}
		p.logs.discardAnswers()
		if err := pub.write(directory); err != nil {
			return "", err
		}
		has, err := p.awaitRead(ctx, pub, before)
		switch {
		case err != nil:
			return "", err
		case has.rejections() == before.rejections():
			return pub.version, nil
		case round > 0:
			return "", rejectedError{errors.New(p.logs.rejection())}
		}
	}
	return "", nil // not reached
}

// awaitRead waits until the process has read all secrets of a publication, whether it takes or rejects them. Envoy reports a secret's
// version once the secret is in each of its TLS contexts. before is what it reported before the files were written.
func (p *Process) awaitRead(ctx context.Context, pub publication, before secretStates) (has secretStates, err error) {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		if has, err = p.admin.secrets(ctx, pub.names()); err != nil || has.allRead(pub.version, before) {
			return has, err
		}
		select {
		case <-tick.C:
		case <-p.exited:
			return nil, p.Err()
		case <-ctx.Done():
			return nil, fmt.Errorf("Envoy has not read the certificates in time: %w", ctx.Err())
		}
	}
}
