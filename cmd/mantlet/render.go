package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"mantlet/reconcile/dns"
	"mantlet/render"
	"mantlet/schema"
)

// load reads the environment and the override file that it names. The error is an invalid with the problems of both, unless
// the environment is valid and the file cannot be read.
func load(environ []string) (*schema.Environment, schema.Config, error) {
	env, _ := schema.ParseEnvironment(environ) // Load returns its error, too
	config, err := loadFile(env)
	if err != nil {
		return nil, schema.Config{}, err
	}
	return env, config, nil
}

// loadFile is load for an environment that was parsed.
func loadFile(env *schema.Environment) (schema.Config, error) {
	config, err := env.Load()
	if err != nil && !errors.As(err, new(syscall.Errno)) {
		err = invalid{err}
	}
	return config, err
}

// noArgs rejects arguments. A remedy says what takes them, by their name.
func noArgs(remedy string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return nil
		}
		reason := fmt.Sprintf("%s takes no arguments, but got %q", cmd.CommandPath(), args[0])
		if remedy != "" {
			reason += "; " + remedy
		}
		return errors.New(reason)
	}
}

// outputFlag adds the flag -o, whose value is one of the formats, by default the first.
func outputFlag(cmd *cobra.Command, usage string, formats ...string) *string {
	f := &format{formats[0], formats}
	cmd.Flags().VarP(f, "output", "o", usage+" "+strings.Join(formats, ", "))
	return &f.chosen
}

// format implements pflag.Value.
type format struct {
	chosen string
	all    []string
}

func (f *format) String() string { return f.chosen }
func (f *format) Type() string   { return "format" }

func (f *format) Set(name string) error {
	if !slices.Contains(f.all, name) {
		return fmt.Errorf("must be one of %s", strings.Join(f.all, ", "))
	}
	f.chosen = name
	return nil
}

func renderCommand() *cobra.Command {
	var explain bool
	cmd := &cobra.Command{
		Use:   "render",
		Short: "Print the desired state: nftables rules, ---, Envoy's bootstrap",
		Example: `  # The rules, checked by nft.
  EDG_INGRESS_PROXY_CONFIG='web#8080#false' mantlet render -o nft | nft -c -f -

  # Where each value comes from.
  MANTLET_CONFIG=/etc/mantlet/mesh.yaml mantlet render --explain`,
		Long: "Print the desired state that the environment and the override file describe. It needs no privileges, no kernel\n" +
			"and no Envoy. A rejected configuration prints nothing on stdout.\n\n" +
			"  text   the rules as nft prints them, a line ---, the bootstrap as JSON\n" +
			"  nft    the rules, as `nft -f` takes them\n" +
			"  envoy  the bootstrap, as `envoy -c` takes it\n" +
			"  json   all of it: the merged mesh in the form of the override file, rules, bootstrap, its digest\n" +
			"  yaml   the same as YAML",
		Args: noArgs("MANTLET_CONFIG names the override file"),
	}
	output := outputFlag(cmd, "what to print:", "text", "nft", "envoy", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if explain && (*output == "nft" || *output == "envoy") {
			return fmt.Errorf("--explain has no --output %s; use text, json or yaml", *output)
		}
		env, config, err := load(os.Environ())
		if err != nil {
			return err
		}
		if explain {
			return printExplained(cmd.OutOrStdout(), config.Explain(), *output)
		}
		return printState(cmd.OutOrStdout(), env, config, *output)
	}
	cmd.Flags().BoolVar(&explain, "explain", false, "print each value, where it comes from and what it overrode (text, json, yaml)")
	return cmd
}

func printState(to io.Writer, env *schema.Environment, config schema.Config, output string) error {
	state, err := render.Render(config.Mesh, render.Place{RuntimeDirectory: env.Process.EnvoyDirectory(), Resolvers: servers(dns.System())})
	if err != nil {
		return err
	}
	bootstrap, err := render.JSON(state.Bootstrap)
	if err != nil {
		return err
	}
	rules := state.Ruleset.ForUsers(0, uint32(env.Process.EnvoyUID)).Text()
	switch output {
	case "text":
		_, err = fmt.Fprintf(to, "%s---\n%s", rules, bootstrap)
	case "nft":
		_, err = io.WriteString(to, rules)
	case "envoy":
		_, err = to.Write(bootstrap)
	default:
		err = printData(to, map[string]any{
			"mesh": config.Mesh, "rules": rules, "envoy": json.RawMessage(bootstrap), "digest": state.Digest,
		}, output)
	}
	return err
}

// unprintable matches what JSON has as it is, and YAML does not. All JSON that is printed is YAML too, so that a mesh can be
// given back as an override file.
var unprintable = regexp.MustCompile(`[\x7f-\x9f\x{fffe}\x{ffff}]`)

// printData prints what a machine may read, as YAML or else JSON.
func printData(to io.Writer, data any, output string) error {
	var text bytes.Buffer
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	if err := encoder.Encode(data); err != nil {
		return err
	}
	printed := unprintable.ReplaceAllFunc(text.Bytes(), func(char []byte) []byte {
		r, _ := utf8.DecodeRune(char)
		return fmt.Appendf(nil, `\u%04x`, r)
	})
	if output == "yaml" {
		var values any
		if err := yaml.Unmarshal(printed, &values); err != nil {
			return err
		}
		text.Reset()
		encoder := yaml.NewEncoder(&text)
		encoder.SetIndent(2)
		if err := encoder.Encode(values); err != nil {
			return err
		}
		printed = text.Bytes()
	}
	_, err := to.Write(printed)
	return err
}

func printExplained(to io.Writer, all []schema.Explained, output string) error {
	if output != "text" {
		return printData(to, all, output)
	}
	table := tabwriter.NewWriter(to, 0, 0, 3, ' ', 0)
	_, _ = fmt.Fprintln(table, "FIELD\tVALUE\tFROM\tOVERRIDES")
	for _, e := range all {
		var overrides []string
		for _, o := range e.Overrides {
			overrides = append(overrides, fmt.Sprintf("%s (%s)", onLine(o.Value), o.Origin))
		}
		_, _ = fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", e.Path, onLine(e.Value), e.Origin, strings.Join(overrides, ", "))
	}
	return table.Flush()
}

// onLine makes any text fit for a cell of a table.
func onLine(text string) string {
	const most = 60
	quoted := fmt.Sprintf("%q", text)
	plain := quoted == `"`+text+`"` && text != ""
	inner := []rune(quoted[1 : len(quoted)-1])
	if len(inner) > most {
		inner = append(inner[:most], '…')
	}
	if plain {
		return string(inner)
	}
	return `"` + string(inner) + `"`
}

func schemaCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "schema",
		Short: "Print the JSON Schema of the override file",
		Args:  noArgs(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := cmd.OutOrStdout().Write(schema.JSONSchema())
			return err
		},
	}
}
