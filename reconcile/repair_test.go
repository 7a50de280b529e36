package reconcile

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestRepair: rules that somebody changed are put back, and nothing is done where they are as they should be.
func TestRepair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.run(t)
		expect(t, w, "start Envoy", "rules")
		w.changes <- "mantlet"
		expect(t, w)
		w.set(func() { w.found = errors.New("a rule is missing") })
		ready(t, w, "a rule is missing")
		w.changes <- "nft"
		expect(t, w, "mend")
		if log := w.logged(); !strings.Contains(log, "by=nft") || !strings.Contains(log, "a rule is missing") {
			t.Errorf("the log:\n%s", log)
		}
		time.Sleep(resync)
		expect(t, w, "mend") // also without an event
		last, count := w.Repairs()
		if count != 2 || len(last) != 2 || last[0].By != "nft" || last[1].By != "" || !slices.Equal(last[1].Found, []string{"a rule is missing"}) {
			t.Errorf("repairs: %d, %+v", count, last)
		}
		w.set(func() { w.rulesErr = errors.New("no memory") })
		time.Sleep(resync)
		expect(t, w, "mend") // in vain
		if last, count := w.Repairs(); count != 2 || last[2].Error != "no memory" {
			t.Errorf("repairs: %d, %+v", count, last)
		}
		w.set(func() { w.found, w.rulesErr = nil, nil })
		time.Sleep(resync)
		expect(t, w)
		ready(t, w, "")
	})
}

// TestForeignRules: what undermines the rules is warned of once, and noted while it is there.
func TestForeignRules(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.undermining = []string{"a redirect"}
		w.run(t)
		noted := func() (texts []string) {
			for _, note := range w.Notes() {
				texts = append(texts, note.Text)
			}
			return texts
		}
		for _, foreign := range [][]string{{"a redirect"}, {"a notrack", "a redirect"}, nil, {"a redirect"}} {
			w.set(func() { w.undermining = foreign })
			time.Sleep(2 * resync)
			synctest.Wait()
			if got := noted(); !slices.Equal(got, foreign) {
				t.Errorf("of %q is noted %q", foreign, got)
			}
		}
		ready(t, w, "")
		for line, want := range map[string]int{`found="a redirect"`: 2, `found="a notrack"`: 1, "undermine mantlet's any more": 1} {
			if n := strings.Count(w.logged(), line); n != want {
				t.Errorf("said %d times, want %d: %s", n, want, line)
			}
		}
	})
}

// TestChangesDoNotFlood: however fast another process changes rules, its own or mantlet's, the log grows slowly and says what it left
// out, and nothing that is gone is kept.
func TestChangesDoNotFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.run(t)
		time.Sleep(resync)
		synctest.Wait()
		const most = changesAtOnce + 100/10 + 1
		for i := range 100 {
			var foreign []string
			for j := range 100 {
				foreign = append(foreign, fmt.Sprintf("rule %d of table %d", j, i))
			}
			w.set(func() { w.undermining = foreign })
			time.Sleep(resync)
		}
		synctest.Wait()
		if n := strings.Count(w.logged(), "undermine mantlet's; they are left alone"); n < changesAtOnce || n > most {
			t.Errorf("%d lines of other tables", n)
		}
		if n := len(w.Notes()); n > maxFound+1 {
			t.Errorf("%d notes", n)
		}
		w.set(func() { w.found = errors.New("a rule") })
		for range 1000 {
			w.changes <- "nft"
		}
		synctest.Wait()
		w.set(func() { w.found = nil })
		if n := strings.Count(w.logged(), "are put back"); n < changesAtOnce || n > most {
			t.Errorf("%d lines of repairs", n)
		}
		time.Sleep(changesEvery)
		w.set(func() { w.found = errors.New("a rule") })
		w.changes <- "nft"
		synctest.Wait()
		w.set(func() { w.found = nil })
		if !strings.Contains(w.logged(), "left_out_before=9") {
			t.Error("what was left out is not told")
		}
		if last, count := w.Repairs(); len(last) != keptRepairs || count < 1001 {
			t.Errorf("%d repairs of %d are kept", len(last), count)
		}
	})
}

// TestRepairWhileOtherTablesAreRead: other software may have so many rules that they take long to read.
func TestRepairWhileOtherTablesAreRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		survey := make(chan struct{})
		w.hang = map[string]chan struct{}{"survey": survey}
		w.run(t)
		time.Sleep(2 * resync)
		synctest.Wait()
		_, before := w.Repairs()
		w.set(func() { w.found = errors.New("the table is not there") })
		w.changes <- "nft"
		synctest.Wait()
		w.set(func() { w.found = nil })
		if _, count := w.Repairs(); count == before {
			t.Error("nothing was put back")
		}
		close(survey)
	})
}

// TestRepairWhileEnvoyStarts: nothing that takes long keeps the rules from being put back, deny-all among them.
func TestRepairWhileEnvoyStarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.startTake = time.Minute
		w.run(t)
		expect(t, w, "start Envoy")
		w.set(func() { w.found = errors.New("the table is not there") })
		w.changes <- "nft"
		expect(t, w, "mend")
		w.set(func() { w.found = nil })
	})
}
