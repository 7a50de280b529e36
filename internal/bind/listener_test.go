package bind

import (
	"cmp"
	"net"
	"slices"
	"testing"
)

// TestListenersOfBothSources: the kernel tells the same by sock_diag and by /proc/net/tcp, which is read where there is no sock_diag.
func TestListenersOfBothSources(t *testing.T) {
	for _, at := range []string{"127.0.0.1:0", "[::1]:0", ":0"} {
		listener, err := net.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = listener.Close() }()
	}
	byDiag, err := Listeners()
	if err != nil {
		t.Fatal(err)
	}
	byProc, err := listenersOfProc()
	if err != nil {
		t.Fatal(err)
	}
	byInode := func(a, b Listener) int { return cmp.Compare(a.Inode, b.Inode) }
	slices.SortFunc(byDiag, byInode)
	slices.SortFunc(byProc, byInode)
	if len(byDiag) < 3 || !slices.Equal(byDiag, byProc) {
		t.Errorf("sock_diag tells %v, and /proc/net/tcp %v", byDiag, byProc)
	}
}
