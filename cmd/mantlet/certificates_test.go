package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/renameio/v2"

	"mantlet/internal/lab"
)

// probe runs `mantlet probe` in the pod and returns its exit code and what it says.
func (p *pod) probe(what string) (code int, said string) {
	p.t.Helper()
	cmd := p.sidecar.Command("probe", what)
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	p.must(p.Start(cmd))
	_ = cmd.Wait()
	return cmd.ProcessState.ExitCode(), output.String()
}

// copyPieces copies files into the TLS directory as a slow writer does: in place, and with so much time between the pieces
// that mantlet reads each.
func (p *pod) copyPieces(from string, names ...string) {
	p.t.Helper()
	for _, name := range names {
		text, err := os.ReadFile(filepath.Join(from, name))
		p.must(err)
		file, err := os.OpenFile(filepath.Join(p.sidecar.TLSDirectory, name), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
		p.must(err)
		const pieces = 3
		for i := range pieces {
			_, err := file.Write(text[i*len(text)/pieces : (i+1)*len(text)/pieces])
			p.must(err)
			p.besieged()
		}
		p.must(file.Close())
	}
}

// TestClockIsBehind: certificates that are not valid yet by this clock are waited for, as one that is set right makes them.
func TestClockIsBehind(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	valid := time.Now().Add(8 * time.Second).Truncate(time.Second)
	soon, err := p.mesh.Issue(lab.Leaf{DNSNames: []string{"pod"}, NotBefore: valid})
	p.must(err)
	p.must(soon.Write(p.sidecar.TLSDirectory))
	p.besiege()
	p.run()
	p.protect(mtlsPort)
	p.unready("is the clock right?")
	p.besieged()
	if total := p.prober.Stats().Total(); total.Accepted > 0 {
		t.Errorf("%+v, want nothing accepted", total)
	}
	p.ready()
	if now := time.Now(); now.Before(valid) {
		t.Errorf("ready at %v, before %v", now, valid)
	}
	p.shows(soon)
}

func TestCertificatesAppear(t *testing.T) {
	t.Parallel()
	for name, appear := range map[string]func(p *pod, directory string){
		"by rename": func(p *pod, directory string) { p.must(p.identity.Write(directory)) },
		"in pieces": func(p *pod, _ string) {
			from := p.t.TempDir()
			p.must(p.identity.Write(from))
			p.copyPieces(from, lab.ChainFile, lab.KeyFile, lab.CAFile)
		},
		"in pieces, chain last": func(p *pod, _ string) {
			from := p.t.TempDir()
			p.must(p.identity.Write(from))
			p.copyPieces(from, lab.CAFile, lab.KeyFile, lab.ChainFile)
		},
		"by cert-manager's names": func(p *pod, directory string) {
			from := p.t.TempDir()
			p.must(p.identity.Write(from))
			for to, name := range map[string]string{"tls.crt": lab.ChainFile, "tls.key": lab.KeyFile, "ca.crt": lab.CAFile} {
				p.must(os.Rename(filepath.Join(from, name), filepath.Join(directory, to)))
			}
		},
		"with their directory": func(p *pod, directory string) {
			p.must(os.Remove(directory))
			p.besieged()
			from := filepath.Join(p.t.TempDir(), "tls")
			p.must(os.Mkdir(from, 0o755))
			p.must(p.identity.Write(from))
			p.must(os.Rename(from, directory))
		},
		// As kubelet does: files are links to ..data/, which is a link to what is the latest.
		"by a swapped link": func(p *pod, directory string) {
			for _, name := range []string{lab.ChainFile, lab.KeyFile, lab.CAFile} {
				p.must(os.Symlink(filepath.Join("..data", name), filepath.Join(directory, name)))
			}
			version := filepath.Join(directory, "..1")
			p.must(os.Mkdir(version, 0o755))
			p.must(p.identity.Write(version))
			p.must(os.Symlink("..1", filepath.Join(directory, "..data_tmp")))
			p.must(os.Rename(filepath.Join(directory, "..data_tmp"), filepath.Join(directory, "..data")))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t, web)
			p.besiege()
			p.run()
			p.protect(tlsPort)
			p.protect(mtlsPort)
			p.unready(lab.ChainFile)
			code, said := p.probe("ready")
			if code != 1 || !bytes.Contains([]byte(said), []byte("waiting for certificates")) || !bytes.Contains([]byte(said), []byte(lab.KeyFile)) {
				t.Errorf("probe ready: exit code %d: %s", code, said)
			}
			if code, said := p.probe("live"); code != 0 {
				t.Errorf("probe live: exit code %d: %s", code, said)
			}
			p.besieged()
			if total := p.prober.Stats().Total(); total.Accepted > 0 {
				t.Errorf("%+v, want nothing accepted", total)
			}
			appear(p, p.sidecar.TLSDirectory)
			p.ready()
			if code, said := p.probe("ready"); code != 0 || said != "ok\n" {
				t.Errorf("probe ready: exit code %d: %s", code, said)
			}
			p.shows(p.identity)
			if got := p.log.count("certificates published"); got != 1 {
				t.Errorf("certificates were published %d times, want once", got)
			}
		})
	}
}

