package main

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"mantlet/internal/bind"
	"mantlet/internal/rundir"
	"mantlet/internal/sandbox"
	"mantlet/reconcile"
	"mantlet/reconcile/dns"
	"mantlet/reconcile/envoy"
	"mantlet/reconcile/iptables"
	"mantlet/reconcile/nft"
	"mantlet/reconcile/routes"
	"mantlet/render"
	"mantlet/schema"
)

func runCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the sidecar",
		Example: `  # What the image does by itself.
  mantlet run

  # With more of Envoy's log.
  mantlet run -l debug`,
		Long: "Run the sidecar. The pod is closed first, whatever the arguments and the environment say: then nothing comes in until the\n" +
			"desired state is in force.",
		DisableFlagParsing: true, // the pod is closed whether flags are right or not
	}
	level := envoyLogLevelFlag(cmd)
	allowed := cmd.Flags().Count(allowHostNetwork, "given twice: run in the machine's own network namespace, and cut the machine off")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if asksForHelp(args) {
			return cmd.Help()
		}
		failed := parse(cmd, args)
		if failed != nil {
			failed = fmt.Errorf("%w: `mantlet run --help` says what it takes", failed)
		}
		own := new(slog.LevelVar)
		log, queue := logTo(unblock(), own)
		defer queue.flush(flushLimit)
		err := run(cmd.Context(), arguments{max(*allowed, given(args, "--"+allowHostNetwork)), level.environ(), failed}, log, queue, own)
		if err == nil {
			return nil
		}
		rules := "they stay"
		if open, ok := errors.AsType[unclosed](err); ok {
			rules = open.rules
		}
		for _, p := range schema.Problems(err) {
			log.Error("mantlet can't run", "error", p.Error(), "rules", rules)
		}
		return logged{err}
	}
	return cmd
}

// arguments are run's own.
type arguments struct {
	allowHostNetwork int      // how often that was given
	environ          []string // the environment, with what they say instead
	err              error    // why they are not right
}

const envoyLogLevel = "envoy-log-level"

// logLevel is the value of a flag for Envoy's log level.
type logLevel struct{ format }

// envoyLogLevelFlag adds the flag -l, which takes the place of schema.LogLevelVariable.
func envoyLogLevelFlag(cmd *cobra.Command) *logLevel {
	level := &logLevel{format{all: schema.EnvoyLogLevels()}}
	cmd.Flags().VarP(level, envoyLogLevel, "l", "the `LEVEL` of Envoy's log, instead of "+schema.LogLevelVariable+": "+strings.Join(level.all, ", "))
	return level
}

// Set implements pflag.Value. Envoy takes warn for warning, too.
func (l *logLevel) Set(name string) error {
	if name == "warn" {
		name = "warning"
	}
	return l.format.Set(name)
}

// environ returns the process's environment with the level in it, if the flag was given.
func (l *logLevel) environ() []string {
	if l.chosen == "" {
		return os.Environ()
	}
	return append(os.Environ(), schema.LogLevelVariable+"="+l.chosen)
}

// parse reads what follows `mantlet run`.
func parse(cmd *cobra.Command, args []string) error {
	if err := cmd.Flags().Parse(args); err != nil {
		return err
	}
	if cmd.Flags().NArg() > 0 {
		return fmt.Errorf("mantlet run takes no arguments, but gets %q", cmd.Flags().Arg(0))
	}
	return nil
}

// asksForHelp reports whether arguments do, whatever else they say.
func asksForHelp(args []string) bool { return given(args, "--help")+given(args, "-h") > 0 }

// given returns how often a flag is, also where something before it is a mistake.
func given(args []string, flag string) (n int) {
	for _, arg := range args {
		if arg == "--" {
			break
		}
		if arg == flag {
			n++
		}
	}
	return n
}

// logged is an error that stands in the log.
type logged struct{ error }

func (l logged) Unwrap() error { return l.error }

// unclosed is an error with which no deny-all was put in place, and what that means for the rules.
type unclosed struct {
	error
	rules string
}

func (u unclosed) Unwrap() error { return u.error }

