package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"mantlet/internal/lab"
	"mantlet/internal/rundir"
	"mantlet/internal/status"
	"mantlet/reconcile/nft"
	"mantlet/render"
)

// What is asked of mantlet, beside what it costs now.
const (
	mostRatio  = 1.5 // of the time that Envoy alone takes until it is live
	mostMemory = 25  // MiB resident
	mostBinary = 20  // MiB, stripped
)

// BenchmarkStart takes turns between mantlet, from exec to ready, and Envoy alone, started by hand with the bootstrap
// that mantlet wrote, from exec to LIVE. It has nothing of the trial of certificates, which counts as mantlet's.
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
	p.inMemory()
	directory := filepath.Join(p.sidecar.RuntimeDirectory, "envoy")
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	saved := filepath.Join(b.TempDir(), "bootstrap.json")
	admin := filepath.Join(directory, "admin-0.sock")

	const rounds = 50
	var ours, envoys []time.Duration
	var memory []int
	for b.Loop() {
		for range rounds {
			before := p.log.count(inForce)
			p.must(p.sidecar.Start())
			p.await(inForce, func() bool { return p.log.count(inForce) > before }) // asking all the while would keep it busy
			p.answers(filepath.Join(p.sidecar.RuntimeDirectory, "mantlet.sock"), "/readyz", "ok")
			ours = append(ours, time.Since(p.sidecar.Executed()))
			memory = append(memory, resident(b, p.sidecar.PID()))
			// mantlet takes these with it: the one holds the paths of the others, which hold the key.
			files := map[string]string{"bootstrap-0.json": saved}
			for _, secret := range []string{render.IdentitySecret, render.MeshCASecret} {
				files[rundir.SecretFile(secret)] = rundir.Envoy(directory).Secret(secret)
			}
			texts := map[string][]byte{}
			for name := range files {
				texts[name], err = os.ReadFile(filepath.Join(directory, name))
				p.must(err)
			}
			p.must(p.sidecar.Stop())
			p.nft("delete", "table", "inet", "mantlet") // the next one finds a new pod
			texts["bootstrap-0.json"] = withoutTrial(b, texts["bootstrap-0.json"])
			for name, file := range files {
				p.must(os.WriteFile(file, texts[name], 0o640)) // as mantlet does: the next one keeps the mode of what is there
			}

			envoy := p.Command(os.Getenv("MANTLET_ENVOY_PATH"), "--config-path", saved, "--concurrency", "2", "--log-level", "warning")
			envoy.Stdout, envoy.Stderr = nil, nil
			began := time.Now()
			p.must(p.Start(envoy))
			p.answers(admin, "/server_info", `"state": "LIVE"`)
			envoys = append(envoys, time.Since(began))
			p.must(envoy.Process.Signal(syscall.SIGTERM))
			_ = envoy.Wait()
		}
	}
	// Round by round: the machine is faster and slower by turns, and the medians of both may be of different turns.
	var ratios []float64
	for i := range ours {
		ratios = append(ratios, float64(ours[i])/float64(envoys[i]))
	}
	ratio := median(ratios)
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

// withoutTrial returns a bootstrap without what mantlet tries certificates in.
func withoutTrial(t testing.TB, text []byte) []byte {
	t.Helper()
	var b map[string]any
	check(t, json.Unmarshal(text, &b))
	resources, ok := b["static_resources"].(map[string]any)
	if !ok {
		t.Fatal("the bootstrap has no resources")
	}
	for _, kind := range []string{"listeners", "clusters"} {
		all, _ := resources[kind].([]any)
		resources[kind] = slices.DeleteFunc(all, func(one any) bool {
			named, _ := one.(map[string]any)
			name, _ := named["name"].(string)
			return strings.HasPrefix(name, "trial-")
		})
	}
	text, err := json.Marshal(b)
	check(t, err)
	return text
}

// inMemory makes the runtime directory memory-backed, as in a pod.
func (p *pod) inMemory() {
	p.t.Helper()
	directory, err := os.MkdirTemp("/dev/shm", "run")
	p.must(err)
	p.t.Cleanup(func() { p.check(os.RemoveAll(directory)) })
	p.sidecar.RuntimeDirectory = directory
}

// reloaded runs a pod with an override file, quietly: nobody comes.
func reloaded(b *testing.B) (*pod, *mounted) {
	p := newPod(b, web)
	p.inMemory()
	m := p.override("{}")
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.ready()
	return p, m
}

// commit is a transaction that changed the table, and whose it was.
type commit struct {
	at time.Time
	by string
}

