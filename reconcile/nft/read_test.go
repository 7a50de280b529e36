package nft

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

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
			got, err := p.table.Undermining()
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
