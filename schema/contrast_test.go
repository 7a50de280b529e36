package schema_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"mantlet/schema"
)

// TestAdminPort checks at which ports peers reach the status in plaintext: at an admin port only where an entry says passthrough.
func TestAdminPort(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		environ []string
		file    string
		want    uint16
	}{
		"without an entry":     {[]string{"CONTRAST_ADMIN_PORT=9901"}, "", 0},
		"with its entry":       {[]string{"CONTRAST_ADMIN_PORT=9901", ingress + "admin#9901#true"}, "", 9901},
		"the older spelling":   {[]string{"EDG_ADMIN_PORT=9901", ingress + "admin#9901#true"}, "", 9901},
		"with TLS":             {[]string{"CONTRAST_ADMIN_PORT=9901", ingress + "admin#9901#false"}, "", 0},
		"another port's entry": {[]string{"CONTRAST_ADMIN_PORT=9901", ingress + "admin#9902#true"}, "", 0},
		"a range":              {[]string{"CONTRAST_ADMIN_PORT=9901"}, "ingress: [{port: 9900-9909, mode: passthrough}]", 9901},
		"a file closes it":     {[]string{"CONTRAST_ADMIN_PORT=9901", ingress + "admin#9901#true", "MANTLET_OVERRIDES=tighten"}, "ingress: [{port: 9901, mode: mtls}]", 0},
		"the same address":     {[]string{"CONTRAST_ADMIN_PORT=9901", "MANTLET_STATUS_ADDRESS=:9901"}, "", 0},
		"a status address":     {[]string{"MANTLET_STATUS_ADDRESS=:9901"}, "", 9901},
		"ingress is off":       {[]string{"CONTRAST_ADMIN_PORT=9901", ingress + "DISABLED"}, "", 0},
	} {
		env, err := schema.ParseEnvironment(append(c.environ, "MANTLET_CONFIG=/config.yaml"))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		config, err := env.Merge([]byte(c.file))
		if err != nil || config.Mesh.StatusPort != c.want {
			t.Errorf("%s: %d, %v, want %d", name, config.Mesh.StatusPort, err, c.want)
		}
	}
}

