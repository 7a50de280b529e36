package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"
)

func installCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "install DIRECTORY",
		Short: "Copy this binary into a directory, for an init container: the workload finds `mantlet gate` there",
		Example: `  initContainers:
  - name: mantlet-install
    image: mantlet
    command: [mantlet, install, /gate]`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return fmt.Errorf("one directory is needed, but got %d arguments: mantlet install DIRECTORY", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			path := filepath.Join(args[0], "mantlet")
			if err := install(path); err != nil {
				return fmt.Errorf("installing %s: %w", path, err)
			}
			_, err := fmt.Fprintln(cmd.OutOrStdout(), path)
			return err
		},
	}
}

// install puts a copy of the running binary at path, executable by all. One that is there is replaced as a whole, so that it may
// be in use.
func install(path string) error {
	binary, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer func() { _ = binary.Close() }()
	// The temporary file lies in the same directory: it is on another file system than the image.
	copied, err := renameio.NewPendingFile(path, renameio.WithTempDir(filepath.Dir(path)), renameio.WithPermissions(0o755), renameio.IgnoreUmask())
	if err != nil {
		return err
	}
	_, err = io.Copy(copied, binary)
	if err == nil {
		err = copied.CloseAtomicallyReplace()
	}
	return errors.Join(err, copied.Cleanup())
}
