package inject_test

import (
	"bytes"
	"testing"

	"mantlet/internal/inject"
)

// FuzzInject gives inject any text. What comes out of it can be undone, and a second time changes nothing.
func FuzzInject(f *testing.F) {
	f.Add([]byte("kind: Pod\nspec: {containers: [{name: a, command: [a], livenessProbe: {tcpSocket: {port: 1}}}]}\n"), true)
	f.Add([]byte("kind: Pod\nspec:\n  initContainers: []\n  containers:\n  - command:\n    - a\n    name: a\n  volumes:\n"), true)
	f.Add([]byte("kind: Pod\nspec:\n  containers: &a\n  - &b {name: a}\n  - *b\n  volumes: *a\n"), false)
	f.Add([]byte("kind: List\nitems:\n- kind: Job\n  spec:\n    template:\n      spec: {containers: []}\n# >>> mantlet inject >>>\n# <<< mantlet inject <<<\n"), false)
	f.Fuzz(func(t *testing.T, text []byte, gate bool) {
		in := inject.Injector{Options: inject.Options{Gate: gate, TLSSecret: "mesh"}}
		result, err := in.Inject(inject.Source{Name: "in.yaml", Text: text})
		if err != nil || len(result.Refused) > 0 {
			return
		}
		before, err := in.Remove(inject.Source{Name: "in.yaml", Text: text})
		if err != nil {
			t.Fatalf("what can be injected can't be removed: %v", err)
		}
		removed, err := in.Remove(inject.Source{Name: "out.yaml", Text: result.Text})
		if err != nil || !bytes.Equal(removed.Text, before.Text) {
			t.Errorf("removed: %v\n%q\nwant\n%q", err, removed.Text, before.Text)
		}
		again, err := in.Inject(inject.Source{Name: "in.yaml", Text: result.Text})
		if err != nil || !bytes.Equal(again.Text, result.Text) {
			t.Errorf("again: %v\n%q\nwant\n%q", err, again.Text, result.Text)
		}
	})
}
