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

// checked is what validate looks at instead of the current environment.
type checked struct {
	file, envFile, manifest, container string
}

// subject is one configuration to look at.
type subject struct {
	name    string // of the object in a manifest, "" for an environment
	environ []string
	named   bool                             // the override file is, by a flag
	file    func(path string) ([]byte, bool) // looks the override file up in a manifest; nil: it is where it is said to be
	link    string                           // where links led to from the env file or the manifest, see schema.Content
}

func validateCommand() *cobra.Command {
	var from checked
	cmd := &cobra.Command{
		Use:   "validate",
		Short: "Report all problems of the configuration; exit 0 if there are none, 1 if there are",
		Long: "Report all problems of the configuration, each with its place, and warn of what is valid but may not be meant.\n" +
			"Without flags it is the current environment's. Exit 0: valid; 1: not valid; 2: it could not be read.",
		Args: noArgs("use --file for an override file, --manifest for a Kubernetes manifest, or --env-file"),
	}
	output := outputFlag(cmd, "how to report:", "text", "json")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		subjects, err := from.subjects()
		if err != nil {
			return err
		}
		var verdicts []verdict
		for _, s := range subjects {
			v := verdict{subject: s}
			v.config, v.warnings, v.err = s.load()
			if v.err != nil && !errors.As(v.err, new(invalid)) {
				return v.err
			}
			if v.err != nil && s.link != "" {
				v.err = invalid{schema.Withhold(v.err, s.link)}
			}
			verdicts = append(verdicts, v)
		}
		if *output == "json" {
			return printVerdicts(cmd, verdicts)
		}
		return sayVerdicts(cmd, verdicts)
	}
	cmd.Flags().StringVar(&from.file, "file", "", "an override file to check instead of the one that MANTLET_CONFIG names")
	cmd.Flags().StringVar(&from.envFile, "env-file", "", "lines NAME=VALUE to check instead of the current environment")
	cmd.Flags().StringVar(&from.manifest, "manifest", "", "a Kubernetes manifest to read the variables, and ConfigMaps, of sidecar containers from")
	cmd.Flags().StringVar(&from.container, "container", "mantlet", "the name of those containers")
	cmd.MarkFlagsMutuallyExclusive("env-file", "manifest")
	return cmd
}

// verdict is what there is to say of a subject.
type verdict struct {
	subject

	config   schema.Config
	warnings []schema.Problem
	err      error // an invalid; nil if all is well
}

func sayVerdicts(cmd *cobra.Command, verdicts []verdict) error {
	var outcome error
	for _, v := range verdicts {
		if v.err != nil {
			_, _ = fmt.Fprintln(cmd.ErrOrStderr(), invalid{fmt.Errorf("%s%w", v.of(), errors.Unwrap(v.err))})
			outcome = errNot
			continue
		}
		for _, w := range v.warnings {
			_, _ = fmt.Fprintf(cmd.ErrOrStderr(), "%swarning: %v\n", v.of(), w)
		}
		_, err := fmt.Fprintf(cmd.OutOrStdout(), "%svalid: %d ingress entries, %d egress entries\n",
			v.of(), len(v.config.Mesh.Ingress), len(v.config.Mesh.Egress))
		if err != nil {
			return err
		}
	}
	return outcome
}

// of starts a line that is about one of several subjects.
func (s subject) of() string {
	if s.name == "" {
		return ""
	}
	return s.name + ": "
}

// found is a problem or a warning, for machines.
type found struct {
	Object string `json:"object,omitempty"` // of a manifest
	Place  string `json:"place"`
	Line   int    `json:"line,omitempty"`
	Column int    `json:"column,omitempty"`
	Path   string `json:"path,omitempty"`
	Value  string `json:"value,omitempty"`
	Reason string `json:"reason"`
}

func printVerdicts(cmd *cobra.Command, verdicts []verdict) error {
	problems, warnings := []found{}, []found{}
	for _, v := range verdicts {
		list := func(to []found, all []schema.Problem) []found {
			for _, p := range all {
				to = append(to, found{v.name, p.Origin.String(), p.Origin.Line, p.Origin.Column, p.Path, p.Value, p.Reason})
			}
			return to
		}
		problems = list(problems, schema.Problems(v.err))
		warnings = list(warnings, v.warnings)
	}
	err := printData(cmd.OutOrStdout(), map[string]any{
		"valid": len(problems) == 0, "problems": problems, "warnings": warnings,
	}, "json")
	if err == nil && len(problems) > 0 {
		return errNot
	}
	return err
}

