package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"mantlet/internal/lab"
)

// The two deployments.
const (
	webConfig   = "EDG_INGRESS_PROXY_CONFIG=web#8080#false##metrics#7890#true"
	shopBilling = "EDG_EGRESS_PROXY_CONFIG=billing#127.137.0.1:8081#billing-svc:8080"
	shopCart    = "##cart#127.137.0.2:8081#cart-svc:8080"
)

const introduction = `mantlet wraps a pod's TCP connections in TLS; its workload speaks plain TCP and knows nothing of it.
Pods and services below are network namespaces; Envoy, nftables and every connection are real.

  web     its port 8080 is TLS for anyone, 7890 is plain TCP; the rest is for members of the mesh
          ` + webConfig + `
  shop    all its ports are for members; it reaches two services at loopback addresses
          ` + shopBilling + `
          ` + shopCart + `
  client  is outside; it shows a certificate of the mesh's CA, of another CA of that name, or none

"Refused" and "no answer" also say that the workload saw no connection.`

// Ports of the pod web: the two that its deployment names, and one of the rest.
const (
	tlsPort   = 8080
	plainPort = 7890
	otherPort = 9000
)

// directory is in the lab's own memory, and ends with the lab.
const directory = "/dev/shm/demo"

// stage is where the demo plays.
type stage struct {
	network       *lab.Network
	mesh, foreign *lab.Authority
	client        *lab.Host
	member        *lab.Identity // what client can show
	stranger      *lab.Identity
	web, shop     *pod
	billing, cart *endpoint
	prober        *lab.Prober // speaks plaintext as long as mantlet runs
	moment        time.Time   // when the current act began
}

// pod is a host with a workload and a mantlet.
type pod struct {
	*lab.Host
	identity  *lab.Identity
	sidecar   *lab.Sidecar
	file      string // the override file
	log       *log
	workloads []*lab.Workload
}

// endpoint is a host with a service that speaks the mesh's TLS by itself.
type endpoint struct {
	*lab.Host
	*lab.Workload
}

// lay makes the stage: everything but a running mantlet.
func lay(binary string) *stage {
	s := &stage{network: must(lab.NewNetwork()), mesh: must(lab.NewAuthority("mesh")), foreign: must(lab.NewAuthority("mesh"))}
	s.client = must(s.network.Host("client"))
	s.member = must(s.mesh.Issue(lab.Leaf{DNSNames: []string{"client"}}))
	s.stranger = must(s.foreign.Issue(lab.Leaf{DNSNames: []string{"client"}}))
	s.web = s.pod("web", lab.Leaf{DNSNames: []string{"web"}}, binary, webConfig)
	s.shop = s.pod("shop", lab.Leaf{CommonName: "shop", DNSNames: []string{"*"}}, binary, shopBilling+shopCart)
	s.billing = s.endpoint("billing-svc")
	s.cart = s.endpoint("cart-svc")
	names := map[string][]netip.Addr{}
	for _, h := range []*lab.Host{s.client, s.web.Host, s.shop.Host, s.billing.Host, s.cart.Host} {
		names[h.Name] = h.Addrs()
	}
	check(lab.Hosts(names))
	return s
}

func (s *stage) pod(name string, leaf lab.Leaf, binary, config string) *pod {
	p := &pod{Host: must(s.network.Host(name)), identity: must(s.mesh.Issue(leaf)), log: &log{}}
	p.file = filepath.Join(directory, name, "mantlet.yaml")
	p.sidecar = must(p.Sidecar(directory, binary, config, "MANTLET_CONFIG="+p.file))
	p.sidecar.Log = p.log
	check(os.WriteFile(p.file, nil, 0o644))
	for _, port := range []uint16{tlsPort, plainPort, otherPort} {
		address := fmt.Sprintf(":%d", port)
		p.workloads = append(p.workloads,
			must(p.Serve(lab.Service{Address: address, Banner: greeting(name)})),
			must(p.Serve(lab.Service{Address: address, Network: "udp"})))
	}
	return p
}

func (s *stage) endpoint(name string) *endpoint {
	e := &endpoint{Host: must(s.network.Host(name))}
	config := must(s.mesh.Issue(lab.Leaf{DNSNames: []string{name}})).ServerConfig()
	e.Workload = must(e.Serve(lab.Service{Address: ":8080", Banner: greeting(name), TLS: config}))
	return e
}

