package nft

import (
	"io"
	"net"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"mantlet/internal/sockdiag"
	"mantlet/render"
	"mantlet/schema"
)

// TestMovedConnectionsLiveOn: of two connections at a port whose policy is tightened, that lives on which is moved to the new generation.
func TestMovedConnectionsLiveOn(t *testing.T) {
	t.Parallel()
	attempt := func(moves bool) func(x *trial) bool {
		return func(x *trial) bool {
			x.replace(rules())
			x.standIn(schema.IngressMTLSPort)
			moved, left := x.greeted(x.target(9000)), x.greeted(x.target(9000))
			update := func(r render.Ruleset) {
				x.t.Helper()
				if err := x.pod.Do(func() error { return x.table.Exchange(r) }); err != nil {
					x.t.Fatal(err)
				}
				x.check()
			}
			update(render.Rules(schema.Mesh{}, render.Generations{Moving: true}))
			socket := sockdiag.Socket{Local: moved.RemoteAddr().(*net.TCPAddr).AddrPort(), Remote: moved.LocalAddr().(*net.TCPAddr).AddrPort()}
			must := func(err error) {
				if err != nil {
					x.t.Fatal(err)
				}
			}
			must(x.pod.Do(func() error {
				clients, _, err := x.table.Open()
				if mark := clients[socket]; err != nil || mark != render.MarkOf(schema.ModeMTLS, 0) || len(clients) != 2 {
					x.t.Errorf("%v: mark %#x of %d, %v", socket, mark, len(clients), err)
				}
				if !moves {
					return nil
				}
				gone := socket
				gone.Remote = socket.Local
				mark := render.MarkOf(schema.ModeMTLS, 1)
				done, err := x.table.Move(map[sockdiag.Socket]render.Mark{socket: mark, gone: mark})
				if err != nil || !slices.Equal(done, []sockdiag.Socket{socket}) {
					x.t.Errorf("moved %v, %v", done, err)
				}
				return nil
			}))
			for what, conn := range map[string]net.Conn{"moved": moved, "left": left} {
				if !x.certainly(func() bool { return x.passes(conn, conn) }) {
					x.t.Errorf("a connection that is %s does not pass while they are moved", what)
				}
			}
			update(x.rules)
			wait := x.wait
			x.wait = patience
			if x.passes(left, left) {
				x.t.Error("a connection that was not moved passes")
			}
			x.wait = wait
			return x.passes(moved, moved)
		}
	}
	whole := render.Rules(schema.Mesh{}, render.Generations{Default: 1})
	try(t, "moved", whole, true, attempt(true))
	try(t, "not moved", whole, false, attempt(false))
}

// TestExchangeFromAnyStateToAnyOther: whatever stays, the rules are as they should be, and what each chain says too.
func TestExchangeFromAnyStateToAnyOther(t *testing.T) {
	t.Parallel()
	all := map[string]render.Ruleset{"deny all": render.DenyAll(true), "generations": render.Rules(schema.Mesh{Ingress: []schema.Ingress{port1(8080, schema.ModeTLS)}}, render.Generations{
		Default: 3, Ports: []render.PortsGeneration{{Ports: schema.Ports{First: 8000, Last: 8099}, Generation: 4}},
	})}
	for _, name := range []string{"web", "ranges", "last port", "status", "drop", "closed"} {
		all[name] = states()[name]
	}
	otherNames := regexp.MustCompile(`\b([a-z_]+[46]?)\` + alternate + `\b`) // see otherName
	sorted := func(text string) string {
		parts := strings.Split(strings.TrimSuffix(text, "}\n"), "\n\n")
		for i := range parts {
			parts[i] = strings.TrimSpace(parts[i])
		}
		slices.Sort(parts)
		return strings.Join(parts, "\n\n")
	}
	modes(t, func(t *testing.T, p *place) {
		for from, first := range all {
			for to, second := range all { // itself among them
				p.replace(first)
				if err := p.pod.Do(func() error { return p.table.Exchange(second) }); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(sorted(second.Text()), sorted(otherNames.ReplaceAllString(listing(t, p.pod), "$1"))); diff != "" {
					t.Fatalf("from %q to %q (-want +got):\n%s", from, to, diff)
				}
				p.check()
			}
		}
	})
}

// TestExchangeIsNotNoticed: connections that speak all the time, at ports with an entry of their own, go on while generations change and
// other ports, those beside them too, come and go.
func TestExchangeIsNotNoticed(t *testing.T) {
	t.Parallel()
	modes(t, func(t *testing.T, p *place) {
		generation := func(g render.Generation, moving bool, entries ...schema.Ingress) render.Ruleset {
			return render.Rules(schema.Mesh{Ingress: entries}, render.Generations{
				Default: g, Moving: moving, Ports: []render.PortsGeneration{{Ports: schema.Ports{First: 9000, Last: 9000}, Generation: 0}},
			})
		}
		p.replace(generation(5, false))
		p.standIn(schema.IngressMTLSPort)
		var speaking sync.WaitGroup
		var stop atomic.Bool
		for range 8 {
			for family := range 2 {
				conn := p.greeted(p.addr(family, 9000))
				speaking.Go(func() {
					for !stop.Load() {
						_ = conn.SetDeadline(time.Now().Add(limit)) // for each turn: the changes take as long as they take
						_, err := io.WriteString(conn, "passes")
						if err == nil {
							err = hear(conn, "passes")
						}
						if err != nil {
							t.Errorf("a connection that nothing forbids: %v", err)
							return
						}
					}
				})
			}
		}
		for n := range 24 {
			next := []render.Ruleset{
				generation(6, true, port1(8999, schema.ModeTLS)), generation(7, false, port1(9001, schema.ModePassthrough)), generation(5, false),
			}[n%3]
			if err := p.pod.Do(func() error { return p.table.Exchange(next) }); err != nil {
				t.Error(err)
			}
		}
		stop.Store(true)
		speaking.Wait()
	})
}
