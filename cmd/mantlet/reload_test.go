package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"mantlet/internal/lab"
)

// mounted is a directory as kubelet mounts a ConfigMap: the file is a link through ..data, which is swapped as a whole.
type mounted struct {
	p         *pod
	directory string
	version   int
}

func (p *pod) mount() *mounted { return &mounted{p: p, directory: p.t.TempDir()} }

// override gives mantlet an override file, from its next start on.
func (p *pod) override(text string) *mounted {
	p.t.Helper()
	m := p.mount()
	m.write(text)
	p.sidecar.Env = append(p.sidecar.Env, "MANTLET_CONFIG="+m.file())
	return m
}

func (m *mounted) file() string { return filepath.Join(m.directory, "override.yaml") }

// write makes a new version of the file visible.
func (m *mounted) write(text string) { m.publish(map[string][]byte{"override.yaml": []byte(text)}) }

// publish makes a new version of the directory visible at once.
func (m *mounted) publish(files map[string][]byte) {
	m.p.t.Helper()
	m.version++
	data := fmt.Sprintf("..%d", m.version)
	m.p.must(os.Mkdir(filepath.Join(m.directory, data), 0o755))
	for name, text := range files {
		m.p.must(os.WriteFile(filepath.Join(m.directory, data, name), text, 0o600))
		if m.version == 1 {
			m.p.must(os.Symlink(filepath.Join("..data", name), filepath.Join(m.directory, name)))
		}
	}
	m.p.must(os.Symlink(data, filepath.Join(m.directory, "..tmp")))
	m.p.must(os.Rename(filepath.Join(m.directory, "..tmp"), filepath.Join(m.directory, "..data")))
}

// TestReload: a change of modes moves ports between the listeners that are there and ends what it forbids; all else is a
// hot restart, which cuts nothing; a bad file changes nothing.
func TestReload(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	m := p.override("{}")
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.besiege()
	p.run()
	p.protect(tlsPort)
	p.protect(mtlsPort)
	p.serve(p.Host, lab.Service{Address: fmt.Sprintf(":%d", passthroughPort)})
	p.ready()
	first := p.envoy()
	mesh := p.client.ClientConfig("pod")

	for _, addr := range p.Addrs() {
		plain := p.dial(p.outside, netip.AddrPortFrom(addr, passthroughPort))
		p.must(echo(plain))
		long, err := p.handshake(netip.AddrPortFrom(addr, mtlsPort), mesh)
		p.must(err)
		p.must(echo(long))

		m.write(fmt.Sprintf("ingress: [{port: %d, mode: mtls}]", passthroughPort))
		p.await("a plaintext port asks for certificates", func() bool {
			return p.exchange(netip.AddrPortFrom(addr, passthroughPort), mesh) == nil
		})
		_, _ = plain.Write([]byte("x")) // it may be reset before or after
		p.must(cut(plain))
		p.must(echo(long))
		if got := p.envoy(); got != first {
			t.Fatalf("Envoy was %d and is %d: a change of modes needs no restart", first, got)
		}
		m.write("{}")
		p.await("the port is plain again", func() bool {
			conn, err := p.tryPlain(addr)
			return err == nil && echo(conn) == nil
		})
	}
	for _, bad := range []string{"ingress: [{port: 8080, mode: tsl}]", "a: b: c", "\x00"} {
		before := p.log.count("configuration rejected")
		m.write(bad)
		p.await("it is reported", func() bool { return p.log.count("configuration rejected") > before })
		p.ready()
		p.must(p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), mesh))
	}
	m.write("{}")
	p.await("the log says that it is good again", func() bool {
		return p.log.count(`"msg":"configuration accepted again"`) == 1
	})
	p.must(os.Remove(filepath.Join(m.directory, "..data")))
	p.must(p.sidecar.Signal(syscall.SIGHUP))
	p.ready()
	p.must(p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), mesh))
	p.besieged()
}

