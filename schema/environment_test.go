package schema_test

import (
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"mantlet/schema"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	ingress = "EDG_INGRESS_PROXY_CONFIG="
	egress  = "EDG_EGRESS_PROXY_CONFIG="
)

// report is what a person reads of an error, a line for each problem.
func report(err error) []string {
	var lines []string
	for _, p := range schema.Problems(err) {
		lines = append(lines, p.Error())
	}
	return lines
}

// addresses makes them values for cmp.
var addresses = cmp.Options{
	cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
}

// defaults is the mesh of an empty environment.
func defaults() schema.Mesh {
	return schema.Mesh{
		TLS:            schema.TLS{MinVersion: schema.TLS12},
		Envoy:          schema.Envoy{Concurrency: 2, DrainTime: 10 * time.Second, ParentShutdownTime: 10 * time.Minute, LogLevel: "warning"},
		OtherProtocols: schema.OtherProtocolsDrop,
		AccessLog:      schema.AccessLogRefused,
		SourceAddress:  schema.SourceAddressPod,
		Outbound:       schema.Outbound{Mode: schema.OutboundAccept},
	}
}

func TestEnvironment(t *testing.T) {
	port := func(name string, port uint16, mode schema.Mode) schema.Ingress {
		return schema.Ingress{Name: name, Ports: schema.Ports{First: port, Last: port}, Mode: mode}
	}
	to := func(name, listen, host string, port uint16) schema.Egress {
		return schema.Egress{Name: name, Listen: netip.MustParseAddrPort(listen), Upstream: schema.Upstream{Host: host, Port: port}}
	}
	long := strings.Repeat("x", 4096)
	for name, c := range map[string]struct {
		environ []string
		ingress []schema.Ingress
		egress  []schema.Egress
	}{
		"nothing":         {},
		"empty variables": {environ: []string{ingress, egress, "MANTLET_CONFIG=", "MANTLET_ACCESS_LOG=", "MANTLET_CONFIG_INLINE="}},
		"empty entries":   {environ: []string{ingress + "####", egress + "##"}},
		"foreign variables": {environ: []string{
			"PATH=/bin", "MANTLET=x", "mantlet_config=x", "EDG_OTHER=x", "=C:=C:\\", "", "EDG_MARBLE_TYPE=x", "CONTRAST_LOG_LEVEL=x", "CONTRAST_CONFIG=x", "MY_INGRESS_PROXY_CONFIG=x",
			"K8S_EGRESS_PROXY_CONFIG=x", "NGINX_INGRESS_PROXY_CONFIG=x", "INGRESS_PROXY_CONFIG=x", "EDG_INGRESS_HOST=x", "MANTIS_CONFIG=x", "CONFIG=x",
		}},
		"of a Service of Mantlet": {environ: []string{"MANTLET_SERVICE_HOST=10.0.0.1", "MANTLET_SERVICE_PORT_WEB=80", "MANTLET_PORT=tcp://10.0.0.1:80", "MANTLET_CONFIG_PORT_80_TCP_ADDR=10.0.0.1"}},
		"modes": {
			environ: []string{ingress + "web#8080#false##metrics#7890#true"},
			ingress: []schema.Ingress{port("metrics", 7890, schema.ModePassthrough), port("web", 8080, schema.ModeTLS)},
		},
		"edges of ports": {
			environ: []string{ingress + "a#65535#true##b#1#true##c#15005#true##d#15008#true"},
			ingress: []schema.Ingress{
				port("b", 1, schema.ModePassthrough), port("c", 15005, schema.ModePassthrough),
				port("d", 15008, schema.ModePassthrough), port("a", 65535, schema.ModePassthrough),
			},
		},
		"empty entries among others": {
			environ: []string{ingress + "##web#8080#false####metrics#7890#true##"},
			ingress: []schema.Ingress{port("metrics", 7890, schema.ModePassthrough), port("web", 8080, schema.ModeTLS)},
		},
		"the same twice": {
			environ: []string{ingress + "web#8080#false##other#8080#false", egress + "a#127.0.0.1:80#b:1##c#127.0.0.1:80#b:1"},
			ingress: []schema.Ingress{port("web", 8080, schema.ModeTLS)},
			egress:  []schema.Egress{to("a", "127.0.0.1:80", "b", 1)},
		},
		"two ports of one name": {
			environ: []string{ingress + "web#8080#false##web#8081#false"},
			ingress: []schema.Ingress{port("web", 8080, schema.ModeTLS), port("web", 8081, schema.ModeTLS)},
		},
		"upstreams": {
			environ: []string{egress + strings.Join([]string{
				"short#127.0.0.1:1#billing-svc:8080", "long#127.0.0.1:2#billing_svc.shop.svc.cluster.local.:8080", "four#127.0.0.1:3#192.0.2.7:65535",
				"six#127.0.0.1:4#[2001:DB8::7]:8080", "mapped#127.0.0.1:5#[::ffff:192.0.2.7]:8080", "digits#127.0.0.1:6#10.0.0.com:1",
			}, "##")},
			egress: []schema.Egress{
				to("short", "127.0.0.1:1", "billing-svc", 8080), to("long", "127.0.0.1:2", "billing_svc.shop.svc.cluster.local.", 8080),
				to("four", "127.0.0.1:3", "192.0.2.7", 65535), to("six", "127.0.0.1:4", "2001:db8::7", 8080),
				to("mapped", "127.0.0.1:5", "192.0.2.7", 8080), to("digits", "127.0.0.1:6", "10.0.0.com", 1),
			},
		},
		"listen addresses, sorted by number": {
			environ: []string{egress + "a#127.255.255.254:8081#x:1##b#[::1]:8081#x:1##c#127.0.0.10:80#x:1##d#127.0.0.9:81#x:1##e#127.0.0.9:80#x:1##f#[0:0::1]:8082#x:1"},
			egress: []schema.Egress{
				to("e", "127.0.0.9:80", "x", 1), to("d", "127.0.0.9:81", "x", 1), to("c", "127.0.0.10:80", "x", 1),
				to("a", "127.255.255.254:8081", "x", 1), to("b", "[::1]:8081", "x", 1), to("f", "[::1]:8082", "x", 1),
			},
		},
		"the newer spelling": {
			environ: []string{"CONTRAST_INGRESS_PROXY_CONFIG=web#8080#false", "CONTRAST_EGRESS_PROXY_CONFIG=a#127.0.0.1:80#b:1"},
			ingress: []schema.Ingress{port("web", 8080, schema.ModeTLS)},
			egress:  []schema.Egress{to("a", "127.0.0.1:80", "b", 1)},
		},
		"both spellings": {
			environ: []string{ingress + "web#8080#false", "CONTRAST_INGRESS_PROXY_CONFIG=web#8080#false"},
			ingress: []schema.Ingress{port("web", 8080, schema.ModeTLS)},
		},
		"both spellings, one empty": {
			environ: []string{ingress, "CONTRAST_INGRESS_PROXY_CONFIG=web#8080#false", egress + "a#127.0.0.1:80#b:1", "CONTRAST_EGRESS_PROXY_CONFIG="},
			ingress: []schema.Ingress{port("web", 8080, schema.ModeTLS)},
			egress:  []schema.Egress{to("a", "127.0.0.1:80", "b", 1)},
		},
		"a variable twice": { // as the container gets it of a Kubernetes manifest
			environ: []string{ingress + "web#0#x", ingress + "web#8080#false"},
			ingress: []schema.Ingress{port("web", 8080, schema.ModeTLS)},
		},
		"names": {
			environ: []string{
				ingress + "\"}] drop\n\t\x00#1#true##\xff\xfe#2#true##🦀=é#3#true##" + long + "#4#true###5#true## #6#true",
				egress + "{{.}}'`$(id)#127.0.0.1:1#b:1",
			},
			ingress: []schema.Ingress{
				port("\"}] drop\n\t\x00", 1, schema.ModePassthrough), port("\xff\xfe", 2, schema.ModePassthrough),
				port("🦀=é", 3, schema.ModePassthrough), port(long, 4, schema.ModePassthrough),
				port("", 5, schema.ModePassthrough), port(" ", 6, schema.ModePassthrough),
			},
			egress: []schema.Egress{to("{{.}}'`$(id)", "127.0.0.1:1", "b", 1)},
		},
	} {
		t.Run(name, func(t *testing.T) {
			want := defaults()
			want.Ingress, want.Egress = c.ingress, c.egress
			env, err := schema.ParseEnvironment(c.environ)
			if diff := cmp.Diff([]string(nil), report(err)); diff != "" {
				t.Fatal(diff)
			}
			config, err := env.Load()
			if err != nil {
				t.Fatal(err)
			}
			for _, got := range []schema.Mesh{env.Base().Mesh, config.Mesh} {
				if diff := cmp.Diff(want, got, addresses); diff != "" {
					t.Error(diff)
				}
			}
		})
	}
}

