package render

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	xdscorev3 "github.com/cncf/xds/go/xds/core/v3"
	xdsmatcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	networkv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/network/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"mantlet/schema"
)

const (
	// mapped is the most ports of a range that are looked up one by one, in a hash map. A larger range costs a regular
	// expression, of which each connection may try all.
	mapped = 32
	// alternatives is the most ranges in one regular expression, so that none comes near RE2's limit of 8 MiB.
	alternatives = 64
)

// lists are a list of clients and one of protocols, either of which may be nil, and the ports that have both.
type lists struct {
	chain       string
	allow, alpn []string
	ports       []schema.Ports
}

// lists returns what the entries of a listener's ports list, equal lists once. Those without a list of clients are in both
// listeners, so that such a port can change its mode without a new Envoy.
func (r *renderer) lists(mode schema.Mode) []*lists {
	var all []*lists
	byKey := map[string]*lists{}
	for _, in := range r.mesh.Ingress {
		if in.Allow == nil && in.ALPN == nil || in.Allow != nil && mode != schema.ModeMTLS {
			continue
		}
		key := strings.Join(in.Allow, "\x00") + "\x00\x00" + strings.Join(in.ALPN, "\x00") // no name or protocol contains it, or is empty
		list := byKey[key]
		if list == nil {
			list = &lists{chain: fmt.Sprintf("%s-%d", ingressName(mode), in.Ports.First), allow: in.Allow, alpn: in.ALPN}
			byKey[key], all = list, append(all, list)
		}
		if last := len(list.ports) - 1; last >= 0 && list.ports[last].Last+1 == in.Ports.First {
			list.ports[last].Last = in.Ports.Last
		} else {
			list.ports = append(list.ports, in.Ports)
		}
	}
	return all
}

// listed adds, to a listener with the chain for ports without a list, a chain for each pair of lists, and what sends the ports
// to their chains. A connection whose port is not known is closed: no chain is for it.
func (r *renderer) listed(l *listenerv3.Listener, mode schema.Mode) {
	lists := r.lists(mode)
	if len(lists) == 0 {
		return
	}
	single := map[string]*xdsmatcherv3.Matcher_OnMatch{}
	var several []*xdsmatcherv3.Matcher_MatcherList_FieldMatcher
	for _, list := range lists {
		l.FilterChains = append(l.FilterChains, r.ingressChain(list.chain, mode, list.allow, list.alpn))
		to := r.chain(list.chain)
		var ranges []schema.Ports
		for _, p := range list.ports {
			if p.Last-p.First >= mapped {
				ranges = append(ranges, p)
				continue
			}
			for port := int(p.First); port <= int(p.Last); port++ {
				single[strconv.Itoa(port)] = to
			}
		}
		for some := range slices.Chunk(ranges, alternatives) {
			several = append(several, r.onPorts(decimals(some), to))
		}
	}
	rest := &xdsmatcherv3.Matcher{MatcherType: &xdsmatcherv3.Matcher_MatcherList_{MatcherList: &xdsmatcherv3.Matcher_MatcherList{
		Matchers: append(several, r.onPorts("[0-9]+", r.chain(ingressName(mode)))),
	}}}
	l.FilterChainMatcher = rest
	if len(single) > 0 {
		l.FilterChainMatcher = &xdsmatcherv3.Matcher{
			MatcherType: &xdsmatcherv3.Matcher_MatcherTree_{MatcherTree: &xdsmatcherv3.Matcher_MatcherTree{
				Input:    r.destinationPort(),
				TreeType: &xdsmatcherv3.Matcher_MatcherTree_ExactMatchMap{ExactMatchMap: &xdsmatcherv3.Matcher_MatcherTree_MatchMap{Map: single}},
			}},
			OnNoMatch: &xdsmatcherv3.Matcher_OnMatch{OnMatch: &xdsmatcherv3.Matcher_OnMatch_Matcher{Matcher: rest}},
		}
	}
}