// TestWaysToReplace: in whichever way a file comes to be another, it is read, and put in force once: also where no event tells,
// as in some sandboxes, and at once when SIGHUP asks for it. In between, what was in force goes on.
func TestWaysToReplace(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	directory, elsewhere := filepath.Join(base, "config"), filepath.Join(base, "elsewhere")
	file, target := filepath.Join(directory, "override.yaml"), filepath.Join(elsewhere, "real.yaml")
	p := newPod(t, web, "MANTLET_CONFIG="+file)
	rename := func(text string) { p.must(renameio.WriteFile(file, []byte(text), 0o600)) }
	inPlace := func(text string) { p.must(os.WriteFile(file, []byte(text), 0o600)) }
	version, pauses := 0, 0
	// Each content forbids nothing that the one before it allows: such changes would soon have to wait.
	content := func(version int) string { return fmt.Sprintf("ingress: [{port: 5000-%d, mode: tls}]", 5000+version) }
	applied := func(text string) {
		t.Helper()
		p.await("the last content is in force", func() bool {
			s := p.status()
			return s.Applied != nil && s.Applied.SourceDigest == fmt.Sprintf("%x", sha256.Sum256([]byte(text)))
		})
	}
	p.must(errors.Join(os.Mkdir(directory, 0o755), os.Mkdir(elsewhere, 0o755)))
	inPlace("{}")
	p.start()
	envoy := p.envoy()
	for _, way := range []struct {
		name  string
		write func(text string)
	}{
		{"rename", rename},
		{"in place", inPlace},
		{"removed and made again", func(text string) {
			p.must(os.Remove(file))
			p.await("it is missed", func() bool { return strings.Contains(strings.Join(p.status().Problems, "\n"), "no such file") })
			inPlace(text)
		}},
		{"removed and made again with its directory", func(text string) {
			p.must(os.RemoveAll(directory))
			p.await("it is missed", func() bool { return strings.Contains(strings.Join(p.status().Problems, "\n"), "no such file") })
			p.must(os.Mkdir(directory, 0o755))
			inPlace(text)
		}},
		{"another directory in the place of its own", func(text string) {
			p.must(os.Rename(directory, filepath.Join(base, "former")))
			p.must(os.Mkdir(directory, 0o755))
			rename(text)
		}},
		{"kubelet", func(text string) {
			for name, text := range map[string]string{"..1": "{}", "..2": text} {
				p.must(os.Mkdir(filepath.Join(directory, name), 0o755))
				p.must(os.WriteFile(filepath.Join(directory, name, "override.yaml"), []byte(text), 0o600))
			}
			p.must(renameio.Symlink("..2", filepath.Join(directory, "..data")))
			p.must(renameio.Symlink(filepath.Join("..data", "override.yaml"), file))
		}},
		{"a hundred changes in a row", func(text string) {
			for i := range 100 {
				began := time.Now()
				p.must(os.WriteFile(file+".new", []byte(content(1000+i)), 0o600))
				p.must(os.Rename(file+".new", file))
				if time.Since(began) > 20*time.Millisecond {
					pauses++ // such as a busy machine makes, and an end as far as mantlet can tell
				}
			}
			inPlace(text)
		}},
		{"elsewhere, where nobody watches", func(text string) {
			p.must(os.WriteFile(target, []byte(text), 0o600))
			p.must(renameio.Symlink(target, file))
		}},
		{"elsewhere in place", func(text string) { p.must(os.WriteFile(target, []byte(text), 0o600)) }},
	} {
		version++
		want := content(version)
		before := p.log.count(inForce)
		pauses = 0
		way.write(want)
		applied(want)
		if got := p.log.count(inForce) - before; got < 1 || got > 1+pauses {
			t.Errorf("%s: something was put in force %d times", way.name, got)
		}
		p.ready()
	}
	// By polling alone these would take five seconds each.
	began := time.Now()
	const signals = 5
	for range signals {
		version++
		p.must(os.WriteFile(target, []byte(content(version)), 0o600))
		p.must(p.sidecar.Signal(syscall.SIGHUP))
		applied(content(version))
	}
	if took := time.Since(began); took > (signals-2)*5*time.Second {
		t.Errorf("%d files took %v", signals, took)
	}
	if got := p.envoy(); got != envoy {
		t.Errorf("Envoy was %d and is %d", envoy, got)
	}
	p.besieged()
}

