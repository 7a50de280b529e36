// Package envoy runs Envoy: its epochs, its certificates, and what it says of itself.
package envoy

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	"google.golang.org/protobuf/proto"

	"mantlet/internal/bind"
	"mantlet/internal/cgroup"
	"mantlet/internal/sandbox"
	"mantlet/internal/status"
	"mantlet/render"
	"mantlet/schema"
)

// Runner starts Envoys: the first as epoch 0, and each later one as a hot restart of the one that serves. Its exported
// fields are set before the first Start. Start is not safe for concurrent use.
type Runner struct {
	Path             string               // the binary; found on PATH where it has no slash
	UID              int                  // of Envoys
	Needs            []sandbox.Capability // of mantlet's container
	Processes        bind.Processes       // that listened when mantlet still could see who does
	RuntimeDirectory string               // theirs and mantlet's: holds sockets, SDS files and bootstraps
	Log              *slog.Logger
	Limits           render.Limits  // of mantlet and all Envoys
	Memory           *cgroup.Memory // that they have; nil where the kernel does not tell
	// Upstream describes the upstream of the egress entry that listens at an address. It may be nil.
	Upstream func(listen string) status.Upstream
	// Progress is told each step that Start begins, and how long it takes at most. It may be nil.
	Progress func(what string, limit time.Duration)

	spawner  spawner
	standIns sync.WaitGroup
	bases    []*base // that Envoys were given

	refused refusals

	liveLimit time.Duration // defaultLiveLimit where it is 0
	failed    atomic.Uint64 // Envoys that were executed and did not get live

	mu      sync.Mutex
	ended   map[string]uint64 // statistics of those that are not among running any more
	running []*Process        // by epoch: those that drain, and at last the one that serves; some may have ended
}

// defaultLiveLimit bounds initialisation: 45-100 ms as a rule; a busy machine takes longer, a hung start for ever.
const defaultLiveLimit = 20 * time.Second

// partLimit is what a filter chain or a cluster adds to that: four times what one takes of a processor.
const partLimit = 6 * time.Millisecond

// Start executes Envoy for a state and waits until it says by itself that it is live with that state. Where another Envoy
// serves, it takes over from it without a connection being refused, and the other one drains and ends by itself.
//
// Where the new one does not get live in time, it is killed, and whatever served goes on; but it may have lost its admin
// interface, which only another Start brings back, with any state that works.
func (r *Runner) Start(ctx context.Context, state render.State, settings schema.Envoy) (*Process, error) {
	p, err := r.restart(ctx, state, settings)
	if err != nil {
		return nil, err
	}
	r.Log.Info("Envoy is live", "epoch", p.Epoch, "pid", p.PID(), "digest", p.Digest)
	return p, nil
}

func (r *Runner) restart(ctx context.Context, state render.State, settings schema.Envoy) (*Process, error) {
	if err := r.spawner.do(func() error { return nil }); err != nil { // before anything is made that it would have to remove
		return nil, err
	}
	parent := r.serving()
	// Where it drains already, the one after it died: nobody listens, and a failure can't make it worse.
	if parent != nil && !parent.drains {
		r.progress("having Envoy validate the bootstrap", r.limit(state))
		if err := r.preflight(ctx, state); err != nil {
			return nil, err
		}
		r.progress("counting connections", askLimit)
		r.count(ctx) // while it still answers
	}
	if err := r.tryBinds(state.Bootstrap); err != nil {
		return nil, err
	}
	r.progress("executing Envoy", executeLimit)
	var abandoned []*Process
	if parent != nil {
		if err := r.obstacle(parent); err != nil {
			abandoned, parent = r.Running(), nil
			r.Log.Warn("a plain restart of Envoy, which cuts connections: a hot one is not possible", "error", err)
		}
	}
	p, err := r.succeed(ctx, state, settings, parent)
	if err != nil {
		return nil, err
	}
	for _, old := range slices.Backward(abandoned) {
		r.progress("ending an Envoy that nothing can follow", termLimit)
		old.Stop()
	}
	r.add(p, parent, settings.ParentShutdownTime)
	if parent != nil {
		r.standIns.Go(func() { r.standIn(parent, p) })
		r.progress("waiting until the Envoy before it takes no more connections", r.limit(state))
		r.awaitDrain(parent, r.limit(state))
	}
	return p, nil
}

