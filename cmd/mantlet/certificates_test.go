package main

import (
	"bytes"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"mantlet/lab"
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
	for _, addr := range p.Addrs() {
		p.await("the certificate is in use", func() bool {
			conn, err := p.handshake(netip.AddrPortFrom(addr, mtlsPort), p.client.ClientConfig("pod"))
			p.must(err)
			defer conn.Close()
			p.must(echo(conn))
			got := conn.ConnectionState().PeerCertificates
			return len(got) == 2 && got[0].Equal(identity.Leaf)
		})
	}
}

func TestRotation(t *testing.T) {
	t.Parallel()
	p := start(t, web)
	envoy := p.envoy()
	long, err := p.handshake(netip.AddrPortFrom(p.IPv6, mtlsPort), p.client.ClientConfig("pod"))
	p.must(err)
	p.must(echo(long))
	p.shows(p.identity)
	for _, write := range []func(*lab.Identity, string) error{(*lab.Identity).Write, (*lab.Identity).WriteInPlace} {
		next := p.issue("pod")
		p.must(write(next, p.sidecar.TLSDirectory))
		p.shows(next)
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
		{"key of another", "does not match", func() { replace(lab.ChainFile, p.issue("pod").ChainPEM()) }},
		{"expired", "expired at", func() { p.must(expired.Write(directory)) }},
		{"another CA", "does not verify", func() {
			p.must(stranger.Write(directory))
			replace(lab.CAFile, p.mesh.CAPEM())
		}},
		{"garbage", "holds no certificate", func() { replace(lab.CAFile, []byte("garbage")) }},
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
