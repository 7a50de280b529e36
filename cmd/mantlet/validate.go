package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"mantlet/schema"
)

// checked is the configuration that validate looks at instead of the current one.
type checked struct {
	file, envFile, manifest, container string
}

func validateCommand() *cobra.Command {
	var from checked
	var output string
	cmd := &cobra.Command{
		Use:   "validate",
		Short: "Report all problems of the configuration; exit 0 if there are none, 1 if there are",
		Long: "Report all problems of the configuration, each with its place, and warn of what is valid but may not be meant.\n" +
			"Without flags it is the current environment's. Exit 0: valid; 1: not valid; 2: it could not be read.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return fmt.Errorf("--output %q: must be text or json", output)
			}
			config, err := from.load()
			problems := schema.Problems(err)
			if err != nil && !errors.As(err, new(invalid)) {
				return err
			}
			if output == "json" {
				return printVerdict(cmd, config, problems)
			}
			if err != nil {
				return err
			}
			for _, w := range config.Warnings() {
				_, _ = fmt.Fprintln(cmd.ErrOrStderr(), "warning:", w)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "valid: %d ingress entries, %d egress entries\n",
				len(config.Mesh.Ingress), len(config.Mesh.Egress))
			return err
		},
	}
	cmd.Flags().StringVar(&from.file, "file", "", "an override file to check instead of the one that MANTLET_CONFIG names")
	cmd.Flags().StringVar(&from.envFile, "env-file", "", "lines NAME=VALUE to check instead of the current environment")
	cmd.Flags().StringVar(&from.manifest, "manifest", "", "a Kubernetes manifest to read the variables, and ConfigMaps, of a sidecar container from")
	cmd.Flags().StringVar(&from.container, "container", "mantlet", "the name of that container")
	cmd.MarkFlagsMutuallyExclusive("env-file", "manifest")
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return cmd
}

// found is a problem or a warning, for machines.
type found struct {
	Place  string `json:"place"`
	Line   int    `json:"line,omitempty"`
	Column int    `json:"column,omitempty"`
	Path   string `json:"path,omitempty"`
	Value  string `json:"value,omitempty"`
	Reason string `json:"reason"`
}

func printVerdict(cmd *cobra.Command, config schema.Config, problems []schema.Problem) error {
	list := func(all []schema.Problem) []found {
		some := []found{}
		for _, p := range all {
			some = append(some, found{p.Origin.String(), p.Origin.Line, p.Origin.Column, p.Path, p.Value, p.Reason})
		}
		return some
	}
	err := printData(cmd.OutOrStdout(), map[string]any{
		"valid": len(problems) == 0, "problems": list(problems), "warnings": list(config.Warnings()),
	}, "json")
	if err == nil && len(problems) > 0 {
		return errNot
	}
	return err
}

// load reads the configuration to check. An override file of a manifest need not be in reach: without it, what the
// environment says is checked.
func (c checked) load() (schema.Config, error) {
	environ := os.Environ()
	var content []byte
	var err error
	switch {
	case c.envFile != "":
		environ, err = readEnvFile(c.envFile)
	case c.manifest != "":
		environ, content, err = readManifest(c.manifest, c.container)
	}
	if err != nil {
		return schema.Config{}, err
	}
	if c.file != "" {
		path, err := filepath.Abs(c.file)
		if err != nil {
			return schema.Config{}, err
		}
		environ = append(environ, "MANTLET_CONFIG="+path)
	} else if c.manifest != "" {
		return loadContent(environ, content)
	}
	_, config, err := load(environ)
	return config, err
}

// loadContent is load with an override file's content at hand, or without one.
func loadContent(environ []string, content []byte) (schema.Config, error) {
	env, err := schema.ParseEnvironment(environ)
	if err != nil {
		return schema.Config{}, invalid{err}
	}
	config, err := env.Base(), error(nil)
	if content != nil && env.Process.Overrides != schema.OverridesNone {
		config, err = env.Merge(content)
	}
	if err != nil {
		return schema.Config{}, invalid{err}
	}
	return config, nil
}

// readEnvFile reads lines NAME=VALUE, as `docker run --env-file` does: empty lines and those that start with # are left
// out, and quotes mean themselves.
func readEnvFile(path string) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading the env file: %w", err)
	}
	defer func() { _ = f.Close() }()
	var environ []string
	scanner := bufio.NewScanner(f)
	const longest = 4 << 20 // far above what a process may be given in one variable
	scanner.Buffer(nil, longest)
	for number := 1; scanner.Scan(); number++ {
		line := strings.TrimSuffix(scanner.Text(), "\r")
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if name, _, ok := strings.Cut(line, "="); !ok || name == "" {
			return nil, fmt.Errorf("reading the env file: %s:%d: %q is not NAME=VALUE", path, number, line)
		}
		environ = append(environ, line)
	}
	if err := scanner.Err(); err != nil {
		return nil, fmt.Errorf("reading the env file: %w", err)
	}
	return environ, nil
}
