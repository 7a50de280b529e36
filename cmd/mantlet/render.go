package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"mantlet/render"
	"mantlet/schema"
)

// load reads the environment and the override file that it names.
func load() (*schema.Environment, schema.Config, error) {
	env, err := schema.ParseEnvironment(os.Environ())
	if err != nil {
		return nil, schema.Config{}, invalid{err}
	}
	config, err := env.Load()
	if err != nil {
		return nil, schema.Config{}, invalid{err}
	}
	return env, config, nil
}

func renderCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "render",
		Short: "Print the desired state: nftables rules, ---, Envoy's bootstrap",
		Long: "Print the desired state that the environment describes: the rules as nft prints them, a line ---, and Envoy's " +
			"bootstrap as JSON. It needs no privileges, no kernel and no Envoy. A rejected configuration prints nothing on stdout.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			env, config, err := load()
			if err != nil {
				return err
			}
			state, err := render.Render(config.Mesh, render.Place{RuntimeDirectory: env.Process.RuntimeDirectory})
			if err != nil {
				return err
			}
			text, err := render.JSON(state.Bootstrap)
			if err != nil {
				return err
			}
			switch output {
			case "text":
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s---\n%s", state.Ruleset.Text(), text)
			case "nft":
				_, err = fmt.Fprint(cmd.OutOrStdout(), state.Ruleset.Text())
			case "envoy":
				_, err = cmd.OutOrStdout().Write(text)
			default:
				return fmt.Errorf("--output %q: must be one of text, nft, envoy", output)
			}
			return err
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "text", "what to print: text (both), nft or envoy")
	return cmd
}

func validateCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "validate",
		Short: "Report all problems of the configuration; exit 0 if there are none, 1 if there are",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, config, err := load()
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "valid: %d ingress entries, %d egress entries\n",
				len(config.Mesh.Ingress), len(config.Mesh.Egress))
			return err
		},
	}
}
