package peers

import (
	"crypto/x509"
	"encoding/pem"
	"net/url"
	"slices"
	"testing"

	"mantlet/internal/lab"
)

// TestPeer: who a certificate is for is told as Envoy tells it: names as whole strings, and for endpoints a wildcard covers them.
func TestPeer(t *testing.T) {
	mesh, err := lab.NewAuthority("mesh")
	if err != nil {
		t.Fatal(err)
	}
	other, err := lab.NewAuthority("other")
	if err != nil {
		t.Fatal(err)
	}
	const spiffe = "spiffe://mesh/ns/shop/sa/cart"
	signer, err := mesh.Subordinate("signer")
	if err != nil {
		t.Fatal(err)
	}
	identity, err := signer.Issue(lab.Leaf{DNSNames: []string{"cart", "*.shop.svc"}, URIs: []string{spiffe}})
	if err != nil {
		t.Fatal(err)
	}
	text := url.PathEscape(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: identity.Leaf.Raw})))
	p, err := parse(text)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := p.Names(), []string{"cart", "*.shop.svc", spiffe}; !slices.Equal(got, want) {
		t.Errorf("names %q, want %q", got, want)
	}
	for _, c := range []struct {
		list             []string
		isListed, serves bool
	}{
		{nil, true, true},
		{[]string{"x", "cart"}, true, true},
		{[]string{spiffe}, true, true},
		{[]string{"Cart"}, false, true},
		{[]string{"web.shop.svc"}, false, true},
		{[]string{spiffe + "2", "carts", "a.b.shop.svc"}, false, false},
	} {
		if got := p.IsListed(c.list); got != c.isListed {
			t.Errorf("%q: it is listed: %t", c.list, got)
		}
		if got := p.Serves(c.list); got != c.serves {
			t.Errorf("%q: it serves: %t", c.list, got)
		}
	}
	anchors := func(all ...*lab.Authority) (parsed []*x509.Certificate) {
		for _, a := range all {
			block, _ := pem.Decode(a.CAPEM())
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			parsed = append(parsed, cert)
		}
		return parsed
	}
	between := make([]*x509.Certificate, 0, 1)
	for _, der := range identity.Certificate().Certificate[1:] {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		between = append(between, cert)
	}
	for what, c := range map[string]struct {
		trust Trust
		leads bool
	}{
		"both CAs":                 {Trust{anchors(mesh, other), between}, true},
		"the other CA":             {Trust{anchors(other), between}, false},
		"no intermediate is known": {Trust{anchors(mesh), nil}, false},
	} {
		if got := p.Leads(c.trust); got != c.leads {
			t.Errorf("%s: it leads there: %t", what, got)
		}
	}
	for _, bad := range []string{"", "-", "%zz", url.PathEscape("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")} {
		if _, err := parse(bad); err == nil {
			t.Errorf("%q is a certificate", bad)
		}
	}
}