// TestAdminPortProblems checks what is refused of the variable, and that a file or an entry can't take its port for something else.
func TestAdminPortProblems(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		environ []string
		want    string
	}{
		"no number":        {[]string{"CONTRAST_ADMIN_PORT=admin"}, `CONTRAST_ADMIN_PORT: "admin": must be a port number from 1 to 65535`},
		"an address":       {[]string{"EDG_ADMIN_PORT=:9901"}, `EDG_ADMIN_PORT: ":9901": must be a port number from 1 to 65535`},
		"a space":          {[]string{"EDG_ADMIN_PORT=9901 "}, `EDG_ADMIN_PORT: "9901 ": must be a port number from 1 to 65535`},
		"too large":        {[]string{"EDG_ADMIN_PORT=99010"}, `EDG_ADMIN_PORT: "99010": must be a port number from 1 to 65535`},
		"Envoy's":          {[]string{"EDG_ADMIN_PORT=15006"}, `EDG_ADMIN_PORT: "15006": ports 15006 and 15007 are mantlet's own listeners; leave them out`},
		"a Service's":      {[]string{"CONTRAST_ADMIN_PORT=tcp://10.0.0.1:80"}, `CONTRAST_ADMIN_PORT: "tcp://10.0.0.1:80": is what Kubernetes sets in pods beside a Service of that name; set enableServiceLinks: false, or the variable to a port number`},
		"two":              {[]string{"CONTRAST_ADMIN_PORT=1", "EDG_ADMIN_PORT=2"}, `CONTRAST_ADMIN_PORT: "1": EDG_ADMIN_PORT is also set, to a different value ("2"); set only one of them, or both to the same value`},
		"a status address": {[]string{"CONTRAST_ADMIN_PORT=1", "MANTLET_STATUS_ADDRESS=127.0.0.1:1"}, `CONTRAST_ADMIN_PORT: "1": MANTLET_STATUS_ADDRESS is also set, to another address (127.0.0.1:1); set only one of them`},
		"an egress entry":  {[]string{"CONTRAST_ADMIN_PORT=1", egress + "a#127.0.0.1:1#b:1"}, `EDG_EGRESS_PROXY_CONFIG entry 1: egress[127.0.0.1:1]: port 1 is already used by mantlet's own status (CONTRAST_ADMIN_PORT); choose another port for one of them`},
		"a misspelling":    {[]string{"CONTRAST_ADMIN_PROT=1"}, `CONTRAST_ADMIN_PROT: "1": mantlet has no such variable; did you mean CONTRAST_ADMIN_PORT?`},
	} {
		_, err := schema.ParseEnvironment(c.environ)
		var got []string
		for _, p := range schema.Problems(err) {
			got = append(got, p.Error())
		}
		if diff := cmp.Diff([]string{c.want}, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

// TestIngressOff checks that the environment alone can switch ingress off, by one word, and that nothing then says otherwise in vain.
func TestIngressOff(t *testing.T) {
	t.Parallel()
	const off = "CONTRAST_INGRESS_PROXY_CONFIG=DISABLED"
	const vain = "has no effect, since CONTRAST_INGRESS_PROXY_CONFIG is DISABLED, which only the environment can change"
	for name, c := range map[string]struct {
		environ []string
		file    string
		off     bool
		want    []string // problems
	}{
		"as it is":            {[]string{off}, "", true, nil},
		"both spellings":      {[]string{off, ingress + "DISABLED"}, "", true, nil},
		"with egress":         {[]string{off, egress + "a#127.0.0.1:1#b:1"}, "tls: {minVersion: '1.3'}", true, nil},
		"accept goes with it": {[]string{off}, "otherProtocols: accept", true, nil},
		"an entry of the file": {[]string{off}, "ingress: [{port: 80, mode: mtls}]", false, []string{
			"/config.yaml:1:11: ingress[80]: " + vain,
		}},
		"an entry of a file that may tighten": {[]string{off, "MANTLET_OVERRIDES=tighten"}, "ingress: [{port: 80}]", false, []string{
			"/config.yaml:1:11: ingress[80]: " + vain,
		}},
		"other protocols":    {[]string{off}, "otherProtocols: drop", false, []string{`/config.yaml:1:17: otherProtocols: "drop": ` + vain}},
		"clients' addresses": {[]string{off}, "sourceAddress: client", false, []string{`/config.yaml:1:16: sourceAddress: "client": ` + vain}},
		"the pod's address":  {[]string{off}, "sourceAddress: pod", true, nil},
		"an inline entry": {[]string{off, "MANTLET_CONFIG_INLINE=ingress: [{port: 80}]"}, "", false, []string{
			"MANTLET_CONFIG_INLINE:1:11: ingress[80]: " + vain,
		}},
		"entries in the other spelling": {[]string{off, ingress + "a#80#true"}, "", false, []string{
			`CONTRAST_INGRESS_PROXY_CONFIG: "DISABLED": EDG_INGRESS_PROXY_CONFIG is also set, to a different value ("a#80#true"); set only one of them, or both to the same value`,
		}},
		"in other letters": {[]string{ingress + "disabled "}, "", false, []string{
			`EDG_INGRESS_PROXY_CONFIG: "disabled ": write DISABLED and nothing else to leave alone whatever comes in`,
		}},
		"as one of two entries": {[]string{ingress + "DISABLED##a#80#true"}, "", false, []string{
			`EDG_INGRESS_PROXY_CONFIG entry 1: "DISABLED": must have 3 fields, name#port#disableTLS, but has 1`,
		}},
		"of egress": {[]string{egress + "DISABLED"}, "", false, []string{
			`EDG_EGRESS_PROXY_CONFIG entry 1: "DISABLED": must have 3 fields, name#listen-ip:listen-port#host-or-ip:port, but has 1`,
		}},
		"by the file": {nil, "ingress: DISABLED", false, []string{
			`/config.yaml:1:10: ingress: "DISABLED": must be a list`,
		}},
		"by another key of the file": {nil, "ingressOff: true", false, []string{`/config.yaml:1:1: "ingressOff": unknown key; did you mean ingress?`}},
		"entries, and no more":       {[]string{ingress + "a#80#true"}, "", false, nil},
	} {
		env, err := schema.ParseEnvironment(append(slices.Clone(c.environ), "MANTLET_CONFIG=/config.yaml"))
		config, merged := env.Merge([]byte(c.file))
		if merged != nil {
			err = merged
		}
		var got []string
		for _, p := range schema.Problems(err) {
			got = append(got, p.Error())
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
		if config.Mesh.IngressOff != c.off {
			t.Errorf("%s: off is %v", name, config.Mesh.IngressOff)
		}
		told := slices.ContainsFunc(config.Warnings(), func(p schema.Problem) bool { return strings.Contains(p.Reason, "in plaintext, at every port") })
		if told != c.off {
			t.Errorf("%s: the warnings are %v", name, config.Warnings())
		}
	}
}

// TestDefaultTLSDirectory checks which of the usual directories is read where no variable names one.
func TestDefaultTLSDirectory(t *testing.T) {
	t.Parallel()
	for want, all := range map[string][][]string{
		"/tls-config":          {nil, {"/tls-config"}, {"/tls-config", "/contrast", "/contrast/tls-config"}},
		"/contrast/tls-config": {{"/contrast", "/contrast/tls-config"}, {"/contrast/tls-config"}, {"/contrast"}}, // which the initializer is still to make
	} {
		for _, there := range all {
			if got := schema.DefaultTLSDirectory(func(path string) bool { return slices.Contains(there, path) }); got != want {
				t.Errorf("with %q there: %s, want %s", there, got, want)
			}
		}
	}
}
