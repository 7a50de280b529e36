// Command mantlet is a service-mesh sidecar: it wraps a pod's TCP traffic in mutual TLS. See README.md.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"
)

func main() { os.Exit(execute(os.Args[1:], os.Stdout, os.Stderr)) }

// Exit codes: 0 all is well, 1 it is not, 2 the command could not do its work.
const (
	exitNot   = 1
	exitError = 2
)

// errNot ends a command whose answer is no and has been given.
var errNot = errors.New("no")

func execute(args []string, stdout, stderr io.Writer) int {
	root := &cobra.Command{
		Use:           "mantlet",
		Short:         "A service-mesh sidecar: never plaintext, never down, and plain about why",
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(runCommand(), renderCommand(), validateCommand(), diffCommand(), statusCommand(), probeCommand(), schemaCommand(), checkCommand(), versionCommand())
	root.CompletionOptions.HiddenDefaultCmd = true
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.Execute()
	if errors.As(err, new(logged)) {
		stderr = io.Discard
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
		_, _ = fmt.Fprintln(stderr, "mantlet:", err)
		return exitError
	}
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
		Args:  cobra.NoArgs,
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