// subjects returns the configurations to look at.
func (c checked) subjects() ([]subject, error) {
	all := []subject{{environ: os.Environ()}}
	var err error
	switch {
	case c.envFile != "":
		all[0].environ, all[0].link, err = readEnvFile(c.envFile)
	case c.manifest != "":
		all, err = readManifest(c.manifest, c.container)
	}
	if err != nil || c.file == "" {
		return all, err
	}
	file, err := filepath.Abs(c.file)
	for i := range all {
		all[i].named = true
		all[i].environ = append(all[i].environ, "MANTLET_CONFIG="+file)
		all[i].file = nil
	}
	return all, err
}

// load reads the configuration. An override file that the manifest does not have need not be in reach: without it, what the
// environment says is checked, and there is a warning.
func (s subject) load() (schema.Config, []schema.Problem, error) {
	if s.file == nil {
		env, config, err := load(s.environ)
		if err == nil && s.named {
			err = unread(env)
		}
		return config, config.Warnings(), err
	}
	env, err := schema.ParseEnvironment(s.environ)
	config := env.Base()
	content, known := s.file(env.Process.ConfigFile)
	switch {
	case err != nil:
		if known {
			_, err = env.Merge(content) // which tells what is wrong with the file, too
		}
		return schema.Config{}, nil, invalid{err}
	case env.Process.ConfigFile == "" || env.Process.Overrides == schema.OverridesNone:
	case !known:
		return config, append(config.Warnings(), schema.Problem{
			Origin: schema.Origin{Source: env.Process.ConfigFile},
			Reason: "does not stand in the manifest, and was not checked; --file names one to check instead",
		}), nil
	default:
		if config, err = env.Merge(content); err != nil {
			return schema.Config{}, nil, invalid{err}
		}
	}
	return config, config.Warnings(), nil
}

// unread is the error about an override file that was named by a flag, and that the environment does not let mantlet read.
func unread(env *schema.Environment) error {
	if env.ReadsFile() {
		return nil
	}
	return fmt.Errorf("MANTLET_OVERRIDES=%s: the override file would not be read", env.Process.Overrides)
}

// readEnvFile reads lines NAME=VALUE, as `docker run --env-file` does: empty lines and those that start with # are left
// out, and quotes are part of the value. It returns where a link led to, too. The error has all lines that are wrong.
func readEnvFile(path string) (environ []string, link string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, "", fmt.Errorf("reading the env file: %w", err)
	}
	defer func() { _ = f.Close() }()
	link = schema.Link(f)
	scanner := bufio.NewScanner(f)
	const longest = 4 << 20 // far above what a process may be given in one variable
	scanner.Buffer(nil, longest)
	var wrong []error
	for number := 1; scanner.Scan(); number++ {
		line := strings.TrimSuffix(scanner.Text(), "\r")
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if reason := misread(line); reason != "" {
			if link == "" {
				reason = fmt.Sprintf("%q %s", line, reason)
			}
			wrong = append(wrong, fmt.Errorf("reading the env file: %s:%d: %s", path, number, reason))
			continue
		}
		environ = append(environ, line)
	}
	if err := scanner.Err(); err != nil {
		wrong = append(wrong, fmt.Errorf("reading the env file: %w", err))
	}
	return environ, link, errors.Join(wrong...)
}

// misread returns why a line of an env file does not set the variable that it seems to set.
func misread(line string) string {
	name, _, ok := strings.Cut(line, "=")
	switch {
	case strings.HasPrefix(line, "\ufeff"):
		return "starts with a byte order mark (BOM), which would be part of the name; save the file as UTF-8 without a BOM"
	case strings.HasPrefix(line, "export "):
		return "is not NAME=VALUE; leave out export, and quotes around the value"
	case !ok || name == "" || strings.ContainsAny(name, " \t"):
		return "is not NAME=VALUE"
	}
	return ""
}
