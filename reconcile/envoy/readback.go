package envoy

import (
	"context"
	"crypto/x509"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"mantlet/internal/status"
	"mantlet/render"
)

// secretState is what Envoy reports of a secret.
type secretState struct {
	version  string // the last one that it took into all its TLS contexts
	rejected uint64 // how many versions it rejected
}

type secretStates map[string]secretState

func (s secretStates) allAt(version string) bool {
	for _, one := range s {
		if one.version != version {
			return false
		}
	}
	return true
}

// allRead reports whether each secret was taken at a version, or rejected since.
func (s secretStates) allRead(version string, before secretStates) bool {
	for name, one := range s {
		if one.version != version && one.rejected == before[name].rejected {
			return false
		}
	}
	return true
}

func (s secretStates) rejections() (sum uint64) {
	for _, one := range s {
		sum += one.rejected
	}
	return sum
}

// secrets asks for the statistics of the named secrets (Envoy's docs/root/configuration/security/secret.rst).
func (a admin) secrets(ctx context.Context, names []string) (secretStates, error) {
	var answer struct {
		Stats []struct {
			Name  string `json:"name"`
			Value any    `json:"value"`
		} `json:"stats"`
	}
	filter := fmt.Sprintf(`^sds\.(%s)\.(version_text|update_rejected)$`, strings.Join(names, "|"))
	if err := a.get(ctx, "/stats?format=json&filter="+url.QueryEscape(filter), &answer); err != nil {
		return nil, err
	}
	all := secretStates{}
	for _, name := range names {
		all[name] = secretState{}
	}
	for _, s := range answer.Stats {
		name, _, _ := strings.Cut(strings.TrimPrefix(s.Name, "sds."), ".")
		one := all[name]
		switch value := s.Value.(type) {
		case string:
			one.version = value
		case float64:
			one.rejected = uint64(value)
		}
		all[name] = one
	}
	return all, nil
}

// envoyCertificates are the certificates that Envoy has.
type envoyCertificates struct {
	chain, anchors []*x509.Certificate
}

// secretTexts are the mesh's secrets as Envoy was given them last, in PEM, and their versions.
type secretTexts struct{ chain, anchors, chainVersion, anchorsVersion string }

// secretTexts asks /config_dump (envoy.admin.v3.SecretsConfigDump).
func (a admin) secretTexts(ctx context.Context) (text secretTexts, err error) {
	type source struct {
		Inline string `json:"inline_string"`
	}
	var answer struct {
		Configs []struct {
			Name    string `json:"name"`
			Version string `json:"version_info"`
			Secret  struct {
				Certificate struct {
					Chain source `json:"certificate_chain"`
				} `json:"tls_certificate"`
				Context struct {
					CA source `json:"trusted_ca"`
				} `json:"validation_context"`
			} `json:"secret"`
		} `json:"configs"`
	}
	filter := fmt.Sprintf(`^(%s)$`, strings.Join(meshNames(), "|"))
	if err := a.get(ctx, "/config_dump?resource=dynamic_active_secrets&name_regex="+url.QueryEscape(filter), &answer); err != nil {
		return text, err
	}
	for _, c := range answer.Configs {
		switch c.Name {
		case render.IdentitySecret:
			text.chain, text.chainVersion = c.Secret.Certificate.Chain.Inline, c.Version
		case render.MeshCASecret:
			text.anchors, text.anchorsVersion = c.Secret.Context.CA.Inline, c.Version
		}
	}
	return text, nil
}

// outdated reports whether Envoy rejected a secret that it was given. Where a secret's content stays the same, Envoy goes on reporting
// the older version here.
func (t secretTexts) outdated(states secretStates) bool {
	return t.chainVersion > states[render.IdentitySecret].version || t.anchorsVersion > states[render.MeshCASecret].version
}

// parse parses the certificates. Where Envoy has none yet, the result is empty.
func (t secretTexts) parse() (h envoyCertificates, err error) {
	for _, part := range []struct {
		text string
		into *[]*x509.Certificate
	}{{t.chain, &h.chain}, {t.anchors, &h.anchors}} {
		if part.text == "" {
			continue
		}
		if *part.into, err = parseCertificates([]byte(part.text)); err != nil {
			return envoyCertificates{}, fmt.Errorf("reading the certificates that Envoy has: %w", err)
		}
	}
	return h, nil
}

// describe returns the certificates as a status has them: the chain, then the mesh CAs. Those of the path are needed.
func (h envoyCertificates) describe(path []*x509.Certificate) []status.Certificate {
	var all []status.Certificate
	describe := func(role string, c *x509.Certificate) {
		all = append(all, status.Certificate{
			Role: role, Subject: c.Subject.String(), SANs: sans(c), NotBefore: c.NotBefore, NotAfter: c.NotAfter,
			Needed: slices.ContainsFunc(path, c.Equal),
		})
	}
	for i, c := range h.chain {
		if i == 0 {
			describe(status.RoleLeaf, c)
		} else {
			describe(status.RoleIntermediate, c)
		}
	}
	for _, c := range h.anchors {
		describe(status.RoleMeshCA, c)
	}
	return all
}
