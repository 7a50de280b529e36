package nft

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/netlink"
	"github.com/rogpeppe/go-internal/txtar"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"mantlet/render"
	"mantlet/schema"
)

func TestReadGivesBackWhatReplacePut(t *testing.T) {
	t.Parallel()
	for name, want := range states() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPlace(t)
			have, err := p.table.Read()
			if err != nil || len(render.Diff(render.Ruleset{}, have)) > 0 {
				t.Fatalf("before there is a table, Read returned %v, %v", have, err)
			}
			p.replace(want)
			have, err = p.table.Read()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want.Text(), have.Text()); diff != "" {
				t.Errorf("(-want +have):\n%s", diff)
			}
			for _, line := range render.Diff(want, have) {
				t.Error(line)
			}
		})
	}
}

// TestUndermining: other tables' rules that take something away from these are told, and none that don't.
func TestUndermining(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	p.replace(rules(port1(8080, schema.ModeTLS)))
	for name, test := range map[string]struct {
		text string
		want []string
	}{
		"nothing": {"", nil},
		"harmless": {`table inet filter {
			chain first { type filter hook prerouting priority -300; policy accept; accept; }
			chain in { type filter hook input priority 0; policy drop; ct state established accept; tcp dport 22 jump more; notrack; }
			chain more { counter drop; }
			chain late { type filter hook prerouting priority -100; ct mark set 1; notrack; }
		}
		table ip nat {
			chain out { type nat hook output priority -100; tcp dport 1 redirect to :80; }
			chain post { type nat hook postrouting priority 100; masquerade; }
		}`, nil},
		"notrack": {`table inet raw {
			chain pre { type filter hook prerouting priority raw; tcp dport 8080 notrack; }
			chain out { type filter hook output priority raw; jump other; }
			chain other { notrack; }
		}`, []string{
			"table inet raw, chain other: notrack leaves packets without a connection, and mantlet's rules let none of them in",
			"table inet raw, chain pre: notrack leaves packets without a connection, and mantlet's rules let none of them in",
		}},
		"redirect": {`table ip nat {
			chain pre { type nat hook prerouting priority dstnat; tcp dport 7890 redirect to :8080; jump more; }
			chain more { tcp dport 1 dnat to 192.0.2.1:2; }
		}`, []string{
			"table ip nat, chain more: dnat can send connections to another port than the one whose policy let them in",
			"table ip nat, chain pre: redir can send connections to another port than the one whose policy let them in",
		}},
		"tproxy": {`table ip6 t { chain pre { type filter hook prerouting priority -160; meta l4proto tcp tproxy to [::1]:1; }; }`, []string{
			"table ip6 t, chain pre: tproxy can take connections away from Envoy",
		}},
	} {
		nft(t, p.pod, "flush ruleset")
		if test.text != "" {
			load(t, p.pod, test.text)
		}
		p.replace(rules(port1(8080, schema.ModeTLS)))
		for range 2 { // the second time from memory
			got, err := p.table.Conflicts()
			if diff := cmp.Diff(test.want, got); err != nil || diff != "" {
				t.Errorf("%s: %v (-want +got):\n%s", name, err, diff)
			}
		}
	}
}

// TestUnderminingByWhatIsMissingHere: iptables' targets and offloading, as kernels tell them that have them.
func TestUnderminingByWhatIsMissingHere(t *testing.T) {
	s := survey{hooks: map[site][]render.Hook{}}
	pre := site{unix.NFPROTO_IPV4, "raw", "PREROUTING"}
	s.hooks[pre] = []render.Hook{{Name: "prerouting", Priority: -300}}
	for target, want := range map[string]bool{"CT": true, "NOTRACK": true, "DNAT": true, "REDIRECT": true, "TPROXY": true, "MARK": false, "SNAT": false} {
		got := s.effect(pre, expression{name: "target", data: fields{"1": []byte(target + "\x00")}})
		if (got != "") != want || want && !strings.HasPrefix(got, target) {
			t.Errorf("target %s: %q", target, got)
		}
	}
	if got := s.effect(pre, expression{name: "flow_offload"}); got == "" {
		t.Error("offloaded connections are not told")
	}
	hook, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: unix.NFTA_HOOK_HOOKNUM, Data: make([]byte, 4)}, {Type: unix.NFTA_HOOK_PRIORITY, Data: make([]byte, 4)}})
	if err != nil {
		t.Fatal(err)
	}
	for name, add := range map[string]func() error{
		"flowtable": func() error {
			return s.addFlowtable(unix.NFPROTO_INET, attributes{flowtableTable: []byte("t\x00"), flowtableName: []byte("f\x00")})
		},
		"hardware": func() error {
			return s.addChain(unix.NFPROTO_NETDEV, attributes{
				unix.NFTA_CHAIN_TABLE: []byte("t\x00"), unix.NFTA_CHAIN_NAME: []byte("c\x00"), unix.NFTA_CHAIN_HOOK: hook, chainFlags: {0, 0, 0, 3},
			})
		},
	} {
		if err := add(); err != nil || len(s.lines) != 1 || !strings.Contains(s.lines[0], name) {
			t.Errorf("%s: %v, %q", name, err, s.lines)
		}
		s.lines = nil
	}
}

