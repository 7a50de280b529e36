package main

import (
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"mantlet/internal/analyze"
	"mantlet/internal/inject"
	"mantlet/internal/manifest"
	"mantlet/schema"
)

func analyzeCommand() *cobra.Command {
	var containers []string
	cmd := &cobra.Command{
		Use:   "analyze [FILE|DIRECTORY...|-]",
		Short: "Say what the pods of manifests are reachable by and what they reach, and find mistakes between them",
		Long: `Say what the pods of manifests are reachable by and what they reach, and find mistakes between them.

All manifests are looked at together: those of the files, of the directories and their subdirectories (.yaml, .yml, .json), or of
standard input. Egress entries are followed through Services to the pods that they lead to, and held against the ingress there:

  no Service or pod of that name, a port that the Service does not have, a targetPort that no container has
  a pod without mantlet, a port that is passthrough, mantlet's own ports
  a caller that is not in the allow list, an endpoint that is not in serverNames
  certificates of different meshes, Secrets that lack a file

Names are those of the certificate, where its Secret is in the manifests; else that of the workload and those of its Services.
What validate --manifest says of each pod is told, too.

Exit codes: 0 no problems; 1 problems; 2 the input could not be read.`,
		Example: `  mantlet analyze deploy/
  kustomize build overlays/production | mantlet analyze
  helm template shop ./chart | mantlet inject | mantlet analyze -o json`,
	}
	output := outputFlag(cmd, "how to report:", "text", "json")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		files, err := manifestFiles(args)
		if err != nil {
			return err
		}
		sources, err := readSources(files, cmd.InOrStdin())
		if err != nil {
			return err
		}
		manifests, err := parseSources(sources)
		if err != nil {
			return err
		}
		reports := analyze.Analyzer{Sidecars: containers, Runs: runs}.Analyze(manifests)
		if len(reports) == 0 {
			return fmt.Errorf("analyzing %s: no pods in the manifests", strings.Join(files, ", "))
		}
		if *output == "json" {
			err = printReports(cmd.OutOrStdout(), reports)
		} else {
			err = sayReports(cmd.OutOrStdout(), reports)
		}
		if err == nil && slices.ContainsFunc(reports, func(r analyze.Report) bool { return len(r.Problems) > 0 }) {
			return errNot
		}
		return err
	}
	cmd.Flags().StringSliceVar(&containers, "container", []string{"mantlet", "contrast-service-mesh"}, "the names of the sidecar containers")
	return cmd
}

// manifestFiles returns the files, and those of the directories in their order.
func manifestFiles(args []string) ([]string, error) {
	if len(args) == 0 {
		return []string{"-"}, nil
	}
	var all []string
	for _, arg := range args {
		if arg == "-" {
			all = append(all, arg)
			continue
		}
		err := filepath.WalkDir(arg, func(path string, entry fs.DirEntry, err error) error {
			isManifest := path == arg || slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(path))
			if err == nil && !entry.IsDir() && isManifest {
				all = append(all, path)
			}
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("reading the manifests: %w", err)
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("reading the manifests: no .yaml, .yml or .json in %s", strings.Join(args, ", "))
	}
	return all, nil
}

func parseSources(sources []inject.Source) ([]*manifest.Manifest, error) {
	var all []*manifest.Manifest
	for _, s := range sources {
		m, err := manifest.Parse(s.Name, s.Text)
		if err != nil {
			return nil, fmt.Errorf("reading the manifest %w", err)
		}
		all = append(all, m)
	}
	return all, nil
}

func sayReports(to io.Writer, reports []analyze.Report) error {
	var b strings.Builder
	for i, r := range reports {
		if i > 0 {
			b.WriteString("\n")
		}
		b.WriteString(r.Object)
		if r.Namespace != "" {
			fmt.Fprintf(&b, " (namespace %s)", r.Namespace)
		}
		b.WriteString("\n")
		section := func(title string, lines []string) {
			if len(lines) > 0 {
				fmt.Fprintf(&b, "  %s\n    %s\n", title, strings.Join(lines, "\n    "))
			}
		}
		section("lets in", r.Inbound)
		section("is called by", r.Callers)
		section("reaches", r.Outbound)
		for _, p := range r.Problems {
			fmt.Fprintf(&b, "  problem: %v\n", p)
		}
		for _, w := range warnings([]verdict{{warnings: r.Warnings}}) {
			b.WriteString("  ")
			w.say(&b)
		}
	}
	_, err := io.WriteString(to, b.String())
	return err
}

func printReports(to io.Writer, reports []analyze.Report) error {
	type pod struct {
		analyze.Report

		Problems []found `json:"problems"`
		Warnings []found `json:"warnings"`
	}
	findings := func(r analyze.Report, all []schema.Problem) []found {
		list := []found{}
		for _, p := range all {
			list = append(list, findingOf(r.Object, p))
		}
		return list
	}
	pods := []pod{}
	for _, r := range reports {
		pods = append(pods, pod{r, findings(r, r.Problems), findings(r, r.Warnings)})
	}
	return printData(to, map[string]any{"pods": pods}, "json")
}
