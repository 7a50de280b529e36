package envoy

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"mantlet/internal/rundir"
	"mantlet/internal/sandbox"
	"mantlet/render"
	"mantlet/schema"
)

// executeLimit bounds what has no limit of its own: writing a bootstrap, ending an Envoy that hangs, and execve.
const executeLimit = 5 * time.Second

func (r *Runner) execute(state render.State, settings schema.Envoy, parent *Process) (*Process, error) {
	p, err := r.newProcess(parent)
	if err != nil {
		return nil, err
	}
	for _, old := range r.Running() {
		if old.base == p.base && old.Epoch <= p.Epoch-epochs {
			old.Kill() // it hangs: its child told it to end
			<-old.exited
		}
	}
	b := proto.CloneOf(state.Bootstrap)
	render.SetEpoch(b, r.RuntimeDirectory, p.Epoch)
	if err := render.Limit(b, r.Limits.Capacity(state.Cost)); err != nil {
		return nil, err
	}
	if err := render.AddMesh(b, state.Mesh); err != nil {
		return nil, err
	}
	p.Digest, p.listeners, p.workers, p.parts = state.Digest, listenersOf(b), settings.Concurrency, partsOf(state.Bootstrap)
	config := r.directory().Bootstrap(p.Epoch)
	if err := r.write(config, b); err != nil {
		return nil, err
	}
	// An Envoy that has not ended yet could answer there for the new one.
	socket := rundir.Envoy(r.RuntimeDirectory).AdminSocket(p.Epoch)
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("removing the admin socket of an Envoy before this one: %w", err)
	}
	p.admin = newAdmin(socket)
	p.trial = render.TrialSocket(r.RuntimeDirectory, p.Epoch)
	p.logs = newLogs(r.Log.With("epoch", p.Epoch), &r.refused, r.Upstream)
	p.logs.peers = &r.peers
	p.exited = make(chan struct{})
	p.spawner = &r.spawner
	return p, r.start(p, arguments(config, r.directory().HotRestart(), p.base.id, p.Epoch, settings))
}

// write puts a bootstrap into a file of the runtime directory, in the form that its name asks for. JSON is not indented: of 1,000 entries
// that would double it, and take Envoy 0.15 s more to read.
func (r *Runner) write(path string, bootstrap *bootstrapv3.Bootstrap) error {
	marshal := protojson.MarshalOptions{UseProtoNames: true}.Marshal
	if filepath.Ext(path) == rundir.Binary {
		marshal = proto.Marshal
	}
	text, err := marshal(bootstrap)
	if err == nil {
		err = writeFile(path, text)
	}
	if err != nil {
		return fmt.Errorf("writing the bootstrap: %w", err)
	}
	return nil
}

// start executes Envoy with arguments.
func (r *Runner) start(p *Process, arguments []string) error {
	stdout, stderr, dumpable, err := r.spawn(p, arguments)
	if errors.Is(err, errUntraced) { // from now on it is not tried
		stdout, stderr, dumpable, err = r.spawn(p, arguments)
	}
	if errors.Is(err, os.ErrPermission) {
		err = cmp.Or(r.executableError(), fmt.Errorf("%w: user %d must be allowed to execute it, where it was when mantlet started", err, r.UID))
	}
	if err != nil {
		return fmt.Errorf("executing %q: %w", r.Path, err)
	}
	if dumpable != nil {
		r.Log.Warn("other processes of Envoy's user can read its memory, and the key", "pid", p.PID(), "error", dumpable)
	}
	before, _ := r.oomKills()
	go func() {
		read := make(chan struct{})
		go func() { defer close(read); p.logs.access(stdout) }()
		p.logs.messages(stderr)
		<-read
		p.err = p.cmd.Wait()
		p.killedBy = r.explainKill(before)
		close(p.exited)
	}()
	return nil
}

// spawn starts Envoy with pipes that are made on the spawner's thread as well: Envoy opens /dev/stdout, and may do so only if its user
// made the pipe. dumpable is why other processes of the user can read Envoy's memory; nil if they can't.
func (r *Runner) spawn(p *Process, arguments []string) (stdout, stderr io.ReadCloser, dumpable, err error) {
	p.cmd = exec.Command(r.Path, arguments...)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid: true, // a terminal's Ctrl-C is for mantlet, which ends Envoy when it is time
		// Until Envoy asks for SIGTERM itself: without mantlet, nobody watches over what it serves.
		Pdeathsig: syscall.SIGKILL,
	}
	err = r.spawner.do(func() (err error) {
		if p.cmd.SysProcAttr.AmbientCaps, err = sandbox.AmbientCapabilities(ports(p.listeners)); err != nil {
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

// oomKills returns how many processes the kernel killed because they took too much memory; false where it does not tell.
func (r *Runner) oomKills() (count uint64, ok bool) {
	if r.Memory == nil {
		return 0, false
	}
	count, err := r.Memory.Kills()
	return count, err == nil
}

// explainKill says who killed a process that mantlet did not kill. before is what oomKills returned when the process started.
func (r *Runner) explainKill(before uint64) string {
	switch now, ok := r.oomKills(); {
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