// run closes the pod before it reads a single argument or setting. From then on nothing but the desired state opens it, however run
// ends.
func run(ctx context.Context, args arguments, log *slog.Logger, queue *logQueue, level *slog.LevelVar) error {
	collectLater()
	warm()
	signal.Ignore(syscall.SIGPIPE) // the end of whoever reads the log must not be mantlet's
	hups := make(chan os.Signal, 1)
	signal.Notify(hups, syscall.SIGHUP) // while it starts too: else one would be its end
	defer signal.Stop(hups)
	table, found, err := closePod(args, log)
	if err != nil {
		return err
	}
	defer func() { _ = table.Close() }()
	if args.err != nil {
		return args.err
	}
	env, err := environment(args.environ, log, level)
	if err != nil {
		return err
	}
	resolver := dns.System()
	place := place(env, resolver)
	found = meanwhile(table, found, env.Base().Mesh, place, log)
	runner, err := newRunner(env, log)
	if err != nil {
		return err
	}
	endpoints, err := envoy.ServeEndpoints(runner.RuntimeDirectory, log)
	if err != nil {
		return errors.Join(err, runner.Close())
	}
	names := dns.NewFollower(resolver, endpoints, log)
	files := rundir.Directory(env.Process.RuntimeDirectory)
	secrets := &envoy.Secrets{
		Files: env.Process.TLS, RuntimeDirectory: runner.RuntimeDirectory, KeptFile: files.LastGoodCertificates(), Runner: runner, Log: log,
	}
	daemon := &reconcile.Daemon{
		Version:      versionText(),
		Environment:  env,
		Place:        place,
		NameOf:       resolver.Name,
		Resolvers:    func() render.Resolvers { return servers(resolver) },
		HasIPv6:      hasIPv6,
		Kernel:       table,
		Found:        found,
		PolicyRoutes: routes.Kernel{},
		Secrets:      secrets,
		Proxy:        proxy{runner},
		Legacy:       iptables.Tables{LockFile: files.IptablesLock()},
		Names:        names,
		Limits:       runner.Limits,
		Processes:    runner.Processes,
		Follow:       runner.Follow,
		Log:          log,
		Rest:         releaseMemory,
		LogLost:      func() (uint64, time.Duration) { return queue.lost(time.Now()) },
	}
	runner.Progress, runner.Upstream = daemon.Progress, daemon.Upstream
	err = serve(ctx, hups, daemon)
	names.Close()
	return errors.Join(err, endpoints.Close(), secrets.Close(), runner.Close())
}

// environment parses the environment, sets the log's level by it, and prepares what else it names.
func environment(environ []string, log *slog.Logger, level *slog.LevelVar) (*schema.Environment, error) {
	if err := schema.HostNetwork(environ); err != nil {
		log.Warn("the environment says that the pod has hostNetwork, and its network namespace says that it has not", "environment", err)
	}
	env, err := schema.ParseEnvironment(environ)
	if err != nil {
		_, err = env.Load() // which tells what is wrong with the override file, too
		return nil, invalid{err}
	}
	if err := level.UnmarshalText([]byte(env.Process.LogLevel)); err != nil {
		return nil, err
	}
	if err := prepare(env.Process); err != nil {
		return nil, err
	}
	for _, warning := range env.Base().Warnings() {
		if warning.Origin.Source == env.Process.IngressOff {
			log.Warn("nothing that comes in is protected", "reason", warning.Error())
		}
	}
	return env, nil
}

// meanwhile changes the closed pod's rules to what holds until the desired state is in force: what the pod sends is treated as the
// environment says, and the status port is open. It returns what the table now remembers.
func meanwhile(table *nft.Table, found render.Ruleset, mesh schema.Mesh, place render.Place, log *slog.Logger) render.Ruleset {
	if mesh.Outbound.Mode != render.OutboundOf(found).Mode {
		found = found.Allowing(mesh.Outbound, place)
		if err := table.DenyAll(found); err != nil {
			log.Warn("what the pod sends in the clear leaves until the desired state is in force", "error", err)
		}
	}
	if port := mesh.StatusPort; port != 0 {
		if err := table.OnlyStatus(port, found); err != nil {
			log.Warn("the status address can't be reached until the desired state is in force", "error", err)
		}
	}
	return found
}

// newRunner confines this process for good, and ends the Envoys that an earlier mantlet left.
func newRunner(env *schema.Environment, log *slog.Logger) (*envoy.Runner, error) {
	if err := raiseDescriptors(); err != nil {
		log.Warn("Envoy takes fewer connections than it could", "error", err)
	}
	limits, memory := limits()
	runner := &envoy.Runner{
		Path: env.Process.EnvoyPath, UID: env.Process.EnvoyUID, RuntimeDirectory: env.Process.EnvoyDirectory(), Log: log,
		Limits: limits, Memory: memory, Needs: capabilities(env, env.Base()), Processes: bind.Listening(),
	}
	err := confine(runner, env.Process, log)
	if err == nil {
		err = runner.Evict()
	}
	if err != nil {
		return nil, errors.Join(err, runner.Close())
	}
	return runner, nil
}

