package main

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"mantlet/internal/lab"
)

// hang makes the file system of what is mounted one that does not answer, until it goes on.
func (m *mounted) hang() (resume func()) {
	m.p.t.Helper()
	data := filepath.Join(m.directory, "..hung")
	m.p.must(os.Mkdir(data, 0o755))
	end, err := lab.Hang(data)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		m.p.t.Skipf("no file system can be made that hangs: %v", err)
	}
	m.p.must(err)
	link := filepath.Join(m.directory, "..data")
	was, err := os.Readlink(link)
	m.p.must(err)
	point := func(to string) {
		m.p.must(os.Symlink(to, filepath.Join(m.directory, "..tmp")))
		m.p.must(os.Rename(filepath.Join(m.directory, "..tmp"), link))
	}
	point("..hung")
	ended := false
	resume = func() {
		if !ended {
			ended = true
			point(was)
			m.p.must(end())
			m.p.must(os.Remove(data))
		}
	}
	m.p.t.Cleanup(resume)
	return resume
}

// TestFilesHang: a file that can't be read, since its file system does not answer, holds up nothing but itself. The last good
// state goes on, and mantlet says which file it is.
func TestFilesHang(t *testing.T) {
	t.Parallel()
	p := newPod(t, web)
	config := p.override("ingress: [{port: 8080, mode: tls}]")
	secret := &mounted{p: p, directory: p.sidecar.TLSDirectory}
	write := func(identity *lab.Identity) {
		directory, files := t.TempDir(), map[string][]byte{}
		p.must(identity.Write(directory))
		for _, name := range []string{lab.ChainFile, lab.KeyFile, lab.CAFile} {
			text, err := os.ReadFile(filepath.Join(directory, name))
			p.must(err)
			files[name] = text
		}
		secret.publish(files)
	}
	write(p.identity)
	p.besiege()
	p.run()
	p.protect(tlsPort)
	p.protect(mtlsPort)
	p.ready()
	mesh, addr := p.client.ClientConfig("pod"), netip.AddrPortFrom(p.IPv4, tlsPort)
	// A command that reads the files itself could not even be killed.
	told := func(path string) func() bool {
		return func() bool {
			problems := strings.Join(p.served().Problems, "\n")
			return strings.Contains(problems, path) && strings.Contains(problems, "it takes longer than 5s")
		}
	}

	resume := config.hang()
	p.await("mantlet tells which file hangs", told(config.file()))
	p.ready()
	next := p.issue("pod")
	write(next)
	p.shows(next)
	envoy := p.envoy()
	p.must(syscall.Kill(envoy, syscall.SIGKILL))
	p.await("there is another Envoy", func() bool { return p.exchange(addr, mesh) == nil && p.envoy() != envoy })
	resume()
	p.await("all is well", func() bool { return len(p.served().Problems) == 0 })

	secret.hang()
	p.await("mantlet tells which file hangs", told(filepath.Join(secret.directory, "certChain.pem")))
	p.must(p.exchange(addr, p.anonymous()))
	config.write("ingress: [{port: 8080, mode: mtls}]")
	p.await("the port asks for a certificate", func() bool { return p.exchange(addr, p.anonymous()) != nil })
	p.must(p.exchange(addr, mesh))
	config.hang()
	p.await("mantlet tells which file hangs", told(config.file()))
	p.must(p.sidecar.Stop())
}
