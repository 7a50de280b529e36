package main

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/spf13/cobra"

	"mantlet/internal/sandbox"
	"mantlet/reconcile/nft"
	"mantlet/reconcile/routes"
	"mantlet/render"
)

func cleanupCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "cleanup",
		Short:   "Remove the rules that a mantlet left in this network namespace; everything comes in again",
		Example: `  nsenter --net=/proc/PID/ns/net mantlet cleanup`,
		Long: "Remove the table inet mantlet from this network namespace: the rules that a mantlet left when it ended, and its\n" +
			"policy routes. From then on everything comes in as if there had been no mantlet. A mantlet that runs is not disturbed: cleanup ends\n" +
			"with exit code 2. It needs the capability NET_ADMIN.",
		Args: noArgs(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			removed, err := cleanup()
			if err != nil {
				return err
			}
			said := "there is no table inet " + render.Table + " in this network namespace"
			if removed {
				said = "removed the table inet " + render.Table + ": everything comes in, as without mantlet"
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), said)
			return err
		},
	}
}

// cleanup removes the table and reports whether there was one.
func cleanup() (bool, error) {
	table, err := nft.Open()
	if err != nil {
		return false, err
	}
	removed, err := table.Remove()
	if err == nil {
		_, err = routes.Kernel{}.Repair(render.Routes{})
	}
	if errors.Is(err, syscall.EPERM) {
		err = errors.Join(err, sandbox.Missing(sandbox.Needs(os.Geteuid())[:1])) // NET_ADMIN
	}
	return removed, errors.Join(err, table.Close())
}