// greeting is what a workload says first. It is HTTP to those who try by hand, with curl.
func greeting(name string) string {
	body := "hello from " + name + "\n"
	return fmt.Sprintf("HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
}

// startLimit bounds what takes a tenth of a second as a rule.
const startLimit = 10 * time.Second

// start runs mantlet in both pods, without certificates, and lets plaintext be spoken from then on.
func (s *stage) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	var targets []netip.AddrPort
	for _, p := range []*pod{s.web, s.shop} {
		if err := p.start(ctx); err != nil {
			return err
		}
		for _, addr := range p.Addrs() {
			targets = append(targets, netip.AddrPortFrom(addr, tlsPort), netip.AddrPortFrom(addr, otherPort))
		}
	}
	s.prober = s.client.Probe(targets...)
	return nil
}

// start returns when mantlet lives, which is when nothing comes in any more.
func (p *pod) start(ctx context.Context) error {
	if err := p.sidecar.Start(); err != nil {
		return err
	}
	err := lab.Until(ctx, func() bool { return p.sidecar.Ended() || p.sidecar.Command("probe", "live").Run() == nil })
	if p.sidecar.Ended() {
		return fmt.Errorf("mantlet ended in the pod %s: %w", p.Name, p.sidecar.Wait())
	}
	if err != nil {
		return fmt.Errorf("mantlet in the pod %s does not live: %w", p.Name, err)
	}
	return nil
}

// certify gives both pods their certificates and returns when they are ready.
func (s *stage) certify(ctx context.Context) error {
	if err := errors.Join(s.web.identity.Write(s.web.sidecar.TLSDirectory), s.shop.identity.Write(s.shop.sidecar.TLSDirectory)); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	return errors.Join(s.web.sidecar.Ready(ctx), s.shop.sidecar.Ready(ctx))
}

// edit writes web's override file, as an editor would: a new file in the old one's place.
func (s *stage) edit(text string) func(context.Context) error {
	return func(context.Context) error { return renameio.WriteFile(s.web.file, []byte(text), 0o644) }
}

// explain returns how mantlet in the pod web explains the last claim's refusal in its log, and its status.
func (s *stage) explain(ctx context.Context) (string, error) {
	const code = "san_not_allowed"
	refuse := s.into(otherPort, new(s.member.Certificate()), verdict)
	var line string
	if err := lab.Until(ctx, func() bool { // mantlet leaves lines out where there are many: the plaintext makes many
		if line = s.web.log.last(code); line == "" {
			refuse(ctx, ipv4)
		}
		return line != ""
	}); err != nil {
		return "", fmt.Errorf("mantlet's log has no line with %s: %w", code, err)
	}
	status, err := s.web.sidecar.Command("status").Output()
	return "\nThe pod's log\n" + line + "\n\n$ mantlet status\n" + string(status), err
}

// replaceCart puts an impostor in the place of cart-svc, who takes all that it is given.
func (s *stage) replaceCart(context.Context) error {
	identity, err := s.foreign.Issue(lab.Leaf{DNSNames: []string{s.cart.Name}})
	if err != nil {
		return err
	}
	config := identity.ServerConfig()
	config.ClientAuth, config.ClientCAs = 0, nil
	if err := s.cart.Close(); err != nil {
		return err
	}
	s.cart.Workload, err = s.cart.Serve(lab.Service{Address: ":8080", Banner: greeting("an impostor"), TLS: config})
	return err
}

// killEnvoy returns when web's Envoy is dead.
func (s *stage) killEnvoy(context.Context) error {
	envoys, err := s.web.sidecar.Envoys()
	if err != nil || len(envoys) == 0 {
		return errors.Join(errors.New("there is no Envoy to kill"), err)
	}
	for _, pid := range envoys {
		if err := kill(pid); err != nil {
			return fmt.Errorf("killing Envoy %d: %w", pid, err)
		}
	}
	return nil
}

// kill returns when the process, which is another's child, is dead.
func kill(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		return err
	}
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(startLimit.Milliseconds()))
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// keepDown kills web's Envoy while nobody can bring it back.
func (s *stage) keepDown(ctx context.Context) error {
	if err := s.web.sidecar.Signal(unix.SIGSTOP); err != nil {
		return err
	}
	return s.killEnvoy(ctx)
}

func (s *stage) letGo(context.Context) error { return s.web.sidecar.Signal(unix.SIGCONT) }