// succeed executes an Envoy that is to relieve a parent, if there is one, and returns it once it is live.
func (r *Runner) succeed(ctx context.Context, state render.State, settings schema.Envoy, parent *Process) (*Process, error) {
	if parent != nil {
		parent.interview.yield(true)
		defer parent.interview.yield(false)
	}
	p, err := r.execute(state, settings, parent)
	if err != nil {
		return nil, err
	}
	r.progress("waiting until Envoy is live", r.limit(state))
	ctx, cancel := context.WithTimeout(ctx, r.limit(state))
	defer cancel()
	if err := p.waitLive(ctx, parent); err != nil {
		r.failed.Add(1)
		r.progress("ending an Envoy that does not start", settleLimit)
		p.Kill() // SIGTERM would make it end its parent, which serves
		<-p.exited
		if parent != nil && parent.alive() {
			parent.base.stuck = errors.Join(r.spawner.do(parent.base.clearInitializing), r.settle(parent))
		}
		return nil, err
	}
	return p, nil
}

// executeLimit bounds what has no limit of its own: writing a bootstrap, ending an Envoy that hangs, and execve.
const executeLimit = 5 * time.Second

// limit bounds initialisation with a state.
func (r *Runner) limit(state render.State) time.Duration {
	resources, parts := state.Bootstrap.StaticResources, 0
	for _, l := range resources.Listeners {
		parts += len(l.FilterChains)
	}
	return cmp.Or(r.liveLimit, defaultLiveLimit) + time.Duration(parts+len(resources.Clusters))*partLimit
}

// grace is what a step may take beyond its limit on a machine that is busy.
const grace = 5 * time.Second

func (r *Runner) progress(what string, limit time.Duration) {
	if r.Progress != nil {
		r.Progress(what, limit+grace)
	}
}

// obstacle returns why no epoch can follow a process, if it is known beforehand.
func (r *Runner) obstacle(parent *Process) error {
	_, err := os.Stat(parent.base.path())
	return errors.Join(parent.base.stuck, err, r.spawner.do(func() error { return reach(r.parentSocket(parent)) }))
}

// reach returns nil if a process listens at a socket. It sends nothing.
func reach(socket string) error {
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("reaching the Envoy that serves: %w", err)
	}
	return conn.Close()
}

// add makes a process the one that serves, and its parent one that drains, for a time at most. It removes the files of those
// that have ended.
func (r *Runner) add(p, parent *Process, most time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p.since = time.Now()
	if parent != nil && !parent.drains {
		parent.drains, parent.since, parent.most = true, p.since, most
	}
	r.running = append(slices.DeleteFunc(r.running, func(old *Process) bool {
		if !old.alive() {
			r.ended = sums(r.ended, old.counted)
		}
		if !old.alive() && old.Epoch != p.Epoch {
			_ = r.remove(fmt.Sprintf("*-%d.sock", old.Epoch), bootstrapFile(old.Epoch))
		}
		return !old.alive()
	}), p)
	r.retire()
}

// retire removes what bases left that no process has any more. What can't be removed now is tried again.
func (r *Runner) retire() {
	r.bases = slices.DeleteFunc(r.bases, func(b *base) bool {
		used := slices.ContainsFunc(r.running, func(p *Process) bool { return p.base == b && p.alive() })
		return !used && errors.Join(r.spawner.do(b.remove), r.remove(fmt.Sprintf("epoch_*_%d[0-%d]", b.id, epochs-1))) == nil
	})
}

// Running returns the processes that have not ended, the one that serves last.
func (r *Runner) Running() []*Process {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(r.running), func(p *Process) bool { return !p.alive() })
}

// Connections returns how many connections would be cut if all processes were stopped now.
func (r *Runner) Connections(ctx context.Context) (int, error) {
	sum := 0
	var errs []error
	for _, p := range r.Running() {
		open, err := r.connections(ctx, p)
		if err != nil && p.alive() {
			errs = append(errs, fmt.Errorf("counting connections of epoch %d: %w", p.Epoch, err))
		}
		sum += open
	}
	return sum, errors.Join(errs...)
}

