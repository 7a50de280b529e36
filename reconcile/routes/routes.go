// Package routes keeps the policy routes by which the workload's answers to clients' addresses come back to Envoy: in each IP family a
// routing rule for the packets that mantlet's rules mark, and a routing table with one route, which leads to lo. It touches no other
// routing rule and no other table.
//
// The routes open nothing: what they miss is dropped by mantlet's rules. They stay when mantlet ends, as the rules do.
//
// Of github.com/vishvananda/netlink it uses the package of messages alone. The whole of it would make mantlet's binary 330 KB larger.
package routes

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"mantlet/render"
)

// Kernel is the routing of the calling thread's network namespace.
type Kernel struct{}

// family is an IP family.
type family struct {
	name   string
	number uint8
	option string     // what the kernel needs for routing rules
	sample netip.Addr // no host has it
}

var families = []family{
	{"IPv4", unix.AF_INET, "CONFIG_IP_MULTIPLE_TABLES", netip.MustParseAddr("192.0.2.1")}, // RFC 5737
	{"IPv6", unix.AF_INET6, "CONFIG_IPV6_MULTIPLE_TABLES", netip.MustParseAddr("100::1")}, // RFC 6666
}

// wanted reports whether routes has a family.
func (f family) wanted(routes render.Routes) bool {
	if f.number == unix.AF_INET6 {
		return routes.IPv6
	}
	return routes.IPv4
}

