package render

import (
	"fmt"

	"mantlet/schema"
)

// The policy route by which the workload's answers to clients' addresses find lo, of each IP family.
const (
	// RouteTable is the routing table that has the route. The number is that of a listener: no other software has a reason to take it.
	RouteTable uint32 = schema.IngressMTLSPort
	// RoutePriority is the routing rule's: the kernel's own rule for local addresses (0) is the only one before it.
	RoutePriority uint32 = 1
)

// Routes says for which IP families there is a policy route. The zero value is none.
type Routes struct{ IPv4, IPv6 bool }

// Routes returns the routes that a state needs.
func (s State) Routes(place Place) Routes {
	if s.Mesh.SourceAddress != schema.SourceAddressClient || s.Mesh.IngressOff {
		return Routes{}
	}
	return Routes{IPv4: true, IPv6: !place.NoIPv6}
}

// RoutingRule returns the routing rule as `ip rule` takes it.
func RoutingRule() string {
	return fmt.Sprintf("priority %d fwmark %#x/%#x lookup %d", RoutePriority, uint32(MarkClient), uint32(MarkMask), RouteTable)
}

// Route returns the route as `ip route` takes it.
func Route() string { return fmt.Sprintf("local default dev lo table %d", RouteTable) }
