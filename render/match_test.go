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
func matched(t *testing.T, expression string) (ports []int) {
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

// TestDecimals holds the regular expressions of ranges against each port that there is, and those of any range against ports within and
// around it.
func TestDecimals(t *testing.T) {
	edges := []uint16{1, 9, 101, 9999, 19999, 65535}
	for i, first := range edges {
		for _, last := range edges[i:] {
			expression := decimals([]schema.Ports{{First: first, Last: last}})
			got := matched(t, expression)
			if len(got) != int(last-first)+1 || got[0] != int(first) || got[len(got)-1] != int(last) {
				t.Errorf("%d-%d: %s describes %v", first, last, expression, got)
			}
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		a, b := rapid.Uint16Min(1).Draw(t, "a"), rapid.Uint16Min(1).Draw(t, "b")
		first, last := int(min(a, b)), int(max(a, b))
		expression := decimals([]schema.Ports{{First: min(a, b), Last: max(a, b)}})
		e := regexp.MustCompile("^(?:" + expression + ")$")
		tried := rapid.SliceOfN(rapid.IntRange(0, 1<<16), 50, 50).Draw(t, "ports")
		for _, port := range append(tried, first-1, first, first+1, first*10, last/10, last-1, last, last+1) {
			if got, want := e.MatchString(strconv.Itoa(port)), port >= first && port <= last; got != want {
				t.Errorf("%d-%d: %s describes %d: %v", first, last, expression, port, got)
			}
		}
		if len(expression) > 250 {
			t.Errorf("%d-%d: %s is long", first, last, expression)
		}
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