// shows waits until connections of both families are shown an identity's chain. None may fail meanwhile.
func (p *pod) shows(identity *lab.Identity) {
	p.t.Helper()
	p.showsTo(p.client, identity)
}

func (p *pod) showsTo(client, identity *lab.Identity) {
	p.t.Helper()
	for _, addr := range p.Addrs() {
		p.await("the certificate is in use", func() bool {
			conn, err := p.handshake(netip.AddrPortFrom(addr, mtlsPort), client.ClientConfig("pod"))
			p.must(err)
			defer conn.Close()
			p.must(echo(conn))
			got := conn.ConnectionState().PeerCertificates
			return len(got) == 2 && got[0].Equal(identity.Leaf)
		})
	}
}

// TestRotation: in whichever way certificates come to be others, the last ones are published, once, and no handshake fails.
func TestRotation(t *testing.T) {
	t.Parallel()
	p := start(t, web)
	envoy := p.envoy()
	long, err := p.handshake(netip.AddrPortFrom(p.IPv6, mtlsPort), p.client.ClientConfig("pod"))
	p.must(err)
	p.must(echo(long))
	p.shows(p.identity)
	directory := p.sidecar.TLSDirectory
	elsewhere := filepath.Join(filepath.Dir(directory), "elsewhere")
	former, pauses := p.issue("pod"), 0
	for _, way := range []struct {
		name  string
		write func(next *lab.Identity)
	}{
		{"by rename", func(next *lab.Identity) { p.must(next.Write(directory)) }},
		{"in place", func(next *lab.Identity) { p.must(next.WriteInPlace(directory)) }},
		{"with their directory", func(next *lab.Identity) {
			p.must(os.Rename(directory, directory+".former"))
			p.must(os.Mkdir(directory, 0o755))
			p.must(next.Write(directory))
		}},
		{"a hundred in a row", func(next *lab.Identity) {
			for i := range 100 {
				began := time.Now()
				p.must([]*lab.Identity{former, next}[i%2].Write(directory))
				if time.Since(began) > 20*time.Millisecond {
					pauses++ // such as a busy machine makes, and an end as far as mantlet can tell
				}
			}
		}},
		{"elsewhere, where nobody watches", func(next *lab.Identity) {
			p.must(os.Mkdir(elsewhere, 0o755))
			p.must(former.Write(elsewhere))
			for _, name := range []string{lab.ChainFile, lab.KeyFile, lab.CAFile} {
				p.must(renameio.Symlink(filepath.Join(elsewhere, name), filepath.Join(directory, name)))
			}
			p.shows(former)
			pauses = 3 // each file may be seen by itself
			p.must(next.Write(elsewhere))
		}},
	} {
		before := p.log.count("certificates published")
		pauses = 0
		next := p.issue("pod")
		way.write(next)
		p.shows(next)
		if got := p.log.count("certificates published") - before; got < 1 || got > 1+pauses {
			t.Errorf("%s: certificates were published %d times", way.name, got)
		}
		p.must(echo(long))
		if got := p.envoy(); got != envoy {
			t.Fatalf("Envoy was %d and is %d", envoy, got)
		}
		p.ready()
	}
	p.besieged()
}