// prepare makes the files that mantlet is to have before it is confined, and looks at the places of others.
func prepare(process schema.Process) error {
	if err := private(process.RuntimeDirectory, process.EnvoyUID); err != nil {
		return err
	}
	if path := process.ReadyFile; path != "" {
		if err := reconcile.PlaceReadyFile(path, process.RuntimeDirectory); err != nil {
			return fmt.Errorf("MANTLET_READY_FILE %q can't be made: %w", path, err)
		}
	}
	if socket := process.GateSocket; socket != "" {
		if info, err := os.Stat(filepath.Dir(socket)); err != nil || !info.IsDir() {
			return fmt.Errorf("%s: there is no directory %s: mount there the volume that the workload mounts too", schema.GateVariable, filepath.Dir(socket))
		}
	}
	return nil
}

// gcPercent is GOGC unless the environment sets it. mantlet allocates much at a change and little in between: memory is worth more than
// the time of collections.
const gcPercent = 50

// collectLater lets the heap grow to 16 MiB before garbage is collected, for a second: starting takes some 6 MiB, and the
// collections in it would take a part of the time in which Envoy is not running yet.
func collectLater() {
	usual := debug.SetGCPercent(400)
	if os.Getenv("GOGC") == "" {
		usual = gcPercent
	}
	time.AfterFunc(time.Second, func() { debug.SetGCPercent(usual) })
}

// releaseMemory gives back to the kernel what a start or a change took and nobody needs any more: rendering 1,000 entries takes several
// times what is kept of them.
func releaseMemory() {
	debug.FreeOSMemory()
	releaseBinary()
}

// releaseBinary gives back the pages of mantlet's own code, some 7 MiB, of which a start or a change touches most and the time after it
// few: the package initialisers of protobuf, say. What is touched again comes back from the kernel's cache.
func releaseBinary() {
	binary, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return
	}
	for line := range strings.Lines(string(maps)) {
		var from, to uintptr
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil || !strings.HasSuffix(line, " "+binary+"\n") {
			continue
		}
		if mode == "r-xp" { // never written, so nothing of it is lost; what can only be read may have been relocated
			_, _, _ = unix.RawSyscall(unix.SYS_MADVISE, from, to-from, unix.MADV_DONTNEED)
		}
	}
}

// warm makes packages build what they build at first use, while the rules are put in place: protobuf's tables take 10 ms,
// multiples of P-384's generator 2 ms. None of it depends on the configuration.
func warm() {
	go func() {
		env, err := schema.ParseEnvironment([]string{"EDG_EGRESS_PROXY_CONFIG=warm#127.0.0.1:1#127.0.0.1:2"})
		if err != nil {
			return
		}
		if state, err := render.Render(env.Base().Mesh, render.Place{}); err == nil {
			_, _ = render.JSON(state.Bootstrap)
		}
	}()
	go func() { _, _ = ecdh.P384().NewPrivateKey(bytes.Repeat([]byte{1}, 48)) }()
}

// proxy is a Runner as the daemon knows it.
type proxy struct{ *envoy.Runner }

// Start implements reconcile.Proxy.
func (p proxy) Start(ctx context.Context, state render.State, settings schema.Envoy) (reconcile.Process, error) {
	process, err := p.Runner.Start(ctx, state, settings)
	if err != nil {
		return nil, err
	}
	return process, nil
}

// closePod puts the deny-all rules in place, and returns what was there before. Its error is unclosed where the pod may be open.
func closePod(args arguments, log *slog.Logger) (*nft.Table, render.Ruleset, error) {
	if err := here().judge(args.allowHostNetwork); err != nil {
		return nil, render.Ruleset{}, unclosed{errors.Join(err, args.err), "none was touched"}
	}
	table, err := nft.Open()
	if err != nil {
		return nil, render.Ruleset{}, notClosed(err, args.environ)
	}
	table.EnvoyUID = schema.EnvoyUID(args.environ)
	found, err := deny(table, log)
	if err != nil {
		return nil, render.Ruleset{}, notClosed(errors.Join(err, table.Close()), args.environ)
	}
	return table, found, nil
}

