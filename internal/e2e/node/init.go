package node

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"embed"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// home is the directory of all that the node's components read and write.
const home = "/run/node"

//go:embed config
var config embed.FS

// initialize makes the namespaces a node, starts its components and starts again what ends. It is the node's first process, and
// so reaps as well.
func initialize() error {
	if err := mount(map[string]string{"bin": os.Args[1], "runc": os.Args[2], "log": os.Args[3]}); err != nil {
		return err
	}
	for _, variable := range environment() {
		name, value, _ := strings.Cut(variable, "=")
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	if err := errors.Join(unix.Sethostname([]byte("node")), connect(), configure()); err != nil {
		return err
	}
	file, err := os.Create(home + "/log/init.log")
	if err != nil {
		return err
	}
	s := supervisor{log: slog.New(slog.NewTextHandler(file, nil)), running: map[int]component{}}
	if err := s.start(first...); err != nil {
		return err
	}
	go func() {
		for !apiServerReady() {
			time.Sleep(100 * time.Millisecond)
		}
		if err := s.start(others...); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}()
	return s.supervise()
}

// configure writes the components' configuration.
func configure() error {
	files, err := fs.Sub(config, "config")
	if err != nil {
		return err
	}
	if err := os.CopyFS(home, files); err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
	return errors.Join(
		os.WriteFile(home+"/key.pem", text, 0o600),
		os.Mkdir(home+"/cni", 0o755),
		os.Rename(home+"/pods.conflist", home+"/cni/pods.conflist"),
		os.Mkdir(home+"/tmp", 0o700),
	)
}

func apiServerReady() bool {
	client := http.Client{Timeout: time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true,
	}}
	request, err := http.NewRequest(http.MethodGet, "https://127.0.0.1:6443/readyz", nil)
	if err != nil {
		return false
	}
	request.Header.Set("Authorization", "Bearer admin")
	response, err := client.Do(request)
	if err != nil {
		return false
	}
	defer response.Body.Close()
	return response.StatusCode == http.StatusOK
}

// supervisor starts components, and starts each again that ends.
type supervisor struct {
	log     *slog.Logger
	mu      sync.Mutex
	running map[int]component // by process id
}

func (s *supervisor) start(components ...component) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range components {
		log, err := os.OpenFile(filepath.Join(home, "log", c.name+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
		if err != nil {
			return err
		}
		cmd := exec.Command(c.command[0], c.command[1:]...)
		cmd.Stdout, cmd.Stderr = log, log
		if err := errors.Join(cmd.Start(), log.Close()); err != nil {
			return err
		}
		s.running[cmd.Process.Pid] = c
		err = os.WriteFile(filepath.Join(home, c.name+".pid"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o644)
		if err := errors.Join(err, cmd.Process.Release()); err != nil { // supervise waits for it
			return err
		}
	}
	return nil
}

// supervise returns only if something is badly wrong.
func (s *supervisor) supervise() error {
	for {
		var status syscall.WaitStatus
		id, err := syscall.Wait4(-1, &status, 0, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("waiting for the node's processes: %w", err)
		}
		s.mu.Lock()
		c, ours := s.running[id]
		delete(s.running, id)
		s.mu.Unlock()
		if !ours {
			continue // an orphan
		}
		s.log.Info("component ended", "component", c.name, "exit_status", status.ExitStatus(), "signal", status.Signal())
		time.Sleep(time.Second)
		if err := s.start(c); err != nil {
			return err
		}
	}
}
