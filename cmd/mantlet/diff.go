package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"mantlet/internal/rundir"
	"mantlet/internal/status"
	"mantlet/reconcile"
	"mantlet/reconcile/dns"
	"mantlet/reconcile/envoy"
	"mantlet/reconcile/nft"
	"mantlet/reconcile/routes"
	"mantlet/render"
	"mantlet/schema"
)

func diffCommand() *cobra.Command {
	var against string
	var verbose bool
	cmd := &cobra.Command{
		Use:   "diff [--against FILE]",
		Short: "Say what differs from the configuration; exit 0 nothing, 1 something, 2 it can't be told",
		Example: `  # What is in force otherwise than the configuration says.
  mantlet diff

  # What another override file would change.
  mantlet diff --against new.yaml`,
		Long: "Say what the rules in the kernel, Envoy and its certificates have otherwise than the configuration that is there now, in\n" +
			"its words, and what each step takes. It asks the kernel and Envoy by itself, in the pod's network namespace, and no mantlet that runs.\n" +
			"With --against it says what another override file would change, and needs neither kernel nor Envoy. If a mantlet runs here, it is\n" +
			"asked how many open connections each step would end.",
		Args: noArgs("--against names another override file to compare with"),
	}
	output := outputFlag(cmd, "how to say it:", "text", "json")
	level := envoyLogLevelFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		var d reconcile.Difference
		var err error
		if cmd.Flags().Changed("against") {
			d.Steps, err = compare(cmd.Context(), against)
		} else {
			d, err = diffLive(cmd.Context(), level.environ(), cmd.ErrOrStderr())
		}
		if err != nil {
			return err
		}
		if *output == "json" {
			d.Steps = append([]reconcile.Step{}, d.Steps...)
			err = printData(cmd.OutOrStdout(), d, "json")
		} else {
			err = printDifference(cmd.OutOrStdout(), d, verbose)
		}
		if err == nil && len(d.Steps) > 0 {
			return errNot
		}
		return err
	}
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "list the rules, and the fields of Envoy's bootstrap, that differ, too")
	cmd.Flags().StringVar(&against, "against", "", "the override file to compare with, instead of the one that MANTLET_CONFIG names")
	return cmd
}

// printDifference prints the steps and, where all is asked for, what they change.
func printDifference(to io.Writer, d reconcile.Difference, all bool) (err error) {
	for _, s := range d.Steps {
		_, err = fmt.Fprintln(to, printable(s.String()))
	}
	if all {
		for _, line := range d.Details {
			_, err = fmt.Fprintln(to, " ", printable(line))
		}
	}
	return err
}

// liveLimit bounds how long Envoy may take to answer.
const liveLimit = 10 * time.Second

// diffLive returns what leads from what is in force in this network namespace to the current configuration.
func diffLive(ctx context.Context, environ []string, notes io.Writer) (d reconcile.Difference, err error) {
	ctx, cancel := context.WithTimeout(ctx, liveLimit)
	defer cancel()
	env, config, err := load(environ)
	if err != nil {
		return d, fmt.Errorf("the current configuration: %w", incomparable(err))
	}
	table, err := nft.Open()
	if err != nil {
		return d, err
	}
	defer func() { _ = table.Close() }()
	table.EnvoyUID = uint32(env.Process.EnvoyUID)
	rules, err := table.Read()
	if err != nil {
		return d, err
	}
	process := env.Process
	running, published, err := envoy.Read(ctx, process.EnvoyDirectory())
	if err != nil {
		return d, fmt.Errorf("asking Envoy: %w", err)
	}
	certificates, err := published.Differences(process.TLS, time.Now())
	if err != nil {
		_, _ = fmt.Fprintln(notes, "the certificates are not good, so they are not published:", err)
	}
	return reconcile.Diff(config.Mesh, place(env, dns.System()), reconcile.Live{Rules: rules, Routes: routes.Kernel{}.Check, Fit: table.Fit, Envoy: running, Certificates: certificates})
}

// compare returns the steps from the current configuration to the one with another override file. A configuration that
// is not valid is not comparable: an error other than validate's.
func compare(ctx context.Context, against string) ([]reconcile.Step, error) {
	path, err := filepath.Abs(against)
	if err != nil {
		return nil, err
	}
	_, from, err := load(os.Environ())
	if err != nil {
		return nil, fmt.Errorf("the current configuration: %w", incomparable(err))
	}
	env, to, err := load(append(os.Environ(), "MANTLET_CONFIG="+path))
	if err == nil {
		err = unread(env)
	}
	if err != nil {
		return nil, fmt.Errorf("the configuration with %s: %w", against, incomparable(err))
	}
	steps := reconcile.Compare(from.Mesh, to.Mesh)
	if f, err := forecast(ctx, env.Process.RuntimeDirectory, to.Mesh); err == nil {
		reconcile.AddForecast(steps, from.Mesh, to.Mesh, f)
	}
	return steps, nil
}

// forecast asks the mantlet that runs with a runtime directory which open connections a mesh would end. It fails if none runs.
func forecast(ctx context.Context, directory string, mesh schema.Mesh) (f status.Forecast, err error) {
	ctx, cancel := context.WithTimeout(ctx, liveLimit)
	defer cancel()
	text, err := render.MarshalMesh(mesh)
	if err != nil {
		return f, err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://mantlet"+status.ForecastPath, bytes.NewReader(text))
	if err != nil {
		return f, err
	}
	response, err := status.OverSocket(rundir.Directory(directory).StatusSocket()).Do(request)
	if err != nil {
		return f, err
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode != http.StatusOK {
		return f, fmt.Errorf("mantlet answers %s", response.Status)
	}
	return f, json.NewDecoder(response.Body).Decode(&f)
}

// incomparable makes of what is validate's answer what it is to diff: an error.
func incomparable(err error) error {
	if bad, ok := errors.AsType[invalid](err); ok {
		return bad.error
	}
	return err
}
