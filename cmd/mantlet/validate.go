package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"mantlet/internal/manifest"
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
	named   bool              // the override file is, by a flag
	isHere  bool              // the environment is this process's own
	link    string            // where links led to from the env file or the manifest, see schema.Content
	sidecar *manifest.Sidecar // nil for an environment

	unknown  []string           // variables whose values are not in the manifest
	findings []manifest.Finding // about the variables
}

func validateCommand() *cobra.Command {
	var from checked
	cmd := &cobra.Command{
		Use:   "validate",
		Short: "Report all problems of the configuration; exit 0 if there are none, 1 if there are",
		Example: `  mantlet validate --file mesh.yaml
  helm template . | mantlet validate --manifest - -o json`,
		Long: "Report all problems of the configuration, each with its place, and warn of what is valid but may not be meant.\n" +
			"Without flags it is the current environment's. A manifest's pods are checked, too: what keeps mantlet from doing its\n" +
			"work in them, and what lets other containers defeat it. Exit 0: valid; 1: not valid; 2: it could not be read.",
		Args: noArgs("use --file for an override file, --manifest for a Kubernetes manifest, or --env-file"),
	}
	output := outputFlag(cmd, "how to report:", "text", "json")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		subjects, err := from.subjects(cmd.InOrStdin())
		if err != nil {
			return err
		}
		var verdicts []verdict
		for _, s := range subjects {
			v, err := s.judge()
			if err != nil {
				return err
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
	cmd.Flags().StringVar(&from.manifest, "manifest", "", "a Kubernetes manifest to check, with its ConfigMaps and Secrets; - is standard input")
	cmd.Flags().StringVar(&from.container, "container", "mantlet", "the name of the sidecar containers in it")
	cmd.MarkFlagsMutuallyExclusive("env-file", "manifest")
	return cmd
}

// subjects returns the configurations to look at.
func (c checked) subjects(stdin io.Reader) ([]subject, error) {
	all := []subject{{environ: os.Environ(), isHere: true}}
	var err error
	switch {
	case c.envFile != "":
		all[0].isHere = false
		all[0].environ, all[0].link, err = readEnvFile(c.envFile)
	case c.manifest != "":
		all, err = readManifest(c.manifest, c.container, stdin)
	}
	if err != nil || c.file == "" {
		return all, err
	}
	file, err := filepath.Abs(c.file)
	for i := range all {
		all[i].named = true
		all[i].environ = append(all[i].environ, "MANTLET_CONFIG="+file)
	}
	return all, err
}

// readManifest returns the configuration of each container of a name.
func readManifest(file, name string, stdin io.Reader) ([]subject, error) {
	source, link := file, ""
	if file == "-" {
		source = "standard input"
	} else {
		f, err := os.Open(file)
		if err != nil {
			return nil, fmt.Errorf("reading the manifest: %w", err)
		}
		defer func() { _ = f.Close() }()
		stdin, link = f, schema.Link(f)
	}
	text, err := io.ReadAll(stdin)
	if err != nil {
		return nil, fmt.Errorf("reading the manifest: %w", err)
	}
	m, err := manifest.Parse(source, text)
	if err != nil {
		return nil, fmt.Errorf("reading the manifest %w", err)
	}
	var all []subject
	for _, sidecar := range m.Sidecars(name) {
		s := subject{name: sidecar.Object(), link: link, sidecar: &sidecar}
		s.environ, s.unknown, s.findings = sidecar.Environ()
		if slices.Contains(s.unknown, "MANTLET_CONFIG") { // else its digest would be one of no file
			s.environ = append(s.environ, "MANTLET_CONFIG_SHA256=")
		}
		all = append(all, s)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("reading the manifest %s: no container is named %q; --container names another", source, name)
	}
	return all, nil
}

// verdict is what there is to say of a subject.
type verdict struct {
	subject

	mesh               schema.Mesh // the zero value if there are problems
	problems, warnings []schema.Problem
}

// judge looks at the configuration, and at the pod that it is in. The error is of a file that cannot be read.
func (s subject) judge() (verdict, error) {
	v := verdict{subject: s}
	env, _ := schema.ParseEnvironment(s.environ) // Load and Merge return its error, too
	config, isPartial, err := s.load(env, &v)
	if bad := new(invalid); errors.As(err, bad) {
		v.problems = schema.Problems(bad.error)
	} else if err != nil {
		return v, err
	}
	v.problems = append(v.problems, s.misplaced(env.Process)...)
	v.warnings = append(v.warnings, config.Warnings()...)
	if s.sidecar != nil {
		mesh := config.Mesh
		if err != nil {
			mesh, isPartial = env.Partial(), true
		}
		s.findings = append(s.findings, s.sidecar.Check(manifest.Settings{
			Process: env.Process, Mesh: &mesh, IsPartial: isPartial || len(s.unknown) > 0, Runs: runs,
		})...)
	}
	for _, f := range s.findings {
		if f.Severity == manifest.Error {
			v.problems = append(v.problems, f.Problem)
		} else {
			v.warnings = append(v.warnings, f.Problem)
		}
	}
	problems, warnings := schema.Join(v.problems), schema.Join(v.warnings)
	if s.link != "" {
		problems, warnings = schema.Withhold(problems, s.link), schema.Withhold(warnings, s.link)
	}
	v.problems, v.warnings = schema.Problems(problems), schema.Problems(warnings)
	if len(v.problems) == 0 {
		v.mesh = config.Mesh
	}
	return v, nil
}

// load reads the configuration, and tells whether it is only a part: an override file that the manifest does not have need
// not be in reach. Without it, what the environment says is checked, and there is a warning.
func (s subject) load(env *schema.Environment, v *verdict) (config schema.Config, isPartial bool, err error) {
	if s.sidecar == nil || s.named {
		config, err = loadFile(env)
		if err == nil && s.named {
			err = unread(env)
		}
		return config, false, err
	}
	content, known := s.sidecar.File(env.Process.ConfigFile)
	if known && env.ReadsFile() {
		config, err = env.Merge(content)
	} else {
		isPartial, config, err = env.ReadsFile(), env.Base(), env.Err()
	}
	if isPartial {
		v.warnings = append(v.warnings, schema.Problem{
			Origin: schema.Origin{Source: env.Process.ConfigFile}, Reason: "is not in the manifest and was not checked; --file names a file to check instead",
		})
	}
	if err != nil {
		return schema.Config{}, isPartial, invalid{err}
	}
	return config, isPartial, nil
}

// misplaced returns why `mantlet run` would refuse where the configuration says that it runs.
func (s subject) misplaced(process schema.Process) []schema.Problem {
	var all []schema.Problem
	add := func(variable, value, reason string) {
		all = append(all, schema.Problem{Origin: schema.Origin{Source: variable}, Value: value, Reason: reason})
	}
	if err := schema.HostNetwork(s.environ); err != nil {
		add("MANTLET_POD_IP", process.PodIP, "is the address of the node, too (MANTLET_HOST_IP): the pod has hostNetwork, and mantlet's rules would close the node; remove hostNetwork")
	}
	const variable = "MANTLET_RUNTIME_DIRECTORY"
	directory := process.RuntimeDirectory
	err := fits(directory)
	if err == nil && s.isHere && os.Geteuid() == 0 {
		err = closable(directory)
	}
	switch {
	case err != nil:
		add(variable, directory, strings.TrimPrefix(err.Error(), fmt.Sprintf("%s %q ", variable, directory)))
	case s.sidecar == nil && manifest.IsShared(directory):
		add(variable, directory, "is used by others, and mantlet would close it to them; name a directory of mantlet's own, or one that does not exist")
	}
	return all
}

// runs returns why a mantlet with these arguments is no sidecar.
func runs(arguments []string) error {
	cmd := runCommand()
	if len(arguments) == 0 || arguments[0] != cmd.Name() {
		return errors.New("only mantlet run is a sidecar")
	}
	return parse(cmd, arguments[1:])
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
