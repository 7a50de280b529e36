package status

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
)

// full is a status of which nothing is empty.
func full(t *testing.T) Status {
	t.Helper()
	var s Status
	fill(reflect.ValueOf(&s).Elem())
	s.Applies = []Applies{{Kind: ApplyRules, Within: make([]uint64, len(ApplySeconds()))}}
	s.Epochs = append(s.Epochs, Epoch{Serving: true, Connections: new(int)})
	return s
}

// fill puts something into each field, and one element into each slice.
func fill(v reflect.Value) {
	switch v.Kind() {
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			v.Set(reflect.ValueOf(time.Unix(1800000000, 0)))
			return
		}
		if v.Type() == reflect.TypeFor[netip.Addr]() {
			v.Set(reflect.ValueOf(netip.IPv6Loopback()))
			return
		}
		for i := range v.NumField() {
			fill(v.Field(i))
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0))
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem())
	case reflect.String:
		v.SetString("text")
	case reflect.Int:
		v.SetInt(7)
	case reflect.Uint64, reflect.Uint16:
		v.SetUint(7)
	case reflect.Float64:
		v.SetFloat(7)
	default:
	}
}

func TestMetricsAreLinted(t *testing.T) {
	for name, s := range map[string]Status{"full": full(t), "empty": {}} {
		var text bytes.Buffer
		if err := WriteMetrics(&text, s); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		problems, err := promlint.New(bytes.NewReader(text.Bytes())).Lint()
		if err != nil || len(problems) > 0 {
			t.Errorf("%s: %v, %v in\n%s", name, err, problems, text.String())
		}
		for line := range strings.Lines(text.String()) {
			if !strings.HasPrefix(line, "#") && !strings.HasPrefix(line, "mantlet_") && !strings.HasPrefix(line, "go_") && !strings.HasPrefix(line, "process_") {
				t.Errorf("%s: a metric is nobody's: %s", name, line)
			}
		}
		for _, check := range waitingChecks() { // no status says that it fails, but of the empty one nothing is in force
			if passes := strings.Contains(text.String(), `mantlet_check_passed{check="`+check+`"} 1`); passes != (s.Applied != nil) {
				t.Errorf("%s: that %s passes is %v", name, check, passes)
			}
		}
	}
}

// TestStatusIsDocumented holds the fields of the status against those of the example: none is missing, or there no more.
func TestStatusIsDocumented(t *testing.T) {
	text, err := json.Marshal(full(t))
	if err != nil {
		t.Fatal(err)
	}
	example, err := os.ReadFile("../../examples/status.json")
	if err != nil {
		t.Fatal(err)
	}
	got, want := fields(t, example), fields(t, text)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("examples/status.json has (+) and lacks (-):\n%s", diff)
	}
	decoder := json.NewDecoder(bytes.NewReader(example))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(new(Status)); err != nil {
		t.Error(err)
	}
}

// fields returns the paths of all that is in a JSON text, elements of lists as one.
func fields(t *testing.T, text []byte) map[string]bool {
	t.Helper()
	var value any
	if err := json.Unmarshal(text, &value); err != nil {
		t.Fatal(err)
	}
	all := map[string]bool{}
	var walk func(path string, value any)
	walk = func(path string, value any) {
		switch value := value.(type) {
		case map[string]any:
			for name, inner := range value {
				walk(path+"."+name, inner)
			}
		case []any:
			for _, inner := range value {
				walk(path+"[]", inner)
			}
		case nil: // what may be null is something elsewhere
		default:
			all[path] = true
		}
	}
	walk("", value)
	return all
}

// TestProblemCodes: whatever a reason says, its code is one that is known.
func TestProblemCodes(t *testing.T) {
	for _, check := range Checks() {
		for _, text := range append(Reasons(), "something new") {
			if p := (Reason{check, text + ": why"}).Problem(); !slices.Contains(ProblemCodes(), p.Code) {
				t.Errorf("%s: %s has the code %q", check, text, p.Code)
			}
		}
	}
}