// chain ends a match: it names a filter chain.
func (r *renderer) chain(name string) *xdsmatcherv3.Matcher_OnMatch {
	return &xdsmatcherv3.Matcher_OnMatch{OnMatch: &xdsmatcherv3.Matcher_OnMatch_Action{
		Action: r.extension(name, wrapperspb.String(name)),
	}}
}

// destinationPort is the port that the client dialled, in decimal: the listener filter original_dst has put it there.
func (r *renderer) destinationPort() *xdscorev3.TypedExtensionConfig {
	return r.extension("envoy.matching.inputs.destination_port", &networkv3.DestinationPortInput{})
}

func (r *renderer) extension(name string, config proto.Message) *xdscorev3.TypedExtensionConfig {
	return &xdscorev3.TypedExtensionConfig{Name: name, TypedConfig: r.pack(config)}
}

// onPorts matches ports whose decimal form is, as a whole, what a regular expression describes.
func (r *renderer) onPorts(expression string, to *xdsmatcherv3.Matcher_OnMatch) *xdsmatcherv3.Matcher_MatcherList_FieldMatcher {
	return &xdsmatcherv3.Matcher_MatcherList_FieldMatcher{
		Predicate: &xdsmatcherv3.Matcher_MatcherList_Predicate{
			MatchType: &xdsmatcherv3.Matcher_MatcherList_Predicate_SinglePredicate_{
				SinglePredicate: &xdsmatcherv3.Matcher_MatcherList_Predicate_SinglePredicate{
					Input: r.destinationPort(),
					Matcher: &xdsmatcherv3.Matcher_MatcherList_Predicate_SinglePredicate_ValueMatch{
						ValueMatch: &xdsmatcherv3.StringMatcher{MatchPattern: &xdsmatcherv3.StringMatcher_SafeRegex{
							SafeRegex: &xdsmatcherv3.RegexMatcher{
								EngineType: &xdsmatcherv3.RegexMatcher_GoogleRe2{GoogleRe2: &xdsmatcherv3.RegexMatcher_GoogleRE2{}},
								Regex:      expression,
							},
						}},
					},
				},
			},
		},
		OnMatch: to,
	}
}

// decimals returns a regular expression that describes, as a whole, the ports of ranges in decimal.
func decimals(ranges []schema.Ports) string {
	var all []string
	for _, p := range ranges {
		for first := int(p.First); first <= int(p.Last); {
			// Numbers of one length: up to the last of them.
			last := min(int(p.Last), pow10(len(strconv.Itoa(first)))-1)
			all = append(all, between(strconv.Itoa(first), strconv.Itoa(last))...)
			first = last + 1
		}
	}
	return strings.Join(all, "|")
}

func pow10(n int) int {
	power := 1
	for range n {
		power *= 10
	}
	return power
}

// between describes the numbers from one to another of the same length.
func between(first, last string) []string {
	rest := len(first) - 1
	whole := func(from, to byte) []string {
		if from > to {
			return nil
		}
		return []string{digit(from, to) + digits(rest)}
	}
	switch {
	case first == "":
		return []string{""}
	case strings.Trim(first[1:], "0") == "" && strings.Trim(last[1:], "9") == "":
		return whole(first[0], last[0])
	case first[0] == last[0]:
		return prefixed(first[:1], between(first[1:], last[1:]))
	}
	return slices.Concat(
		prefixed(first[:1], between(first[1:], strings.Repeat("9", rest))),
		whole(first[0]+1, last[0]-1),
		prefixed(last[:1], between(strings.Repeat("0", rest), last[1:])),
	)
}

// digit describes a digit from one to another.
func digit(from, to byte) string {
	if from == to {
		return string(from)
	}
	return "[" + string(from) + "-" + string(to) + "]"
}

// digits describes any digits.
func digits(count int) string {
	switch count {
	case 0:
		return ""
	case 1:
		return "[0-9]"
	}
	return "[0-9]{" + strconv.Itoa(count) + "}"
}

func prefixed(prefix string, all []string) []string {
	for i := range all {
		all[i] = prefix + all[i]
	}
	return all
}
