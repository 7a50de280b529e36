package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"mantlet/reconcile"
)

func diffCommand() *cobra.Command {
	var against string
	cmd := &cobra.Command{
		Use:   "diff --against FILE",
		Short: "Say what another override file would change; exit 0 nothing, 1 something, 2 it can't be told",
		Args:  cobra.NoArgs,
	}
	output := outputFlag(cmd, "how to say it:", "text", "json")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		steps, err := compare(against)
		if err != nil {
			return err
		}
		if *output == "json" {
			err = printData(cmd.OutOrStdout(), map[string]any{"steps": steps}, "json")
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
	if err := cmd.MarkFlagRequired("against"); err != nil {
		panic(err)
	}
	return cmd
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
	return append([]reconcile.Step{}, reconcile.Compare(from.Mesh, to.Mesh)...), nil
}

// incomparable makes of what is validate's answer what it is to diff: an error.
func incomparable(err error) error {
	if bad, ok := errors.AsType[invalid](err); ok {
		return bad.error
	}
	return err
}