// TestFirstOverrideFile: nothing comes in before there is a good one. A mantlet that is started again beside a bad one goes on
// with the last good one, and says so.
func TestFirstOverrideFile(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	m := p.mount()
	p.sidecar.Env = append(p.sidecar.Env, "MANTLET_CONFIG="+m.file())
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.besiege()
	p.run()
	p.protect(tlsPort)
	p.protect(mtlsPort)
	p.unready("waiting for a good override file")
	m.write("ingress: [{port: 8080, mode: tsl}]")
	p.unready("ingress[8080].mode")
	p.besieged()
	if total := p.prober.Stats().Total(); total.Accepted > 0 {
		t.Errorf("%+v, want nothing accepted", total)
	}
	good := fmt.Sprintf("ingress: [{port: %d, mode: mtls}]", tlsPort)
	m.write(good)
	p.ready()
	m.write("ingress: [{port: 8080, mode: tsl}]")
	p.await("it is reported", func() bool { return len(p.status().Problems) == 1 })
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		p.must(p.sidecar.Signal(signal))
		_ = p.sidecar.Wait()
		p.run()
		p.ready()
		s := p.status()
		if len(s.Problems) != 1 || !strings.Contains(s.Problems[0], "ingress[8080].mode") || !strings.Contains(s.Problems[0], "the last good state stays in force") {
			t.Errorf("the problems are %q", s.Problems)
		}
		if want := fmt.Sprintf("%x", sha256.Sum256([]byte(good))); s.Applied == nil || s.Applied.SourceDigest != want {
			t.Errorf("in force is %+v, want the file with digest %s", s.Applied, want)
		}
		if err := p.exchange(netip.AddrPortFrom(p.IPv4, tlsPort), p.anonymous()); err == nil {
			t.Error("the last good file is not in force")
		}
	}
	m.write("{}")
	p.await("the next good one is in force", func() bool {
		return p.exchange(netip.AddrPortFrom(p.IPv4, tlsPort), p.anonymous()) == nil
	})
	if s := p.status(); len(s.Problems) > 0 {
		t.Errorf("the problems are %q", s.Problems)
	}
	p.besieged()
}

// TestRuntimeDirectoryFull: what is in force goes on, what can't be written is told, and comes about once it can.
func TestRuntimeDirectoryFull(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	m := p.override("{}")
	p.must(os.MkdirAll(p.sidecar.RuntimeDirectory, 0o700))
	p.must(unix.Mount("tmpfs", p.sidecar.RuntimeDirectory, "tmpfs", 0, "size=1m,mode=700"))
	t.Cleanup(func() { _ = unix.Unmount(p.sidecar.RuntimeDirectory, unix.MNT_DETACH) })
	p.start()
	mesh := p.client.ClientConfig("pod")
	long, err := p.handshake(netip.AddrPortFrom(p.IPv6, mtlsPort), mesh)
	p.must(err)

	filler, err := os.Create(filepath.Join(p.sidecar.RuntimeDirectory, "filler"))
	p.must(err)
	fill := func() {
		for err = error(nil); err == nil; {
			_, err = filler.Write(make([]byte, 4096))
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("the directory is not full: %v", err)
		}
	}
	told := func(what string) func() bool {
		return func() bool {
			problems := strings.Join(p.status().Problems, "\n")
			return strings.Contains(problems, what) && strings.Contains(problems, "no space left")
		}
	}
	fill()
	m.write(fmt.Sprintf("ingress: [{port: %d, allow: [somebody-else]}]", mtlsPort))
	p.await("it is told of the bootstrap", told("bootstrap"))
	fill() // where the file was that is not the last good one any more
	next := p.issue("pod")
	p.must(next.Write(p.sidecar.TLSDirectory))
	p.await("it is told of the certificates", told("secret"))
	p.must(echo(long))
	p.must(p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), mesh))
	p.ready()

	p.must(errors.Join(filler.Close(), os.Remove(filler.Name())))
	p.await("the client is not let in any more", func() bool { return p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), mesh) != nil })
	p.await("the certificate is in use", func() bool {
		conn, err := p.handshake(netip.AddrPortFrom(p.IPv4, tlsPort), p.anonymous())
		return err == nil && conn.ConnectionState().PeerCertificates[0].Equal(next.Leaf)
	})
	p.await("all is well", func() bool { return len(p.status().Problems) == 0 })
	// The next mantlet has what this one was told while there was no room to keep it.
	p.await("the last good file is kept", func() bool {
		_, err := os.Stat(filepath.Join(p.sidecar.RuntimeDirectory, "last-good.json"))
		return err == nil
	})
	p.besieged()
}

