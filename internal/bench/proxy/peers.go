package proxy

import (
	"embed"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"text/template"

	"mantlet/internal/lab"
)

//go:embed config
var configs embed.FS

// end is what the configuration of one side is made of.
type end struct {
	Side, Peer string // the certificates' names: client and server
	Listen, To netip.AddrPort
	Chain, Key string // files
	Pair       string // file of both
	CA         string
	Directory  string
	Modules    string
	Resume     bool
	Sessions   bool
	Verify     bool
}

// peers puts a proxy between client and server.
func (p *Path) peers(server *lab.Host, mesh *lab.Authority) error {
	hosts := [2]*lab.Host{Client: p.client, Server: server}
	listen := [2]netip.AddrPort{
		Client: netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), plainPort),
		Server: netip.AddrPortFrom(server.IPv4, tlsPort),
	}
	to := [2]netip.AddrPort{Server: netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), workload)}
	if !p.Pods {
		for side, name := range []string{"client's proxy", "server's proxy"} {
			var err error
			if hosts[side], err = p.host(name); err != nil {
				return err
			}
		}
		listen = [2]netip.AddrPort{
			Client: netip.AddrPortFrom(hosts[Client].IPv4, plainPort),
			Server: netip.AddrPortFrom(hosts[Server].IPv4, tlsPort),
		}
		to[Server] = p.to
	}
	to[Client] = listen[Server]
	names := [2]string{"client", "server"}
	for side, name := range names {
		identity, err := mesh.Issue(lab.Leaf{DNSNames: []string{name}})
		if err != nil {
			return err
		}
		e := end{
			Side: name, Peer: names[1-side], Listen: listen[side], To: to[side],
			Directory: filepath.Join(p.directory, name+"-files"), Modules: p.programs.NginxModules, Resume: !p.NoResume,
			Sessions: p.Sessions, Verify: !p.Unverified,
		}
		if err := e.write(identity); err != nil {
			return err
		}
		program, args, err := p.command(e)
		if err != nil {
			return err
		}
		cmd, err := p.start(hosts[side], p.Proxy+"-"+name, program, args...)
		if err != nil {
			return err
		}
		p.sides[side] = cmd.Process.Pid
	}
	p.to = listen[Client]
	return nil
}

// write writes the certificates.
func (e *end) write(identity *lab.Identity) error {
	e.Chain, e.Key = filepath.Join(e.Directory, lab.ChainFile), filepath.Join(e.Directory, lab.KeyFile)
	e.CA, e.Pair = filepath.Join(e.Directory, lab.CAFile), filepath.Join(e.Directory, "pair.pem")
	if err := os.MkdirAll(e.Directory, 0o755); err != nil {
		return err
	}
	if err := identity.Write(e.Directory); err != nil {
		return err
	}
	key, err := os.ReadFile(e.Key)
	if err != nil {
		return err
	}
	return os.WriteFile(e.Pair, append(identity.ChainPEM(), key...), 0o600)
}

// command returns what starts a proxy's side, and writes its configuration.
func (p *Path) command(e end) (program string, args []string, err error) {
	switch p.Proxy {
	case Envoy:
		file, err := e.config("envoy-" + e.Side + ".yaml")
		return p.programs.Envoy, []string{"--config-path", file, "--concurrency", "2", "--disable-hot-restart", "--log-level", "error"}, err
	case HAProxy:
		file, err := e.config("haproxy-" + e.Side + ".cfg")
		return p.programs.HAProxy, []string{"-db", "-f", file}, err
	case Nginx:
		file, err := e.config("nginx-" + e.Side + ".conf")
		return p.programs.Nginx, []string{"-p", e.Directory, "-c", file}, err
	case Stunnel:
		file, err := e.config("stunnel-" + e.Side + ".conf")
		return p.programs.Stunnel, []string{file}, err
	case Ghostunnel:
		common := []string{e.Side, "--listen", e.Listen.String(), "--target", e.To.String(), "--cert", e.Chain, "--key", e.Key, "--cacert", e.CA, "--quiet", "all"}
		if e.Side == "client" {
			return p.programs.Ghostunnel, append(common, "--unsafe-listen", "--override-server-name", e.Peer), nil
		}
		return p.programs.Ghostunnel, append(common, "--unsafe-target", "--allow-dns", e.Peer), nil
	default:
		return "", nil, errors.New("there is no such proxy")
	}
}

// config writes a configuration file.
func (e end) config(name string) (string, error) {
	text, err := template.ParseFS(configs, "config/"+name)
	if err != nil {
		return "", err
	}
	path := filepath.Join(e.Directory, name)
	file, err := os.Create(path)
	if err != nil {
		return "", err
	}
	if err := errors.Join(text.Execute(file, e), file.Close()); err != nil {
		return "", fmt.Errorf("writing %s: %w", name, err)
	}
	return path, nil
}