type environmentProblem struct {
	environ []string
	want    []string // without the variable's name where there is only one
}

// environmentProblems has every way in which a variable can be wrong, and what an operator reads then.
func environmentProblems() map[string]environmentProblem {
	const (
		port     = "must be a port number from 1 to 65535"
		listen   = "must be a loopback address and a port, for example 127.137.0.1:8081 or [::1]:8081"
		upstream = "must be a host and a port, for example billing-svc:8080, 192.0.2.7:8080 or [2001:db8::7]:8080"
		disable  = `must be "true" (passthrough, no TLS) or "false" (TLS without client certificates)`
		in       = "must have 3 fields, name#port#disableTLS, but has "
		out      = "must have 3 fields, name#listen-ip:listen-port#host-or-ip:port, but has "
		duration = "must be a duration from 1s to 24h in hours, minutes and seconds, for example 10s or 1h30m"
		known    = "ACCESS_LOG, CONFIG, CONFIG_INLINE, CONFIG_SHA256, ENVOY_CONCURRENCY, ENVOY_DRAIN_TIME, ENVOY_LOG_LEVEL, " +
			"ENVOY_PARENT_SHUTDOWN_TIME, ENVOY_PATH, ENVOY_UID, GATE_SOCKET, HOST_IP, LIFT_DEFAULT_DENY, LOG_LEVEL, MAX_CONNECTION_AGE, OTHER_PROTOCOLS, OUTBOUND, OUTBOUND_ALLOW, OVERRIDES, POD_IP, READY_FILE, RUNTIME_DIRECTORY, SOURCE_ADDRESS, STATUS_ADDRESS, TLS_CA, TLS_CERTIFICATE, TLS_DIRECTORY, TLS_KEY, TLS_MIN_VERSION"
	)
	x120 := strings.Repeat("x", 120)
	long := strings.Repeat("a.", 127) + "a"
	pin := strings.Repeat("0a", 32)
	return map[string]environmentProblem{
		"ports": {
			[]string{ingress + "a#0#true##b#70000#true##c#-1#true##d#abc#true##e#+80#true##f# 80#true##g#080#true##h#80-90#true##i#0x50#true##j##true"},
			[]string{
				` entry 1: port of "a#0#true": "0": ` + port,
				` entry 2: port of "b#70000#true": "70000": ` + port,
				` entry 3: port of "c#-1#true": "-1": ` + port,
				` entry 4: port of "d#abc#true": "abc": ` + port,
				` entry 5: port of "e#+80#true": "+80": ` + port,
				` entry 6: port of "f# 80#true": " 80": starts with a space: remove it`,
				` entry 7: port of "g#080#true": "080": ` + port,
				` entry 8: port of "h#80-90#true": "80-90": ` + port,
				` entry 9: port of "i#0x50#true": "0x50": ` + port,
				` entry 10: "j": ` + in + "1", // ## is an end wherever it stands
				` entry 11: "true": ` + in + "1",
			},
		},
		"mantlet's own ports": {
			[]string{ingress + "a#15006#true##b#15007#false"},
			[]string{
				` entry 1: port of "a#15006#true": "15006": ports 15006 and 15007 are mantlet's own listeners; leave them out`,
				` entry 2: port of "b#15007#false": "15007": ports 15006 and 15007 are mantlet's own listeners; leave them out`,
			},
		},
		"numbers of fields": {
			[]string{ingress + "#####a#80##b#80#true#x##c#81#true#"},
			[]string{
				` entry 3: port of "#a#80": "a": ` + port,
				` entry 3: disableTLS of "#a#80": "80": ` + disable,
				` entry 4: "b#80#true#x": ` + in + "4; separate entries with ##",
				` entry 5: "c#81#true#": ` + in + "4; separate entries with ##",
			},
		},
		"disableTLS": {
			[]string{ingress + "a#80#True##b#81#yes##c#82#1##d#83#true ##e#84#false\n"},
			[]string{
				` entry 1: disableTLS of "a#80#True": "True": ` + disable + `; write true`,
				` entry 2: disableTLS of "b#81#yes": "yes": ` + disable,
				` entry 3: disableTLS of "c#82#1": "1": ` + disable + `; write true`,
				` entry 4: disableTLS of "d#83#true ": "true ": ends with a space: remove it`,
				` entry 5: disableTLS of "e#84#false\n": "false\n": ends with a line break: remove it`,
			},
		},
		"several in one entry, behind empty ones": {
			[]string{ingress + "##a#x#y##"},
			[]string{
				` entry 2: port of "a#x#y": "x": ` + port,
				` entry 2: disableTLS of "a#x#y": "y": ` + disable,
			},
		},
		"the same port, another mode": {
			[]string{ingress + "a#80#true##b#80#false##c#80#true##d#80#false"},
			[]string{
				` entry 2: ingress[80]: differs from the entry at EDG_INGRESS_PROXY_CONFIG entry 1; keep only one of them`,
				` entry 4: ingress[80]: differs from the entry at EDG_INGRESS_PROXY_CONFIG entry 1; keep only one of them`,
			},
		},
		"a long name": {
			[]string{ingress + strings.Repeat("x", 4096) + "#0#true"},
			[]string{` entry 1: port of "` + x120 + `"… (4103 bytes): "0": ` + port},
		},
		"a long value": {
			[]string{ingress + "a#" + strings.Repeat("x", 4096) + "#true"},
			[]string{` entry 1: port of "a#` + x120[2:] + `"… (4103 bytes): "` + x120 + `"… (4096 bytes): ` + port},
		},
		"a name that would break a log": {
			[]string{ingress + "\"}]\n\x1b[31m\xff🦀#80#maybe"},
			[]string{` entry 1: disableTLS of "\"}]\n\x1b[31m\xff🦀#80#maybe": "maybe": ` + disable},
		},
		"listen addresses": {
			[]string{egress + "a#10.0.0.1:80#x:1##b#::1:80#x:1##c#127.0.0.1#x:1##d#127.0.0.1:0#x:1##e#[127.0.0.1]:80#x:1##f#localhost:80#x:1##" +
				"g#127.255.255.255:80#x:1##h#127.0.0.1:15006#x:1##i#[::2]:80#x:1##j#[::ffff:127.0.0.1]:80#x:1##k#127.0.0.01:80#x:1##l#0.0.0.0:80#x:1##m#[::1%lo]:80#x:1##n#:80#x:1"},
			[]string{
				` entry 1: listen address of "a#10.0.0.1:80#x:1": "10.0.0.1:80": is outside 127.0.0.0/8 and [::1], so others than the workload could connect to it; ` + listen,
				` entry 2: listen address of "b#::1:80#x:1": "::1:80": ` + listen,
				` entry 3: listen address of "c#127.0.0.1#x:1": "127.0.0.1": ` + listen,
				` entry 4: listen address of "d#127.0.0.1:0#x:1": "127.0.0.1:0": ` + listen,
				` entry 5: listen address of "e#[127.0.0.1]:80#x:1": "[127.0.0.1]:80": ` + listen,
				` entry 6: listen address of "f#localhost:80#x:1": "localhost:80": ` + listen,
				` entry 7: listen address of "g#127.255.255.255:80#x:1": "127.255.255.255:80": is the broadcast address of loopback, which nothing can connect to; ` + listen,
				` entry 8: listen address of "h#127.0.0.1:15006#x:1": "127.0.0.1:15006": ports 15006 and 15007 are mantlet's own listeners; leave them out`,
				` entry 9: listen address of "i#[::2]:80#x:1": "[::2]:80": is outside 127.0.0.0/8 and [::1], so others than the workload could connect to it; ` + listen,
				` entry 10: listen address of "j#[::ffff:127.0.0.1]:80#x:1": "[::ffff:127.0.0.1]:80": is outside 127.0.0.0/8 and [::1], so others than the workload could connect to it; ` + listen,
				` entry 11: listen address of "k#127.0.0.01:80#x:1": "127.0.0.01:80": ` + listen,
				` entry 12: listen address of "l#0.0.0.0:80#x:1": "0.0.0.0:80": is outside 127.0.0.0/8 and [::1], so others than the workload could connect to it; ` + listen,
				` entry 13: listen address of "m#[::1%lo]:80#x:1": "[::1%lo]:80": is outside 127.0.0.0/8 and [::1], so others than the workload could connect to it; ` + listen,
				` entry 14: listen address of "n#:80#x:1": ":80": ` + listen,
			},
		},
		"upstreams": {
			[]string{egress + "a#127.0.0.1:1#b##b#127.0.0.1:2#b:0##c#127.0.0.1:3#2001:db8::7:80##d#127.0.0.1:4#[b]:80##e#127.0.0.1:5#[192.0.2.7]:80##f#127.0.0.1:6#:80##" +
				"g#127.0.0.1:7#[fe80::1%eth0]:80##h#127.0.0.1:8#0.0.0.0:80##i#127.0.0.1:9#b:x##j#127.0.0.1:10#10.0.0.300:80##k#127.0.0.1:11#-b:80##l#127.0.0.1:12#" + long + "b:80##" +
				"m#127.0.0.1:13#[2001:db8::7:80##n#127.0.0.1:14#tcp://b:80##o#127.0.0.1:15#a..b:80##p#127.0.0.1:16#10.007:80##q#127.0.0.1:17#224.0.0.1:80##r#127.0.0.1:18#b :80##s#127.0.0.1:19#bücher:80##t#127.0.0.1:20#"},
			[]string{
				` entry 1: upstream of "a#127.0.0.1:1#b": "b": ` + upstream,
				` entry 2: upstream of "b#127.0.0.1:2#b:0": "b:0": the port "0" ` + port,
				` entry 3: upstream of "c#127.0.0.1:3#2001:db8::7:80": "2001:db8::7:80": ` + upstream,
				` entry 4: upstream of "d#127.0.0.1:4#[b]:80": "[b]:80": ` + upstream,
				` entry 5: upstream of "e#127.0.0.1:5#[192.0.2.7]:80": "[192.0.2.7]:80": ` + upstream,
				` entry 6: upstream of "f#127.0.0.1:6#:80": ":80": ` + upstream,
				` entry 7: upstream of "g#127.0.0.1:7#[fe80::1%eth0]:80": "[fe80::1%eth0]:80": must be the address of a single host, without a zone`,
				` entry 8: upstream of "h#127.0.0.1:8#0.0.0.0:80": "0.0.0.0:80": must be the address of a single host, without a zone`,
				` entry 9: upstream of "i#127.0.0.1:9#b:x": "b:x": the port "x" ` + port,
				` entry 10: upstream of "j#127.0.0.1:10#10.0.0.300:80": "10.0.0.300:80": "10.0.0.300" is neither an IP address nor a host name`,
				` entry 11: upstream of "k#127.0.0.1:11#-b:80": "-b:80": "-b" is not a host name: each part between dots must have 1 to 63 letters, digits, hyphens or underscores, with no hyphen at either end`,
				` entry 12: upstream of "l#127.0.0.1:12#` + long[:105] + `"… (274 bytes): "` + long[:120] + `"… (259 bytes): the host name is longer than 253 characters`,
				` entry 13: upstream of "m#127.0.0.1:13#[2001:db8::7:80": "[2001:db8::7:80": ` + upstream,
				` entry 14: upstream of "n#127.0.0.1:14#tcp://b:80": "tcp://b:80": ` + upstream,
				` entry 15: upstream of "o#127.0.0.1:15#a..b:80": "a..b:80": "a..b" is not a host name: each part between dots must have 1 to 63 letters, digits, hyphens or underscores, with no hyphen at either end`,
				` entry 16: upstream of "p#127.0.0.1:16#10.007:80": "10.007:80": "10.007" is neither an IP address nor a host name`,
				` entry 17: upstream of "q#127.0.0.1:17#224.0.0.1:80": "224.0.0.1:80": must be the address of a single host, without a zone`,
				` entry 18: upstream of "r#127.0.0.1:18#b :80": "b :80": "b " is not a host name: each part between dots must have 1 to 63 letters, digits, hyphens or underscores, with no hyphen at either end`,
				` entry 19: upstream of "s#127.0.0.1:19#bücher:80": "bücher:80": "bücher" is not a host name: each part between dots must have 1 to 63 letters, digits, hyphens or underscores, with no hyphen at either end`,
				` entry 20: upstream of "t#127.0.0.1:20#": ` + upstream,
			},
		},
		"egress fields": {
			[]string{egress + "a#127.0.0.1:1##b#127.0.0.1:2#x:1#y"},
			[]string{
				` entry 1: "a#127.0.0.1:1": ` + out + "2",
				` entry 2: "b#127.0.0.1:2#x:1#y": ` + out + "4; separate entries with ##",
			},
		},
		"the same listen address, another upstream": {
			[]string{egress + "a#127.0.0.1:1#x:1##b#127.0.0.1:1#x:2##c#[::1]:1#x:1##d#[0::1]:1#y:1"},
			[]string{
				` entry 2: egress[127.0.0.1:1]: differs from the entry at EDG_EGRESS_PROXY_CONFIG entry 1; keep only one of them`,
				` entry 4: egress[[::1]:1]: differs from the entry at EDG_EGRESS_PROXY_CONFIG entry 3; keep only one of them`,
			},
		},
		"a circle": {
			[]string{egress + "a#127.0.0.1:1#127.0.0.1:1##b#[::1]:1#[0::1]:1"},
			[]string{
				` entry 1: egress[127.0.0.1:1].upstream: "127.0.0.1:1": is the entry's own listen address: connections would loop back to mantlet`,
				` entry 2: egress[[::1]:1].upstream: "[::1]:1": is the entry's own listen address: connections would loop back to mantlet`,
			},
		},
		"a circle of several": {
			[]string{egress + "a#127.0.0.1:1#127.0.0.2:2##b#127.0.0.2:2#127.0.0.1:1##c#127.0.0.1:3#LocalHost.:3##d#127.0.0.1:4#127.0.0.1:15006##e#127.0.0.1:5#127.0.0.1:6"},
			[]string{
				` entry 1: egress[127.0.0.1:1].upstream: "127.0.0.2:2": is the listen address of egress[127.0.0.2:2]: connections would loop back to mantlet`,
				` entry 2: egress[127.0.0.2:2].upstream: "127.0.0.1:1": is the listen address of egress[127.0.0.1:1]: connections would loop back to mantlet`,
				` entry 3: egress[127.0.0.1:3].upstream: "LocalHost.:3": is the listen address of egress[127.0.0.1:3]: connections would loop back to mantlet`,
				` entry 4: egress[127.0.0.1:4].upstream: "127.0.0.1:15006": is mantlet's own listener: connections would loop back to mantlet`,
			},
		},
		"spellings differ": {
			[]string{"CONTRAST_INGRESS_PROXY_CONFIG=a#80#true", ingress + "a#80#false", "CONTRAST_EGRESS_PROXY_CONFIG=##", egress + "a#127.0.0.1:80#x:1"},
			[]string{
				`CONTRAST_EGRESS_PROXY_CONFIG: "##": EDG_EGRESS_PROXY_CONFIG is also set, to a different value ("a#127.0.0.1:80#x:1"); set only one of them, or both to the same value`,
				`CONTRAST_INGRESS_PROXY_CONFIG: "a#80#true": EDG_INGRESS_PROXY_CONFIG is also set, to a different value ("a#80#false"); set only one of them, or both to the same value`,
			},
		},
		"the newer spelling is named": {
			[]string{"CONTRAST_INGRESS_PROXY_CONFIG=a#80#x"},
			[]string{`CONTRAST_INGRESS_PROXY_CONFIG entry 1: disableTLS of "a#80#x": "x": ` + disable},
		},
		"unknown names": {
			[]string{
				"MANTLET_TLS_MIN_VERSON=1.3", "MANTLET_TLS_MINVERSION=", "MANTLET_CONFIG_FILE=/x", "MANTLET_CONFIG_SHA=", "MANTLET_FOO=a\nb=c", "MANTLET_ACCESSLOG",
				"MANTLET_overrides=none", "MANTLET_=",
			},
			[]string{
				`MANTLET_: mantlet has no such variable; known variables: MANTLET_… ` + known,
				`MANTLET_ACCESSLOG: mantlet has no such variable; did you mean MANTLET_ACCESS_LOG?`,
				`MANTLET_CONFIG_FILE: "/x": mantlet has no such variable; did you mean MANTLET_CONFIG?`,
				`MANTLET_CONFIG_SHA: mantlet has no such variable; did you mean MANTLET_CONFIG_SHA256?`,
				`MANTLET_FOO: "a\nb=c": mantlet has no such variable; known variables: MANTLET_… ` + known,
				`MANTLET_TLS_MINVERSION: mantlet has no such variable; did you mean MANTLET_TLS_MIN_VERSION?`,
				`MANTLET_TLS_MIN_VERSON: "1.3": mantlet has no such variable; did you mean MANTLET_TLS_MIN_VERSION?`,
				`MANTLET_overrides: "none": mantlet has no such variable; did you mean MANTLET_OVERRIDES?`,
			},
		},
		"nearly known names": {
			[]string{
				"EDG_INGRES_PROXY_CONFIG=web#8080#false", "EDG_EGRESS_PROXI_CONF=", "EDG_INGRESS_PROXY=x", "EDG_EGRESS_PROXY_CONFIGURATION=x", "EDGE_INGRESS_PROXY_CONFIG=x",
				"EDGINGRESS_PROXY_CONFIG=x", " EDG_EGRESS_PROXY_CONFIG=x", "\ufeffEDG_EGRESS_PROXY_CONFIG=x", "EDG-INGRESS-PROXY-CONFIG=x",
				"CONTRAST_INGRESS_PROXY_CONFGI=x", "CONTRST_EGRESS_PROXY_CONFIG=x", "CONTRAST_INGRESS_PROXY_CFG=x", "MANTLE_CONFIG=x",
				"MANTLET_INGRES_PROXY_CONFIG=x",
			},
			[]string{
				`" EDG_EGRESS_PROXY_CONFIG": "x": mantlet has no such variable; did you mean EDG_EGRESS_PROXY_CONFIG?`,
				`CONTRAST_INGRESS_PROXY_CFG: "x": mantlet has no such variable; did you mean CONTRAST_INGRESS_PROXY_CONFIG?`,
				`CONTRAST_INGRESS_PROXY_CONFGI: "x": mantlet has no such variable; did you mean CONTRAST_INGRESS_PROXY_CONFIG?`,
				`CONTRST_EGRESS_PROXY_CONFIG: "x": mantlet has no such variable; did you mean CONTRAST_EGRESS_PROXY_CONFIG?`,
				`EDG-INGRESS-PROXY-CONFIG: "x": mantlet has no such variable; did you mean EDG_INGRESS_PROXY_CONFIG?`,
				`EDGE_INGRESS_PROXY_CONFIG: "x": mantlet has no such variable; did you mean EDG_INGRESS_PROXY_CONFIG?`,
				`EDGINGRESS_PROXY_CONFIG: "x": mantlet has no such variable; did you mean EDG_INGRESS_PROXY_CONFIG?`,
				`EDG_EGRESS_PROXI_CONF: mantlet has no such variable; did you mean EDG_EGRESS_PROXY_CONFIG?`,
				`EDG_EGRESS_PROXY_CONFIGURATION: "x": mantlet has no such variable; did you mean EDG_EGRESS_PROXY_CONFIG?`,
				`EDG_INGRESS_PROXY: "x": mantlet has no such variable; did you mean EDG_INGRESS_PROXY_CONFIG?`,
				`EDG_INGRES_PROXY_CONFIG: "web#8080#false": mantlet has no such variable; did you mean EDG_INGRESS_PROXY_CONFIG?`,
				`MANTLET_INGRES_PROXY_CONFIG: "x": mantlet has no such variable; did you mean EDG_INGRESS_PROXY_CONFIG?`,
				`MANTLE_CONFIG: "x": mantlet has no such variable; did you mean MANTLET_CONFIG?`,
				`"\ufeffEDG_EGRESS_PROXY_CONFIG": "x": mantlet has no such variable; did you mean EDG_EGRESS_PROXY_CONFIG?`,
			},
		},
		"scalars of the mesh": {
			[]string{
				"MANTLET_TLS_MIN_VERSION=1.1", "MANTLET_ENVOY_CONCURRENCY=0", "MANTLET_ENVOY_DRAIN_TIME=10", "MANTLET_ENVOY_PARENT_SHUTDOWN_TIME=5s",
				"MANTLET_ENVOY_LOG_LEVEL=warn", "MANTLET_OTHER_PROTOCOLS=Drop", "MANTLET_ACCESS_LOG=yes",
			},
			[]string{
				`MANTLET_ACCESS_LOG: accessLog: "yes": must be one of none, refused, all`,
				`MANTLET_ENVOY_CONCURRENCY: envoy.concurrency: "0": must be a number of worker threads from 1 to 256`,
				`MANTLET_ENVOY_DRAIN_TIME: envoy.drainTime: "10": ` + duration, // and nothing of the other, which 5s may be longer than
				`MANTLET_ENVOY_LOG_LEVEL: envoy.logLevel: "warn": must be one of trace, debug, info, warning, error, critical, off; did you mean warning?`,
				`MANTLET_OTHER_PROTOCOLS: otherProtocols: "Drop": must be one of drop, accept; did you mean drop?`,
				`MANTLET_TLS_MIN_VERSION: tls.minVersion: "1.1": must be one of 1.2, 1.3`,
			},
		},
		"threads":         {[]string{"MANTLET_ENVOY_CONCURRENCY=257"}, []string{`MANTLET_ENVOY_CONCURRENCY: envoy.concurrency: "257": must be a number of worker threads from 1 to 256`}},
		"threads, signed": {[]string{"MANTLET_ENVOY_CONCURRENCY=+2"}, []string{`MANTLET_ENVOY_CONCURRENCY: envoy.concurrency: "+2": must be a number of worker threads from 1 to 256`}},
		"drains longer than it lives": {
			[]string{"MANTLET_ENVOY_DRAIN_TIME=20m"},
			[]string{`MANTLET_ENVOY_DRAIN_TIME: envoy.drainTime: "20m": must be less than envoy.parentShutdownTime, which is 10m (default)`},
		},
		"lives shorter than it drains": {
			[]string{"MANTLET_ENVOY_PARENT_SHUTDOWN_TIME=10s"},
			[]string{`MANTLET_ENVOY_PARENT_SHUTDOWN_TIME: envoy.parentShutdownTime: "10s": must be more than envoy.drainTime, which is 10s (default)`},
		},
		"both times": {
			[]string{"MANTLET_ENVOY_PARENT_SHUTDOWN_TIME=3600s", "MANTLET_ENVOY_DRAIN_TIME=60m"},
			[]string{`MANTLET_ENVOY_PARENT_SHUTDOWN_TIME: envoy.parentShutdownTime: "1h": must be more than envoy.drainTime, which is 1h (MANTLET_ENVOY_DRAIN_TIME)`},
		},
		"quotes": { // as a shell would remove them, and an env file does not
			[]string{
				ingress + `"web#8080#false"`, egress + `'a#127.0.0.1:1#b:1'`, `MANTLET_TLS_DIRECTORY="/tls"`, `MANTLET_ACCESS_LOG='all'`, `MANTLET_ENVOY_PATH="envoy"`,
				"MANTLET_ENVOY_UID=\"1337\n\"",
			},
			[]string{
				`EDG_EGRESS_PROXY_CONFIG entry 1: upstream of "'a#127.0.0.1:1#b:1'": "b:1'": the quotes are part of the value: remove them`,
				` entry 1: disableTLS of "\"web#8080#false\"": "false\"": the quotes are part of the value: remove them`,
				`MANTLET_ACCESS_LOG: accessLog: "'all'": the quotes are part of the value: remove them`,
				`MANTLET_ENVOY_PATH: "\"envoy\"": the quotes are part of the value: remove them`,
				`MANTLET_ENVOY_UID: "\"1337\n\"": must be a numeric user ID from 0 to 2147483647`,
				`MANTLET_TLS_DIRECTORY: "\"/tls\"": the quotes are part of the value: remove them`,
			},
		},
		"one # between entries": {
			[]string{ingress + "a#1#true#b#2#true", egress + "a#127.0.0.1:1#x:1#b#127.0.0.1:2#x:1"},
			[]string{
				`EDG_EGRESS_PROXY_CONFIG entry 1: "a#127.0.0.1:1#x:1#b#127.0.0.1:2#x:1": ` + out + "6; separate entries with ##",
				` entry 1: "a#1#true#b#2#true": ` + in + "6; separate entries with ##",
			},
		},
		"the process": {
			[]string{
				"MANTLET_CONFIG=mesh.yaml", "MANTLET_CONFIG_SHA256=" + pin[1:], "MANTLET_OVERRIDES=tight", "MANTLET_LOG_LEVEL=warning",
				"MANTLET_TLS_DIRECTORY=./tls", "MANTLET_RUNTIME_DIRECTORY=~/run",
			},
			[]string{
				`MANTLET_CONFIG: "mesh.yaml": must be an absolute path`,
				`MANTLET_CONFIG_SHA256: "` + pin[1:] + `": must be a SHA-256 digest: 64 hexadecimal digits and nothing else`,
				`MANTLET_LOG_LEVEL: "warning": must be one of debug, info, warn, error; did you mean warn?`,
				`MANTLET_OVERRIDES: "tight": must be one of all, tighten, none; did you mean tighten?`,
				`MANTLET_RUNTIME_DIRECTORY: "~/run": must be an absolute path`,
				`MANTLET_TLS_DIRECTORY: "./tls": must be an absolute path`,
			},
		},
		"a pin with the end of its line": {
			[]string{"MANTLET_CONFIG=/x", "MANTLET_CONFIG_SHA256=" + pin + "\r\n"},
			[]string{`MANTLET_CONFIG_SHA256: "` + pin + `\r\n": ends with a line break: remove it`},
		},
		"a pin as sha256sum prints it": {
			[]string{"MANTLET_CONFIG=/x", "MANTLET_CONFIG_SHA256=" + pin + "  x"},
			[]string{`MANTLET_CONFIG_SHA256: "` + pin + `  x": must be a SHA-256 digest: 64 hexadecimal digits and nothing else`},
		},
		"a user by name": {
			[]string{"MANTLET_ENVOY_UID=nobody"},
			[]string{`MANTLET_ENVOY_UID: "nobody": must be a numeric user ID from 0 to 2147483647`},
		},
		"the user that means none": {
			[]string{"MANTLET_ENVOY_UID=4294967295"},
			[]string{`MANTLET_ENVOY_UID: "4294967295": must be a numeric user ID from 0 to 2147483647`},
		},
		"a pin of no file": {
			[]string{"MANTLET_CONFIG=", "MANTLET_CONFIG_SHA256=" + pin},
			[]string{"MANTLET_CONFIG_SHA256: pins the content of the override file, but MANTLET_CONFIG does not name one"},
		},
		"one mistake, one problem": { // not that the upstream is missing
			[]string{egress + "a#127.0.0.1:1#x", "MANTLET_CONFIG_INLINE=egress: [{listen: '127.0.0.1:1', serverNames: [y]}]"},
			[]string{` entry 1: upstream of "a#127.0.0.1:1#x": "x": ` + upstream},
		},
		"everywhere at once, in order": {
			[]string{
				"MANTLET_CONFIG_INLINE=ingress:\n  - port: 80-90\n    mode: x\n  - port: 85\n  - port: 443\negress:\n  - listen: 127.0.0.1:1\n    upstrem: x:1\n  - listen: 127.0.0.1:2\n",
				egress + "a#10.0.0.1:80#x:1", ingress + "a#443-444#x##b#86#true", "MANTLET_ACCESS_LOG=x", "MANTLET_X=1",
			},
			[]string{
				`EDG_EGRESS_PROXY_CONFIG entry 1: listen address of "a#10.0.0.1:80#x:1": "10.0.0.1:80": is outside 127.0.0.0/8 and [::1], so others than the workload could connect to it; ` + listen,
				`EDG_INGRESS_PROXY_CONFIG entry 1: port of "a#443-444#x": "443-444": ` + port,
				`EDG_INGRESS_PROXY_CONFIG entry 1: disableTLS of "a#443-444#x": "x": ` + disable,
				`MANTLET_ACCESS_LOG: accessLog: "x": must be one of none, refused, all`,
				`MANTLET_CONFIG_INLINE:2:5: ingress[80-90]: overlaps 86 (EDG_INGRESS_PROXY_CONFIG entry 2); ranges must be identical or disjoint`,
				`MANTLET_CONFIG_INLINE:3:11: ingress[80-90].mode: "x": must be one of mtls, tls, passthrough`,
				`MANTLET_CONFIG_INLINE:4:5: ingress[85]: overlaps 80-90 (MANTLET_CONFIG_INLINE:2:5); ranges must be identical or disjoint`,
				`MANTLET_CONFIG_INLINE:8:5: egress[127.0.0.1:1]: "upstrem": unknown key; did you mean upstream?`,
				`MANTLET_CONFIG_INLINE:9:5: egress[127.0.0.1:2].upstream: is missing: a new entry needs it`,
				`MANTLET_X: "1": mantlet has no such variable; known variables: MANTLET_… ` + known,
			},
		},
	}
}