// notClosed says what an error of deny means for the pod, and what would repair it.
func notClosed(err error, environ []string) error {
	if errors.Is(err, nft.ErrOwned) {
		return err // another mantlet keeps the pod closed
	}
	if errors.Is(err, syscall.EPERM) {
		env, _ := schema.ParseEnvironment(environ)
		needs := capabilities(env, env.Base())
		err = errors.Join(sandbox.Missing(needs), fmt.Errorf("%w; %s", err, sandbox.Remedy(needs)))
	}
	return unclosed{err, "no deny-all could be put in place: the pod is open, unless an earlier mantlet left its rules there"}
}

// deny claims the table for this mantlet and puts the deny-all rules into it. Of all that can fail before, only another mantlet keeps it
// from that.
func deny(table *nft.Table, log *slog.Logger) (found render.Ruleset, err error) {
	owned, unowned := table.Own()
	if errors.Is(unowned, nft.ErrOwned) {
		return found, unowned
	}
	found, unreadable := table.Read()
	if unreadable != nil {
		found = render.DenyAll(true) // which tells as little of what was before
	}
	if err := table.DenyAll(found); err != nil {
		return found, err
	}
	log.Info("nothing comes in until the desired state is in force", "owned", owned)
	if unreadable != nil {
		log.Warn("the rules of before cannot be read; connections that they let in end", "error", unreadable)
	}
	if !owned {
		log.Warn("the kernel keeps no owner for the table, or it was made without one: other privileged processes can change the rules")
	}
	if table.LacksTimeouts() {
		log.Warn("the kernel has no ct timeout objects (CONFIG_NF_CONNTRACK_TIMEOUT): " + withoutTimeouts)
	}
	if unowned != nil {
		log.Warn("a second mantlet that is started here would not end", "error", unowned)
	}
	squatter, err := table.Alone()
	if squatter != "" {
		log.Warn("a process that is not mantlet has the name of mantlet's socket; mantlet goes on without the name", "by", squatter)
	}
	return found, err
}

// confine gives up, for good, what neither mantlet nor Envoy needs from here on.
func confine(runner *envoy.Runner, process schema.Process, log *slog.Logger) error {
	rules := sandbox.System()
	rules.Write = append(rules.Write, runner.RuntimeDirectory)
	binary := process.EnvoyPath
	if found, err := exec.LookPath(binary); err == nil {
		binary = found
	}
	if filepath.IsAbs(binary) {
		rules.Execute = append(rules.Execute, filepath.Dir(binary))
		if real, err := filepath.EvalSymlinks(binary); err == nil {
			rules.Execute = append(rules.Execute, real)
		}
	}
	return runner.Confine(rules, func() error {
		own := sandbox.Rules{
			Read:  sandbox.Inputs(process.TLS.Directory, process.TLS.Names()...),
			Write: []string{process.RuntimeDirectory},
		}
		for _, path := range process.TLS.Elsewhere() {
			own.Read = append(own.Read, sandbox.Inputs(filepath.Dir(path), filepath.Base(path))...)
		}
		if process.ReadyFile != "" {
			own.Link = append(own.Link, process.RuntimeDirectory)
		}
		if process.ConfigFile != "" {
			own.Read = append(own.Read, sandbox.Inputs(filepath.Dir(process.ConfigFile), filepath.Base(process.ConfigFile))...)
		}
		if path, err := iptables.Installed(); err == nil && process.LiftDefaultDeny {
			own.Execute = append(own.Execute, filepath.Dir(path))
		}
		if process.GateSocket != "" {
			own.Write = append(own.Write, filepath.Dir(process.GateSocket))
		}
		if err := sandbox.Drop(); err != nil {
			return err
		}
		err := rules.And(own).Restrict()
		if errors.Is(err, sandbox.ErrNoLandlock) {
			log.Warn("files are guarded by their owners and modes alone", "reason", err)
			return nil
		}
		return err
	})
}

// maxDirectory leaves room in a unix socket's 108 bytes for the longest name that Envoy makes of it:
// /envoy/epoch_udp_parent_ and a number of ten digits.
const maxDirectory = 107 - 34

func fits(directory string) error {
	if len(directory) > maxDirectory {
		return fmt.Errorf("MANTLET_RUNTIME_DIRECTORY %q is too long for the sockets in it: at most %d bytes", directory, maxDirectory)
	}
	return nil
}

