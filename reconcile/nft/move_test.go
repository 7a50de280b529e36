package nft

import (
	"net"
	"slices"
	"testing"

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
			x.replace(render.Rules(schema.Mesh{}, render.Generations{Moving: true}))
			socket := sockdiag.Socket{Local: moved.RemoteAddr().(*net.TCPAddr).AddrPort(), Remote: moved.LocalAddr().(*net.TCPAddr).AddrPort()}
			must := func(err error) {
				if err != nil {
					x.t.Fatal(err)
				}
			}
			must(x.pod.Do(func() error {
				clients, err := x.table.Clients()
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
			for _, conn := range []struct {
				what string
				pass bool
			}{{"moved", x.passes(moved, moved)}, {"left", x.passes(left, left)}} {
				if !conn.pass {
					x.t.Errorf("a connection that is %s does not pass while they are moved", conn.what)
				}
			}
			x.apply()
			if x.passes(left, left) {
				x.t.Error("a connection that was not moved passes")
			}
			return x.passes(moved, moved)
		}
	}
	whole := render.Rules(schema.Mesh{}, render.Generations{Default: 1})
	try(t, "moved", whole, true, attempt(true))
	try(t, "not moved", whole, false, attempt(false))
}
