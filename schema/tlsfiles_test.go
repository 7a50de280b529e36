package schema

import (
	"slices"
	"strings"
	"testing"
)

func TestTLSFiles(t *testing.T) {
	for name, c := range map[string]struct {
		environ, there []string
		want           [3]string
		err            string // two texts that the error has, with a comma between
	}{
		"nothing is there yet":         {nil, nil, [3]string{"/tls/certChain.pem", "/tls/key.pem", "/tls/mesh-ca.pem"}, ""},
		"of a Kubernetes TLS secret":   {nil, []string{"/tls/tls.crt", "/tls/tls.key", "/tls/ca.crt"}, [3]string{"/tls/tls.crt", "/tls/tls.key", "/tls/ca.crt"}, ""},
		"of SPIFFE, the first of them": {nil, []string{"/tls/bundle.pem"}, [3]string{"/tls/svid.pem", "/tls/svid_key.pem", "/tls/bundle.pem"}, ""},
		"of two sets":                  {nil, []string{"/tls/tls.crt", "/tls/key.pem"}, [3]string{}, "certChain.pem,tls.crt"},
		"named": {
			[]string{"MANTLET_TLS_CERTIFICATE=cert.pem", "MANTLET_TLS_KEY=private.pem", "MANTLET_TLS_CA=/etc/mesh/ca.pem"},
			[]string{"/tls/tls.crt", "/tls/svid.pem"},
			[3]string{"/tls/cert.pem", "/tls/private.pem", "/etc/mesh/ca.pem"},
			"",
		},
		"one is named": {[]string{"MANTLET_TLS_CA=/etc/mesh/ca.pem"}, []string{"/tls/tls.crt"}, [3]string{"/tls/tls.crt", "/tls/tls.key", "/etc/mesh/ca.pem"}, ""},
		"a usual name is named": {
			[]string{"MANTLET_TLS_CERTIFICATE=tls.crt", "MANTLET_TLS_KEY=tls.key", "MANTLET_TLS_CA=bundle.pem"},
			[]string{"/tls/tls.crt", "/tls/tls.key", "/tls/bundle.pem"},
			[3]string{"/tls/tls.crt", "/tls/tls.key", "/tls/bundle.pem"},
			"",
		},
	} {
		env, err := ParseEnvironment(append([]string{"MANTLET_TLS_DIRECTORY=/tls"}, c.environ...))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		got, err := env.Process.TLS.Paths(func(path string) bool { return slices.Contains(c.there, path) })
		if c.err != "" {
			for _, text := range strings.Split(c.err, ",") {
				if err == nil || !strings.Contains(err.Error(), text) {
					t.Errorf("%s: the error is %v, want one that names %s", name, err, text)
				}
			}
		} else if err != nil || got != c.want {
			t.Errorf("%s: %v, %v; want %v", name, got, err, c.want)
		}
	}
	for _, bad := range []string{"MANTLET_TLS_KEY=../key.pem", "MANTLET_TLS_CA=a/b", "MANTLET_TLS_CERTIFICATE=."} {
		if _, err := ParseEnvironment([]string{bad}); err == nil || !strings.Contains(err.Error(), "must be the name of a file in MANTLET_TLS_DIRECTORY") {
			t.Errorf("%s: %v", bad, err)
		}
	}
}