// TestRuntimeDirectoryFullAtStart: what mantlet waits for is room, and not certificates.
func TestRuntimeDirectoryFullAtStart(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	p.must(os.MkdirAll(p.sidecar.RuntimeDirectory, 0o700))
	p.must(unix.Mount("tmpfs", p.sidecar.RuntimeDirectory, "tmpfs", 0, "size=64k,mode=700"))
	t.Cleanup(func() { _ = unix.Unmount(p.sidecar.RuntimeDirectory, unix.MNT_DETACH) })
	filler := filepath.Join(p.sidecar.RuntimeDirectory, "filler")
	if err := os.WriteFile(filler, make([]byte, 64<<10), 0o600); !errors.Is(err, syscall.ENOSPC) && err != nil {
		t.Fatal(err)
	}
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.besiege()
	p.run()
	p.unready("the runtime directory cannot be written to: ")
	p.unready("no space left on device")
	p.must(os.Remove(filler))
	p.ready()
	if got := p.log.count("certificates not published"); got != 1 {
		t.Errorf("one failure is logged %d times", got)
	}
	p.besieged()
}

// TestUnsuitableRuntimeDirectory: mantlet ends, and names the variable.
func TestUnsuitableRuntimeDirectory(t *testing.T) {
	t.Parallel()
	for name, says := range map[string]string{"read-only": "permission denied", "closed": "cannot enter"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t, web)
			above := filepath.Join(t.TempDir(), "above")
			lab.Open(filepath.Dir(above))
			p.must(os.Mkdir(above, 0o755))
			p.must(os.Chmod(above, map[string]os.FileMode{"read-only": 0o555, "closed": 0o700}[name]))
			p.sidecar.RuntimeDirectory = filepath.Join(above, "run")
			p.must(p.sidecar.Start())
			if err := p.sidecar.Wait(); err == nil {
				t.Error("mantlet ended without an error")
			}
			want := fmt.Sprintf(`MANTLET_RUNTIME_DIRECTORY \"%s\"`, p.sidecar.RuntimeDirectory)
			if log := p.log.String(); !strings.Contains(log, want) || !strings.Contains(log, says) {
				t.Errorf("mantlet does not say %s, and %s:\n%s", want, says, log)
			}
		})
	}
}

// tryPlain connects to the port that may be passthrough.
func (p *pod) tryPlain(addr netip.Addr) (net.Conn, error) {
	ctx, cancel := p.context()
	defer cancel()
	conn, err := p.outside.Dial(ctx, "tcp", netip.AddrPortFrom(addr, passthroughPort).String())
	if err == nil {
		p.t.Cleanup(func() { _ = conn.Close() })
	}
	return conn, err
}

// reloadable runs a pod with an override file that says nothing, and makes connections from outside through the mesh.
func reloadable(t *testing.T, env ...string) (p *pod, m *mounted, others, concerned []*tls.Conn) {
	t.Helper()
	p = newPod(t, append(env, web)...)
	m = p.mount()
	m.write("{}")
	p.sidecar.Env = append(p.sidecar.Env, "MANTLET_CONFIG="+m.file())
	p.start()
	for _, addr := range p.Addrs() {
		for port, list := range map[uint16]*[]*tls.Conn{tlsPort: &others, mtlsPort: &concerned} {
			conn, err := p.handshake(netip.AddrPortFrom(addr, port), p.client.ClientConfig("pod"))
			p.must(err)
			p.must(echo(conn))
			*list = append(*list, conn)
		}
	}
	return p, m, others, concerned
}