// goldens returns the rulesets of render's golden cases, by their texts.
func goldens(t *testing.T) map[string]render.Ruleset {
	t.Helper()
	files, err := filepath.Glob("../../render/testdata/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]render.Ruleset{}
	for _, file := range files {
		archive, err := txtar.ParseFile(file)
		if err != nil {
			t.Fatal(err)
		}
		environ, content := []string(nil), []byte(nil)
		for _, f := range archive.Files {
			switch f.Name {
			case "env":
				environ = strings.Split(strings.TrimSuffix(string(f.Data), "\n"), "\n")
			case "config.yaml":
				content, environ = f.Data, append(environ, "MANTLET_CONFIG=/config.yaml")
			}
		}
		env, err := schema.ParseEnvironment(environ)
		if err != nil {
			continue // a case of what is refused
		}
		config := env.Base()
		if content != nil {
			config, err = env.Merge(content)
		}
		if err == nil {
			r := render.Rules(config.Mesh, render.Generations{})
			all[r.Text()] = r
		}
	}
	if len(all) < 10 {
		t.Fatalf("%d golden rulesets", len(all))
	}
	return all
}

// readsBack puts a ruleset in place, and wants to read the same.
func (p *place) readsBack(t interface{ Errorf(string, ...any) }, want render.Ruleset) {
	if err := p.table.Replace(want); err != nil {
		t.Errorf("%v", err)
	}
	have, err := p.table.Read()
	if lines := render.Diff(want, have); err != nil || len(lines) > 0 {
		t.Errorf("%v, it differs: %s\nwant\n%shave\n%s", err, strings.Join(lines, "\n"), want.Text(), have.Text())
	}
}

func TestReadGivesBackGoldens(t *testing.T) {
	t.Parallel()
	modes(t, func(t *testing.T, p *place) {
		for _, want := range goldens(t) {
			p.readsBack(t, want)
		}
	})
}

func TestReadGivesBackAnyRuleset(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	rapid.Check(t, func(t *rapid.T) {
		mesh := schema.Mesh{
			OtherProtocols: rapid.SampledFrom([]schema.OtherProtocols{schema.OtherProtocolsDrop, schema.OtherProtocolsAccept}).Draw(t, "other protocols"),
		}
		generation := rapid.Custom(func(t *rapid.T) render.Generation {
			return render.Generation(rapid.Uint8Max(uint8(render.MaxGeneration)).Draw(t, "generation"))
		})
		generations := render.Generations{Default: generation.Draw(t, "default")}
		edges := rapid.SliceOfNDistinct(rapid.Uint16Min(1), 0, 30, rapid.ID).Draw(t, "edges")
		slices.Sort(edges)
		for pair := range slices.Chunk(edges, 2) {
			at := schema.Ports{First: pair[0], Last: pair[len(pair)-1]}
			mode := rapid.SampledFrom([]schema.Mode{schema.ModeMTLS, schema.ModeTLS, schema.ModePassthrough}).Draw(t, "mode")
			mesh.Ingress = append(mesh.Ingress, schema.Ingress{Ports: at, Mode: mode})
			if rapid.Bool().Draw(t, "has a generation") {
				generations.Ports = append(generations.Ports, render.PortsGeneration{Ports: at, Generation: generation.Draw(t, "of ports")})
			}
		}
		p.readsBack(t, render.Rules(mesh, generations))
	})
}

// substitutes are what other text may stand in a rule for some text; nft does not take each everywhere.
var substitutes = [][2]string{
	{"accept", "drop"},
	{"drop", "accept"},
	{"goto", "jump"},
	{"counter", ""},
	{"tcp reset", "icmpx admin-prohibited"},
	{`"lo"`, `"nope"`},
	{"iif ", "oif "},
	{"oif ", "iif "},
	{"priority 0:5", "priority 0:4"},
	{"priority 0:3", "priority 0:4"},
	{"set none", "set 0:1"},
	{`ct timeout set "tcp_timeouts"`, "ct mark set 1"},
	{"dport 15", "dport 16"},
	{"dport 9901", "dport 9902"},
	{"127.0.0.1", "127.0.0.2"},
	{"127.0.0.0/8", "127.0.0.0/16"},
	{"::1", "::2"},
	{"unicast", "local"},
	{"type local", "type unicast"},
	{"meta l4proto tcp", "meta l4proto udp"},
	{"meta l4proto tcp", "tcp sport 1"},
	{"!= tcp", "tcp"},
	{"{ icmp, ipv6-icmp }", "{ icmp, ipv6-icmp, sctp }"},
	{"{ tcp, udp }", "{ tcp, udp, sctp }"},
	{"reply", "original"},
	{"original", "reply"},
	{"invalid", "established"},
	{"snat", "dnat"},
	{"==", "!="},
	{"!=", "=="},
	{"0x0ff00000", "0x07f00000"},
	{"0x00400000", "0x00500000"},
	{"0x00300000", "0x00700000"},
	{"| 0x00", "| 0x01"},
	{"flags syn", "flags ack"},
	{"rst == rst", "fin == fin"},
	{"nd-redirect", "nd-router-advert"},
	{"icmp type redirect", "icmp type echo-request"},
	{"syn,rst,ack", "syn,ack"},
	{"wildcard 0", "wildcard 1"},
	{"skuid 1337", "skuid 1338"},
	{"skuid 0", "skuid 1"},
	{"0x6d6e7464", "0x6d6e7465"},
	{"admin-prohibited", "host-unreachable"},
	{"!= {", "{"},
	{"update", "add"},
	{". 0 ", ". 1 "},
	{" counter }", " }"},
	{"0x6d6e746c", "0x6d6e746d"},
	{"!= 0x6d", "0x6d"},
	{":15006", ":15999"},
	{":15007", ":15006"},
	{"127.0.0.1", "127.0.0.2"},
	{"@modes", "@answers"},
	{"@answers", "@modes"},
	{"sport", "dport"},
	{"dport", "sport"},
}

// TestEachStatementCounts: in a live table each rule that is taken away, and each statement that is changed, is told, and
// nothing else; and so it can be put back.
func TestEachStatementCounts(t *testing.T) {
	t.Parallel()
	mesh := schema.Mesh{
		StatusPort: statusPort, Ingress: []schema.Ingress{port1(7890, schema.ModePassthrough), port1(8080, schema.ModeTLS)},
		Egress: listening("127.0.0.1:1531", "[::1]:1531"),
	}
	tried := map[string]bool{} // rules that both modes have are tried once
	for _, mode := range []schema.OutboundMode{schema.OutboundDrop, schema.OutboundAccept} {
		t.Run(string(mode), func(t *testing.T) {
			mesh := mesh
			mesh.Outbound = leaving(mode)
			eachStatementCounts(t, render.Rules(mesh, render.Generations{}), tried)
		})
	}
}

func eachStatementCounts(t *testing.T, want render.Ruleset, done map[string]bool) {
	t.Helper()
	p := newPlace(t)
	p.replace(want)
	told := func(command, start string) {
		t.Helper()
		found, err := p.table.Repair()
		if err != nil || len(found) != 1 || !strings.HasPrefix(found[0], start) {
			t.Errorf("after %s differ, %v:\n\t%s\nwant one line that begins\n\t%s", command, err, strings.Join(found, "\n\t"), start)
		}
	}
	for _, chain := range want.Chains {
		for i, rule := range chain.Rules {
			if done[chain.Name+rule.Text()] {
				continue
			}
			done[chain.Name+rule.Text()] = true
			handle := p.handles(chain.Name)[i]
			command := fmt.Sprintf("delete rule inet mantlet %s handle %s", chain.Name, handle)
			nft(t, p.pod, command)
			told(command, fmt.Sprintf("chain %s rule %d: ", chain.Name, i+1))
			for s := range rule {
				tried := false
				for _, text := range variants(rule, s) {
					command := fmt.Sprintf("replace rule inet mantlet %s handle %s %s", chain.Name, p.handles(chain.Name)[i], text)
					if _, err := p.pod.Run("nft", command); err == nil {
						told(command, fmt.Sprintf("chain %s rule %d: have `", chain.Name, i+1))
						tried = true
						break
					}
				}
				if !tried {
					t.Errorf("chain %s, rule %q: no change of %q could be tried", chain.Name, rule.Text(), rule[s].Text())
				}
			}
		}
	}
}

// variants returns a rule's text with another text in one of its statements.
func variants(rule render.Rule, statement int) (all []string) {
	before, after := rule[:statement].Text(), rule[statement+1:].Text()
	text := rule[statement].Text()
	for _, s := range substitutes {
		if other := strings.Replace(text, s[0], s[1], 1); other != text {
			all = append(all, strings.Join([]string{before, other, after}, " "))
		}
	}
	return all
}

// handles returns those of a chain's rules.
func (p *place) handles(chain string) (all []string) {
	p.t.Helper()
	for line := range strings.Lines(nft(p.t, p.pod, "-a", "-s", "list", "chain", "inet", "mantlet", chain)) {
		if rule, handle, ok := strings.Cut(strings.TrimSpace(line), " # handle "); ok && !strings.HasSuffix(rule, "{") {
			all = append(all, handle)
		}
	}
	return all
}

func BenchmarkRead(b *testing.B) {
	p := newPlace(b)
	p.replace(rules(port1(7890, schema.ModePassthrough), port1(8080, schema.ModeTLS)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := p.table.Read(); err != nil {
			b.Fatal(err)
		}
	}
}