// TestBadRotation: what can't be used is reported, and the last good certificates stay, also for an Envoy that has to
// start anew.
func TestBadRotation(t *testing.T) {
	t.Parallel()
	p := start(t, web)
	foreign, err := lab.NewAuthority("mesh")
	p.must(err)
	stranger, err := foreign.Issue(lab.Leaf{DNSNames: []string{"pod"}})
	p.must(err)
	expired, err := p.mesh.Issue(lab.Leaf{DNSNames: []string{"pod"}, NotBefore: time.Now().AddDate(0, 0, -2), NotAfter: time.Now().Add(-time.Hour)})
	p.must(err)
	directory := p.sidecar.TLSDirectory
	replace := func(name string, text []byte) { p.must(os.WriteFile(filepath.Join(directory, name), text, 0o600)) }
	for _, c := range []struct {
		name, says string
		write      func()
	}{
		{"key of another", "is not the key of the leaf (CN=pod)", func() { replace(lab.ChainFile, p.issue("pod").ChainPEM()) }},
		{"expired", "expired at", func() { p.must(expired.Write(directory)) }},
		{"another CA", "another CA of the same name", func() {
			p.must(stranger.Write(directory))
			replace(lab.CAFile, p.mesh.CAPEM())
		}},
		{"garbage", "is not PEM", func() { replace(lab.CAFile, []byte("garbage")) }},
		{"nothing", "no such file", func() { p.must(os.Remove(filepath.Join(directory, lab.KeyFile))) }},
	} {
		before := p.log.count(c.says)
		c.write()
		p.await(c.name+" is reported", func() bool { return p.log.count(c.says) > before })
		p.shows(p.identity)
		p.ready()
	}
	old := p.envoy()
	p.must(syscall.Kill(old, syscall.SIGKILL))
	p.await("Envoy is back", func() bool {
		pids, _ := p.sidecar.Envoys()
		return len(pids) == 1 && pids[0] != old
	})
	p.ready()
	p.shows(p.identity)

	next := p.issue("pod")
	p.must(next.Write(directory))
	p.shows(next)
}

// bundle puts an identity into the TLS directory, with these mesh CAs and not its own.
func (p *pod) bundle(identity *lab.Identity, cas ...[]byte) {
	p.t.Helper()
	directory := p.t.TempDir()
	p.must(identity.Write(directory))
	p.must(os.WriteFile(filepath.Join(directory, lab.CAFile), bytes.Join(cas, nil), 0o600))
	for _, name := range []string{lab.ChainFile, lab.KeyFile, lab.CAFile} {
		text, err := os.ReadFile(filepath.Join(directory, name))
		p.must(err)
		p.must(renameio.WriteFile(filepath.Join(p.sidecar.TLSDirectory, name), text, 0o600))
	}
}

// upstreams makes an Envoy end at its start over a chain that it cannot load.
const upstreams = "EDG_EGRESS_PROXY_CONFIG=billing#127.137.0.1:8081#192.0.2.1:8080##cart#127.137.0.2:8081#192.0.2.2:8080"

// TestUntriedCertificates: at a first start the first Envoy tries the certificates, or the next one where that ends over them.
// Nothing comes in while it does not accept them, and the ports open once there are others.
func TestUntriedCertificates(t *testing.T) {
	t.Parallel()
	for name, environ := range map[string][]string{"Envoy starts with them": {web}, "Envoy ends over them": {web, upstreams}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t, environ...)
			refused, err := p.mesh.Issue(lab.Leaf{DNSNames: []string{"pod"}, KeyUsage: x509.KeyUsageKeyAgreement})
			p.must(err)
			p.must(refused.Write(p.sidecar.TLSDirectory))
			p.besiege()
			p.run()
			p.protect(tlsPort)
			p.protect(mtlsPort)
			p.unready("Envoy does not accept the certificates: the leaf's key usage lacks digitalSignature")
			p.besieged()
			for _, addr := range p.Addrs() {
				if conn, err := p.dialBriefly(netip.AddrPortFrom(addr, tlsPort)); err == nil {
					_ = conn.Close()
					t.Errorf("%s lets connections in", addr)
				}
			}
			p.must(p.identity.Write(p.sidecar.TLSDirectory))
			p.ready()
			p.shows(p.identity)
			p.besieged()
		})
	}
}

