package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"mantlet/internal/inject"
	"mantlet/schema"
)

func injectCommand() *cobra.Command {
	var options inject.Options
	var remove, isDiff bool
	cmd := &cobra.Command{
		Use:   "inject [FILE...|-]",
		Short: "Add the sidecar to the pods of Kubernetes manifests, and write them to standard output",
		Long: `Add the sidecar to the pods of Kubernetes manifests, and write them to standard output.

Pods of Deployments, StatefulSets, DaemonSets, ReplicaSets, Jobs and CronJobs, Pods and PodTemplates get it, also within Lists and
in files of several documents. Everything else is written as it is, byte for byte. Without files, or for -, standard input is read.

What is added stands between comments, which also hold the lines that it replaces: --remove gives back the manifest as it was,
and another inject replaces what an earlier one added. The kubelet's probes of ports that need a mesh certificate become
probes of mantlet's. Egress entries with a host name get it as their serverNames.

Annotations of the pod's template, or of the object itself, say what a pod is given. They come before the flags:

  mantlet/ingress, mantlet/egress       the entries, as in EDG_INGRESS_PROXY_CONFIG and EDG_EGRESS_PROXY_CONFIG
  mantlet/config-map                    the ConfigMap with the override file: NAME (key mantlet.yaml) or NAME/KEY
  mantlet/tls-secret                    the Secret with certChain.pem, key.pem and mesh-ca.pem
  mantlet/status-port, mantlet/image, mantlet/gate
  mantlet/inject: "false"               the pod gets no sidecar
  contrast.edgeless.systems/servicemesh-ingress, -egress, -admin-interface-port

A pod that would not be safe is refused with the reasons, and its object is left out: a workload with NET_ADMIN, for example.

Exit codes: 0 done; 1 an object was refused, or with --diff there is a difference; 2 the input could not be read.`,
		Example: `  mantlet inject deployment.yaml | kubectl apply -f -
  mantlet inject --ingress 'web#8080#false' --tls-secret web-mesh --gate deployment.yaml
  helm template shop ./chart | mantlet inject - | kubectl apply -f -
  mantlet inject --diff deployment.yaml
  mantlet inject --remove injected.yaml > deployment.yaml`,
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		sources, err := readSources(args, cmd.InOrStdin())
		if err != nil {
			return err
		}
		in := inject.Injector{Options: options, Runs: runs}
		if in.Known, err = parseSources(sources); err != nil {
			return err
		}
		var outcome error
		var before []byte
		for _, s := range sources {
			do := in.Inject
			if remove {
				do = in.Remove
			}
			result, err := do(s)
			if err != nil {
				return err
			}
			if sayFindings(cmd.ErrOrStderr(), result) {
				outcome = errNot
			}
			text := result.Text
			if isDiff {
				text = inject.Diff(s, result)
				if len(text) > 0 {
					outcome = errNot
				}
			} else {
				text = inject.Follow(before, text)
				before = append(before, text...)
			}
			if _, err := cmd.OutOrStdout().Write(text); err != nil {
				return err
			}
		}
		return outcome
	}
	flags := cmd.Flags()
	flags.StringVar(&options.Ingress, "ingress", "", "ingress entries name#port#disableTLS, joined by ##")
	flags.StringVar(&options.Egress, "egress", "", "egress entries name#listen-ip:listen-port#host:port, joined by ##")
	flags.StringVar(&options.ConfigMap, "config-map", "", "the ConfigMap with the override file, NAME or NAME/KEY")
	flags.StringVar(&options.TLSSecret, "tls-secret", "", "the Secret with the certificates; without it, a volume that the pod mounts at /tls-config or /contrast")
	flags.StringVar(&options.StatusPort, "status-port", "", "where mantlet serves its status; without it 9901, where probes need it")
	flags.StringVar(&options.Image, "image", "", "the image of mantlet (default "+inject.DefaultImage+")")
	flags.BoolVar(&options.Gate, "gate", false, "have the containers' commands wait until mantlet is ready")
	flags.BoolVar(&options.NoServerNames, "no-server-names", false, "accept the certificate of any workload of the mesh from egress entries' hosts")
	flags.BoolVar(&remove, "remove", false, "take away what inject added")
	flags.BoolVar(&isDiff, "diff", false, "print a unified diff instead; exit 1 if there is a difference")
	return cmd
}

// readSources reads the files, or standard input for - and where there is none.
func readSources(files []string, stdin io.Reader) ([]inject.Source, error) {
	if len(files) == 0 {
		files = []string{"-"}
	}
	var all []inject.Source
	for _, file := range files {
		source := inject.Source{Name: file}
		var err error
		if file == "-" {
			source.Name = "standard input"
			source.Text, err = io.ReadAll(stdin)
		} else {
			source.Text, err = os.ReadFile(file)
		}
		if err != nil {
			return nil, fmt.Errorf("reading the manifest: %w", err)
		}
		all = append(all, source)
	}
	return all, nil
}

// sayFindings says what there is to say, and reports whether something was refused.
func sayFindings(to io.Writer, result inject.Result) bool {
	objects := map[string][]schema.Problem{}
	var order []string
	for _, f := range result.Refused {
		if objects[f.Object] == nil {
			order = append(order, f.Object)
		}
		objects[f.Object] = append(objects[f.Object], f.Problem)
	}
	for _, object := range order {
		_, _ = fmt.Fprintf(to, "mantlet: %s is refused and left out: %v\n", object, errors.Join(schema.Join(objects[object])))
	}
	var verdicts []verdict
	for _, f := range result.Warnings {
		verdicts = append(verdicts, verdict{subject: subject{name: f.Object}, warnings: []schema.Problem{f.Problem}})
	}
	for _, w := range warnings(verdicts) {
		w.say(to)
	}
	return len(order) > 0
}