// suitable returns why a directory can't be mantlet's runtime directory; nil where nothing of what can be seen is in the way.
func suitable(directory string, envoyUID int) error {
	if err := errors.Join(fits(directory), closable(directory)); err != nil {
		return err
	}
	if err := sandbox.Enterable(filepath.Dir(directory), envoyUID, "name another directory, such as /run/mantlet"); err != nil {
		return fmt.Errorf("MANTLET_RUNTIME_DIRECTORY %q: %w", directory, err)
	}
	return nil
}

// private makes the runtime directory and closes it to others: it comes to hold the key. Envoy's user must get through the
// directories above it.
func private(directory string, envoyUID int) error {
	if err := suitable(directory, envoyUID); err != nil {
		return err
	}
	defer unix.Umask(unix.Umask(0o022))
	err := os.MkdirAll(filepath.Dir(directory), 0o755)
	if err == nil {
		err = os.MkdirAll(directory, 0o700)
	}
	if err == nil {
		err = os.Chmod(directory, 0o700)
	}
	if err != nil {
		return fmt.Errorf("MANTLET_RUNTIME_DIRECTORY %q can't be made, or closed to others: %w", directory, err)
	}
	return nil
}

// closable returns why a directory can't become mantlet's own; nil where there is none. What is open to others and not empty
// they use. A volume is open to others at first too, a memory-backed one like /tmp, but empty; and what mantlet has closed
// once may hold anything.
func closable(directory string) error {
	info, err := os.Stat(directory)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("looking at MANTLET_RUNTIME_DIRECTORY: %w", err)
	}
	const right = "name a directory of mantlet's own, or one that does not exist"
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && int(owner.Uid) != os.Geteuid() {
		return fmt.Errorf("MANTLET_RUNTIME_DIRECTORY %q belongs to user %d: mantlet can't close it to others; %s", directory, owner.Uid, right)
	}
	if !info.IsDir() || info.Mode()&0o007 == 0 {
		return nil
	}
	entries, err := os.ReadDir(directory)
	if err != nil {
		return fmt.Errorf("looking into MANTLET_RUNTIME_DIRECTORY: %w", err)
	}
	for _, e := range entries {
		if !rundir.IsOwn(e.Name()) {
			return fmt.Errorf("MANTLET_RUNTIME_DIRECTORY %q is open to others (%v) and holds %q: mantlet would close to them what they use; %s",
				directory, info.Mode(), e.Name(), right)
		}
	}
	return nil
}

// addresses returns those that Envoy and mantlet listen at.
func addresses(env *schema.Environment, config schema.Config) (all []netip.AddrPort) {
	if state, err := render.Render(config.Mesh, place(env, dns.System())); err == nil {
		all = render.ListenAddresses(state.Bootstrap)
	}
	if status := env.Process.StatusListen(); status.IsValid() {
		all = append(all, status)
	}
	return all
}

// place is where mantlet runs.
func place(env *schema.Environment, resolver *dns.Resolver) render.Place {
	return render.Place{RuntimeDirectory: env.Process.EnvoyDirectory(), NoIPv6: !hasIPv6(), Resolvers: servers(resolver)}
}

// servers are the name servers that a workload asks.
func servers(resolver *dns.Resolver) (all render.Resolvers) {
	copy(all[:], resolver.Servers())
	return all
}

// hasIPv6 tells whether Envoy can bind to ::1. Where it can't, the kernel has no IPv6 and nothing to redirect.
func hasIPv6() bool {
	listener, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		return !errors.Is(err, syscall.EADDRNOTAVAIL) && !errors.Is(err, syscall.EAFNOSUPPORT)
	}
	_ = listener.Close()
	return true
}

// serve runs the daemon and its status socket until SIGTERM or SIGINT; a second one cuts short what is left. A hangup makes
// it read its inputs anew.
func serve(ctx context.Context, hups <-chan os.Signal, daemon *reconcile.Daemon) error {
	ends := make(chan os.Signal, 2)
	signal.Notify(ends, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(ends)
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	status, stopStatus := context.WithCancel(context.WithoutCancel(ctx))
	reload, abort := make(chan struct{}, 1), make(chan struct{})
	var group errgroup.Group
	group.Go(func() error { defer stop(); return daemon.Serve(status) })
	group.Go(func() error { defer stopStatus(); daemon.Run(ctx, reload, abort); return nil })
	group.Go(func() error {
		for {
			select {
			case <-hups:
				select {
				case reload <- struct{}{}:
				default: // one that is still to come will see the same
				}
			case <-ends:
				if ctx.Err() != nil {
					close(abort)
					return nil
				}
				stop()
			case <-status.Done():
				return nil
			}
		}
	})
	return group.Wait()
}