// TestNoHalfGeneration: whatever Envoy and Go read or verify differently, the last good generation stays whole: its
// certificate is shown, its CAs let in and no others do, and that is what mantlet says; also once Envoy, or mantlet, was
// killed. The next good generation takes its place.
func TestNoHalfGeneration(t *testing.T) {
	t.Parallel()
	p := newPod(t, web, upstreams)
	authority := func() (*lab.Authority, *lab.Identity) {
		a, err := lab.NewAuthority("mesh")
		p.must(err)
		client, err := a.Issue(lab.Leaf{DNSNames: []string{"client"}})
		p.must(err)
		return a, client
	}
	second, secondClient := authority()
	next, nextClient := authority()
	p.bundle(p.identity, p.mesh.CAPEM(), second.CAPEM())
	p.besiege()
	p.run()
	p.protect(tlsPort)
	p.protect(mtlsPort)
	p.ready()
	letIn := func(client *lab.Identity) bool {
		config := client.ClientConfig("")
		config.VerifyConnection = nil // whom it is let in by is the question
		return p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), config) == nil
	}
	// holds checks that the generation with these CAs is in force, and that mantlet says so.
	holds := func(when string, client, identity *lab.Identity, cas int, clients map[*lab.Identity]bool) {
		t.Helper()
		p.ready()
		p.showsTo(client, identity)
		for client, want := range clients {
			if got := letIn(client); got != want {
				t.Errorf("%s: a client is let in: %t, want %t", when, got, want)
			}
		}
		var leaf, anchors int
		for _, c := range p.status().Certificates {
			switch {
			case c.Role == "mesh CA":
				anchors++
			case c.Role == "leaf" && c.NotAfter.Equal(identity.Leaf.NotAfter):
				leaf++
			}
		}
		if leaf != 1 || anchors != cas {
			t.Errorf("%s: the status has %d leaves and %d mesh CAs, want 1 and %d", when, leaf, anchors, cas)
		}
	}
	before := map[*lab.Identity]bool{p.client: true, secondClient: true, nextClient: false}
	holds("at first", p.client, p.identity, 2, before)

	refused, err := next.Issue(lab.Leaf{DNSNames: []string{"pod"}, KeyUsage: x509.KeyUsageKeyAgreement})
	p.must(err)
	foreign, err := lab.NewAuthority("foreign")
	p.must(err)
	for _, bad := range []struct {
		name, says string
		write      func()
	}{
		{"a CA taken away, the others glued", "is glued to the one before", func() {
			p.bundle(p.identity, bytes.TrimSpace(foreign.CAPEM()), next.CAPEM(), p.mesh.CAPEM())
		}},
		{"another mesh, whose leaf Envoy refuses", "key usage lacks digitalSignature", func() { p.bundle(refused, next.CAPEM()) }},
	} {
		reported := p.log.count(bad.says)
		bad.write()
		p.await(bad.name+" is reported", func() bool { return p.log.count(bad.says) > reported })
		holds(bad.name, p.client, p.identity, 2, before)
		if said := strings.Join(p.status().Problems, "\n"); !strings.Contains(said, bad.says) {
			t.Errorf("%s: the problems are %q", bad.name, said)
		}
		old := p.envoy()
		p.must(syscall.Kill(old, syscall.SIGKILL))
		p.await("Envoy is back", func() bool {
			pids, _ := p.sidecar.Envoys()
			return len(pids) == 1 && pids[0] != old
		})
		holds(bad.name+", and Envoy was killed", p.client, p.identity, 2, before)
		p.must(p.sidecar.Signal(syscall.SIGKILL))
		_ = p.sidecar.Wait()
		p.run()
		holds(bad.name+", and mantlet was killed", p.client, p.identity, 2, before)
	}

	identity, err := next.Issue(lab.Leaf{DNSNames: []string{"pod"}})
	p.must(err)
	rules := p.log.count(inForce)
	p.bundle(identity, next.CAPEM())
	// Until what the mesh CAs before let in has ended, new connections may end with it.
	p.await("the next good one is published", func() bool { return letIn(nextClient) && p.log.count(inForce) > rules })
	holds("the next good one", nextClient, identity, 1, map[*lab.Identity]bool{p.client: false, secondClient: false, nextClient: true})
	if problems := p.status().Problems; len(problems) > 0 {
		t.Errorf("the problems are %q", problems)
	}
	p.same()
	p.besieged()
}

