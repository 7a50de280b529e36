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
	var against, output string
	cmd := &cobra.Command{
		Use:   "diff --against FILE",
		Short: "Say what another override file would change; exit 0 nothing, 1 something, 2 it can't be told",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return fmt.Errorf("--output %q: must be text or json", output)
			}
			steps, err := compare(against)
			if err != nil {
				return err
			}
			if output == "json" {
				err = printData(cmd.OutOrStdout(), map[string]any{"steps": steps}, "json")
			}
			for _, s := range steps {
				if output == "text" {
					_, err = fmt.Fprintln(cmd.OutOrStdout(), s)
				}
			}
			if err == nil && len(steps) > 0 {
				return errNot
			}
			return err
		},
	}
	cmd.Flags().StringVar(&against, "against", "", "the override file to compare with, instead of the one that MANTLET_CONFIG names")
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
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
		return nil, fmt.Errorf("the current configuration: %w", errors.Unwrap(err))
	}
	_, to, err := load(append(os.Environ(), "MANTLET_CONFIG="+path))
	if err != nil {
		return nil, fmt.Errorf("the configuration with %s: %w", against, errors.Unwrap(err))
	}
	return append([]reconcile.Step{}, reconcile.Compare(from.Mesh, to.Mesh)...), nil
}
