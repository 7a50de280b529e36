package nft

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"mantlet/render"
)

func TestReadGivesBackWhatReplacePut(t *testing.T) {
	t.Parallel()
	for name, want := range states() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPlace(t)
			have, err := p.table.Read()
			if err != nil || len(render.Diff(render.Ruleset{}, have)) > 0 {
				t.Fatalf("before there is a table, Read returned %v, %v", have, err)
			}
			p.replace(want)
			have, err = p.table.Read()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want.Text(), have.Text()); diff != "" {
				t.Errorf("(-want +have):\n%s", diff)
			}
			for _, line := range render.Diff(want, have) {
				t.Error(line)
			}
		})
	}
}
