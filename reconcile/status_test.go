package reconcile

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"mantlet/internal/status"
)

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
		if s.Ready || s.Envoys != (status.Envoys{Failed: 2}) || s.LastError == nil || s.LastError.Place != status.CheckEnvoy || !strings.Contains(s.LastError.Text, "no room") ||
			!s.LastError.Time.Equal(began) || !slices.Contains(s.Problems, "envoy: starting Envoy: no room") || s.Applied != nil || s.Desired.Generation != 1 {
			t.Errorf("with an Envoy that does not start: %+v", s)
		}
		w.set(func() { w.startErr, w.startTake = nil, time.Second })
		time.Sleep(maxPause)
		synctest.Wait()
		w.set(func() { w.found = errors.New("a rule is missing") })
		w.changes <- "iptables"
		synctest.Wait()
		w.set(func() { w.found = nil })
		close(w.latest.exited)
		time.Sleep(time.Minute)
		synctest.Wait()
		s = w.Status(t.Context())
		if !s.Ready || len(s.Problems) > 0 || s.Envoys != (status.Envoys{Started: 2, Failed: s.Envoys.Failed, Ended: 1, Recovered: 1}) || s.Applied.Generation != 1 || s.Repaired != 1 || s.Repairs[0].By != "iptables" || !slices.Equal(s.Repairs[0].Found, []string{"a rule is missing"}) {
			t.Errorf("after it was mended: %+v", s)
		}
		for _, a := range s.Applies {
			switch {
			case a.Kind == status.ApplyStart && (a.Succeeded != 2 || a.Failed != s.Envoys.Failed || a.Seconds != 2):
				t.Errorf("starts: %+v", a)
			case a.Kind == status.ApplyRules && (a.Succeeded != 1 || a.Failed != 0 || a.Within[0] != 1):
				t.Errorf("rules: %+v", a)
			case a.Kind == status.ApplyHotRestart && a.Succeeded+a.Failed > 0:
				t.Errorf("hot restarts: %+v", a)
			}
		}
	})
}

// TestFlood: however often strangers ask, mantlet and Envoy are asked a few times a second. Over the unix socket it is tried
// each time.
func TestFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.run(t)
		var tried atomic.Int64
		w.latest.check = func(context.Context) error {
			tried.Add(1)
			time.Sleep(time.Millisecond)
			return nil
		}
		server := status.Server{Source: w}
		ask := func(local net.Addr, times int) int {
			before := tried.Load()
			var all sync.WaitGroup
			for i := range times {
				all.Go(func() {
					time.Sleep(time.Duration(i) * 10 * time.Millisecond)
					request := httptest.NewRequest(http.MethodGet, "/readyz", nil)
					request = request.WithContext(context.WithValue(t.Context(), http.LocalAddrContextKey, local))
					recorder := httptest.NewRecorder()
					server.Handler().ServeHTTP(recorder, request)
					if recorder.Code != http.StatusOK {
						t.Errorf("%d: %s", recorder.Code, recorder.Body)
					}
				})
			}
			all.Wait()
			return int(tried.Load() - before)
		}
		if n := ask(&net.TCPAddr{}, 100); n != 5 { // in a second
			t.Errorf("strangers made it try %d times", n)
		}
		if n := ask(&net.UnixAddr{}, 100); n != 100 {
			t.Errorf("over the socket it tried %d times", n)
		}
	})
}
