package schema_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"mantlet/schema"
)

const configFile = "/config.yaml"

// fataler is a *testing.T or a *rapid.T.
type fataler interface {
	Helper()
	Fatal(args ...any)
}

// environment returns what an environment with an override file says.
func environment(t fataler, environ ...string) *schema.Environment {
	t.Helper()
	env, err := schema.ParseEnvironment(append([]string{"MANTLET_CONFIG=" + configFile}, environ...))
	if err != nil {
		t.Fatal(err)
	}
	return env
}

// places shortens problems to their line and column, and what is wrong there.
func places(err error) []string {
	var lines []string
	for _, line := range report(err) {
		lines = append(lines, strings.TrimPrefix(strings.TrimPrefix(line, configFile), ":"))
	}
	return lines
}

// TestYAMLNothing has what says nothing, and leaves the environment as it is.
func TestYAMLNothing(t *testing.T) {
	env := environment(t, ingress+"web#8080#false", egress+"a#127.0.0.1:80#b:1", "MANTLET_TLS_MIN_VERSION=1.3")
	for _, text := range []string{
		"", "\n\n", "# nothing\n", "---\n", "--- # nothing\n", "---\n...\n", "{}\n", "~\n", "null\n", "\xef\xbb\xbf", "\xef\xbb\xbf# nothing\r\n", "%YAML 1.1\n---\n",
		"ingress: []\negress: []\n", "tls: {}\nenvoy: {}\n", "ingress: []\r\negress:\r\n  []\r\n", strings.Repeat("# 2 MiB of comments\n", (2<<20)/20),
	} {
		config, err := env.Merge([]byte(text))
		if err != nil {
			t.Errorf("%.20q: %v", text, err)
			continue
		}
		if diff := cmp.Diff(env.Base().Mesh, config.Mesh, addresses); diff != "" {
			t.Errorf("%.20q: %s", text, diff)
		}
	}
}

// TestYAML has what is read as it stands there.
func TestYAML(t *testing.T) {
	want := defaults()
	want.AccessLog = schema.AccessLogAll
	want.TLS.MinVersion = schema.TLS13
	for name, text := range map[string]string{
		"block":                 "accessLog: all\ntls:\n  minVersion: \"1.3\"\n",
		"flow":                  "{accessLog: all, tls: {minVersion: '1.3'}}",
		"JSON":                  `{"accessLog":"all","tls":{"minVersion":"1.3"}}`,
		"CRLF":                  "accessLog: all\r\ntls:\r\n  minVersion: '1.3'\r\n",
		"CR":                    "accessLog: all\rtls:\r  minVersion: '1.3'\r",
		"a byte order mark":     "\xef\xbb\xbfaccessLog: all\ntls: {minVersion: '1.3'}\n",
		"a document's borders":  "# a comment\n---\naccessLog: all\ntls: {minVersion: '1.3'}\n...\n",
		"no end of line":        "tls: {minVersion: '1.3'}\naccessLog: all",
		"a tab after the colon": "accessLog:\tall\ntls: {minVersion: '1.3'}\n",
		"texts of lines":        "accessLog: >-\n  all\ntls:\n  minVersion: |-\n    1.3\n",
		"an explicit key":       "? accessLog\n: all\n? tls\n: {minVersion: '1.3'}\n",
		"an escaped key":        `"access\u004cog": "\x61ll"` + "\ntls: {minVersion: '1.3'}\n",
	} {
		t.Run(name, func(t *testing.T) {
			config, err := environment(t).Merge([]byte(text))
			if err != nil {
				t.Fatalf("%q: %v", text, err)
			}
			if diff := cmp.Diff(want, config.Mesh, addresses); diff != "" {
				t.Error(diff)
			}
		})
	}
}

type yamlProblem struct {
	text string
	want []string
}

