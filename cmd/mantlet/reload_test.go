package main

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"mantlet/lab"
)

// mounted is a directory as kubelet mounts a ConfigMap: the file is a link through ..data, which is swapped as a whole.
type mounted struct {
	p         *pod
	directory string
	version   int
}

func (p *pod) mount() *mounted { return &mounted{p: p, directory: p.t.TempDir()} }

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
	m := p.mount()
	m.write("{}")
	p.sidecar.Env = append(p.sidecar.Env, "MANTLET_CONFIG="+m.file())
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
		before := p.log.count("an input is not good")
		m.write(bad)
		p.await("it is reported", func() bool { return p.log.count("an input is not good") > before })
		p.ready()
		p.must(p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), mesh))
	}
	p.must(os.Remove(filepath.Join(m.directory, "..data")))
	p.must(p.sidecar.Signal(syscall.SIGHUP))
	p.ready()
	p.must(p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), mesh))
	p.besieged()
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
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.besiege()
	p.run()
	p.protect(tlsPort)
	p.protect(mtlsPort)
	p.ready()
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

// TestTightening: a list of clients ends connections that it would not let in, on the port that it is for, and no others.
func TestTightening(t *testing.T) {
	t.Parallel()
	p, m, others, concerned := reloadable(t)
	m.write(fmt.Sprintf("ingress: [{port: %d, allow: [somebody-else]}]", mtlsPort))
	p.await("the client is not let in any more", func() bool {
		return p.exchange(netip.AddrPortFrom(p.IPv4, mtlsPort), p.client.ClientConfig("pod")) != nil
	})
	p.await("the rules follow", func() bool { return p.log.count("rules are in force") > 1 })
	for _, conn := range concerned {
		_, _ = conn.NetConn().Write([]byte("x")) // it may be reset before or after
		p.must(cut(conn.NetConn()))
	}
	for _, conn := range others {
		p.must(echo(conn))
	}
	p.must(p.exchange(netip.AddrPortFrom(p.IPv6, mtlsPort), p.issue("somebody-else").ClientConfig("pod")))
	p.ready()
	p.besieged()
}
