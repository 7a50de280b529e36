package routes

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"mantlet/internal/lab"
	"mantlet/render"
)

func TestMain(m *testing.M) {
	lab.Enter()
	goleak.VerifyTestMain(m)
}

var both = render.Routes{IPv4: true, IPv6: true}

// in calls fn in a network namespace of its own, with a default route to nowhere in it.
func in(t *testing.T, fn func() error) {
	t.Helper()
	network, err := lab.NewNetwork()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := network.Close(); err != nil {
			t.Error(err)
		}
	})
	host, err := network.Host("pod")
	if err != nil {
		t.Fatal(err)
	}
	if err := host.Do(fn); err != nil {
		t.Error(err)
	}
}

// leads returns which way a packet with mantlet's mark, or without one, goes.
func leads(t *testing.T, f family, mark uint32) string {
	t.Helper()
	routes, err := netlink.RouteGetWithOptions(f.sample.AsSlice(), &netlink.RouteGetOptions{Mark: mark})
	switch {
	case err != nil:
		return err.Error()
	case routes[0].Type == unix.RTN_LOCAL && routes[0].LinkIndex == loopbackIndex:
		return "lo"
	default:
		return routes[0].String()
	}
}

func TestRepair(t *testing.T) {
	t.Parallel()
	in(t, func() error {
		var k Kernel
		before, err := snapshot()
		if err != nil {
			return err
		}
		for _, want := range []render.Routes{{IPv4: true}, {IPv6: true}, both, {}, both, {}} {
			if want != (render.Routes{}) && k.Check(want) == nil {
				t.Errorf("%+v are there before they are put there", want)
			}
			found, err := k.Repair(want)
			if err != nil || len(found) == 0 {
				t.Errorf("%+v: %q, %v", want, found, err)
			}
			if err := k.Check(want); err != nil {
				t.Errorf("%+v: %v", want, err)
			}
			if found, err := k.Repair(want); err != nil || len(found) > 0 {
				t.Errorf("%+v once more: %q, %v", want, found, err)
			}
			for _, f := range families {
				if is := leads(t, f, uint32(render.MarkClient)) == "lo"; is != f.wanted(want) {
					t.Errorf("%+v: that %s leads to lo is %v", want, f.name, is)
				}
				if way := leads(t, f, 0); way == "lo" {
					t.Errorf("%+v: what is not marked leads to lo", want)
				}
			}
		}
		after, err := snapshot()
		if err != nil {
			return err
		}
		if diff := cmp.Diff(before, after); diff != "" {
			t.Errorf("something else changed, or is left: %s", diff)
		}
		return nil
	})
}

// snapshot returns all routing rules and routes.
func snapshot() (all []string, err error) {
	for _, f := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := netlink.RuleList(f)
		if err != nil {
			return nil, err
		}
		for _, r := range rules {
			all = append(all, r.String())
		}
		routes, err := netlink.RouteListFiltered(f, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return nil, err
		}
		for _, r := range routes {
			all = append(all, r.String())
		}
	}
	return all, nil
}

func everything(f family) *net.IPNet {
	bits := f.sample.BitLen()
	return &net.IPNet{IP: make(net.IP, bits/8), Mask: net.CIDRMask(0, bits)}
}

// ourRule is the rule that mantlet makes.
func ourRule(f family) *netlink.Rule {
	rule := netlink.NewRule()
	rule.Family, rule.Table, rule.Priority = int(f.number), int(render.RouteTable), int(render.RoutePriority)
	rule.Mark, rule.Mask = uint32(render.MarkClient), new(uint32(render.MarkMask))
	return rule
}

func ourRoute(f family) *netlink.Route {
	return &netlink.Route{Dst: everything(f), Table: int(render.RouteTable), Type: unix.RTN_LOCAL, LinkIndex: loopbackIndex, Scope: netlink.SCOPE_HOST}
}

