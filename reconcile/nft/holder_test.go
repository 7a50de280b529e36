package nft

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	"mantlet/render"
	"mantlet/schema"
)

// listen takes an abstract socket's name on the pod.
func (p *place) listen(name string) net.Listener {
	p.t.Helper()
	var listener net.Listener
	if err := p.pod.Do(func() (err error) {
		listener, err = net.Listen("unix", name)
		return err
	}); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = listener.Close() })
	return listener
}

// alone calls Alone on the pod.
func (p *place) alone(table *Table) (squatter string, err error) {
	err = p.pod.Do(func() (err error) {
		squatter, err = table.Alone()
		return err
	})
	return squatter, err
}

// TestOneHolder: where the kernel keeps no owner, a second connection is refused as long as the first one that made the table lives,
// and only as long.
func TestOneHolder(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	nft(t, p.pod, "add table inet mantlet")
	if owned, err := p.claim(p.table); owned || err != nil {
		t.Fatalf("Own returned %v, %v", owned, err)
	}
	if squatter, err := p.alone(p.table); squatter != "" || err != nil {
		t.Errorf("Alone returned %q, %v", squatter, err)
	}
	want := rules(port1(8080, schema.ModeTLS))
	p.replace(want)
	second := open(t, p.pod)
	says := fmt.Sprintf("another mantlet owns this network namespace (process %d, user 0)", os.Getpid())
	for range 20 { // more than fit into the queue of connections that nobody accepts
		if owned, err := p.claim(second); owned || !errors.Is(err, ErrOwned) || !strings.HasPrefix(err.Error(), "claiming the table inet mantlet: another mantlet") {
			t.Errorf("a second Own returned %v, %v", owned, err)
		}
	}
	third := open(t, p.pod)
	if _, err := p.claim(third); err == nil || strings.Contains(err.Error(), "(process") && !strings.HasSuffix(err.Error(), says) {
		t.Errorf("a third Own returned %v", err)
	}
	p.check()
	if err := p.table.Close(); err != nil {
		t.Fatal(err)
	}
	p.listen("@mantlet") // by that name alone nobody is a mantlet
	p.table = open(t, p.pod)
	if _, err := p.claim(p.table); err != nil {
		t.Errorf("Own returned %v", err)
	}
	if err := p.table.DenyAll(want); err != nil {
		t.Error(err)
	}
	if squatter, err := p.alone(p.table); squatter != fmt.Sprintf("(process %d, user 0)", os.Getpid()) || err != nil {
		t.Errorf("Alone returned %q, %v", squatter, err)
	}
	p.check()
}

// TestHoldersAtTheSameTime: of two that put their rules in place one after the other, without having seen each other, the one that
// has not got the name gives way; and the same rules of somebody else are not one's own.
func TestHoldersAtTheSameTime(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	nft(t, p.pod, "add table inet mantlet")
	second := open(t, p.pod)
	for _, table := range []*Table{p.table, second} {
		if _, err := p.claim(table); err != nil {
			t.Fatal(err)
		}
	}
	for _, table := range []*Table{p.table, second} {
		if err := table.DenyAll(render.Ruleset{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.table.Check(); err == nil || !strings.HasSuffix(err.Error(), "another mantlet made the table") {
		t.Errorf("Check returned %v", err)
	}
	mended := make(chan error, 1)
	go func() {
		_, err := p.table.Repair()
		mended <- err
	}()
	if squatter, err := p.alone(second); squatter != "" || !errors.Is(err, ErrOwned) {
		t.Errorf("Alone returned %q, %v", squatter, err)
	}
	if err := <-mended; err != nil {
		t.Error(err)
	}
	p.check()
}