// Epochs describes the processes that have not ended, the one that serves last.
func (r *Runner) Epochs(ctx context.Context) []status.Epoch {
	r.mu.Lock()
	running := slices.Clone(r.running)
	var all []status.Epoch
	for _, p := range running {
		e := status.Epoch{Epoch: p.Epoch, PID: p.PID(), Serving: !p.drains, Since: p.since, Digest: p.Digest}
		if p.drains {
			e.LeftSeconds = max(0, time.Until(p.since.Add(p.most))).Round(time.Millisecond).Seconds()
		}
		all = append(all, e)
	}
	r.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	var asked sync.WaitGroup
	for i, p := range running {
		asked.Go(func() {
			if open, err := r.connections(ctx, p); err == nil {
				all[i].Connections = &open
			}
		})
	}
	asked.Wait()
	for i := len(running) - 1; i >= 0; i-- {
		if !running[i].alive() {
			all = slices.Delete(all, i, i+1)
		}
	}
	return all
}

// The statistics that make up the traffic: handshakes with clients, connections of the workload, how often one of them failed
// at an address of the upstream, and how often one came to nothing, since all attempts failed or there was no address.
const (
	handshakes = "listener.ingress-%s.ssl.handshake"
	dialled    = "tcp.%s.downstream_cx_total"
	failures   = "cluster.%s.upstream_cx_connect_fail"
	exhausted  = "cluster.%s.upstream_cx_connect_attempts_exceeded"
	nowhere    = "cluster.%s.upstream_cx_none_healthy"
	statistics = `^(listener\.ingress-m?tls\.ssl\.handshake|listener\.(ingress|egress)-.*\.downstream_(global_cx_overflow|cx_overflow|cx_overload_reject)|` +
		`tcp\.egress-.*\.downstream_cx_total|` +
		`cluster\.egress-.*\.upstream_cx_(connect_fail|connect_attempts_exceeded|none_healthy))$`
)

// count asks the process that serves for its statistics. Those that drain take no new connections.
func (r *Runner) count(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	p := r.serving()
	if p == nil {
		return
	}
	if counted, err := p.admin.stats(ctx, statistics); err == nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		p.counted = counted
	}
}