func TestEnvironmentProblems(t *testing.T) {
	for name, c := range environmentProblems() {
		t.Run(name, func(t *testing.T) {
			var want []string
			for _, line := range c.want {
				if strings.HasPrefix(line, " ") {
					variable, _, _ := strings.Cut(c.environ[0], "=")
					line = variable + line
				}
				want = append(want, line)
			}
			env, err := schema.ParseEnvironment(c.environ)
			if diff := cmp.Diff(want, report(err)); diff != "" {
				t.Fatal(diff)
			}
			// What was refused can't be used by mistake.
			for what, load := range map[string]func() (schema.Config, error){
				"Load":  env.Load,
				"Merge": func() (schema.Config, error) { return env.Merge([]byte("ingress: []\n")) },
			} {
				config, again := load()
				if diff := cmp.Diff(want, report(again)); diff != "" {
					t.Errorf("%s: %s", what, diff)
				}
				if diff := cmp.Diff(schema.Mesh{}, config.Mesh, addresses); diff != "" {
					t.Errorf("%s: %s", what, diff)
				}
			}
		})
	}
}

func TestProcess(t *testing.T) {
	pin := strings.Repeat("0A", 32)
	for name, c := range map[string]struct {
		environ []string
		want    schema.Process
	}{
		"defaults": {nil, schema.Process{
			EnvoyPath: "envoy", EnvoyUID: 1337, TLS: schema.TLSFiles{Directory: "/tls-config"}, RuntimeDirectory: "/run/mantlet", LogLevel: "info", Overrides: schema.OverridesAll,
		}},
		"all set": {[]string{
			"MANTLET_ENVOY_PATH=/opt/envoy=1", "MANTLET_ENVOY_UID=0", "MANTLET_TLS_DIRECTORY=/tls/", "MANTLET_RUNTIME_DIRECTORY=/run//x", "MANTLET_LOG_LEVEL=debug",
			"MANTLET_CONFIG=/etc/mantlet/../mesh.yaml", "MANTLET_CONFIG_SHA256=" + pin, "MANTLET_OVERRIDES=tighten",
			"MANTLET_POD_IP=10.0.0.7", "MANTLET_HOST_IP=2001:db8::1",
		}, schema.Process{
			EnvoyPath: "/opt/envoy=1", EnvoyUID: 0, TLS: schema.TLSFiles{Directory: "/tls"}, RuntimeDirectory: "/run/x", LogLevel: "debug", ConfigFile: "/etc/mesh.yaml",
			ConfigDigest: strings.ToLower(pin), Overrides: schema.OverridesTighten, PodIP: "10.0.0.7", HostIP: "2001:db8::1",
		}},
		"an admin port, and ingress off": {[]string{"EDG_ADMIN_PORT=9901", "CONTRAST_ADMIN_PORT=9901", "EDG_INGRESS_PROXY_CONFIG=DISABLED"}, schema.Process{
			EnvoyPath: "envoy", EnvoyUID: 1337, TLS: schema.TLSFiles{Directory: "/tls-config"}, RuntimeDirectory: "/run/mantlet", LogLevel: "info", Overrides: schema.OverridesAll,
			StatusAddress: ":9901", AdminVariable: "CONTRAST_ADMIN_PORT", IngressOff: "EDG_INGRESS_PROXY_CONFIG",
		}},
		"what a guest needs": {[]string{"MANTLET_LIFT_DEFAULT_DENY=true", "MANTLET_READY_FILE=/ready"}, schema.Process{
			EnvoyPath: "envoy", EnvoyUID: 1337, TLS: schema.TLSFiles{Directory: "/tls-config"}, RuntimeDirectory: "/run/mantlet", LogLevel: "info", Overrides: schema.OverridesAll,
			LiftDefaultDeny: true, ReadyFile: "/ready",
		}},
		"no admin port": {[]string{"EDG_ADMIN_PORT=", "CONTRAST_ADMIN_PORT=0", "MANTLET_LIFT_DEFAULT_DENY=false"}, schema.Process{
			EnvoyPath: "envoy", EnvoyUID: 1337, TLS: schema.TLSFiles{Directory: "/tls-config"}, RuntimeDirectory: "/run/mantlet", LogLevel: "info", Overrides: schema.OverridesAll,
		}},
		"as far as it is right": {[]string{"MANTLET_TLS_DIRECTORY=tls", "MANTLET_RUNTIME_DIRECTORY=/run/x", ingress + "x"}, schema.Process{
			EnvoyPath: "envoy", EnvoyUID: 1337, TLS: schema.TLSFiles{Directory: "/tls-config"}, RuntimeDirectory: "/run/x", LogLevel: "info", Overrides: schema.OverridesAll,
		}},
	} {
		t.Run(name, func(t *testing.T) {
			env, _ := schema.ParseEnvironment(c.environ)
			if diff := cmp.Diff(c.want, env.Process); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestHostNetwork(t *testing.T) {
	for pod, hosts := range map[string]map[string]bool{
		"10.0.0.7":    {"10.0.0.7": true, "::ffff:10.0.0.7": true, "10.0.0.8": false, "": false, "10.0.0.7/24": false},
		"2001:db8::7": {"2001:db8:0::7": true, "2001:db8::8": false},
		"":            {"": false, "10.0.0.7": false},
		"ten":         {"ten": false},
	} {
		for host, want := range hosts {
			err := schema.HostNetwork([]string{"MANTLET_POD_IPS=10.0.0.7", "MANTLET_POD_IP=" + pod, "MANTLET_HOST_IP=" + host})
			if (err != nil) != want {
				t.Errorf("pod %q on host %q: %v", pod, host, err)
			}
		}
	}
	if err := schema.HostNetwork(nil); err != nil {
		t.Error(err)
	}
}

// TestScalarVariables checks that each reaches its field.
func TestScalarVariables(t *testing.T) {
	env, err := schema.ParseEnvironment([]string{
		"MANTLET_TLS_MIN_VERSION=1.3", "MANTLET_ENVOY_CONCURRENCY=256", "MANTLET_ENVOY_DRAIN_TIME=1h30m", "MANTLET_ENVOY_PARENT_SHUTDOWN_TIME=24h",
		"MANTLET_ENVOY_LOG_LEVEL=off", "MANTLET_OTHER_PROTOCOLS=accept", "MANTLET_ACCESS_LOG=all", "MANTLET_SOURCE_ADDRESS=client",
		"MANTLET_OUTBOUND=drop", "MANTLET_OUTBOUND_ALLOW=10.96.0.1:443, dns,[fd00::]/8:443,10.96.0.1/32:443,",
	})
	if err != nil {
		t.Fatal(err)
	}
	want := schema.Mesh{
		TLS:            schema.TLS{MinVersion: schema.TLS13},
		Envoy:          schema.Envoy{Concurrency: 256, DrainTime: 90 * time.Minute, ParentShutdownTime: 24 * time.Hour, LogLevel: "off"},
		OtherProtocols: schema.OtherProtocolsAccept,
		AccessLog:      schema.AccessLogAll,
		SourceAddress:  schema.SourceAddressClient,
		Outbound: schema.Outbound{Mode: schema.OutboundDrop, DNS: true, Allow: []schema.Destination{
			{Prefix: netip.MustParsePrefix("10.96.0.1/32"), Port: 443}, {Prefix: netip.MustParsePrefix("fd00::/8"), Port: 443},
		}},
	}
	if diff := cmp.Diff(want, env.Base().Mesh, addresses); diff != "" {
		t.Error(diff)
	}
}

func TestProblems(t *testing.T) {
	for name, c := range map[string]struct {
		err  error
		want []schema.Problem
	}{
		"none":           {nil, nil},
		"another's":      {os.ErrClosed, []schema.Problem{{Reason: "file already closed"}}},
		"one":            {schema.Problem{Path: "x", Reason: "y"}, []schema.Problem{{Path: "x", Reason: "y"}}},
		"one, wrapped":   {errors.Join(schema.Problem{Path: "x", Reason: "y"}), []schema.Problem{{Path: "x", Reason: "y"}}},
		"without a text": {schema.Problem{Reason: "y"}, []schema.Problem{{Reason: "y"}}},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, schema.Problems(c.err)); diff != "" {
				t.Error(diff)
			}
			for _, p := range c.want {
				if strings.HasPrefix(p.Error(), ":") {
					t.Errorf("%q has an empty place", p.Error())
				}
			}
		})
	}
}

// TestReport checks the text of many problems at once: a line each, and an end to them.
func TestReport(t *testing.T) {
	_, err := schema.ParseEnvironment([]string{ingress + "a##b"})
	want := "2 problems:\n" +
		"  EDG_INGRESS_PROXY_CONFIG entry 1: \"a\": must have 3 fields, name#port#disableTLS, but has 1\n" +
		"  EDG_INGRESS_PROXY_CONFIG entry 2: \"b\": must have 3 fields, name#port#disableTLS, but has 1"
	if diff := cmp.Diff(want, err.Error()); diff != "" {
		t.Error(diff)
	}
	_, err = schema.ParseEnvironment([]string{ingress + strings.Repeat("a\n##", 5000)})
	lines := strings.Split(err.Error(), "\n")
	if diff := cmp.Diff([]string{"5000 problems:", "  and 4900 more"}, []string{lines[0], lines[len(lines)-1]}); diff != "" || len(lines) != 102 {
		t.Errorf("%d lines; %s", len(lines), diff)
	}
	if all := schema.Problems(err); len(all) != 5000 || !slices.IsSortedFunc(all, func(a, b schema.Problem) int { return a.Origin.Entry - b.Origin.Entry }) {
		t.Errorf("%d problems, or not in order", len(all))
	}
}
