package iptables_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"mantlet/internal/lab"
	"mantlet/internal/status"
	"mantlet/reconcile/iptables"
)

func TestMain(m *testing.M) {
	lab.Enter()
	goleak.VerifyTestMain(m)
}

// place is a host with the real iptables-legacy.
type place struct {
	*lab.Host
	t *testing.T
}

func newPlace(t *testing.T) place {
	t.Helper()
	if _, err := exec.LookPath("iptables-legacy"); err != nil {
		t.Fatal("iptables-legacy is not on PATH: `go tool task iptables` finds or unpacks it")
	}
	network, err := lab.NewNetwork()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = network.Close() })
	host, err := network.Host("guest")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("XTABLES_LOCKFILE", filepath.Join(t.TempDir(), "lock"))
	return place{host, t}
}

// run has iptables-legacy do what lines say, and returns what it prints.
func (p place) run(lines ...string) (said string) {
	p.t.Helper()
	for _, line := range lines {
		out, err := p.Run("iptables-legacy", strings.Fields(line)...)
		if err != nil {
			p.t.Fatalf("iptables-legacy %s: %v", line, err)
		}
		said += out
	}
	return said
}

func (p place) read() (rules status.LegacyRules) {
	p.t.Helper()
	if err := p.Do(func() (err error) {
		rules, err = iptables.Tables{}.Read()
		return err
	}); err != nil {
		p.t.Fatal(err)
	}
	return rules
}

const (
	deny  = "-A INPUT -m conntrack ! --ctstate RELATED,ESTABLISHED -j DROP"
	alias = "-A INPUT -m state ! --state RELATED,ESTABLISHED -j DROP"
)

// TestRead checks what is said of the rules that the real iptables-legacy makes. Only what drops all that is new is a default deny.
func TestRead(t *testing.T) {
	for name, c := range map[string]struct {
		lines []string
		want  status.LegacyRules
	}{
		"nothing":                {nil, status.LegacyRules{}},
		"empty tables":           {[]string{"-S", "-t nat -S", "-t mangle -S"}, status.LegacyRules{}},
		"a default deny":         {[]string{"-A INPUT -m conntrack ! --ctstate ESTABLISHED,RELATED -j DROP"}, status.LegacyRules{Denies: []string{deny}}},
		"its older form":         {[]string{"-A INPUT -m state ! --state ESTABLISHED,RELATED -j DROP"}, status.LegacyRules{Denies: []string{alias}}},
		"behind others":          {[]string{"-A INPUT -i lo -j ACCEPT", deny, "-A INPUT -p tcp -j ACCEPT"}, status.LegacyRules{Denies: []string{deny}, Others: []string{"table filter of iptables-legacy has 2 rules: they apply beside mantlet's"}}},
		"twice":                  {[]string{deny, deny}, status.LegacyRules{Denies: []string{deny, deny}}},
		"of TCP alone":           {[]string{"-A INPUT -p tcp -m conntrack ! --ctstate ESTABLISHED,RELATED -j DROP"}, one("filter")},
		"of an interface":        {[]string{"-A INPUT -i eth0 -m conntrack ! --ctstate ESTABLISHED,RELATED -j DROP"}, one("filter")},
		"of an address":          {[]string{"-A INPUT -s 192.0.2.0/24 -m conntrack ! --ctstate ESTABLISHED,RELATED -j DROP"}, one("filter")},
		"of other states":        {[]string{"-A INPUT -m conntrack ! --ctstate ESTABLISHED -j DROP"}, one("filter")},
		"of these states":        {[]string{"-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j DROP"}, one("filter")},
		"with another condition": {[]string{"-A INPUT -m conntrack ! --ctstate ESTABLISHED,RELATED --ctproto 6 -j DROP"}, one("filter")},
		"with another match":     {[]string{"-A INPUT -m conntrack ! --ctstate ESTABLISHED,RELATED -m mark --mark 1 -j DROP"}, one("filter")},
		"that accepts":           {[]string{"-A INPUT -m conntrack ! --ctstate ESTABLISHED,RELATED -j ACCEPT"}, one("filter")},
		"in another chain":       {[]string{"-A FORWARD -m conntrack ! --ctstate ESTABLISHED,RELATED -j DROP", "-A OUTPUT -j ACCEPT"}, status.LegacyRules{Others: []string{"table filter of iptables-legacy has 2 rules: they apply beside mantlet's"}}},
		"in another table":       {[]string{"-t mangle -A INPUT -m conntrack ! --ctstate ESTABLISHED,RELATED -j DROP"}, one("mangle")},
		"in a chain of its own":  {[]string{"-N mine", "-A mine -m conntrack ! --ctstate ESTABLISHED,RELATED -j DROP"}, one("filter")},
		"an empty chain":         {[]string{"-N mine", "-N other"}, status.LegacyRules{}},
		"a policy":               {[]string{"-P INPUT DROP"}, status.LegacyRules{Others: []string{"table filter of iptables-legacy has 0 rules, and -P INPUT DROP: they apply beside mantlet's"}}},
		"a redirect":             {[]string{"-t nat -A PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 81"}, one("nat")},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t)
			p.run(c.lines...)
			if diff := cmp.Diff(c.want, p.read()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func one(table string) status.LegacyRules {
	return status.LegacyRules{Others: []string{"table " + table + " of iptables-legacy has 1 rule: they apply beside mantlet's"}}
}

// TestReadMakesNoTable: asking the kernel for a table makes it, with its hooks for every packet.
func TestReadMakesNoTable(t *testing.T) {
	p := newPlace(t)
	p.read()
	var names []byte
	if err := p.Do(func() (err error) {
		names, err = os.ReadFile("/proc/thread-self/net/ip_tables_names")
		return err
	}); err != nil || len(names) > 0 {
		t.Errorf("there are tables %q, %v", names, err)
	}
}

// TestLift checks that exactly the rule is removed, in either form, and that one which is not there is an error.
func TestLift(t *testing.T) {
	others := []string{"-N mine", "-A mine -j DROP", "-A INPUT -p tcp -m conntrack ! --ctstate ESTABLISHED,RELATED -j DROP", "-P FORWARD DROP", "-A OUTPUT -p udp -j ACCEPT"}
	for _, rule := range []string{deny, alias} {
		p := newPlace(t)
		p.run(others...)
		want := p.run("-S")
		p.run(rule)
		if got := p.read().Denies; len(got) != 1 || got[0] != rule {
			t.Fatalf("it reads %q", got)
		}
		lift := func() error {
			return p.Do(func() error {
				return iptables.Tables{LockFile: filepath.Join(t.TempDir(), "lock")}.Lift(t.Context(), rule)
			})
		}
		if err := lift(); err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(want, p.run("-S")); diff != "" {
			t.Error(diff)
		}
		if err := lift(); err == nil || !strings.Contains(err.Error(), "does a matching rule exist") {
			t.Errorf("once more: %v", err)
		}
	}
}
