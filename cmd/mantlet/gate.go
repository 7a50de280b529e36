package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"

	"mantlet/internal/gate"
	"mantlet/schema"
)

func gateCommand() *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "gate [--timeout 30s] -- COMMAND [ARGS...]",
		Short: "Wait until the pod's mantlet is ready, then become the command: for a workload's own command line",
		Long: `Wait until the pod's mantlet is ready, then become the command.

mantlet listens at the socket that ` + schema.GateVariable + ` names, in a volume that both containers mount; gate reads
the same variable. It needs no privileges. Process id, user, environment, signals and exit code are the command's own.

Exit codes: the command's; 1 not ready within --timeout; 2 wrong usage; 126 the command could not be executed; 127 it was
not found.`,
		Example: `  # In the workload's container. An init container has copied mantlet there: mantlet install /gate
  command: [/gate/mantlet, gate, --, /usr/bin/server, --port=8080]`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return errors.New("the command is missing: mantlet gate -- COMMAND")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if timeout < 0 {
				return fmt.Errorf("--timeout %s: must not be negative", timeout)
			}
			ctx := cmd.Context()
			if timeout > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeoutCause(ctx, timeout, fmt.Errorf("not ready within %s", timeout))
				defer cancel()
			}
			socket, err := gateSocket(os.Getenv(schema.GateVariable))
			if err != nil {
				return err
			}
			debug.FreeOSMemory()
			releaseBinary()
			err = gate.Wait(ctx, socket, func(reason error) {
				_, _ = fmt.Fprintln(cmd.ErrOrStderr(), "mantlet gate: waiting:", reason)
			})
			if err != nil {
				_, _ = fmt.Fprintln(cmd.ErrOrStderr(), "mantlet gate:", err)
				return errNot
			}
			return gate.Exec(args, os.Environ())
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "give up after this time, with exit code 1; 0 waits for ever")
	cmd.Flags().SetInterspersed(false) // what follows the command is the command's
	return cmd
}

// gateSocket returns the path that a value of schema.GateVariable names.
func gateSocket(value string) (string, error) {
	if value == "" {
		return "", fmt.Errorf("%s is not set: it names the socket where mantlet answers, as it does in mantlet's container", schema.GateVariable)
	}
	path, reason := schema.SocketPath(value)
	if reason != "" {
		return "", fmt.Errorf("%s: %q: %s", schema.GateVariable, value, reason)
	}
	return path, nil
}

// execCode returns the exit code for an error of a command that could not be executed.
func execCode(err error) (int, bool) {
	failed, ok := errors.AsType[*gate.ExecError](err)
	if !ok {
		return 0, false
	}
	return failed.Code, true
}
