package envoy

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"mantlet/internal/sandbox"
)

// BenchmarkHotRestart takes turns between a hot restart and bare Envoy: validation, then from exec to LIVE.
func BenchmarkHotRestart(b *testing.B) {
	const mostRatio = 1.5
	s := newStage(b)
	s.start()
	admin := filepath.Join(s.RuntimeDirectory, "test-admin.sock")
	bootstrap := proto.CloneOf(s.state.Bootstrap)
	bootstrap.Admin.Address.GetPipe().Path = admin
	config := filepath.Join(s.RuntimeDirectory, "test-bootstrap.json")
	if err := s.write(config, bootstrap); err != nil {
		b.Fatal(err)
	}
	var ours, bare []time.Duration
	for b.Loop() {
		for range 20 {
			began := time.Now()
			if _, err := s.Start(b.Context(), s.state, s.settings); err != nil {
				b.Fatal(err)
			}
			ours = append(ours, time.Since(began))

			began = time.Now()
			if text, err := exec.Command(s.Path, "--mode", "validate", "--config-path", config).CombinedOutput(); err != nil {
				b.Fatalf("%v: %s", err, text)
			}
			envoy := exec.Command(s.Path, "--config-path", config, "--disable-hot-restart",
				"--concurrency", strconv.Itoa(s.settings.Concurrency), "--log-level", "warning")
			// As the same user: another one can't listen beside the Envoys that serve.
			if err := s.spawner.do(func() error {
				capabilities, err := sandbox.AmbientCapabilities(ports(listenersOf(bootstrap)))
				envoy.SysProcAttr = &syscall.SysProcAttr{AmbientCaps: capabilities}
				return errors.Join(err, envoy.Start())
			}); err != nil {
				b.Fatal(err)
			}
			until(b, "Envoy is live", func() bool {
				info, err := newAdmin(admin).info(b.Context())
				return err == nil && info.State == "LIVE"
			})
			bare = append(bare, time.Since(began))
			_ = s.spawner.do(envoy.Process.Kill)
			_ = envoy.Wait()
			if err := os.Remove(admin); err != nil {
				b.Fatal(err)
			}
		}
	}
	median := func(all []time.Duration) float64 { return float64(slices.Sorted(slices.Values(all))[len(all)/2]) }
	ratio := median(ours) / median(bare)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(median(ours)/float64(time.Millisecond), "restart-ms")
	b.ReportMetric(median(bare)/float64(time.Millisecond), "bare-ms")
	b.ReportMetric(ratio, "restart/bare")
	if ratio > mostRatio {
		b.Errorf("a hot restart takes %.2f times what bare Envoy does; %.1f at most", ratio, mostRatio)
	}
}

// BenchmarkHotRestartsUnderLoad restarts a thousand times, one after the other.
func BenchmarkHotRestartsUnderLoad(b *testing.B) {
	s := newStage(b)
	s.start()
	load := s.load(4)
	var took []time.Duration
	for b.Loop() {
		for range 1000 {
			began := time.Now()
			if _, err := s.Start(b.Context(), s.state, s.settings); err != nil {
				b.Fatal(err)
			}
			took = append(took, time.Since(began))
			load.settle()
		}
	}
	done, failures := load.end()
	slices.Sort(took)
	b.ReportMetric(0, "ns/op")
	for _, p := range []int{50, 90, 99} {
		b.ReportMetric(float64(took[len(took)*p/100])/float64(time.Millisecond), fmt.Sprintf("restart-p%d-ms", p))
	}
	b.ReportMetric(float64(len(took)), "restarts")
	b.ReportMetric(float64(done), "connections")
	b.ReportMetric(float64(len(failures)), "failed")
	if len(failures) > 0 {
		b.Errorf("of %d connections %d failed, as %v", done, len(failures), failures[0])
	}
}

// load is clients that connect without pause.
type load struct {
	t       testing.TB
	stop    chan struct{}
	once    sync.Once
	clients sync.WaitGroup

	mu       sync.Mutex
	begun    []int // by client
	done     int
	failures []error
}

func (s *stage) load(clients int) *load {
	l := &load{t: s.t, stop: make(chan struct{}), begun: make([]int, clients)}
	s.t.Cleanup(func() { l.end() })
	for i := range clients {
		l.clients.Go(func() {
			for {
				select {
				case <-l.stop:
					return
				default:
				}
				l.mu.Lock()
				l.begun[i]++
				l.mu.Unlock()
				err := s.exchange()
				l.mu.Lock()
				l.done++
				if err != nil {
					l.failures = append(l.failures, err)
				}
				l.mu.Unlock()
			}
		})
	}
	return l
}

// exchange is one connection.
func (s *stage) exchange() error {
	conn, err := net.Dial("tcp", service)
	if err != nil {
		return err
	}
	defer conn.Close()
	return talk(conn)
}

// settle returns when all connections that are open are done.
func (l *load) settle() {
	l.t.Helper()
	l.mu.Lock()
	begun := slices.Clone(l.begun)
	l.mu.Unlock()
	until(l.t, "the connections are done", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		for i := range begun {
			if l.begun[i] == begun[i] {
				return false
			}
		}
		return true
	})
}

// end returns how many connections there were, and the failures among them.
func (l *load) end() (int, []error) {
	l.once.Do(func() { close(l.stop) })
	l.clients.Wait()
	return l.done, l.failures
}