// TestDrift: whatever somebody else does to the routes is told, and put right without a touch to what is not mantlet's.
func TestDrift(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		do   func(family) error
		says string
	}{
		"the rule is gone":  {func(f family) error { return netlink.RuleDel(ourRule(f)) }, render.RoutingRule() + " is missing"},
		"the route is gone": {func(f family) error { return netlink.RouteDel(ourRoute(f)) }, render.Route() + " is missing"},
		"both are gone": {func(f family) error {
			return errors.Join(netlink.RuleDel(ourRule(f)), netlink.RouteDel(ourRoute(f)))
		}, " is missing"},
		"the route drops": {func(f family) error {
			route := ourRoute(f)
			route.Type, route.LinkIndex, route.Scope = unix.RTN_BLACKHOLE, 0, netlink.SCOPE_UNIVERSE
			return errors.Join(netlink.RouteDel(ourRoute(f)), netlink.RouteAdd(route))
		}, "another route in table"},
		"a route to some before it": {func(f family) error {
			route := ourRoute(f)
			route.Type, route.LinkIndex, route.Scope = unix.RTN_UNREACHABLE, 0, netlink.SCOPE_UNIVERSE
			route.Dst = &net.IPNet{IP: f.sample.AsSlice(), Mask: net.CIDRMask(f.sample.BitLen(), f.sample.BitLen())}
			return netlink.RouteAdd(route)
		}, "another route in table"},
		"the rule has another place": {func(f family) error {
			rule := ourRule(f)
			rule.Priority = 40000
			return errors.Join(netlink.RuleDel(ourRule(f)), netlink.RuleAdd(rule))
		}, "another routing rule"},
		"the rule is inverted": {func(f family) error {
			rule := ourRule(f)
			rule.Invert = true
			return errors.Join(netlink.RuleDel(ourRule(f)), netlink.RuleAdd(rule))
		}, "another routing rule"},
		"the rule is for some interface": {func(f family) error {
			rule := ourRule(f)
			rule.IifName = "eth0"
			return errors.Join(netlink.RuleDel(ourRule(f)), netlink.RuleAdd(rule))
		}, "another routing rule"},
		"another rule takes the mark": {func(f family) error {
			rule := ourRule(f)
			rule.Table, rule.Priority = unix.RT_TABLE_MAIN, 0
			return netlink.RuleAdd(rule)
		}, "another routing rule"},
		"the table for all": {func(f family) error {
			rule := netlink.NewRule()
			rule.Family, rule.Table, rule.Priority = int(f.number), int(render.RouteTable), 40000
			return netlink.RuleAdd(rule)
		}, "another routing rule"},
	} {
		for _, f := range families {
			t.Run(name+"/"+f.name, func(t *testing.T) {
				t.Parallel()
				in(t, func() error {
					var k Kernel
					if _, err := k.Repair(both); err != nil {
						return err
					}
					before, err := snapshot()
					if err != nil {
						return err
					}
					if err := c.do(f); err != nil {
						return err
					}
					if err := k.Check(both); err == nil || !strings.Contains(err.Error(), f.name+": ") || !strings.Contains(err.Error(), c.says) {
						t.Errorf("Check says %v", err)
					}
					if found, err := k.Repair(both); err != nil || len(found) == 0 || !strings.Contains(strings.Join(found, "\n"), c.says) {
						t.Errorf("found %q, %v", found, err)
					}
					if err := k.Check(both); err != nil {
						t.Error(err)
					}
					after, err := snapshot()
					if err != nil {
						return err
					}
					if diff := cmp.Diff(before, after); diff != "" {
						t.Error(diff)
					}
					return nil
				})
			})
		}
	}
}

// TestEarlierRule: a rule of somebody else's that comes before mantlet's is left alone, and told.
func TestEarlierRule(t *testing.T) {
	t.Parallel()
	in(t, func() error {
		var k Kernel
		if _, err := k.Repair(both); err != nil {
			return err
		}
		for _, f := range families {
			rule, route := netlink.NewRule(), ourRoute(f)
			rule.Family, rule.Table, rule.Priority = int(f.number), 77, 0
			route.Table, route.Type, route.Scope, route.LinkIndex = 77, unix.RTN_UNICAST, netlink.SCOPE_LINK, 0
			eth0, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			route.LinkIndex = eth0.Attrs().Index
			if err := errors.Join(netlink.RouteAdd(route), netlink.RuleAdd(rule)); err != nil {
				return err
			}
			const says = "another routing rule (priority 0 fwmark 0x0/0x0 lookup 77) comes before mantlet's"
			if err := k.Check(both); err == nil || !strings.Contains(err.Error(), f.name+": ") || !strings.Contains(err.Error(), says) {
				t.Errorf("Check says %v", err)
			}
			if _, err := k.Repair(both); err == nil || !strings.Contains(err.Error(), says) {
				t.Errorf("Repair says %v", err)
			}
			if err := netlink.RuleDel(rule); err != nil {
				return err
			}
			if err := k.Check(both); err != nil {
				t.Errorf("without that rule: %v", err)
			}
		}
		return nil
	})
}

// TestTry changes nothing.
func TestTry(t *testing.T) {
	t.Parallel()
	in(t, func() error {
		before, err := snapshot()
		if err != nil {
			return err
		}
		if err := (Kernel{}).Try(both); err != nil {
			t.Error(err)
		}
		after, err := snapshot()
		if diff := cmp.Diff(before, after); diff != "" {
			t.Error(diff)
		}
		return err
	})
}

func TestMissingOptions(t *testing.T) {
	t.Parallel()
	for _, err := range []error{unix.EOPNOTSUPP, unix.EAFNOSUPPORT} {
		if said := families[1].explain(err).Error(); !strings.Contains(said, "the kernel lacks CONFIG_IPV6_MULTIPLE_TABLES") {
			t.Error(said)
		}
	}
}

func TestWatch(t *testing.T) {
	t.Parallel()
	in(t, func() error {
		ctx, cancel := context.WithCancel(t.Context())
		notes := Kernel{}.Watch(ctx)
		defer func() {
			cancel()
			for range notes {
			}
		}()
		for _, f := range families {
			for _, do := range []func() error{
				func() error { return netlink.RouteAdd(ourRoute(f)) }, func() error { return netlink.RuleAdd(ourRule(f)) },
				func() error { return netlink.RuleDel(ourRule(f)) }, func() error { return netlink.RouteDel(ourRoute(f)) },
			} {
				for len(notes) > 0 {
					<-notes
				}
				if err := do(); err != nil {
					return err
				}
				select {
				case <-notes:
				case <-time.After(10 * time.Second):
					t.Errorf("%s: nothing is told", f.name)
				}
			}
		}
		return nil
	})
}
