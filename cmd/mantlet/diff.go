package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"mantlet/reconcile"
	"mantlet/reconcile/envoy"
	"mantlet/reconcile/nft"
)

func diffCommand() *cobra.Command {
	var against string
	cmd := &cobra.Command{
		Use:   "diff [--against FILE]",
		Short: "Say what differs from the configuration; exit 0 nothing, 1 something, 2 it can't be told",
		Long: "Say what the rules in the kernel, Envoy and its certificates have otherwise than the configuration that is there now, and\n" +
			"what each step takes. It asks the kernel and Envoy by itself, in the pod's network namespace, and no mantlet that runs.\n" +
			"With --against it says what another override file would change, and needs neither kernel nor Envoy.",
		Args: cobra.NoArgs,
	}
	output := outputFlag(cmd, "how to say it:", "text", "json")
	level := envoyLogLevelFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		var steps []reconcile.Step
		var err error
		if cmd.Flags().Changed("against") {
			steps, err = compare(against)
		} else {
			steps, err = diffLive(cmd.Context(), level.environ(), cmd.ErrOrStderr())
		}
		if err != nil {
			return err
		}
		if *output == "json" {
			err = printData(cmd.OutOrStdout(), map[string]any{"steps": append([]reconcile.Step{}, steps...)}, "json")
		} else {
			for _, s := range steps {
				_, err = fmt.Fprintln(cmd.OutOrStdout(), s)
			}
		}
		if err == nil && len(steps) > 0 {
			return errNot
		}
		return err
	}
	cmd.Flags().StringVar(&against, "against", "", "the override file to compare with, instead of the one that MANTLET_CONFIG names")
	return cmd
}

// liveLimit bounds how long Envoy may take to answer.
const liveLimit = 10 * time.Second

// diffLive returns the steps from what is in force in this network namespace to the current configuration.
func diffLive(ctx context.Context, environ []string, notes io.Writer) ([]reconcile.Step, error) {
	ctx, cancel := context.WithTimeout(ctx, liveLimit)
	defer cancel()
	env, config, err := load(environ)
	if err != nil {
		return nil, fmt.Errorf("the current configuration: %w", incomparable(err))
	}
	table, err := nft.Open()
	if err != nil {
		return nil, err
	}
	defer func() { _ = table.Close() }()
	rules, err := table.Read()
	if err != nil {
		return nil, err
	}
	process := env.Process
	live, err := envoy.Read(ctx, process.EnvoyDirectory())
	if err != nil {
		return nil, fmt.Errorf("asking Envoy: %w", err)
	}
	certificates, err := envoy.Unpublished(files(process), live, time.Now())
	if err != nil {
		_, _ = fmt.Fprintln(notes, "the certificates are not good, so they are not published:", err)
	}
	return reconcile.Diff(config.Mesh, place(env), reconcile.Live{Rules: rules, Fit: table.Fit, Envoy: live.Envoy, Certificates: certificates})
}

// compare returns the steps from the current configuration to the one with another override file. A configuration that
// is not valid is not comparable: an error other than validate's.
func compare(against string) ([]reconcile.Step, error) {
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
	return reconcile.Compare(from.Mesh, to.Mesh), nil
}

// incomparable makes of what is validate's answer what it is to diff: an error.
func incomparable(err error) error {
	if bad, ok := errors.AsType[invalid](err); ok {
		return bad.error
	}
	return err
}
