package render

import (
	"regexp"
	"slices"
	"strconv"
	"testing"

	"pgregory.net/rapid"

	"mantlet/schema"
)

// matched returns which ports a regular expression describes. Go's are RE2's, as Envoy's.
func matched(t interface{ Fatal(...any) }, expression string) (ports []int) {
	e, err := regexp.Compile("^(?:" + expression + ")$")
	if err != nil {
		t.Fatal(err)
	}
	for port := range 1 << 16 {
		if e.MatchString(strconv.Itoa(port)) {
			ports = append(ports, port)
		}
	}
	return ports
}

// TestDecimals holds the regular expressions of ranges against each port that there is.
func TestDecimals(t *testing.T) {
	check := func(t interface {
		Fatal(...any)
		Errorf(string, ...any)
	}, first, last uint16,
	) {
		expression := decimals([]schema.Ports{{First: first, Last: last}})
		got := matched(t, expression)
		if len(got) != int(last-first)+1 || got[0] != int(first) || got[len(got)-1] != int(last) {
			t.Errorf("%d-%d: %s describes %v", first, last, expression, got)
		}
		if len(expression) > 250 {
			t.Errorf("%d-%d: %s is long", first, last, expression)
		}
	}
	edges := []uint16{1, 9, 10, 99, 100, 101, 999, 1000, 1024, 9999, 10000, 19999, 20000, 49152, 65499, 65500, 65535}
	for i, first := range edges {
		for _, last := range edges[i:] {
			check(t, first, last)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		a, b := rapid.Uint16Min(1).Draw(t, "a"), rapid.Uint16Min(1).Draw(t, "b")
		check(t, min(a, b), max(a, b))
	})
	several := []schema.Ports{{First: 7, Last: 11}, {First: 100, Last: 100}, {First: 65000, Last: 65535}}
	var want []int
	for _, p := range several {
		for port := int(p.First); port <= int(p.Last); port++ {
			want = append(want, port)
		}
	}
	if got := matched(t, decimals(several)); !slices.Equal(got, want) {
		t.Errorf("%s describes %v", decimals(several), got)
	}
}