// Check returns nil if the kernel has these routes and leads there what is marked, and otherwise an error that says what differs.
func (k Kernel) Check(routes render.Routes) error {
	var errs []error
	for _, f := range families {
		changes, err := f.changes(f.wanted(routes))
		for _, c := range changes {
			errs = append(errs, errors.New(c.found))
		}
		if err == nil && len(changes) == 0 && f.wanted(routes) {
			err = f.try()
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Repair makes the kernel have these routes and no others of mantlet's, and returns what differed, a line each. It is idempotent. Where a
// family fails, the error says so, and the other one has its route all the same.
func (k Kernel) Repair(routes render.Routes) (found []string, err error) {
	var errs []error
	for _, f := range families {
		changes, failed := f.changes(f.wanted(routes))
		for _, c := range changes {
			found = append(found, c.found)
			if _, err := c.request.Execute(unix.NETLINK_ROUTE, 0); err != nil && !c.settled(err) {
				failed = errors.Join(failed, fmt.Errorf("%s: %w", c.found, f.explain(err)))
			}
		}
		if failed == nil && f.wanted(routes) {
			failed = f.try()
		}
		errs = append(errs, failed)
	}
	return found, errors.Join(errs...)
}

// Try returns an error for each IP family of routes whose policy routes the kernel cannot have. It changes nothing.
func (k Kernel) Try(routes render.Routes) error {
	var errs []error
	for _, f := range families {
		if f.wanted(routes) {
			_, err := f.dump(unix.RTM_GETRULE)
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// change is one thing that differs, and the request that repairs it.
type change struct {
	found   string
	request *nl.NetlinkRequest
}

// settled reports whether an error says that somebody else did the same meanwhile.
func (c change) settled(err error) bool {
	if c.request.Type == unix.RTM_NEWRULE || c.request.Type == unix.RTM_NEWROUTE {
		return errors.Is(err, unix.EEXIST)
	}
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH)
}

// changes returns what leads from what a family has to the route that it should have, if any.
func (f family) changes(want bool) (all []change, err error) {
	for _, kind := range []struct {
		get, add, remove int
		ours             func(entry) bool
		name             string
		new              func() *nl.NetlinkRequest
	}{
		// The table comes before the rule that looks there.
		{unix.RTM_GETROUTE, unix.RTM_NEWROUTE, unix.RTM_DELROUTE, entry.inTable, render.Route(), f.newRoute},
		{unix.RTM_GETRULE, unix.RTM_NEWRULE, unix.RTM_DELRULE, entry.isOurRule, render.RoutingRule(), f.newRule},
	} {
		entries, err := f.dump(kind.get)
		if err != nil && !want && lacks(err) {
			continue // then it has none of mantlet's
		}
		if err != nil {
			return nil, err
		}
		has := false
		for _, e := range entries {
			switch isRight := kind.get == unix.RTM_GETRULE && e.isRule() || kind.get == unix.RTM_GETROUTE && e.isRoute(); {
			case !kind.ours(e):
			case want && isRight && !has:
				has = true
			default:
				// As `ip route flush` does it: the kernel's own message, as a request to delete.
				request := nl.NewNetlinkRequest(kind.remove, unix.NLM_F_ACK)
				request.AddRawData(e.raw)
				all = append(all, change{fmt.Sprintf("%s: %s is there", f.name, e.text(kind.get)), request})
			}
		}
		if want && !has {
			all = append(all, change{fmt.Sprintf("%s: %s is missing", f.name, kind.name), kind.new()})
		}
	}
	return all, nil
}

func (f family) newRoute() *nl.NetlinkRequest {
	request := nl.NewNetlinkRequest(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK)
	message := nl.NewRtMsg()
	message.Family, message.Table, message.Type, message.Protocol = f.number, unix.RT_TABLE_UNSPEC, unix.RTN_LOCAL, unix.RTPROT_STATIC
	message.Scope = unix.RT_SCOPE_HOST
	request.AddData(message)
	request.AddData(nl.NewRtAttr(unix.RTA_TABLE, native(render.RouteTable)))
	request.AddData(nl.NewRtAttr(unix.RTA_OIF, native(loopbackIndex)))
	return request
}

func (f family) newRule() *nl.NetlinkRequest {
	request := nl.NewNetlinkRequest(unix.RTM_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK)
	request.AddData(&nl.RtMsg{RtMsg: unix.RtMsg{Family: f.number, Table: unix.RT_TABLE_UNSPEC, Type: nl.FR_ACT_TO_TBL}})
	for _, a := range []struct {
		kind  int
		value uint32
	}{
		{nl.FRA_PRIORITY, render.RoutePriority},
		{nl.FRA_FWMARK, uint32(render.MarkClient)},
		{nl.FRA_FWMASK, uint32(render.MarkMask)},
		{nl.FRA_TABLE, render.RouteTable},
	} {
		request.AddData(nl.NewRtAttr(a.kind, native(a.value)))
	}
	return request
}

// loopbackIndex is lo's interface index in every network namespace (LOOPBACK_IFINDEX, include/linux/net_namespace.h).
const loopbackIndex = 1

func native(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

// entry is a routing rule or a route, as the kernel tells it. The headers of both have the same size and fields (struct rtmsg,
// include/uapi/linux/rtnetlink.h; struct fib_rule_hdr, fib_rules.h).
type entry struct {
	raw        []byte
	header     *nl.RtMsg
	attributes map[uint16][]byte
}

func (e entry) u32(kind uint16) uint32 {
	if v := e.attributes[kind]; len(v) == 4 {
		return binary.NativeEndian.Uint32(v)
	}
	return 0
}

// only reports whether an entry has no attributes but some.
func (e entry) only(kinds ...uint16) bool {
	for kind := range e.attributes {
		if !slices.Contains(kinds, kind) {
			return false
		}
	}
	return true
}

// plain reports whether an entry is for all addresses.
func (e entry) plain() bool {
	return e.header.Dst_len == 0 && e.header.Src_len == 0 && e.header.Tos == 0
}

// inTable reports whether a route is in mantlet's table.
func (e entry) inTable() bool { return e.u32(unix.RTA_TABLE) == render.RouteTable }

// isRoute reports whether a route is the one that mantlet makes.
func (e entry) isRoute() bool {
	return e.inTable() && e.plain() && e.header.Type == unix.RTN_LOCAL && e.u32(unix.RTA_OIF) == loopbackIndex &&
		e.header.Flags&(unix.RTNH_F_DEAD|unix.RTNH_F_LINKDOWN) == 0 &&
		e.only(unix.RTA_TABLE, unix.RTA_OIF, unix.RTA_PRIORITY, unix.RTA_CACHEINFO, unix.RTA_PREF)
}

// isOurRule reports whether a rule leads to mantlet's table, or takes what mantlet marks.
func (e entry) isOurRule() bool {
	return e.u32(nl.FRA_TABLE) == render.RouteTable || e.u32(nl.FRA_FWMARK) == uint32(render.MarkClient) && e.u32(nl.FRA_FWMASK) == uint32(render.MarkMask)
}

// fibRuleInvert is FIB_RULE_INVERT: the rule is for all that does not match (include/uapi/linux/fib_rules.h).
const fibRuleInvert = 2

// isRule reports whether a rule is the one that mantlet makes.
func (e entry) isRule() bool {
	const unset = 0xffffffff
	return e.u32(nl.FRA_TABLE) == render.RouteTable && e.plain() && e.header.Type == nl.FR_ACT_TO_TBL && e.header.Flags&fibRuleInvert == 0 &&
		e.u32(nl.FRA_PRIORITY) == render.RoutePriority && e.u32(nl.FRA_FWMARK) == uint32(render.MarkClient) &&
		e.u32(nl.FRA_FWMASK) == uint32(render.MarkMask) && e.u32(nl.FRA_SUPPRESS_PREFIXLEN) == unset &&
		e.only(nl.FRA_TABLE, nl.FRA_PRIORITY, nl.FRA_FWMARK, nl.FRA_FWMASK, nl.FRA_SUPPRESS_PREFIXLEN, nl.FRA_PROTOCOL)
}

func (e entry) text(get int) string {
	if get == unix.RTM_GETROUTE {
		return fmt.Sprintf("another route in table %d (type %d, to interface %d)", render.RouteTable, e.header.Type, e.u32(unix.RTA_OIF))
	}
	return fmt.Sprintf("another routing rule (priority %d fwmark %#x/%#x lookup %d)",
		e.u32(nl.FRA_PRIORITY), e.u32(nl.FRA_FWMARK), e.u32(nl.FRA_FWMASK), e.u32(nl.FRA_TABLE))
}

// dumps bounds how often a dump is begun again since something changed meanwhile.
const dumps = 10

// dump returns all rules or routes of a family.
func (f family) dump(get int) ([]entry, error) {
	var messages [][]byte
	var err error
	for range dumps {
		request := nl.NewNetlinkRequest(get, unix.NLM_F_DUMP)
		request.AddData(&nl.RtMsg{RtMsg: unix.RtMsg{Family: f.number}})
		if messages, err = request.Execute(unix.NETLINK_ROUTE, uint16(get-2)); !errors.Is(err, nl.ErrDumpInterrupted) { // RTM_NEW… is what a dump has
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("reading the policy routes of %s: %w", f.name, f.explain(err))
	}
	var all []entry
	for _, m := range messages {
		e, err := parse(m)
		if err != nil {
			return nil, fmt.Errorf("reading the policy routes of %s: %w", f.name, err)
		}
		if e.header.Family == f.number { // a kernel without the family may tell of another one
			all = append(all, e)
		}
	}
	return all, nil
}

var errShort = errors.New("the kernel's message is too short")

func parse(message []byte) (entry, error) {
	if len(message) < unix.SizeofRtMsg {
		return entry{}, errShort
	}
	attributes, err := nl.ParseRouteAttr(message[unix.SizeofRtMsg:])
	if err != nil {
		return entry{}, err
	}
	e := entry{raw: slices.Clone(message), header: nl.DeserializeRtMsg(message), attributes: map[uint16][]byte{}}
	for _, a := range attributes {
		e.attributes[a.Attr.Type] = a.Value
	}
	return e, nil
}

// try returns an error if a marked packet to a client would not go to lo. The kernel is asked for the way to one address alone; another
// may have its way by a rule before mantlet's.
func (f family) try() error {
	rules, err := f.dump(unix.RTM_GETRULE)
	if err != nil {
		return err
	}
	for _, e := range rules { // in the kernel's order
		if e.isRule() {
			break
		}
		if !e.plain() || e.u32(nl.FRA_TABLE) != unix.RT_TABLE_LOCAL {
			return fmt.Errorf("%s: the workload's answers to clients may not go to lo: %s comes before mantlet's", f.name, e.text(unix.RTM_GETRULE))
		}
	}
	request := nl.NewNetlinkRequest(unix.RTM_GETROUTE, 0)
	request.AddData(&nl.RtMsg{RtMsg: unix.RtMsg{Family: f.number, Dst_len: uint8(f.sample.BitLen())}})
	request.AddData(nl.NewRtAttr(unix.RTA_DST, f.sample.AsSlice()))
	request.AddData(nl.NewRtAttr(unix.RTA_MARK, native(uint32(render.MarkClient))))
	messages, err := request.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWROUTE)
	if err != nil {
		return fmt.Errorf("%s: the kernel has no way for the workload's answers to clients: %w", f.name, err)
	}
	for _, m := range messages {
		if e, err := parse(m); err == nil && e.header.Type == unix.RTN_LOCAL && e.u32(unix.RTA_OIF) == loopbackIndex {
			return nil
		}
	}
	return fmt.Errorf("%s: the workload's answers to clients would not go to lo, although the routing rule and the route are there", f.name)
}

// lacks reports whether an error says that the kernel has no routing rules of a family, or not the family at all.
func lacks(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT)
}

// explain says what an error of the kernel's means.
func (f family) explain(err error) error {
	switch {
	case lacks(err):
		return fmt.Errorf("%w: the kernel lacks %s", err, f.option)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: it takes NET_ADMIN", err)
	default:
		return err
	}
}
