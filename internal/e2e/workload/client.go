package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"mantlet/internal/e2e/pki"
)

// role is how a client speaks.
type role string

const (
	plaintext role = "plaintext"
	anonymous role = "anonymous" // TLS without a client certificate
	stranger  role = "stranger"  // TLS with a certificate of another mesh
	member    role = "member"    // mutual TLS with the pod's own certificate; verifies the server to the mesh CA
)

// client returns one that makes a connection for each request.
func (r role) client() (*http.Client, error) {
	transport := &http.Transport{DisableKeepAlives: true}
	client := &http.Client{Transport: transport, Timeout: time.Minute}
	var err error
	switch r {
	case plaintext:
	case anonymous:
		transport.TLSClientConfig = &tls.Config{InsecureSkipVerify: true}
	case stranger:
		transport.TLSClientConfig, err = strangers()
	case member:
		transport.TLSClientConfig, err = mutual("/tls-config")
	default:
		err = fmt.Errorf("no such role: %q", r)
	}
	return client, err
}

// strangers returns the TLS of another mesh's member, who takes any server.
func strangers() (*tls.Config, error) {
	directory, err := os.MkdirTemp("/", "")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(directory) }()
	if err := errors.Join(pki.NewAuthority(directory), pki.Issue(directory, directory, "stranger")); err != nil {
		return nil, err
	}
	config, err := mutual(directory)
	if err == nil {
		config.VerifyConnection = nil
	}
	return config, err
}

func mutual(directory string) (*tls.Config, error) {
	own, err := tls.LoadX509KeyPair(directory+"/certChain.pem", directory+"/key.pem")
	if err != nil {
		return nil, err
	}
	mesh, err := os.ReadFile(directory + "/mesh-ca.pem")
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(mesh)
	return &tls.Config{
		// Present it to whoever asks, also to a server that names other CAs.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &own, nil },
		InsecureSkipVerify:   true, // crypto/tls verifies with a name or not at all
		VerifyConnection: func(state tls.ConnectionState) error {
			intermediates := x509.NewCertPool()
			for _, certificate := range state.PeerCertificates[1:] {
				intermediates.AddCert(certificate)
			}
			_, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates})
			return err
		},
	}, nil
}

// get ROLE URL prints the answer.
func get(as role, url string) error {
	body, err := request(as, url)
	if err != nil {
		return err
	}
	fmt.Println(body)
	return nil
}

// report is what load and intrude print once their standard input ends. The test has the same type.
type report struct {
	Tries    int            // that are over
	Answers  map[string]int // by the first word: who answered
	Failures map[string]int // by the last words of the error
	Slowest  time.Duration  // try that was answered
	mu       sync.Mutex
}

func (r *report) add(answer string, err error, took time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Tries++
	if err != nil {
		text := err.Error()
		r.Failures[text[strings.LastIndex(text, ": ")+1:]]++ // without addresses
		return
	}
	who, _, _ := strings.Cut(answer, " ")
	r.Answers[who]++
	r.Slowest = max(r.Slowest, took)
}

// repeat tries, by some at a time and with a pause between tries, until standard input ends.
func repeat(workers int, pause time.Duration, try func() (string, error)) error {
	r := &report{Answers: map[string]int{}, Failures: map[string]int{}}
	ctx, stop := context.WithCancel(context.Background())
	var all sync.WaitGroup
	for range workers {
		all.Go(func() {
			for first := true; first || ctx.Err() == nil; first = false {
				start := time.Now()
				answer, err := try()
				r.add(answer, err, time.Since(start))
				time.Sleep(pause)
			}
		})
	}
	_, err := io.Copy(io.Discard, os.Stdin)
	stop()
	all.Wait()
	return errors.Join(err, json.NewEncoder(os.Stdout).Encode(r))
}

// load ROLE URL requests again and again.
func load(as role, url string) error {
	return repeat(4, 20*time.Millisecond, func() (string, error) { return request(as, url) })
}

// flood ADDRESS:PORT opens thousands of connections of mutual TLS, and keeps them open until standard input ends.
func flood(address string) error {
	config, err := mutual("/tls-config")
	if err != nil {
		return err
	}
	conns := make(chan net.Conn, 4000)
	for range 8 {
		go func() {
			for {
				if conn, err := tls.Dial("tcp", address, config); err == nil {
					conns <- conn // waits once there are enough
				}
			}
		}()
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// intrude ADDRESS:PORT is the adversary: it speaks plaintext HTTP to the workload, over and over, and counts who answers in it.
func intrude(address string) error {
	return repeat(4, time.Millisecond, func() (string, error) {
		conn, err := net.DialTimeout("tcp", address, time.Second)
		if err != nil {
			return "", err
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(time.Second)); err != nil {
			return "", err
		}
		if _, err := io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n"); err != nil {
			return "", err
		}
		answer, _ := io.ReadAll(conn)
		_, body, ok := strings.Cut(string(answer), "\r\n\r\n")
		if !ok {
			return "", errors.New("no answer in plaintext")
		}
		return body, nil
	})
}