// yamlProblems has what is no override file, and what an operator reads then: line:column, path, value, reason. What
// koanf alone would let pass (design.md 11) is marked.
func yamlProblems() map[string]yamlProblem {
	const (
		known    = "known keys: ingress, egress, probes, tls, envoy, otherProtocols, accessLog, sourceAddress, outbound, maxConnectionAge"
		ports    = "must be a port from 1 to 65535 or a range, for example 8000-8099"
		listen   = "must be a loopback address and a port, for example 127.137.0.1:8081 or [::1]:8081"
		san      = "must be a SAN: a DNS name, for example frontend or *.shop.svc, or a URI, for example spiffe://mesh/ns/shop/sa/cart"
		duration = "must be a duration from 1s to 24h in hours, minutes and seconds, for example 10s or 1h30m"
		empty    = "has no value; set one or remove the key"
		anchors  = "anchors and aliases are not supported; write the value out"
		manifest = "this is a Kubernetes manifest: use --manifest to check it; the override file is the value of a key of a ConfigMap"
		template = "a template that is not rendered: run helm template first"
		second   = "a second YAML document starts here and would be ignored; the file must have only one"
	)
	return map[string]yamlProblem{
		// Keys.
		"unknown key":            {"ingres: []\n", []string{`1:1: "ingres": unknown key; did you mean ingress?`}}, // koanf
		"unknown key, far":       {"services: []\n", []string{`1:1: "services": unknown key; ` + known}},
		"unknown keys, all":      {"a: 1\nb: 2\ntls: {c: 3}\n", []string{`1:1: "a": unknown key; ` + known, `2:1: "b": unknown key; ` + known, `3:7: tls: "c": unknown key; known keys: minVersion`}},
		"a key's case":           {"Ingress: []\n", []string{`1:1: "Ingress": unknown key; did you mean ingress?`}}, // koanf
		"a nested key's case":    {"tls: {minversion: '1.3'}\n", []string{`1:7: tls: "minversion": unknown key; did you mean minVersion?`}},
		"an entry's key's case":  {"ingress:\n  - port: 8080\n    Mode: tls\n", []string{`3:5: ingress[8080]: "Mode": unknown key; did you mean mode?`}},
		"an entry's key on top":  {"ingress:\n- port: 80\nmode: tls\nupstream: x:1\nhttp: 80\nname: a\nminVersion: '1.3'\ndrainTime: 1s\n", []string{`3:1: "mode": unknown key; it belongs to an ingress entry: indent it`, `4:1: "upstream": unknown key; it belongs to an egress entry: indent it`, `5:1: "http": unknown key; it belongs to a probe: indent it`, `6:1: "name": unknown key; it belongs to an entry of ingress, egress or probes: indent it`, `7:1: "minVersion": unknown key; it belongs to tls: indent it`, `8:1: "drainTime": unknown key; it belongs to envoy: indent it`}},
		"another entry's key":    {"ingress:\n- port: 80\n  upstream: x:1\n  accessLog: all\n", []string{`3:3: ingress[80]: "upstream": unknown key; it belongs to an egress entry`, `4:3: ingress[80]: "accessLog": unknown key; it belongs to the top level of the file: do not indent it`}},
		"a key's spaces":         {"\"accessLog \": all\n", []string{`1:1: "accessLog ": unknown key; did you mean accessLog?`}},
		"the path as a key":      {"tls.minVersion: '1.3'\n", []string{`1:1: "tls.minVersion": unknown key; write it as tls: {minVersion: …}`}}, // koanf
		"a key twice":            {"accessLog: none\notherProtocols: drop\naccessLog: none\n", []string{"3:1: accessLog: already set on line 1; keep only one of them"}},
		"a nested key twice":     {"tls:\n  minVersion: '1.3'\n  minVersion: '1.2'\n", []string{"3:3: tls.minVersion: already set on line 2; keep only one of them"}},
		"an entry's key twice":   {"ingress:\n  - {port: 80, mode: tls, mode: mtls}\n", []string{"2:27: ingress[80].mode: already set on line 2; keep only one of them"}},
		"a list twice":           {"ingress: [{port: 1}]\ningress: [{port: 2}]\n", []string{"2:1: ingress: already set on line 1; keep only one of them"}},
		"keys that are no text":  {"8080: a\ntrue: b\n1.5: c\n~: d\n2001-01-01: e\n", []string{`1:1: "8080": unknown key; ` + known, `2:1: "true": unknown key; ` + known, `3:1: "1.5": unknown key; ` + known, `4:1: "~": unknown key; ` + known, `5:1: "2001-01-01": unknown key; ` + known}},
		"a template as a value":  {"accessLog: {{ .Values.log }}\ningress: {{ .Values.ingress }}\n", []string{"1:12: accessLog: " + template, "2:10: ingress: " + template}},
		"a template's block":     {"ingress:\n{{- range .Values.ports }}\n  - port: {{ . }}\n{{- end }}\n", []string{`3:3: "- port: {{ . }}": not valid YAML: ` + template}},
		"a list as a key":        {"? [ingress]\n: []\n", []string{`1:3: unknown key; ` + known}},
		"a template":             {"{{ .Values.mantlet }}\n", []string{"1:1: " + template}},
		"merge keys":             {"<<: {accessLog: none}\n", []string{`1:1: "<<": unknown key; ` + known}},
		"merge keys by an alias": {"tls: &t {minVersion: '1.3'}\nenvoy: {<<: *t}\n", []string{"1:6: tls: " + anchors, `2:9: envoy: "<<": unknown key; known keys: concurrency, drainTime, parentShutdownTime, logLevel`}},

		// Anchors and tags.
		"an anchor":           {"ingress: &a []\n", []string{"1:10: ingress: " + anchors}},
		"an anchor's alias":   {"accessLog: &a none\notherProtocols: *a\n", []string{`1:12: accessLog: "none": ` + anchors, "2:17: otherProtocols: " + anchors}},
		"a key's anchor":      {"&a accessLog: none\n", []string{`1:1: "accessLog": ` + anchors}},
		"an alias as a key":   {"accessLog: &a none\n*a : none\n", []string{`1:12: accessLog: "none": ` + anchors, "2:1: " + anchors}},
		"an item's alias":     {"ingress:\n  - port: 80\n    allow: [&a x, *a]\n", []string{`3:13: ingress[80].allow[0]: "x": ` + anchors, "3:19: ingress[80].allow[1]: " + anchors}},
		"an entry's alias":    {"ingress:\n  - &a {port: 80}\n  - *a\n", []string{"2:5: ingress[80]: " + anchors, "3:5: ingress[item 2]: " + anchors}},
		"an alias of nothing": {"tls: {}\ningress: *x\n", []string{`2:1: "ingress: *x": not valid YAML: anchors and aliases are not supported; write the value out`}},
		"an alias of itself":  {"ingress: &a [*a]\n", []string{"1:10: ingress: " + anchors}},
		"a billion laughs":    {laughs(), laughed(known, anchors)},
		"tags":                {"!x {accessLog: !!str none, tls: !x {}, ingress: !!seq []}\n", []string{`1:1: tags are not supported; remove "!x"`}},
		"tags within":         {"accessLog: !!str none\ntls: !x {}\ningress: [{port: !!int \"80\"}]\n!!str egress: []\n", []string{`1:12: accessLog: "none": tags are not supported; remove "!!str"`, `2:6: tls: tags are not supported; remove "!x"`, `3:18: ingress[80].port: "80": tags are not supported; remove "!!int"`, `4:1: "egress": tags are not supported; remove "!!str"`}},
		"binary":              {"accessLog: !!binary bm9uZQ==\n", []string{`1:12: accessLog: "bm9uZQ==": tags are not supported; remove "!!binary"`}},

		// Documents.
		"two documents":         {"accessLog: none\n---\naccessLog: all\n", []string{"2:1: " + second}}, // koanf
		"an empty second":       {"accessLog: none\n---\n", []string{"2:1: " + second}},
		"an empty first":        {"---\n---\naccessLog: all\n", []string{"2:1: " + second}},
		"a broken second":       {"accessLog: none\n---\n[\n", []string{`3:1: "[": not valid YAML: a bracket is not closed, or a value is missing`}},
		"a text":                {"accessLog\n", []string{`1:1: "accessLog": must be a mapping of keys to values`}},
		"a list":                {"- ingress\n", []string{"1:1: must be a mapping of keys to values"}},
		"a number":              {"8080\n", []string{`1:1: "8080": must be a mapping of keys to values`}},
		"another version":       {"%YAML 1.2\n---\ntls: {}\n", []string{`3:1: "tls: {}": not valid YAML: remove the line that starts with %YAML`}},
		"a Kubernetes manifest": {"apiVersion: v1\ndata:\n  config.yaml: |\n    tls: {}\n", []string{"1:1: " + manifest}},

		// Null never erases.
		"null lists":    {"ingress:\negress: ~\n", []string{"1:9: ingress: " + empty, `2:9: egress: "~": ` + empty}}, // koanf
		"null objects":  {"tls:\nenvoy: null\n", []string{"1:5: tls: " + empty, `2:8: envoy: "null": ` + empty}},
		"null values":   {"accessLog:\ntls: {minVersion: ~}\n", []string{"1:11: accessLog: has no value; it must be a string", `2:19: tls.minVersion: "~": has no value; it must be a string`}},
		"null entries":  {"ingress:\n  -\n  - ~\n", []string{"2:4: ingress[item 1]: " + empty, `3:5: ingress[item 2]: "~": ` + empty}},
		"null fields":   {"ingress: [{port: , mode: ~}]\n", []string{"1:18: ingress[item 1].port: has no value; it must be a port or a range", `1:26: ingress[item 1].mode: "~": has no value; it must be a string`}},
		"null names":    {"ingress: [{port: 80, allow: [~, x]}]\n", []string{`1:30: ingress[80].allow[0]: "~": has no value; it must be a string`}},
		"no names":      {"ingress: [{port: 80, allow: []}]\n", []string{"1:29: ingress[80].allow: is an empty list, which could mean nobody or anybody; list at least one name or remove the key"}},
		"a null list":   {"ingress: [{port: 80, allow: ~}]\n", []string{`1:29: ingress[80].allow: "~": ` + empty}},
		"a null remove": {"ingress: [{port: 80, remove: }]\n", []string{"1:30: ingress[80].remove: has no value; it must be true"}},

		// Types.
		"an object for a list":   {"ingress: {}\negress: {port: 80}\n", []string{"1:10: ingress: must be a list", "2:9: egress: must be a list"}},
		"a text for a list":      {"ingress: web\n", []string{`1:10: ingress: "web": must be a list`}},
		"a text for names":       {"ingress: [{port: 80, allow: frontend}]\n", []string{`1:29: ingress[80].allow: "frontend": must be a list`}},
		"a list for an object":   {"tls: []\n", []string{"1:6: tls: must be a mapping of keys to values"}},
		"a text for an object":   {"tls: '1.3'\n", []string{`1:6: tls: "1.3": must be a mapping of keys to values`}},
		"a list for a text":      {"accessLog: [all]\n", []string{"1:12: accessLog: must be a string"}},
		"an object for a port":   {"ingress: [{port: {first: 80}}]\n", []string{"1:18: ingress[item 1].port: must be a port or a range"}},
		"entries of no shape":    {"ingress: [80, [80], x]\n", []string{`1:11: ingress[item 1]: "80": must be a mapping of keys to values`, "1:15: ingress[item 2]: must be a mapping of keys to values", `1:21: ingress[item 3]: "x": must be a mapping of keys to values`}},
		"a number for a text":    {"tls: {minVersion: 1.3}\n", []string{`1:19: tls.minVersion: "1.3": is a number in YAML and must be a string; put it in quotes: "1.3"`}}, // koanf
		"a number for a name":    {"ingress: [{port: 80, name: 007}, {port: 81, name: true}, {port: 82, name: 2001-01-01}]\n", []string{`1:28: ingress[80].name: "007": is a number in YAML and must be a string; put it in quotes: "007"`, `1:51: ingress[81].name: "true": is a boolean in YAML and must be a string; put it in quotes: "true"`, `1:75: ingress[82].name: "2001-01-01": is a date in YAML and must be a string; put it in quotes: "2001-01-01"`}},
		"a text for a number":    {"envoy: {concurrency: '2'}\n", []string{`1:22: envoy.concurrency: "2": is a string in YAML and must be a number; remove the quotes`}}, // koanf
		"a text for true":        {"ingress: [{port: 80, remove: 'true'}]\n", []string{`1:30: ingress[80].remove: "true": is a string in YAML and must be true; remove the quotes`}},
		"yes for true":           {"ingress: [{port: 80, remove: yes}]\n", []string{`1:30: ingress[80].remove: "yes": must be true; to keep the entry, remove this key`}},
		"false":                  {"ingress: [{port: 80, remove: false}]\n", []string{`1:30: ingress[80].remove: "false": must be true; to keep the entry, remove this key`}},
		"no":                     {"accessLog: no\n", []string{`1:12: accessLog: "no": must be one of none, refused, all`}},
		"a number for a time":    {"envoy: {drainTime: 10}\n", []string{`1:20: envoy.drainTime: "10": ` + duration}},
		"times":                  {"envoy: {drainTime: 500ms, parentShutdownTime: 25h}\n", []string{`1:20: envoy.drainTime: "500ms": ` + duration, `1:47: envoy.parentShutdownTime: "25h": ` + duration}},
		"more times":             {"envoy: {drainTime: -5s, parentShutdownTime: 1.5m}\n", []string{`1:20: envoy.drainTime: "-5s": ` + duration, `1:45: envoy.parentShutdownTime: "1.5m": ` + duration}},
		"times out of bounds":    {"envoy: {drainTime: 0s, parentShutdownTime: 99999999999999999999h}\n", []string{`1:20: envoy.drainTime: "0s": ` + duration, `1:44: envoy.parentShutdownTime: "99999999999999999999h": ` + duration}},
		"threads":                {"envoy: {concurrency: 0}\n", []string{`1:22: envoy.concurrency: "0": must be a number of worker threads from 1 to 256`}},
		"threads, not decimal":   {"envoy: {concurrency: 0x2}\n", []string{`1:22: envoy.concurrency: "0x2": must be a number of worker threads from 1 to 256`}},
		"half threads":           {"envoy: {concurrency: 2.5}\n", []string{`1:22: envoy.concurrency: "2.5": must be a number of worker threads from 1 to 256`}},
		"a version from nowhere": {"tls: {minVersion: '1.4'}\n", []string{`1:19: tls.minVersion: "1.4": must be one of 1.2, 1.3`}},
		"a version by its name":  {"tls: {minVersion: TLSv1.3}\n", []string{`1:19: tls.minVersion: "TLSv1.3": must be one of 1.2, 1.3; did you mean 1.3?`}},
		"a version of Envoy's":   {"tls: {minVersion: TLSv1_3}\n", []string{`1:19: tls.minVersion: "TLSv1_3": must be one of 1.2, 1.3; did you mean 1.3?`}},
		"a line break":           {"tls: {minVersion: \"1.3\\n\"}\n", []string{`1:19: tls.minVersion: "1.3\n": ends with a line break: remove it`}},
		"a line break, of block": {"accessLog: |\n  all\n", []string{`1:12: accessLog: "all\n": ends with a line break: remove it`}},
		"a tab":                  {"accessLog: \"\\tall\"\n", []string{`1:12: accessLog: "\tall": starts with a tab: remove it`}},
		"quotes in quotes":       {"accessLog: '\"all\"'\n", []string{`1:12: accessLog: "\"all\"": the quotes are part of the value: remove them`}},
		"choices":                {"accessLog: refuse\notherProtocols: DROP\nenvoy: {logLevel: warn}\n", []string{`1:12: accessLog: "refuse": must be one of none, refused, all; did you mean refused?`, `2:17: otherProtocols: "DROP": must be one of drop, accept; did you mean drop?`, `3:19: envoy.logLevel: "warn": must be one of trace, debug, info, warning, error, critical, off; did you mean warning?`}},
		"modes":                  {"ingress: [{port: 80, mode: TLS}, {port: 81, mode: mutual}, {port: 82, mode: pass}]\n", []string{`1:28: ingress[80].mode: "TLS": must be one of mtls, tls, passthrough; did you mean tls?`, `1:51: ingress[81].mode: "mutual": must be one of mtls, tls, passthrough`, `1:77: ingress[82].mode: "pass": must be one of mtls, tls, passthrough; did you mean passthrough?`}},
		"octal":                  {"ingress: [{port: 010}]\n", []string{`1:18: ingress[item 1].port: "010": ` + ports}},     // koanf: 8
		"hexadecimal":            {"ingress: [{port: 0x50}]\n", []string{`1:18: ingress[item 1].port: "0x50": ` + ports}},   // koanf: 80
		"hexadecimal, in text":   {"ingress: [{port: '0x50'}]\n", []string{`1:18: ingress[item 1].port: "0x50": ` + ports}}, // koanf: 80
		"octal, newer":           {"ingress: [{port: 0o120}]\n", []string{`1:18: ingress[item 1].port: "0o120": ` + ports}},
		"binary number":          {"ingress: [{port: 0b1010000}]\n", []string{`1:18: ingress[item 1].port: "0b1010000": ` + ports}},
		"underscores":            {"ingress: [{port: 8_080}]\n", []string{`1:18: ingress[item 1].port: "8_080": ` + ports}},
		"a sign":                 {"ingress: [{port: +80}, {port: -80}]\n", []string{`1:18: ingress[item 1].port: "+80": ` + ports, `1:31: ingress[item 2].port: "-80": ` + ports}},
		"a float":                {"ingress: [{port: 80.0}, {port: 8e1}, {port: .inf}, {port: .nan}]\n", []string{`1:18: ingress[item 1].port: "80.0": ` + ports, `1:32: ingress[item 2].port: "8e1": ` + ports, `1:45: ingress[item 3].port: ".inf": ` + ports, `1:59: ingress[item 4].port: ".nan": ` + ports}},
		"huge numbers":           {"ingress: [{port: 65536}, {port: 18446744073709551696}, {port: 99999999999999999999999}]\n", []string{`1:18: ingress[item 1].port: "65536": ` + ports, `1:33: ingress[item 2].port: "18446744073709551696": ` + ports, `1:63: ingress[item 3].port: "99999999999999999999999": ` + ports}},
		"port 0":                 {"ingress: [{port: 0}]\n", []string{`1:18: ingress[item 1].port: "0": ` + ports}},
		"a port in its own way":  {"ingress: [{port: true}, {port: ''}, {port: ' 80'}, {port: 80/tcp}]\n", []string{`1:18: ingress[item 1].port: "true": ` + ports, "1:32: ingress[item 2].port: " + ports, `1:44: ingress[item 3].port: " 80": starts with a space: remove it`, `1:59: ingress[item 4].port: "80/tcp": ` + ports}},
		"ranges":                 {"ingress: [{port: 9-8}, {port: 1-}, {port: -5-9}, {port: 0-9}, {port: 8000-70000}, {port: 1 - 2}, {port: 1-2-3}, {port: 01-2}]\n", []string{`1:18: ingress[item 1].port: "9-8": ends before it starts; ` + ports, `1:31: ingress[item 2].port: "1-": ` + ports, `1:43: ingress[item 3].port: "-5-9": ` + ports, `1:57: ingress[item 4].port: "0-9": ` + ports, `1:70: ingress[item 5].port: "8000-70000": ` + ports, `1:90: ingress[item 6].port: "1 - 2": ` + ports, `1:105: ingress[item 7].port: "1-2-3": ` + ports, `1:120: ingress[item 8].port: "01-2": ` + ports}},
		"reserved ports":         {"ingress: [{port: 15006}, {port: 1-65535}]\negress: [{listen: '127.0.0.1:15007', upstream: x:1}]\n", []string{`1:18: ingress[item 1].port: "15006": ports 15006 and 15007 are mantlet's own listeners; leave them out`, `1:33: ingress[item 2].port: "1-65535": ports 15006 and 15007 are mantlet's own listeners; leave them out`, `2:19: egress[item 1].listen: "127.0.0.1:15007": ports 15006 and 15007 are mantlet's own listeners; leave them out`}},

		// Entries.
		"no key":                   {"ingress:\n  - name: web\negress:\n  - upstream: x:1\n", []string{`2:5: ingress: an entry needs the key "port"`, `4:5: egress: an entry needs the key "listen"`}},
		"a # in a name":            {"ingress: [{port: 80, name: 'a#b'}]\n", []string{`1:28: ingress[80].name: "a#b": must not contain #`}},
		"a path that breaks lines": {"ingress: [{port: \"80\\nfake: line\", mode: \"\\e[31m\"}]\n", []string{`1:18: ingress[item 1].port: "80\nfake: line": ` + ports, `1:42: ingress[item 1].mode: "\x1b[31m": must be one of mtls, tls, passthrough`}},
		"no upstream":              {"egress: [{listen: '127.0.0.1:80'}]\n", []string{"1:10: egress[127.0.0.1:80].upstream: is missing: a new entry needs it"}},
		"listen addresses":         {"egress: [{listen: '[::2]:80', upstream: x:1}, {listen: 'localhost:80', upstream: x:1}, {listen: 80, upstream: x:1}]\n", []string{`1:19: egress[item 1].listen: "[::2]:80": is outside 127.0.0.0/8 and [::1], so others than the workload could connect to it; ` + listen, `1:56: egress[item 2].listen: "localhost:80": ` + listen, `1:97: egress[item 3].listen: "80": ` + listen}},
		"brackets without quotes":  {"egress:\n  - listen: [::1]:8081\n    upstream: x:1\n", []string{`2:3: "- listen: [::1]:8081": not valid YAML: an address in brackets must be in quotes`}},
		"allow":                    {"ingress: [{port: 80, allow: [yes, 1, 1.5, '', a b, 10.0.0.1, 'spiffe://a b', '*.*.x', 'a.']}]\n", []string{`1:35: ingress[80].allow[1]: "1": ` + san, `1:38: ingress[80].allow[2]: "1.5": ` + san, "1:43: ingress[80].allow[3]: " + san, `1:47: ingress[80].allow[4]: "a b": ` + san, `1:52: ingress[80].allow[5]: "10.0.0.1": ` + san, `1:62: ingress[80].allow[6]: "spiffe://a b": is not a valid URI SAN; write it like spiffe://mesh/ns/shop/sa/cart`, `1:78: ingress[80].allow[7]: "*.*.x": ` + san, `1:87: ingress[80].allow[8]: "a.": ` + san}},
		"allow of another mode":    {"ingress: [{port: 80, mode: tls, allow: [a, b]}]\n", []string{`1:41: ingress[80].allow: "[a, b]": requires mode mtls, but the mode is tls (/config.yaml:1:28): without client certificates, clients cannot be told apart`}},
		"serverNames":              {"egress: [{listen: '127.0.0.1:80', upstream: x:1, serverNames: ['*', '*.x', a, 5]}]\n", []string{`1:64: egress[127.0.0.1:80].serverNames[0]: "*": must name one endpoint, without a wildcard; a wildcard in the endpoint's certificate matches it`, `1:69: egress[127.0.0.1:80].serverNames[1]: "*.x": must name one endpoint, without a wildcard; a wildcard in the endpoint's certificate matches it`, `1:79: egress[127.0.0.1:80].serverNames[3]: "5": ` + san}},
		"removed, and more":        {"ingress: [{port: 80, remove: true, mode: tls}]\n", []string{`1:30: ingress[80].remove: "true": an entry with remove: true must not have other fields`}},
		"times do not fit":         {"envoy: {drainTime: 10m}\n", []string{`1:20: envoy.drainTime: "10m": must be less than envoy.parentShutdownTime, which is 10m (default)`}},
		"the same port twice":      {"ingress: [{port: 80, mode: tls}, {port: '80', mode: mtls}, {port: 80-80, mode: tls}]\n", []string{"1:34: ingress[80]: differs from the entry at /config.yaml:1:11; keep only one of them"}},
		"lists differ":             {"ingress: [{port: 80, allow: [a]}, {port: 80, allow: [a, b]}]\n", []string{"1:35: ingress[80]: differs from the entry at /config.yaml:1:11; keep only one of them"}},
		"overlaps": {"ingress:\n- port: 80-90\n- port: 85\n- port: 87-99\n- port: 90\n- port: 99-100\n- port: 101\n", []string{
			"3:3: ingress[85]: overlaps 80-90 (/config.yaml:2:3); ranges must be identical or disjoint",
			"4:3: ingress[87-99]: overlaps 80-90 (/config.yaml:2:3); ranges must be identical or disjoint",
			"5:3: ingress[90]: overlaps 87-99 (/config.yaml:4:3); ranges must be identical or disjoint",
			"6:3: ingress[99-100]: overlaps 87-99 (/config.yaml:4:3); ranges must be identical or disjoint",
		}},
		"overlaps that start alike": {"ingress: [{port: 80-90}, {port: 80}]\n", []string{"1:26: ingress[80]: overlaps 80-90 (/config.yaml:1:11); ranges must be identical or disjoint"}},
		"one mistake, one problem": { // and not that the upstream is missing, that the times do not fit or that there are two entries
			"egress: [{listen: '127.0.0.1:80', upstream: []}, {listen: '127.0.0.1:81', remove: yes}]\nenvoy: {drainTime: 5, parentShutdownTime: 8s}\ningress: [{port: 80, mode: x}, {port: 80, mode: tls}]\n",
			[]string{"1:45: egress[127.0.0.1:80].upstream: must be a string", `1:83: egress[127.0.0.1:81].remove: "yes": must be true; to keep the entry, remove this key`, `2:20: envoy.drainTime: "5": ` + duration, `3:28: ingress[80].mode: "x": must be one of mtls, tls, passthrough`},
		},

		// What is no YAML.
		"tabs":                {"tls:\n\tminVersion: '1.3'\n", []string{`2:2: "minVersion: '1.3'": not valid YAML: indent with spaces, not tabs`}},
		"indentation":         {"ingress:\n  - port: 80\n   mode: tls\n", []string{`3:4: "mode: tls": not valid YAML: an item that starts with - was expected: check the indentation`}},
		"no colon":            {"tls: {}\ningress\n  - port: 80\n", []string{`3:3: "- port: 80": not valid YAML: a key has no ":" after it, on this line or the one before`}},
		"a colon in a value":  {"tls: {}\naccessLog: a: b\n", []string{`2:1: "accessLog: a: b": not valid YAML: a ":" is not allowed here: check the indentation, or put the value in quotes`}},
		"an open quote":       {"tls: {}\naccessLog: 'none\n", []string{`2:1: "accessLog: 'none": not valid YAML: a quote is not closed`}},
		"an open bracket":     {"ingress: [\n", []string{`1:1: "ingress: [": not valid YAML: a bracket is not closed, or a value is missing`}},
		"NUL":                 {"tls: {}\naccessLog: no\x00ne\n", []string{"2:14: contains a NUL byte; it must be UTF-8 text"}},
		"no UTF-8":            {"# caf\xe9\ntls: {}\n", []string{"1:6: contains the byte 0xe9, which is not valid UTF-8"}},
		"half a character":    {"# caf\xc3", []string{"1:6: contains the byte 0xc3, which is not valid UTF-8"}},
		"a control character": {"# é\x07\n", []string{"1:4: contains the control character U+0007, which YAML does not allow"}},
		"a terminal escape":   {"accessLog: \x1b[2Jnone\n", []string{"1:12: contains the control character U+001B, which YAML does not allow"}},
		"UTF-16":              {"\xff\xfet\x00l\x00s\x00", []string{" is encoded in UTF-16; save it as UTF-8"}},
		"UTF-16, big end":     {"\xfe\xff\x00t\x00l\x00s", []string{" is encoded in UTF-16; save it as UTF-8"}},
		"UTF-16, unmarked":    {"t\x00l\x00s\x00", []string{"1:2: contains a NUL byte; it must be UTF-8 text"}},
		"deep brackets":       {strings.Repeat("[", 100_000), []string{`1:1: "` + strings.Repeat("[", 120) + `"… (10240 bytes): not valid YAML: it is nested too deeply`}},
		"deep objects":        {strings.Repeat("{a: ", 100_000), []string{`1:1: "` + strings.Repeat("{a: ", 30) + `"… (40447 bytes): not valid YAML: it is nested too deeply`}},
		"deep lists":          {strings.Repeat("- ", 100_000), []string{`1:1: "` + strings.Repeat("- ", 60) + `"… (20479 bytes): not valid YAML: it is nested too deeply`}},
		"brackets, closed":    {"ingress: " + strings.Repeat("[", 9_000) + strings.Repeat("]", 9_000), []string{"1:11: ingress[item 1]: must be a mapping of keys to values"}},
		"a binary":            {"\x7fELF\x02\x01\x01\x00", []string{"1:1: contains the control character U+007F, which YAML does not allow"}},
		"too long":            {strings.Repeat("#\n", 2<<20) + "#", []string{" is longer than 4194304 bytes, which is the limit"}},
	}
}

