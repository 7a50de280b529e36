package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"mantlet/internal/rundir"
	"mantlet/internal/status"
	"mantlet/schema"
)

// probeLimit bounds a probe: Kubernetes' own default is a second, and a probe that hangs says less than one that fails.
const probeLimit = 3 * time.Second

func probeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "probe {ready|live}",
		Short: "Ask the running mantlet, for exec probes: exit 0 yes, 1 no",
		Example: `  startupProbe:
    exec: {command: [mantlet, probe, ready]}`,
		Args:      isProbe,
		ValidArgs: []string{"ready", "live"},
		RunE: func(cmd *cobra.Command, args []string) error {
			env, err := schema.ParseEnvironment(os.Environ())
			if err != nil {
				return invalid{err}
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), probeLimit)
			defer cancel()
			ok, said, err := probe(ctx, rundir.Directory(env.Process.RuntimeDirectory).StatusSocket(), "/"+args[0]+"z")
			if err != nil {
				_, _ = fmt.Fprintln(cmd.ErrOrStderr(), "mantlet does not answer:", err)
				return errNot
			}
			if !ok {
				_, _ = fmt.Fprintln(cmd.ErrOrStderr(), indented(said, ""))
				return errNot
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), indented(said, ""))
			return err
		},
	}
	return cmd
}

// isProbe accepts the one argument that a probe has.
func isProbe(cmd *cobra.Command, args []string) error {
	const question = "ready or live?"
	switch {
	case len(args) == 0:
		return fmt.Errorf("the probe is missing: %s", question)
	case len(args) > 1:
		return fmt.Errorf("one probe at a time: %s", question)
	case !slices.Contains(cmd.ValidArgs, args[0]):
		return fmt.Errorf("invalid argument %q: %s", args[0], question)
	}
	return nil
}

// probe asks for a path of the status socket and returns whether the answer was 200, and its text.
func probe(ctx context.Context, socket, path string) (ok bool, said string, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://mantlet"+path, nil)
	if err != nil {
		return false, "", err
	}
	response, err := status.OverSocket(socket).Do(request)
	if err != nil {
		return false, "", err
	}
	defer func() { _ = response.Body.Close() }()
	const most = 16 << 20
	text, err := io.ReadAll(io.LimitReader(response.Body, most))
	return response.StatusCode == http.StatusOK, string(text), err
}
