package reconcile

import (
	"bytes"
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
)

// full is a status of which nothing is empty.
func full(t *testing.T) Status {
	t.Helper()
	var s Status
	fill(reflect.ValueOf(&s).Elem())
	s.Applies = applies{}.all()
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
			if !strings.HasPrefix(line, "#") && !strings.HasPrefix(line, "mantlet_") {
				t.Errorf("%s: a metric is not mantlet's: %s", name, line)
			}
		}
	}
}

// TestStatusCounts: what the daemon does is counted, by kind and result, and the last thing that failed is kept.
func TestStatusCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.startErr = errors.New("no room")
		w.run(t)
		time.Sleep(time.Millisecond)
		synctest.Wait()
		began := time.Now()
		s := w.Status(t.Context())
		if s.Ready || s.Envoys != (Envoys{Failed: 2}) || s.LastError == nil || s.LastError.Place != checkEnvoy || !strings.Contains(s.LastError.Text, "no room") ||
			!s.LastError.Time.Equal(began) || !slices.Contains(s.Problems, "envoy: starting Envoy: no room") || s.Applied != nil || s.Desired.Generation != 1 {
			t.Errorf("with an Envoy that does not start: %+v", s)
		}
		w.set(func() { w.startErr, w.startTake = nil, time.Second })
		time.Sleep(maxPause)
		synctest.Wait()
		w.set(func() { w.rulesErr = nil })
		close(w.latest.exited)
		time.Sleep(time.Minute)
		synctest.Wait()
		s = w.Status(t.Context())
		if !s.Ready || len(s.Problems) > 0 || s.Envoys != (Envoys{Started: 2, Failed: s.Envoys.Failed, Ended: 1, Recovered: 1}) || s.Applied.Generation != 1 {
			t.Errorf("after it was mended: %+v", s)
		}
		for _, a := range s.Applies {
			switch {
			case a.Kind == applyStart && (a.Succeeded != 2 || a.Failed != s.Envoys.Failed || a.Seconds != 2):
				t.Errorf("starts: %+v", a)
			case a.Kind == applyRules && (a.Succeeded != 1 || a.Failed != 0 || a.Within[0] != 1):
				t.Errorf("rules: %+v", a)
			case a.Kind == applyHotRestart && a.Succeeded+a.Failed > 0:
				t.Errorf("hot restarts: %+v", a)
			}
		}
	})
}