// TestHotRestart: a new egress entry comes with a new Envoy, and no connection is cut.
func TestHotRestart(t *testing.T) {
	t.Parallel()
	p, m, others, concerned := reloadable(t)
	first := p.envoy()
	upstream := p.host("upstream")
	endpoint := p.serve(upstream, lab.Service{Address: ":8080", TLS: p.issue("billing").ServerConfig()})
	m.write(fmt.Sprintf("egress: [{listen: '127.137.0.1:8081', upstream: '%s', serverNames: [billing]}]",
		netip.AddrPortFrom(upstream.IPv4, 8080)))
	p.await("the egress entry is served", func() bool {
		ctx, cancel := p.context()
		defer cancel()
		if said := p.sidecar.Unready(ctx); said != "" {
			t.Errorf("not ready in between: %s", said)
		}
		conn, err := p.Dial(ctx, "tcp", "127.137.0.1:8081")
		if err != nil {
			return false
		}
		defer conn.Close()
		return echo(conn) == nil
	})
	if len(endpoint.Connections()) == 0 {
		t.Error("the endpoint saw no connection")
	}
	pids, err := p.sidecar.Envoys()
	p.must(err)
	if len(pids) == 1 && pids[0] == first {
		t.Errorf("Envoy is %d as before: there was no hot restart", first)
	}
	for _, conn := range append(others, concerned...) {
		p.must(echo(conn))
	}
	p.ready()
	p.besieged()
}

// TestLoosenings: what only opens ports, or changes nothing for them, cuts nothing, and what it opens is open.
func TestLoosenings(t *testing.T) {
	t.Parallel()
	p, m, others, concerned := reloadable(t)
	all := append(others, concerned...)
	for _, step := range []string{
		fmt.Sprintf("ingress: [{port: %d, mode: tls}]", mtlsPort),
		fmt.Sprintf("ingress: [{port: %d, mode: tls}, {port: %d, mode: passthrough}]", mtlsPort, 9999),
		fmt.Sprintf("ingress: [{port: %d, mode: tls}]\naccessLog: none", mtlsPort),
	} {
		before := p.log.count("configuration changed")
		m.write(step)
		p.await("it is in force", func() bool {
			s := p.status()
			return p.log.count("configuration changed") > before && s.Applied != nil && s.Desired.Generation == s.Applied.Generation
		})
		for _, conn := range all {
			p.must(echo(conn))
		}
		for _, addr := range p.Addrs() {
			p.must(p.exchange(netip.AddrPortFrom(addr, mtlsPort), p.anonymous()))
		}
	}
	p.besieged()
}

// TestForbiddenOnce: a connection that says nothing, and that was forbidden, is not let in again by as many changes as are made at
// once. TestGenerationsRunOut of package reconcile is about those that come after them.
func TestForbiddenOnce(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	const open, shut = "ingress: [{port: 8080, mode: tls}]", "ingress: [{port: 8080, mode: mtls}]"
	m := p.override(shut)
	p.start()
	becomes := func(text, chain string) {
		t.Helper()
		m.write(text)
		whole := regexp.MustCompile(chain + `\b`)
		p.await("the rules have "+chain, func() bool { return whole.MatchString(p.rules()) })
	}
	becomes(open, "8080 : goto tls_in")
	forbidden, err := p.handshake(netip.AddrPortFrom(p.IPv4, tlsPort), p.anonymous())
	p.must(err)
	p.must(echo(forbidden))
	p.must(forbidden.NetConn().(*net.TCPConn).SetKeepAlive(false))
	for generation := 1; generation <= 12; generation++ {
		becomes(shut, fmt.Sprintf("8080 : goto mtls_in_%d", generation))
		becomes(open, fmt.Sprintf("8080 : goto tls_in_%d", generation))
	}
	if err := echo(forbidden); err == nil {
		t.Error("a connection that was forbidden lives on")
	}
	p.ready()
	p.must(p.exchange(netip.AddrPortFrom(p.IPv4, tlsPort), p.client.ClientConfig("pod")))
	p.besieged()
}