// Traffic returns how many connections there were since the start. What an Envoy counted between the last look at it and its
// crash is not among them.
func (r *Runner) Traffic(ctx context.Context) status.Traffic {
	r.count(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	all := sums(nil, r.ended)
	for _, p := range r.running {
		all = sums(all, p.counted)
	}
	t := status.Traffic{Ingress: []status.Handshakes{}, Egress: []status.Dialled{}, Shed: shedOf(all)}
	for _, mode := range []schema.Mode{schema.ModeMTLS, schema.ModeTLS} {
		t.Ingress = append(t.Ingress, status.Handshakes{Mode: mode, Total: all[fmt.Sprintf(handshakes, mode)]})
	}
	if len(r.running) == 0 {
		return t
	}
	for _, l := range r.running[len(r.running)-1].Bootstrap.StaticResources.Listeners {
		if listen, ok := strings.CutPrefix(l.Name, "egress-"); ok {
			name := strings.ReplaceAll(l.Name, ":", "_") // as Envoy names it among its statistics
			t.Egress = append(t.Egress, status.Dialled{
				Listen: listen, Total: all[fmt.Sprintf(dialled, name)],
				Failed:         all[fmt.Sprintf(exhausted, name)] + all[fmt.Sprintf(nowhere, name)],
				FailedAttempts: all[fmt.Sprintf(failures, name)],
			})
		}
	}
	return t
}

// shed are the directions of connections that were closed since too many were open, and the statistics that count them: over the
// limit of all listeners, over that of one, and for lack of memory.
var shed = map[string]*regexp.Regexp{
	"ingress": regexp.MustCompile(`^listener\.ingress-.*\.downstream_(global_cx_overflow|cx_overload_reject)$`),
	egress:    regexp.MustCompile(`^listener\.egress-.*\.downstream_(cx_overflow|cx_overload_reject)$`),
}

// shedOf returns how many connections were closed as they came, since too many were open, by direction.
func shedOf(all map[string]uint64) map[string]uint64 {
	counts := map[string]uint64{}
	for direction, names := range shed {
		counts[direction] = 0
		for name, n := range all {
			if names.MatchString(name) {
				counts[direction] += n
			}
		}
	}
	return counts
}

// Statistics returns what the Envoy that serves says of itself at /stats/prometheus.
func (r *Runner) Statistics(ctx context.Context) ([]byte, error) {
	serving := r.serving()
	if serving == nil {
		return nil, errors.New("no Envoy runs")
	}
	return serving.admin.statistics(ctx)
}

// sums adds numbers to others by their names.
func sums(to, more map[string]uint64) map[string]uint64 {
	if to == nil {
		to = map[string]uint64{}
	}
	for name, n := range more {
		to[name] += n
	}
	return to
}

// askLimit bounds what a status takes of an Envoy that hangs.
const askLimit = time.Second

// connections returns how many connections go through a process. One that was relieved, or whose relief failed, has no
// admin interface any more, and is asked in its child's place.
func (r *Runner) connections(ctx context.Context, p *Process) (int, error) {
	if open, err := p.admin.connections(ctx); err == nil {
		return open, nil
	}
	return r.openIn(p)
}

// serving returns the newest process.
func (r *Runner) serving() *Process {
	if running := r.Running(); len(running) > 0 {
		return running[len(running)-1]
	}
	return nil
}

// preflight tries what a new epoch could fail at: once it runs, a failure costs the old one its admin interface.
func (r *Runner) preflight(ctx context.Context, state render.State) error {
	config, err := r.write("preflight.json", state.Bootstrap)
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(config) }()
	ctx, cancel := context.WithTimeout(ctx, r.limit(state))
	defer cancel()
	var said bytes.Buffer
	cmd := exec.CommandContext(ctx, r.Path, "--mode", "validate", "--config-path", config, "--log-level", "error")
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.WaitDelay = time.Second // for a script whose child holds the pipe
	cmd.Cancel = func() error { return r.spawner.do(cmd.Process.Kill) }
	if err = r.spawner.do(cmd.Start); err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return fmt.Errorf("Envoy does not accept the bootstrap: %w: %s", cmp.Or(ctx.Err(), err), &said)
	}
	return nil
}

// tryBinds returns why an Envoy could not listen at all addresses of a bootstrap.
func (r *Runner) tryBinds(b *bootstrapv3.Bootstrap) error {
	return r.spawner.do(func() error {
		if _, err := sandbox.AmbientCapabilities(ports(b)); err != nil {
			return err
		}
		return bind.Try(r.Processes, render.ListenAddresses(b)...)
	})
}

// write puts a bootstrap into the runtime directory and returns its path.
func (r *Runner) write(name string, bootstrap *bootstrapv3.Bootstrap) (string, error) {
	text, err := render.JSON(bootstrap)
	if err != nil {
		return "", err
	}
	path := filepath.Join(r.RuntimeDirectory, name)
	if err := writeFile(path, text); err != nil {
		return "", fmt.Errorf("writing the bootstrap: %w", err)
	}
	return path, nil
}

func bootstrapFile(epoch int) string { return fmt.Sprintf("bootstrap-%d.json", epoch) }

// epochs is how many can run at a time: Envoy has that many names for their sockets.
const epochs = 3

// next returns what shall be the epoch after the parent's, or without a parent epoch 0 of a base that no running Envoy has.
func (r *Runner) next(parent *Process) (*Process, error) {
	if parent != nil {
		return &Process{Epoch: parent.Epoch + 1, base: parent.base}, nil
	}
	b, err := newBase(r.Running())
	if err != nil {
		return nil, err
	}
	r.bases = append(slices.DeleteFunc(r.bases, func(old *base) bool { return old.id == b.id }), b)
	return &Process{base: b}, nil
}