func TestYAMLProblems(t *testing.T) {
	for name, c := range yamlProblems() {
		t.Run(name, func(t *testing.T) {
			config, err := environment(t).Merge([]byte(c.text))
			if diff := cmp.Diff(c.want, places(err)); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(schema.Mesh{}, config.Mesh, addresses); diff != "" {
				t.Errorf("a refused file leaves something: %s", diff)
			}
		})
	}
}

// laughs are 10^9 values, ten by each alias.
func laughs() string {
	text := "ingress: &a0 [x]\n"
	for i := range 9 {
		text += fmt.Sprintf("a%d: &a%d [%s]\n", i+1, i+1, strings.Repeat(fmt.Sprintf("*a%d, ", i), 10))
	}
	return text + "egress: *a9\n"
}

func laughed(known, anchors string) []string {
	lines := []string{"1:10: ingress: " + anchors}
	for i := range 9 {
		lines = append(lines, fmt.Sprintf(`%d:1: "a%d": unknown key; %s`, i+2, i+1, known))
	}
	return append(lines, "11:9: egress: "+anchors)
}

// TestYAMLLarge checks that megabytes are read whole, or refused whole.
func TestYAMLLarge(t *testing.T) {
	var text strings.Builder
	text.WriteString("ingress:\n")
	for port := 20_000; text.Len() < 2<<20; port++ {
		fmt.Fprintf(&text, "  - port: %d\n    name: %q\n", port, strings.Repeat("n", 100))
	}
	config, err := environment(t).Merge([]byte(text.String()))
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(text.String(), "port:"); len(config.Mesh.Ingress) != n {
		t.Errorf("%d entries of %d", len(config.Mesh.Ingress), n)
	}
	text.WriteString("  - port: 0\n")
	_, err = environment(t).Merge([]byte(text.String()))
	if all := places(err); len(all) != 1 || !strings.HasSuffix(all[0], `.port: "0": must be a port from 1 to 65535 or a range, for example 8000-8099`) {
		t.Errorf("%q", all)
	}
	_, err = environment(t).Merge([]byte("x: [" + strings.Repeat("y, ", (2<<20)/3)))
	if all := places(err); len(all) != 1 || !strings.Contains(all[0], "not valid YAML: a bracket is not closed, or a value is missing") {
		t.Errorf("%.300q", all)
	}
}

// TestInline checks that the text of MANTLET_CONFIG_INLINE is read as the file is, with its own place.
func TestInline(t *testing.T) {
	_, err := schema.ParseEnvironment([]string{"MANTLET_CONFIG_INLINE=tls: {minVersion: 1.3}\ningress:\n\t- port: 80\n"})
	if diff := cmp.Diff([]string{`MANTLET_CONFIG_INLINE:3:2: "- port: 80": not valid YAML: indent with spaces, not tabs`}, report(err)); diff != "" {
		t.Error(diff)
	}
	_, err = schema.ParseEnvironment([]string{"MANTLET_CONFIG_INLINE=tls: {minVersion: 1.3}\ningress: [{}]\n"})
	if diff := cmp.Diff([]string{
		`MANTLET_CONFIG_INLINE:1:19: tls.minVersion: "1.3": is a number in YAML and must be a string; put it in quotes: "1.3"`,
		`MANTLET_CONFIG_INLINE:2:11: ingress: an entry needs the key "port"`,
	}, report(err)); diff != "" {
		t.Error(diff)
	}
}