// TestNeverLooserThanEither: while one state follows another, again and again, nobody gets in whom both refuse.
func TestNeverLooserThanEither(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	states := []string{
		"ingress: [{port: 8080, mode: mtls, allow: [client]}, {port: 9090, mode: tls}]\ntls: {minVersion: '1.3'}",
		"ingress: [{port: 8080, mode: mtls, allow: [other]}, {port: 9090, mode: mtls}]",
	}
	m := p.override(states[0])
	p.start()
	foreign, err := lab.NewAuthority("mesh")
	p.must(err)
	stranger, err := foreign.Issue(lab.Leaf{DNSNames: []string{"client"}})
	p.must(err)
	strangers := stranger.ClientConfig("pod")
	strangers.RootCAs = p.mesh.Pool()
	var tried atomic.Int64
	var callers sync.WaitGroup
	ctx, stop := context.WithCancel(t.Context())
	defer callers.Wait()
	defer stop()
	// While Envoy has the TLS of after, and the rules are those of before, there is a moment to get in by TLS 1.2.
	older := only(tls.VersionTLS12, p.anonymous())
	for _, call := range []struct {
		who    string
		port   uint16
		config *tls.Config
	}{
		{"a name of neither list", tlsPort, p.issue("third").ClientConfig("pod")},
		{"no certificate", tlsPort, p.anonymous()},
		{"another CA's", tlsPort, strangers},
		{"none, and TLS 1.2", mtlsPort, older},
		{"none, and TLS 1.2", mtlsPort, older},
		{"none, and TLS 1.2", mtlsPort, older},
	} {
		callers.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				if p.exchange(netip.AddrPortFrom(p.Addrs()[n%2], call.port), call.config) == nil {
					t.Errorf("a caller with %s got in", call.who)
				}
				tried.Add(1)
			}
		})
	}
	for i := range 6 {
		before, asked := tried.Load(), p.log.count(inForce)
		m.write(states[(i+1)%2])
		p.await("the other state is in force, and callers saw it come", func() bool {
			return p.log.count(inForce) > asked && tried.Load() > before+20
		})
		p.await("all of it is in force", func() bool { code, _, _ := p.diff(); return code == 0 })
	}
	p.besieged()
}