func (r *Runner) execute(state render.State, settings schema.Envoy, parent *Process) (*Process, error) {
	p, err := r.next(parent)
	if err != nil {
		return nil, err
	}
	for _, old := range r.Running() {
		if old.base == p.base && old.Epoch <= p.Epoch-epochs {
			old.Kill() // it was told to end, and hangs
			<-old.exited
		}
	}
	p.Bootstrap = proto.CloneOf(state.Bootstrap)
	render.SetEpoch(p.Bootstrap, r.RuntimeDirectory, p.Epoch)
	if err := render.Limit(p.Bootstrap, r.Limits.Capacity(state.Cost)); err != nil {
		return nil, err
	}
	if err := render.AddMesh(p.Bootstrap, state.Mesh); err != nil {
		return nil, err
	}
	p.Digest, p.workers = state.Digest, settings.Concurrency
	config, err := r.write(bootstrapFile(p.Epoch), p.Bootstrap)
	if err != nil {
		return nil, err
	}
	// An Envoy that has not ended yet could answer there for the new one.
	socket := render.AdminSocket(r.RuntimeDirectory, p.Epoch)
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("removing the admin socket of an Envoy before this one: %w", err)
	}
	p.admin = newAdmin(socket)
	p.trial = render.TrialSocket(r.RuntimeDirectory, p.Epoch)
	p.logs = newLogs(r.Log.With("epoch", p.Epoch), &r.refused, r.Upstream)
	p.exited = make(chan struct{})
	p.spawner = &r.spawner
	return p, r.start(p, arguments(config, r.socket(), p.base.id, p.Epoch, settings))
}

// start executes Envoy with arguments.
func (r *Runner) start(p *Process, arguments []string) error {
	stdout, stderr, dumpable, err := r.spawn(p, arguments)
	if errors.Is(err, errUntraced) { // from now on it is not tried
		stdout, stderr, dumpable, err = r.spawn(p, arguments)
	}
	if errors.Is(err, os.ErrPermission) {
		err = cmp.Or(r.executable(), fmt.Errorf("%w: user %d must be allowed to execute it, where it was when mantlet started", err, r.UID))
	}
	if err != nil {
		return fmt.Errorf("executing %q: %w", r.Path, err)
	}
	if dumpable != nil {
		r.Log.Warn("other processes of Envoy's user can read its memory, and the key", "pid", p.PID(), "error", dumpable)
	}
	before, _ := r.kills()
	go func() {
		read := make(chan struct{})
		go func() { defer close(read); p.logs.access(stdout) }()
		p.logs.messages(stderr)
		<-read
		p.err = p.cmd.Wait()
		p.killer = r.killer(before)
		close(p.exited)
	}()
	return nil
}

// spawn makes the pipes too on the spawner's thread: Envoy opens /dev/stdout, and may only if its user made it. dumpable is why others
// can look into the process, if they can.
func (r *Runner) spawn(p *Process, arguments []string) (stdout, stderr io.ReadCloser, dumpable, err error) {
	p.cmd = exec.Command(r.Path, arguments...)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid: true, // a terminal's Ctrl-C is for mantlet, which ends Envoy when it is time
		// Until Envoy asks for SIGTERM itself: an Envoy without mantlet would serve what nobody watches.
		Pdeathsig: syscall.SIGKILL,
	}
	err = r.spawner.do(func() (err error) {
		if p.cmd.SysProcAttr.AmbientCaps, err = sandbox.AmbientCapabilities(ports(p.Bootstrap)); err != nil {
			return err
		}
		if stderr, err = p.cmd.StderrPipe(); err != nil {
			return fmt.Errorf("opening its standard error: %w", err)
		}
		if stdout, err = p.cmd.StdoutPipe(); err != nil {
			return fmt.Errorf("opening its standard output: %w", err)
		}
		dumpable, err = r.spawner.start(p.cmd)
		return err
	})
	return stdout, stderr, dumpable, err
}

// kills returns how many processes the kernel killed since they took too much memory; false where it does not tell.
func (r *Runner) kills() (count uint64, ok bool) {
	if r.Memory == nil {
		return 0, false
	}
	count, err := r.Memory.Kills()
	return count, err == nil
}

// killer says why a process was killed that mantlet did not kill, when before was what kills returned as it started.
func (r *Runner) killer(before uint64) string {
	switch now, ok := r.kills(); {
	case !ok:
		return "probably out of memory"
	case now == before:
		return "by another process"
	}
	limit, file := r.Memory.Limit()
	if limit == 0 {
		return "out of memory: the machine has no more"
	}
	return fmt.Sprintf("out of memory: %s is %d MiB", filepath.Base(file), limit>>20)
}

