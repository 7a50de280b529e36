// Package iptables reads what iptables-legacy has in a network namespace, and has its binary remove one rule.
//
// The tables of iptables-legacy are not nftables': nft does not show them, and each packet passes both. The kernel hands them over by
// socket options, in the structures of include/uapi/linux/netfilter_ipv4/ip_tables.h and netfilter/x_tables.h.
package iptables
