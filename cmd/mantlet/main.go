// Command mantlet is a service-mesh sidecar: it wraps a pod's TCP traffic in mutual TLS. See README.md.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func main() {
	done := make(chan int, 1)
	run := func() { done <- execute(os.Args[1:], os.Stdout, os.Stderr) }
	if filepath.Base(os.Args[0]) == "test" {
		os.Exit(test(os.Args[1:], os.Stderr))
	}
	if os.Getpid() == 1 {
		go run()
		os.Exit(reap(done))
	}
	run()
	os.Exit(<-done)
}

// init keeps main on the process's first thread where that is PID 1 of a container, see reap.
func init() { //nolint:gochecknoinits // later it may be another thread already
	if os.Getpid() == 1 {
		runtime.LockOSThread()
	}
}

// reap reaps orphans until the program is done: the kernel gives them to PID 1, whose first thread becomes their parent.
// It looks for that thread's children only. What mantlet starts itself is another thread's, and os/exec waits for it.
func reap(done <-chan int) (code int) {
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGCHLD)
	for {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG|unix.WNOTHREAD, nil)
			if pid <= 0 && !errors.Is(err, unix.EINTR) {
				break
			}
		}
		select {
		case <-ended:
		case code := <-done:
			return code
		}
	}
}

// Exit codes: 0 all is well, 1 it is not, 2 the command could not do its work.
const (
	exitNot   = 1
	exitError = 2
)

// errNot ends a command whose answer is no and has been given.
var errNot = errors.New("no")

// rootCommand returns the program.
func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "mantlet",
		Short:         "A service-mesh sidecar: never plaintext, never down, and plain about why",
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(runCommand(), renderCommand(), validateCommand(), diffCommand(), statusCommand(), probeCommand(), schemaCommand(), checkCommand(), cleanupCommand(), gateCommand(), installCommand(), injectCommand(), analyzeCommand(), versionCommand())
	return root
}

func execute(args []string, stdout, stderr io.Writer) int {
	root := rootCommand()
	root.SetArgs(commandFirst(args))
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.Execute()
	if errors.As(err, new(logged)) {
		stderr = io.Discard
	}
	if code, ok := execCode(err); ok {
		_, _ = fmt.Fprintln(stderr, "mantlet gate:", err)
		return code
	}
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errNot):
		return exitNot
	case errors.As(err, new(invalid)):
		_, _ = fmt.Fprintln(stderr, err)
		return exitNot
	default:
		_, _ = fmt.Fprintln(stderr, errorLine(err))
		return exitError
	}
}

// commandFirst moves what stands before `run` behind it, and adds the command where only the flag -l of it is given: pods that were
// made for another proxy give no command. A wrong flag is a mistake, and it is run that says so: the pod is closed by then.
func commandFirst(args []string) []string {
	const short, long = "-l", "--" + envoyLogLevel
	if len(args) > 0 && (strings.HasPrefix(args[0], short) || args[0] == long || strings.HasPrefix(args[0], long+"=")) {
		return slices.Concat([]string{"run"}, args)
	}
	i := slices.IndexFunc(args, func(arg string) bool { return !strings.HasPrefix(arg, "-") })
	if i < 0 || args[i] != "run" {
		return args
	}
	return slices.Concat(args[i:i+1], args[:i], args[i+1:])
}

// errorLine is an error with its program's name, as programs have it.
func errorLine(err error) string {
	if errors.As(err, new(unanswered)) { // its first word
		return err.Error()
	}
	return "mantlet: " + err.Error()
}

// invalid is a configuration that was rejected.
type invalid struct{ error }

func (i invalid) Error() string { return "mantlet: the configuration is not valid: " + i.error.Error() }
func (i invalid) Unwrap() error { return i.error }

// version is set by the linker; builds without it have what Go knows of the commit.
var version string

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  noArgs(""),
		Run: func(cmd *cobra.Command, _ []string) {
			_, _ = fmt.Fprintln(cmd.OutOrStdout(), "mantlet", versionText())
		},
	}
}

func versionText() string {
	if info, ok := debug.ReadBuildInfo(); ok && version == "" {
		return info.Main.Version
	}
	return version
}