// TestExpiry: mantlet warns before certificates expire, is unready once they have, and ready with others.
func TestExpiry(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	soon, err := p.mesh.Issue(lab.Leaf{DNSNames: []string{"pod"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(10 * time.Second)})
	p.must(err)
	p.must(soon.Write(p.sidecar.TLSDirectory))
	p.besiege()
	p.run()
	p.protect(tlsPort)
	p.protect(mtlsPort)
	p.ready()
	if said := strings.Join(p.status().Problems, "\n"); !strings.Contains(said, "the certificates should be replaced: leaf (CN=pod) expires at ") {
		t.Errorf("seconds before its end the problems are %q", said)
	}
	p.unready("expired at ")
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.ready()
	p.shows(p.identity)
	if problems := p.status().Problems; len(problems) > 0 {
		t.Errorf("the problems are %q", problems)
	}
	p.besieged()
}

// TestOverlap replaces the mesh CA as it is done: the next one beside it, then certificates of that, then the next one alone.
// Nobody is refused whom a CA of the bundle vouches for, on any new connection, and nothing that is open is cut before its CA
// is gone.
func TestOverlap(t *testing.T) {
	t.Parallel()
	p := start(t, web)
	next, err := lab.NewAuthority("mesh")
	p.must(err)
	nextPod, err := next.Issue(lab.Leaf{DNSNames: []string{"pod"}})
	p.must(err)
	nextClient, err := next.Issue(lab.Leaf{DNSNames: []string{"client"}})
	p.must(err)
	config := func(client *lab.Identity) *tls.Config { // that trusts both
		config := client.ClientConfig("pod")
		config.RootCAs = p.mesh.Pool()
		config.RootCAs.AppendCertsFromPEM(next.CAPEM())
		return config
	}
	open := map[*lab.Identity][]*tls.Conn{}
	connect := func(client *lab.Identity) error {
		for _, addr := range p.Addrs() {
			conn, err := p.handshake(netip.AddrPortFrom(addr, mtlsPort), config(client))
			if err == nil {
				err = echo(conn)
			}
			if err != nil {
				return err
			}
			open[client] = append(open[client], conn)
		}
		return nil
	}
	p.must(connect(p.client))
	if connect(nextClient) == nil {
		t.Error("a client of a CA that is not in the bundle is let in")
	}
	p.bundle(p.identity, p.mesh.CAPEM(), next.CAPEM())
	p.await("the next CA's client is let in", func() bool { return connect(nextClient) == nil })
	p.must(connect(p.client))
	p.bundle(nextPod, next.CAPEM(), p.mesh.CAPEM())
	p.await("the next CA's certificate is shown", func() bool {
		p.must(connect(p.client))
		p.must(connect(nextClient))
		all := open[nextClient]
		return all[len(all)-1].ConnectionState().PeerCertificates[0].Equal(nextPod.Leaf)
	})
	for _, conns := range open {
		for _, conn := range conns {
			p.must(echo(conn))
		}
	}
	p.bundle(nextPod, next.CAPEM())
	p.await("the old CA's client is refused", func() bool { return connect(p.client) != nil })
	p.await("the rules follow", func() bool { return p.log.count(inForce) > 1 })
	for _, conn := range open[p.client] {
		_, _ = conn.NetConn().Write([]byte("x"))
		if err := cut(conn.NetConn()); err != nil {
			t.Errorf("a connection by the CA that is gone: %v", err)
		}
	}
	p.must(connect(nextClient))
	p.ready()
	p.besieged()
}

// TestRotationUnderLoad: not one handshake fails while certificates are replaced, in each way that they can be.
func TestRotationUnderLoad(t *testing.T) {
	t.Parallel()
	p := start(t, web)
	var done atomic.Int64
	var stop atomic.Bool
	var clients sync.WaitGroup
	for _, addr := range p.Addrs() {
		clients.Go(func() {
			for !stop.Load() {
				if err := p.exchange(netip.AddrPortFrom(addr, mtlsPort), p.client.ClientConfig("pod")); err != nil {
					t.Errorf("connection %d: %v", done.Load(), err)
				}
				done.Add(1)
			}
		})
	}
	defer func() { stop.Store(true); clients.Wait() }()
	published := func() int { return p.log.count("certificates published") }
	for range 5 {
		for _, write := range []func(*lab.Identity, string) error{(*lab.Identity).Write, (*lab.Identity).WriteInPlace} {
			before, calls := published(), done.Load()
			next := p.issue("pod")
			p.must(write(next, p.sidecar.TLSDirectory))
			p.await("it is published", func() bool { return published() > before })
			p.shows(next)
			p.await("the clients go on", func() bool { return done.Load() > calls+10 })
		}
	}
	stop.Store(true)
	clients.Wait()
	t.Logf("%d connections over %d rotations", done.Load(), published()-1)
	if got := published(); got != 11 {
		t.Errorf("certificates were published %d times, want 11: one mixed generation more is one too many", got)
	}
	p.besieged()
}
