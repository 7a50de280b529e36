// Package dns resolves the names of upstreams as glibc does, and keeps Envoy supplied with their addresses.
//
// It differs from glibc in what it makes of failures, since it asks again and again. What name servers say counts at once: a
// name that does not exist, or has no address, has none from then on. While they do not answer, or answer that they can't tell,
// the addresses that they named last stay, for a time.
package dns