// TestTightenings: each kind ends the connections that it is for, on its ports, and no others. At the port with a list it is known who is
// connected, so a new TLS minimum ends those alone that are below it.
func TestTightenings(t *testing.T) {
	t.Parallel()
	const listed = 9091
	const before = "ingress: [{port: 9091, allow: [client, somebody-else]}]"
	for name, c := range map[string]struct {
		tighten func(p *pod, m *mounted)
		ends    []uint16
	}{
		"mode": {func(_ *pod, m *mounted) {
			m.write("ingress: [{port: 9091, allow: [client, somebody-else]}, {port: 8080, mode: mtls}]")
		}, []uint16{tlsPort}},
		"mode of plaintext": {func(_ *pod, m *mounted) {
			m.write("ingress: [{port: 9091, allow: [client, somebody-else]}, {port: 7890, mode: tls}]")
		}, []uint16{passthroughPort}},
		"allow": {func(_ *pod, m *mounted) {
			m.write("ingress: [{port: 9091, allow: [somebody-else]}]")
		}, []uint16{listed}},
		"TLS minimum": {func(_ *pod, m *mounted) {
			m.write(before + "\ntls: {minVersion: '1.3'}")
		}, []uint16{tlsPort, mtlsPort, listed}},
		"CA": {func(p *pod, _ *mounted) {
			next, err := lab.NewAuthority("mesh")
			p.must(err)
			identity, err := next.Issue(lab.Leaf{DNSNames: []string{"pod"}})
			p.must(err)
			p.must(identity.Write(p.sidecar.TLSDirectory))
		}, []uint16{mtlsPort, listed}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t, web)
			m := p.override(before)
			p.must(p.identity.Write(p.sidecar.TLSDirectory))
			p.besiege()
			p.run()
			for _, port := range []uint16{tlsPort, mtlsPort, listed} {
				p.protect(port)
			}
			p.serve(p.Host, lab.Service{Address: fmt.Sprintf(":%d", passthroughPort)})
			p.ready()
			open := map[uint16][]net.Conn{}
			for _, addr := range p.Addrs() {
				for _, port := range []uint16{tlsPort, mtlsPort, listed} {
					for _, version := range versions {
						conn, err := p.handshake(netip.AddrPortFrom(addr, port), only(version, p.client.ClientConfig("pod")))
						p.must(err)
						open[port] = append(open[port], conn)
					}
				}
				open[passthroughPort] = append(open[passthroughPort], p.dial(p.outside, netip.AddrPortFrom(addr, passthroughPort)))
			}
			for _, conns := range open {
				for _, conn := range conns {
					p.must(echo(conn))
				}
			}
			c.tighten(p, m)
			p.await("it is in force", func() bool { return p.log.count(inForce) > 1 })
			for port, conns := range open {
				for _, conn := range conns {
					secured, isTLS := conn.(*tls.Conn)
					above := name == "TLS minimum" && port == listed && secured.ConnectionState().Version == tls.VersionTLS13
					if !slices.Contains(c.ends, port) || above {
						if err := echo(conn); err != nil {
							t.Errorf("a connection to %s, which nothing forbids: %v", conn.RemoteAddr(), err)
						}
						continue
					}
					if isTLS {
						conn = secured.NetConn()
					}
					_, _ = conn.Write([]byte("x"))
					if err := cut(conn); err != nil {
						t.Errorf("a connection to %s, which is forbidden: %v", conn.RemoteAddr(), err)
					}
				}
			}
			p.besieged()
		})
	}
}

// TestFlips: a file that lets in one client, then another one, again and again, makes few Envoys. Whom the last one forbids is not
// let in while it waits, and whom it allows is served in the end.
func TestFlips(t *testing.T) {
	t.Parallel()
	const port = 9091
	p := newPod(t, web)
	billing := p.host("billing")
	p.serve(billing, lab.Service{Address: ":8443", TLS: p.issue("billing").ServerConfig()})
	entry := fmt.Sprintf("egress: [{listen: '%s', upstream: '%s'}]", replicated, netip.AddrPortFrom(billing.IPv4, 8443))
	m := p.override(entry)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.protect(port)
	p.ready()
	to := netip.AddrPortFrom(p.IPv4, port)
	other := p.issue("other")
	for i := range 30 {
		m.write(entry + fmt.Sprintf("\ningress: [{port: %d, allow: [%s]}]", port, []string{"client", "other"}[i%2]))
		p.await("it is read", func() bool { return p.log.count("configuration changed") > i })
	}
	const closed = "ports are closed until"
	p.await("the port is closed", func() bool { return p.log.count(closed) > 0 })
	out, epochs := p.reach(replicated), p.log.count("Envoy is live")
	m.write(fmt.Sprintf("ingress: [{port: %d, allow: [other]}]", port)) // without the egress entry
	if err := cut(out); err != nil || p.log.count("Envoy is live") > epochs {
		t.Errorf("the connection to an egress entry that is removed does not end while the change waits: %v", err)
	}
	if p.exchange(to, p.client.ClientConfig("pod")) == nil { // its SYN is dropped until the port is served again
		t.Error("whom the last change forbids is let in")
	}
	p.await("whom it allows is served", func() bool { return p.exchange(to, other.ClientConfig("pod")) == nil })
	if p.exchange(to, p.client.ClientConfig("pod")) == nil {
		t.Error("whom it forbids is let in")
	}
	if n := p.log.count("Envoy is live"); n > 8 {
		t.Errorf("%d Envoys", n)
	}
	p.ready()
}