// commits returns what the kernel tells of changes of the pod's table.
func (p *pod) commits() <-chan commit {
	p.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var table *nft.Table
	var notes <-chan string
	p.must(p.Do(func() (err error) {
		if table, err = nft.Open(); err == nil {
			notes = table.Watch(ctx)
		}
		return err
	}))
	p.t.Cleanup(func() { cancel(); p.check(table.Close()) })
	told := make(chan commit, 16)
	go func() {
		for {
			select {
			case by := <-notes:
				if by != "" {
					told <- commit{time.Now(), by}
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return told
}

// last waits for the last transaction of a change: one may prepare chains that are new before another leads to them.
func last(commits <-chan commit) time.Time {
	at := (<-commits).at
	const quiet = 200 * time.Millisecond
	for {
		select {
		case one := <-commits:
			at = one.at
		case <-time.After(quiet):
			return at
		}
	}
}

// mostReload is what a change of modes may take beyond debounce, which is how long the file must be quiet to be read.
const (
	mostReload = 20 * time.Millisecond
	debounce   = 50 * time.Millisecond
)

// BenchmarkReload measures from a change of the override file that concerns modes alone until its rules are in force.
func BenchmarkReload(b *testing.B) {
	p, m := reloaded(b)
	commits := p.commits()
	var took []time.Duration
	for b.Loop() {
		for i := range 100 {
			began := time.Now()
			m.write(fmt.Sprintf("ingress: [{port: %d, mode: tls}]", 9000+i))
			took = append(took, last(commits).Sub(began)-debounce)
		}
	}
	percentiles(b, "in-force", took)
	if median(took) > mostReload {
		b.Errorf("a change of modes is in force %v after the debounce; %v at most", median(took), mostReload)
	}
}

// BenchmarkReloadWithHotRestart takes turns between a change of the override file that needs a new Envoy, from the end of the
// debounce until its rules are in force, and bare Envoy with the same bootstrap: validation, then from exec to LIVE.
func BenchmarkReloadWithHotRestart(b *testing.B) {
	p, m := reloaded(b)
	commits := p.commits()
	file := func(name string) string { return filepath.Join(p.sidecar.RuntimeDirectory, "envoy", name) }
	var ours, bare []time.Duration
	for b.Loop() {
		for range 20 {
			began := time.Now()
			m.write(fmt.Sprintf("ingress: [{port: 9000, mode: mtls, allow: [client-%d]}]", len(ours))) // tightens, so it does not wait
			ours = append(ours, last(commits).Sub(began)-debounce)
			epoch := len(ours)
			text, err := os.ReadFile(file(fmt.Sprintf("bootstrap-%d.json", epoch)))
			p.must(err)
			text = bytes.ReplaceAll(text, fmt.Appendf(nil, "admin-%d.sock", epoch), []byte("bare.sock"))
			text = bytes.ReplaceAll(text, []byte("1500"), []byte("2500")) // listeners are shared by processes of one user only
			p.must(os.WriteFile(file("bare.json"), text, 0o600))
			bare = append(bare, p.bare(file("bare.json"), file("bare.sock")))
		}
	}
	ratio := float64(median(ours)) / float64(median(bare))
	percentiles(b, "in-force", ours)
	percentiles(b, "bare", bare)
	b.ReportMetric(ratio, "in-force/bare")
	if ratio > mostRatio {
		b.Errorf("a change that needs a new Envoy takes %v beyond the debounce, %.2f times the %v of bare Envoy; %v at most",
			median(ours), ratio, median(bare), mostRatio)
	}
}

// bare is how long Envoy by itself takes to validate a bootstrap and to get live with it.
func (p *pod) bare(config, admin string) time.Duration {
	p.t.Helper()
	path := os.Getenv("MANTLET_ENVOY_PATH")
	began := time.Now()
	_, err := p.Run(path, "--mode", "validate", "--config-path", config)
	p.must(err)
	envoy := p.Command(path, "--config-path", config, "--disable-hot-restart", "--concurrency", "2", "--log-level", "warning")
	envoy.Stdout, envoy.Stderr = nil, nil
	p.must(p.Start(envoy))
	p.answers(admin, "/server_info", `"state": "LIVE"`)
	took := time.Since(began)
	p.must(envoy.Process.Kill())
	_ = envoy.Wait()
	p.must(os.Remove(admin))
	return took
}

// BenchmarkRotation measures from the last file of a new set of certificates, less the debounce, until a handshake shows it.
func BenchmarkRotation(b *testing.B) {
	p, _ := reloaded(b)
	config := &tls.Config{InsecureSkipVerify: true}
	var took []time.Duration
	for b.Loop() {
		for range 50 {
			next := p.issue("pod")
			p.must(next.Write(p.sidecar.TLSDirectory))
			began := time.Now()
			for shown := false; !shown; {
				conn, err := p.handshake(netip.AddrPortFrom(p.IPv4, tlsPort), config)
				p.must(err)
				shown = conn.ConnectionState().PeerCertificates[0].Equal(next.Leaf)
				_ = conn.Close()
			}
			took = append(took, time.Since(began)-debounce)
		}
	}
	percentiles(b, "shown", took)
}

// BenchmarkRepair measures from the kernel's note of a foreign change to the rules until the kernel's note that they are put
// back.
func BenchmarkRepair(b *testing.B) {
	const most = 50 * time.Millisecond
	p := newPod(b, web)
	_, err := p.Run("nft", "add", "table", "inet", "mantlet") // one that is there stays without an owner
	p.must(err)
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	p.run()
	p.ready()
	commits := p.commits()
	var took []time.Duration
	for b.Loop() {
		for i := range 100 {
			change := tamperings()[i%len(tamperings())].text
			if strings.Contains(change, "%s") {
				continue
			}
			_, err := p.Run("nft", change)
			p.must(err)
			theirs, ours := <-commits, <-commits
			if theirs.by != "nft" || ours.by == "nft" {
				b.Fatalf("%s: changes by %q and %q", change, theirs.by, ours.by)
			}
			took = append(took, ours.at.Sub(theirs.at))
		}
	}
	percentiles(b, "repair", took)
	if median(took) > most {
		b.Errorf("rules are put back after %v; %v at most", median(took), most)
	}
}

// BenchmarkIdle measures what mantlet and its Envoy take of one core while nobody comes.
func BenchmarkIdle(b *testing.B) {
	const most = 0.2 // percent, mantlet's
	p, _ := reloaded(b)
	envoy := p.envoy()
	tick := time.NewTicker(30 * time.Second)
	defer tick.Stop()
	var ours, envoys float64
	for b.Loop() {
		began := time.Now()
		before, envoyBefore := processor(b, p.sidecar.PID()), processor(b, envoy)
		<-tick.C
		<-tick.C
		percent := func(used time.Duration) float64 { return 100 * float64(used) / float64(time.Since(began)) }
		ours, envoys = percent(processor(b, p.sidecar.PID())-before), percent(processor(b, envoy)-envoyBefore)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(ours, "mantlet-%")
	b.ReportMetric(envoys, "envoy-%")
	if ours > most {
		b.Errorf("an idle mantlet takes %.2f %% of a core; %v %% at most", ours, most)
	}
}

// BenchmarkNames measures what a thousand egress entries with names of their own take: until mantlet is ready and Envoy has all
// addresses, and of one core while nothing changes.
func BenchmarkNames(b *testing.B) {
	const count = 1000
	p := newPod(b, web)
	p.inMemory()
	names := map[string]lab.Answer{}
	var config strings.Builder
	config.WriteString("egress:\n")
	for i := range count {
		name := fmt.Sprintf("svc-%d.shop.svc.cluster.local", i)
		names[name] = lab.Answer{Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, byte(i / 250), byte(i%250 + 1)})}, TTL: 5}
		fmt.Fprintf(&config, "  - {listen: \"127.1.%d.%d:80\", upstream: \"svc-%d:8080\"}\n", i/250, i%250+1, i)
	}
	p.must(p.ResolvConf(clusterDNS))
	p.zone(nil).Set(names)
	p.override(config.String())
	p.must(p.identity.Write(p.sidecar.TLSDirectory))
	began := time.Now()
	p.run()
	p.ready()
	ready := time.Since(began)
	p.resolved()
	resolved := time.Since(began)
	started := processor(b, p.sidecar.PID())
	envoy := p.envoy()
	tick := time.NewTicker(30 * time.Second)
	defer tick.Stop()
	var ours, envoys float64
	for b.Loop() {
		began, before, envoyBefore := time.Now(), processor(b, p.sidecar.PID()), processor(b, envoy)
		<-tick.C
		percent := func(used time.Duration) float64 { return 100 * float64(used) / float64(time.Since(began)) }
		ours, envoys = percent(processor(b, p.sidecar.PID())-before), percent(processor(b, envoy)-envoyBefore)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(ready.Seconds(), "ready-s")
	b.ReportMetric(resolved.Seconds(), "resolved-s")
	b.ReportMetric(started.Seconds(), "start-cpu-s")
	b.ReportMetric(ours, "mantlet-%")
	b.ReportMetric(envoys, "envoy-%")
	b.ReportMetric(float64(resident(b, p.sidecar.PID()))/(1<<20), "resident-MiB")
}

// processor returns how long a process ran on any core up to now, in the steps of 10 ms that the kernel tells.
func processor(t testing.TB, pid int) time.Duration {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	check(t, err)
	_, rest, _ := strings.Cut(string(text), ") ")
	fields := strings.Fields(rest) // of proc(5), from the third on; utime and stime are the 14th and 15th
	sum := 0
	for _, field := range fields[14-3 : 16-3] {
		ticks, err := strconv.Atoi(field)
		check(t, err)
		sum += ticks
	}
	return time.Duration(sum) * 10 * time.Millisecond
}

// percentiles reports how the measurements are distributed.
func percentiles(b *testing.B, what string, all []time.Duration) {
	all = slices.Sorted(slices.Values(all))
	b.ReportMetric(0, "ns/op")
	for _, p := range []int{50, 90, 99} {
		b.ReportMetric(float64(all[min(len(all)*p/100, len(all)-1)].Microseconds())/1000, fmt.Sprintf("%s-p%d-ms", what, p))
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func median[T ~int | ~int64 | ~float64](all []T) T {
	all = slices.Sorted(slices.Values(all))
	return all[len(all)/2]
}

// answers waits until an HTTP server at a unix socket answers 200 with this text.
func (p *pod) answers(socket, path, text string) {
	p.t.Helper()
	client := status.OverSocket(socket)
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
