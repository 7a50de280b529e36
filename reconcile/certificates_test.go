package reconcile

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"mantlet/internal/status"
	"mantlet/schema"
)

// TestBadCertificates: they are reported once, as is their end, and don't make what works unready.
func TestBadCertificates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.expiry = time.Now().Add(10 * time.Minute)
		w.run(t)
		w.set(func() { w.secretErr = errors.New("another's key") })
		time.Sleep(time.Minute)
		ready(t, w, "")
		if n := strings.Count(w.logged(), "another's key"); n != 1 {
			t.Errorf("reported %d times", n)
		}
		w.set(func() { w.secretErr = nil })
		time.Sleep(time.Minute)
		if n := strings.Count(w.logged(), `"certificates accepted again"`); n != 1 {
			t.Errorf("their end is reported %d times", n)
		}
		w.set(func() { w.secretErr = errors.New("another's key") })
		time.Sleep(10 * time.Minute)
		ready(t, w, "certificate 1 expired at ")
		if n := strings.Count(w.logged(), "certificate 1 expired at "); n != 1 || !strings.Contains(w.logged(), `level=ERROR msg="mantlet is not ready"`) {
			t.Errorf("that they expired is reported %d times", n)
		}
		w.set(func() { w.expiry = time.Now().Add(24 * time.Hour) })
		time.Sleep(time.Minute)
		ready(t, w, "")
		if n := strings.Count(w.logged(), "peers accept the certificates again"); n != 1 {
			t.Errorf("that peers accept them again is reported %d times", n)
		}
		if n := strings.Count(w.logged(), "another's key"); n != 2 {
			t.Errorf("reported %d times", n)
		}
		expect(t, w, "start Envoy", "rules")
	})
}

// TestOffered: an Envoy is started with certificates that none has tried, and nothing comes in before it has accepted some.
func TestOffered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		good := w.expiry
		w.expiry, w.untried, w.secretErr = time.Time{}, true, errors.New("Envoy does not accept the certificates")
		w.run(t)
		if did := w.done(); !slices.Equal(did, []string{"start Envoy"}) {
			t.Errorf("did %q", did)
		}
		ready(t, w, "waiting for certificates; nothing comes in until then: Envoy does not accept the certificates")
		w.set(func() { w.expiry, w.secretErr = good, nil })
		time.Sleep(poll)
		synctest.Wait()
		if did := w.done(); !slices.Equal(did, []string{"rules"}) {
			t.Errorf("did %q", did)
		}
		ready(t, w, "")
	})
}

// TestRevocation: what was let in by a mesh CA that is gone ends although no Envoy can be started.
func TestRevocation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.run(t)
		expect(t, w, "start Envoy", "rules")
		w.set(func() { w.startErr = errors.New("no room") })
		close(w.latest.exited)
		time.Sleep(time.Minute)
		synctest.Wait()
		w.done()
		w.set(func() { w.revoked = true })
		time.Sleep(pollMissing)
		synctest.Wait()
		if did := w.done(); !slices.Contains(did, "rules") {
			t.Errorf("the daemon did %q", did)
		}
		if g := w.have.generations.Default; g != 1 {
			t.Errorf("generation %d is in force", g)
		}
		w.set(func() { w.startErr = nil })
		time.Sleep(maxPause)
		expect(t, w, "start Envoy")
		ready(t, w, "")
	})
}

// TestOfferedMeanwhile: a configuration that comes while an Envoy starts for the one before it is taken once that start is over.
func TestOfferedMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		until := w.hangAtStart(t)
		env, err := schema.ParseEnvironment([]string{"EDG_INGRESS_PROXY_CONFIG=web#8080#false"})
		if err != nil {
			t.Fatal(err)
		}
		next, err := w.render(env.Base(), nil)
		if err != nil {
			t.Fatal(err)
		}
		w.locked(func() { w.offered = next })
		notify(w.notes.changed)
		expect(t, w)
		close(until)
		expect(t, w, "rules")
	})
}

// TestExpiryIsWarnedOf: certificates that will expire are told of while there is time, once, and until there are others.
func TestExpiryIsWarnedOf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.expiry = time.Now().Add(2 * time.Hour)
		w.run(t)
		time.Sleep(time.Hour - pollMissing)
		if notes := w.Notes(); len(notes) > 0 {
			t.Errorf("it is too early for %v", notes)
		}
		time.Sleep(time.Minute)
		ready(t, w, "")
		if notes := fmt.Sprint(w.Notes()); !strings.Contains(notes, "leaf (CN=pod) expires at ") {
			t.Errorf("an hour before the end of five: %s", notes)
		}
		if n := strings.Count(w.logged(), "should be replaced"); n != 1 {
			t.Errorf("reported %d times", n)
		}
		w.set(func() { w.expiry = time.Now().Add(2 * time.Hour) })
		time.Sleep(time.Minute)
		if notes := w.Notes(); len(notes) > 0 {
			t.Errorf("replaced, and there is %v", notes)
		}
	})
}

// TestPathExpiryIsWarnedOf: what this workload's own path ends with comes before what others may need, and hides behind nothing.
func TestPathExpiryIsWarnedOf(t *testing.T) {
	now := time.Now()
	certificate := func(role, subject string, left time.Duration, needed bool) status.Certificate {
		return status.Certificate{Role: role, Subject: subject, NotBefore: now.Add(-100 * time.Hour), NotAfter: now.Add(left), Needed: needed}
	}
	const good = 100 * time.Hour
	leaf := certificate(status.RoleLeaf, "CN=pod", good, true)
	cross := certificate(status.RoleIntermediate, "CN=cross", -time.Hour, false)
	for name, c := range map[string]struct {
		given []status.Certificate
		says  string
	}{
		"nothing expires":                   {[]status.Certificate{leaf, certificate(status.RoleMeshCA, "CN=mesh", good, true)}, ""},
		"a mesh CA of before":               {[]status.Certificate{leaf, certificate(status.RoleMeshCA, "CN=old", -time.Hour, false), certificate(status.RoleMeshCA, "CN=mesh", good, true)}, ""},
		"the mesh CA of the path":           {[]status.Certificate{leaf, certificate(status.RoleMeshCA, "CN=mesh", time.Hour, true)}, "mesh CA (CN=mesh) expires at "},
		"an intermediate of no path":        {[]status.Certificate{leaf, cross}, "intermediate (CN=cross) expired at "},
		"it hides no other's end":           {[]status.Certificate{leaf, cross, certificate(status.RoleIntermediate, "CN=inter", time.Hour, true)}, "intermediate (CN=inter) expires at "},
		"an intermediate of no path, later": {[]status.Certificate{leaf, certificate(status.RoleIntermediate, "CN=cross", time.Hour, false)}, "CN=cross) expires at "},
	} {
		w := newWorld(t)
		w.warnOfExpiry(c.given, now)
		if said := fmt.Sprint(w.expiring); c.says == "" && w.expiring != nil || !strings.Contains(said, c.says) {
			t.Errorf("%s: %s; want %q", name, said, c.says)
		}
	}
}