// ports returns those of a bootstrap's listeners.
func ports(b *bootstrapv3.Bootstrap) (ports []uint32) {
	for _, l := range b.StaticResources.Listeners {
		if address := l.GetAddress().GetSocketAddress(); address != nil {
			ports = append(ports, address.GetPortValue())
		}
	}
	return ports
}

// socket is the prefix of the hot restart's sockets. They are files of the runtime directory: abstract ones could be
// spoken to by every container of the pod.
func (r *Runner) socket() string { return filepath.Join(r.RuntimeDirectory, "epoch") }

// parentSocket is where a process listens for what its successor asks and tells.
func (r *Runner) parentSocket(p *Process) string {
	return fmt.Sprintf("%s_parent_%d", r.socket(), int(p.base.id)*10+p.Epoch%epochs)
}

// childSocket is where the successor of a process gets its answers.
func (r *Runner) childSocket(parent *Process) string {
	return fmt.Sprintf("%s_child_%d", r.socket(), int(parent.base.id)*10+(parent.Epoch+1)%epochs)
}

// standIn takes the place of a parent that ends before its child told it to: a child that finds nobody to tell aborts.
// One message comes, and needs no answer. A parent that ends in its time is replaced all the same; nobody calls then.
func (r *Runner) standIn(parent, child *Process) {
	<-parent.exited
	sink, err := r.takeOver(parent, child)
	if err != nil {
		r.Log.Error("the socket of an Envoy that ended can't be taken over", "error", err)
	}
	if sink == nil {
		return
	}
	<-child.exited
	_ = sink.Close()
}

// takeOver listens where the parent did. Where the child does not serve any more it has told the parent already, and
// the place may be a later epoch's.
func (r *Runner) takeOver(parent, child *Process) (sink *net.UnixConn, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.running[len(r.running)-1] != child {
		return nil, nil
	}
	err = r.spawner.do(func() error {
		sink, err = listenAt(r.parentSocket(parent))
		return err
	})
	return sink, err
}

// arguments returns Envoy's command line.
func arguments(config, socket string, base uint32, epoch int, settings schema.Envoy) []string {
	seconds := func(d time.Duration) string { return strconv.Itoa(int(d / time.Second)) }
	return []string{
		"--config-path", config,
		"--base-id", strconv.FormatUint(uint64(base), 10),
		"--restart-epoch", strconv.Itoa(epoch),
		"--socket-path", socket,
		"--socket-mode", "600",
		"--skip-hot-restart-parent-stats", // a child that polls a dead parent for them aborts
		"--concurrency", strconv.Itoa(settings.Concurrency),
		"--drain-time-s", seconds(settings.DrainTime),
		"--parent-shutdown-time-s", seconds(settings.ParentShutdownTime),
		"--log-level", string(settings.LogLevel),
		"--log-format", logFormat,
		"--log-format-escaped",
		"--file-flush-interval-msec", "100", // the access log's; 10 s by default
	}
}

// Stop ends all processes, the newest first: its end is no loss to the others.
func (r *Runner) Stop() {
	for _, p := range slices.Backward(r.Running()) {
		p.Stop()
	}
}

// Close ends the Runner and removes what its Envoys left behind. No Process may be running.
func (r *Runner) Close() error {
	r.standIns.Wait()
	var errs []error
	for _, b := range r.bases {
		errs = append(errs, r.spawner.do(b.remove))
	}
	r.spawner.fail(errors.New("the Runner is closed"))
	return errors.Join(append(errs, r.sweep(), r.remove("sds-*.json"))...)
}

// sweep removes what Envoys, and a mantlet that was killed while it wrote, leave in the runtime directory. None may be running.
func (r *Runner) sweep() error {
	return r.remove("epoch_*", "admin-*.sock", "trial-*.sock", "bootstrap-*.json", "preflight.json", ".*.json*", "../.*.json*")
}

func (r *Runner) remove(patterns ...string) error {
	var errs []error
	for _, pattern := range patterns {
		files, err := filepath.Glob(filepath.Join(r.RuntimeDirectory, pattern))
		errs = append(errs, err)
		for _, f := range files {
			if err := os.Remove(f); !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}
