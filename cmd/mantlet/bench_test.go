package main

import (
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"mantlet/reconcile"
	"mantlet/render"
)

// What is asked of mantlet, beside what it costs now.
const (
	mostRatio  = 1.5 // of the time that Envoy alone takes until it is live
	mostMemory = 25  // MiB resident
	mostBinary = 20  // MiB, stripped
)

// BenchmarkStart takes turns between mantlet, from exec to ready, and Envoy alone, started by hand with the bootstrap
// that mantlet wrote, from exec to LIVE.
func BenchmarkStart(b *testing.B) {
	binary := filepath.Join(b.TempDir(), "mantlet")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, text)
	}
	info, err := os.Stat(binary)
	check(b, err)
	p := newPod(b, web, "EDG_EGRESS_PROXY_CONFIG=billing#127.137.0.1:8081#192.0.2.1:8080##cart#127.137.0.2:8081#[2001:db8::1]:8080")
	p.sidecar.Binary = binary
	p.sidecar.RuntimeDirectory, err = os.MkdirTemp("/dev/shm", "run") // memory-backed, as in a pod
	p.must(err)
	b.Cleanup(func() { p.check(os.RemoveAll(p.sidecar.RuntimeDirectory)) })
	directory := filepath.Join(p.sidecar.RuntimeDirectory, "envoy")
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	saved := filepath.Join(b.TempDir(), "bootstrap.json")
	admin := filepath.Join(directory, "admin-0.sock")

	const rounds = 20
	var ours, envoys []time.Duration
	var memory []int
	for b.Loop() {
		for range rounds {
			began := time.Now()
			p.must(p.sidecar.Start())
			p.answers(filepath.Join(p.sidecar.RuntimeDirectory, "mantlet.sock"), "/readyz", "ok")
			ours = append(ours, time.Since(began))
			memory = append(memory, resident(b, p.sidecar.PID()))
			// mantlet takes these with it: the one holds the paths of the others, which hold the key.
			files := map[string]string{"bootstrap-0.json": saved}
			for _, secret := range []string{render.IdentitySecret, render.MeshCASecret} {
				files[render.SecretFile(secret)] = filepath.Join(directory, render.SecretFile(secret))
			}
			texts := map[string][]byte{}
			for name := range files {
				texts[name], err = os.ReadFile(filepath.Join(directory, name))
				p.must(err)
			}
			p.must(p.sidecar.Stop())
			for name, file := range files {
				p.must(os.WriteFile(file, texts[name], 0o600))
			}

			envoy := p.Command(os.Getenv("MANTLET_ENVOY_PATH"), "--config-path", saved, "--concurrency", "2", "--log-level", "warning")
			envoy.Stdout, envoy.Stderr = nil, nil
			began = time.Now()
			p.must(p.Start(envoy))
			p.answers(admin, "/server_info", `"state": "LIVE"`)
			envoys = append(envoys, time.Since(began))
			p.must(envoy.Process.Signal(syscall.SIGTERM))
			_ = envoy.Wait()
		}
	}
	ratio := float64(median(ours)) / float64(median(envoys))
	mib := float64(median(memory)) / (1 << 20)
	size := float64(info.Size()) / (1 << 20)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(median(ours).Microseconds())/1000, "mantlet-ms")
	b.ReportMetric(float64(median(envoys).Microseconds())/1000, "envoy-ms")
	b.ReportMetric(ratio, "mantlet/envoy")
	b.ReportMetric(mib, "resident-MiB")
	b.ReportMetric(size, "binary-MiB")
	if ratio > mostRatio || mib > mostMemory || size > mostBinary {
		b.Errorf("mantlet is ready after %v, %.2f times the %v that Envoy takes (%v at most), has %.1f MiB resident (%d) and a binary of %.1f MiB (%d)",
			median(ours), ratio, median(envoys), mostRatio, mib, mostMemory, size, mostBinary)
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func median[T ~int | ~int64](all []T) T {
	all = slices.Sorted(slices.Values(all))
	return all[len(all)/2]
}

// answers waits until an HTTP server at a unix socket answers 200 with this text.
func (p *pod) answers(socket, path, text string) {
	p.t.Helper()
	client := reconcile.OverSocket(socket)
	p.await(path+" says "+text, func() bool {
		response, err := client.Get("http://unix" + path)
		if err != nil {
			return false
		}
		defer response.Body.Close()
		body := make([]byte, 64<<10)
		n, _ := response.Body.Read(body)
		return response.StatusCode == http.StatusOK && strings.Contains(string(body[:n]), text)
	})
}

// resident returns how many bytes of a process are in memory.
func resident(t testing.TB, pid int) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	check(t, err)
	_, rest, _ := strings.Cut(string(text), "VmRSS:")
	kib, err := strconv.Atoi(strings.Fields(rest)[0])
	check(t, err)
	return kib << 10
}