// plaintext reports what became of the plaintext that was spoken since start.
func (s *stage) plaintext() (ok bool, what string) {
	ctx, cancel := context.WithTimeout(context.Background(), startLimit)
	defer cancel()
	err := s.prober.Await(ctx, 3) // each way of speaking once more
	total, leaked := s.prober.Stop().Total(), 0
	for _, w := range slices.Concat(s.web.workloads, s.shop.workloads) {
		leaked += w.Leaked()
	}
	what = fmt.Sprintf("%d plaintext attempts, %d bytes reached the workload", total.Attempts, leaked)
	if total.Answered > 0 {
		what += fmt.Sprintf(", %d attempts were answered", total.Answered)
	}
	if err != nil {
		what += ", the last ones took too long"
	}
	return err == nil && total.Attempts > 0 && total.Answered == 0 && leaked == 0, what
}

const hint = `
This shell is in the pod web. Behind "client" or "shop" a command runs there; "exit" ends the demo.
curl trusts the mesh's CA here. What is refused makes it complain, in words that vary.

  client curl https://web:8080                                                              answered
  client curl https://web:9000                                                              refused
  client curl -E client/certChain.pem --key client/key.pem https://web:9000                 answered
  client curl -E stranger/certChain.pem --key stranger/key.pem https://web:9000             refused
  client curl http://web:9000                                                               refused
  client curl http://web:7890                                                               answered
  client openssl s_client -CAfile client/mesh-ca.pem -showcerts -connect web:8080           the chain
  shop curl http://127.137.0.1:8081                                                         answered
  shop curl http://127.137.0.2:8081                                                         impostor
  mantlet status                                                                            one screen
  echo 'ingress: [{port: 9000, mode: tls}]' >web/mantlet.yaml                               9000 asks for no certificate
  echo 'ingress: [{port: 9000, mode: tsl}]' >web/mantlet.yaml                               rejected: see mantlet status
  nft list table inet mantlet
`

// shell is for trying by hand. It is in the pod web, with commands that reach the other hosts.
func (s *stage) shell(t *transcript) error {
	bin := filepath.Join(directory, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		return err
	}
	for name, h := range map[string]*lab.Host{"client": s.client, "shop": s.shop.Host} {
		if err := h.Do(func() error { return enterable(filepath.Join(bin, name)) }); err != nil {
			return err
		}
	}
	for name, identity := range map[string]*lab.Identity{"client": s.member, "stranger": s.stranger} {
		dir := filepath.Join(directory, name)
		if err := errors.Join(os.Mkdir(dir, 0o755), identity.Write(dir)); err != nil {
			return err
		}
	}
	if err := os.Symlink(s.web.sidecar.Binary, filepath.Join(bin, "mantlet")); err != nil {
		return err
	}
	t.say("%s", hint)
	return s.interact(bin)
}

// enterable writes a program that runs a command in the network namespace that this is called in.
func enterable(path string) error {
	namespace, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0) // never closed
	if err != nil {
		return err
	}
	program := fmt.Sprintf("#!/bin/sh\nexec nsenter --net=/proc/%d/fd/%d -- \"$@\"\n", os.Getpid(), namespace)
	return os.WriteFile(path, []byte(program), 0o755)
}

// interact runs the shell to its end.
func (s *stage) interact(bin string) error {
	name, args := "bash", []string{"--norc", "--noprofile"}
	if _, err := exec.LookPath(name); err != nil {
		name, args = "sh", nil
	}
	cmd := s.web.Command(name, args...)
	cmd.Stdin, cmd.Dir = os.Stdin, directory
	cmd.Env = append(s.web.sidecar.Command().Env, "PS1=web# ", "HISTFILE=",
		"CURL_CA_BUNDLE="+filepath.Join(directory, "client", lab.CAFile),
		"PATH="+bin+":"+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if term.IsTerminal(int(os.Stdin.Fd())) {
		cmd.SysProcAttr = &syscall.SysProcAttr{Foreground: true, Ctty: int(os.Stdin.Fd())}
	}
	if err := s.web.Start(cmd); err != nil {
		return err
	}
	_ = cmd.Wait() // its status is that of the last command tried
	return nil
}

// log is what mantlet wrote.
type log struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *log) Write(text []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(text)
}

// last returns the last line that has the text, or "".
func (l *log) last(text string) (found string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.text.String()) {
		if strings.Contains(line, text) {
			found = strings.TrimSpace(line)
		}
	}
	return found
}

// tail returns the last n lines.
func (l *log) tail(n int) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	lines := strings.Split(strings.TrimSpace(l.text.String()), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
