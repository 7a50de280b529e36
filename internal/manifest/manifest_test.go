package manifest_test

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"mantlet/internal/manifest"
	"mantlet/internal/sandbox"
	"mantlet/schema"
)

// good is a pod of which there is nothing to say.
const good = `
apiVersion: v1
kind: Pod
metadata: {name: shop}
spec:
  securityContext: {seccompProfile: {type: RuntimeDefault}}
  initContainers:
    - name: issuer
      securityContext: {runAsUser: 0, capabilities: {drop: [ALL]}}
      volumeMounts: [{name: tls, mountPath: /tls-config}]
    - name: mantlet
      restartPolicy: Always
      env:
        - {name: EDG_INGRESS_PROXY_CONFIG, value: "tls#8443#false##metrics#7890#true"}
        - {name: MANTLET_STATUS_ADDRESS, value: ":9901"}
        - {name: MANTLET_CONFIG_INLINE, value: 'probes: [{name: shop, http: 8080/healthz}]'}
        - {name: MANTLET_POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        - {name: MANTLET_HOST_IP, valueFrom: {fieldRef: {fieldPath: status.hostIP}}}
      securityContext: {runAsUser: 0, readOnlyRootFilesystem: true, capabilities: {drop: [ALL], add: [NET_ADMIN, NET_RAW, SETUID, SETGID]}}
      startupProbe: {exec: {command: [mantlet, probe, ready]}}
      readinessProbe: {httpGet: {path: /readyz, port: 9901}}
      volumeMounts: [{name: tls, mountPath: /tls-config}, {name: run, mountPath: /run/mantlet}]
  containers:
    - name: shop
      ports: [{name: web, containerPort: 8080}]
      readinessProbe: {httpGet: {path: /probe/shop, port: 9901}}
      securityContext: {runAsUser: 1000, capabilities: {drop: [ALL]}}
  volumes: [{name: tls, emptyDir: {medium: Memory}}, {name: run, emptyDir: {medium: Memory}}]
`

// check returns what is said of the only sidecar of a manifest: severity, path, reason.
func check(t *testing.T, text string) []string {
	t.Helper()
	m, err := manifest.Parse("pod.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	sidecars := m.Sidecars("mantlet")
	if len(sidecars) == 0 {
		t.Fatal("no sidecar")
	}
	environ, unknown, findings := sidecars[0].Environ()
	env, err := schema.ParseEnvironment(environ)
	if err != nil {
		t.Fatal(err)
	}
	mesh := env.Base().Mesh
	findings = append(findings, sidecars[0].Check(manifest.Settings{
		Process: env.Process, Mesh: &mesh, IsPartial: len(unknown) > 0, Runs: func(arguments []string) error {
			if !slices.Equal(arguments, []string{"run"}) {
				return errors.New("bad arguments")
			}
			return nil
		},
	})...)
	var lines []string
	for _, f := range findings {
		if f.Origin.Source != "pod.yaml" || f.Origin.Line == 0 {
			t.Errorf("%v has no place", f)
		}
		lines = append(lines, fmt.Sprintf("%s %s: %s", f.Severity, f.Path, f.Reason))
	}
	return lines
}

func TestCheck(t *testing.T) {
	const shop, mantlet = "spec.containers[shop]", "spec.initContainers[mantlet]"
	ask := func(what string) string {
		return "let mantlet ask: probes: [{name: shop, " + what + "}] and httpGet: {path: /probe/shop, port: 9901}"
	}
	const (
		shopProbe    = "readinessProbe: {httpGet: {path: /probe/shop, port: 9901}}"
		shopSecurity = "securityContext: {runAsUser: 1000, capabilities: {drop: [ALL]}}"
		raw          = " can have NET_RAW, which container runtimes give by default, and so send packets past the rules; drop ALL, or at least NET_RAW"
	)
	for name, c := range map[string]struct {
		old, new string
		want     []string // each may be the start of a finding
	}{
		"good": {"", "", nil},

		// The pod.
		"hostNetwork": {"spec:\n", "spec:\n  hostNetwork: true\n", []string{"error spec.hostNetwork: mantlet's rules would close the node"}},
		"other namespaces": {"spec:\n", "spec:\n  hostPID: true\n  hostIPC: true\n  shareProcessNamespace: true\n", []string{
			"warning spec.hostPID: ", "warning spec.hostIPC: ", "warning spec.shareProcessNamespace: ",
		}},

		// What the workload may do.
		"privileged":  {"{runAsUser: 1000, ", "{runAsUser: 1000, privileged: true, ", []string{"error " + shop + ".securityContext.privileged: "}},
		"NET_ADMIN":   {"{runAsUser: 1000, capabilities: {", "{runAsUser: 1000, capabilities: {add: [net_admin], ", []string{"error " + shop + ".securityContext.capabilities.add: a container with NET_ADMIN can remove"}},
		"CAP_NET_RAW": {"{runAsUser: 1000, capabilities: {", "{runAsUser: 1000, capabilities: {add: [CAP_NET_RAW], ", []string{"error " + shop + ".securityContext.capabilities.add: a container with NET_RAW "}},
		"ALL": {"{runAsUser: 1000, capabilities: {", "{runAsUser: 1000, capabilities: {add: [ALL], ", []string{
			"error " + shop + ".securityContext.capabilities.add: a container with NET_ADMIN", "error " + shop + ".securityContext.capabilities.add: a container with SYS_ADMIN",
			"error " + shop + ".securityContext.capabilities.add: a container with NET_RAW",
		}},
		"root with defaults":          {shopSecurity, "", []string{"warning " + shop + ".securityContext.capabilities.drop: its processes, as root," + raw}},
		"another user with setuid":    {shopSecurity, "securityContext: {runAsNonRoot: true}", []string{"warning " + shop + ".securityContext.capabilities.drop: a setuid program in it" + raw}},
		"another user without setuid": {shopSecurity, "securityContext: {runAsUser: 1000, allowPrivilegeEscalation: false}", nil},
		"root without NET_RAW": {shopSecurity, "securityContext: {capabilities: {drop: [CAP_NET_RAW]}}", []string{
			"warning " + shop + ".securityContext.capabilities.drop: its processes, as root, can have SETUID,",
		}},
		"root without NET_RAW and SETUID":  {shopSecurity, "securityContext: {capabilities: {drop: [CAP_NET_RAW, setuid]}}", nil},
		"Envoy's user":                     {"runAsUser: 1000", "runAsUser: 1337", []string{"error " + shop + ".securityContext.runAsUser: is Envoy's user"}},
		"Envoy's user, of the pod":         {"{seccompProfile", "{runAsUser: 1337, seccompProfile", nil}, // each container has another one
		"Envoy's user, of all in the pod":  {"    - name: shop\n", "    - {name: other, securityContext: {runAsUser: 1337, capabilities: {drop: [ALL]}}}\n    - name: shop\n", []string{"error spec.containers[other].securityContext.runAsUser: is Envoy's user"}},
		"another user of Envoy":            {"      env:\n", "      env:\n        - {name: MANTLET_ENVOY_UID, value: \"1000\"}\n", []string{"error " + shop + ".securityContext.runAsUser: is Envoy's user"}},
		"an init container is one as well": {"{runAsUser: 0, capabilities: {drop: [ALL]}}", "{privileged: true}", []string{"error spec.initContainers[issuer].securityContext.privileged: "}},

		// The kubelet's probes.
		"a probe by HTTP": {shopProbe, "readinessProbe: {httpGet: {path: '/healthz?x=1', port: web}}", []string{
			"error " + shop + ".readinessProbe.httpGet: port 8080 is mtls, and the kubelet has no mesh certificate; " + ask("http: 8080/healthz?x=1"),
		}},
		"a probe by TCP": {shopProbe, "livenessProbe: {tcpSocket: {port: 8081}}", []string{
			"warning " + shop + ".livenessProbe.tcpSocket: port 8081 is mtls, so Envoy accepts this connection even where the workload does not; " + ask("tcp: 8081"),
		}},
		"a probe by gRPC": {shopProbe, "startupProbe: {grpc: {port: 9000, service: a.B}}", []string{
			"error " + shop + ".startupProbe.grpc: port 9000 is mtls, and the kubelet has no mesh certificate; " + ask("grpc: 9000/a.B"),
		}},
		"a hook by HTTP":                {shopProbe, "lifecycle: {preStop: {httpGet: {port: 8080}}, postStart: {exec: {command: [x]}}}", []string{"error " + shop + ".lifecycle.preStop.httpGet: port 8080 is mtls"}},
		"a probe without TLS":           {shopProbe, "readinessProbe: {httpGet: {port: 8443}}", []string{"error " + shop + ".readinessProbe.httpGet: port 8443 is tls, and this probe does not speak TLS"}},
		"a probe with TLS":              {shopProbe, "readinessProbe: {httpGet: {port: 8443, scheme: HTTPS}}", nil},
		"a probe with TLS, as a mesh":   {shopProbe, "readinessProbe: {httpGet: {port: 8444, scheme: HTTPS}}", []string{"error " + shop + ".readinessProbe.httpGet: port 8444 is mtls"}},
		"a probe of a port let through": {shopProbe, "readinessProbe: {httpGet: {port: 7890}}\n      livenessProbe: {tcpSocket: {port: 7890}}", nil},
		"a probe of another host":       {shopProbe, "readinessProbe: {httpGet: {port: 8080, host: example.com}}", nil},
		"a probe that mantlet lacks":    {"/probe/shop", "/probe/shoop", []string{"error " + shop + ".readinessProbe.httpGet: mantlet has no probe named \"shoop\"; add probes: [{name: shoop, http: PORT/PATH}], or choose among shop"}},
		"a path that mantlet lacks":     {"/probe/shop", "/healthz", []string{"error " + shop + ".readinessProbe.httpGet: mantlet serves no such path"}},
		"a probe at another port":       {"/probe/shop, port: 9901", "/probe/shop, port: 9902", []string{"error " + shop + ".readinessProbe.httpGet: mantlet serves this at port 9901 (MANTLET_STATUS_ADDRESS)"}},
		"no status address": {`        - {name: MANTLET_STATUS_ADDRESS, value: ":9901"}` + "\n", "", []string{
			"error " + shop + ".readinessProbe.httpGet: mantlet serves this only where MANTLET_STATUS_ADDRESS is set; set it to :9901",
			"error " + mantlet + ".readinessProbe.httpGet: port 9901 is mtls",
		}},
		"a probe whose port may be another's": {"value: \"tls#8443#false##metrics#7890#true\"}", "valueFrom: {secretKeyRef: {name: s, key: k}}}", []string{
			"warning " + mantlet + ".env[EDG_INGRESS_PROXY_CONFIG]: its value comes from key k of Secret s, which is not in the manifest, so it was not checked",
		}},

		// Ports.
		"the status port":               {"containerPort: 8080", "containerPort: 9901", []string{"error " + shop + ".ports[9901]: is mantlet's status port"}},
		"mantlet's port":                {"containerPort: 8080", "containerPort: 15006", []string{"error " + shop + ".ports[15006]: is the port of one of mantlet's own listeners"}},
		"another protocol":              {"containerPort: 8080", "containerPort: 53, protocol: UDP", []string{"warning " + shop + ".ports[53]: inbound UDP is dropped"}},
		"another protocol, let through": {"containerPort: 8080", "containerPort: 7890, protocol: UDP", nil},

		// mantlet's container.
		"arguments":                {"      restartPolicy: Always\n", "      restartPolicy: Always\n      args: [run]\n", []string{"error " + mantlet + ".args: bad arguments; the image starts mantlet run by itself: remove args"}},
		"a command":                {"      restartPolicy: Always\n", "      restartPolicy: Always\n      command: [/usr/local/bin/mantlet, run]\n", nil},
		"a command and arguments":  {"      restartPolicy: Always\n", "      restartPolicy: Always\n      command: [/usr/local/bin/mantlet]\n      args: [check]\n", []string{"error " + mantlet + ".command: bad arguments"}},
		"a shell":                  {"      restartPolicy: Always\n", "      restartPolicy: Always\n      command: [sh, -c, mantlet run]\n", []string{"warning " + mantlet + ".command: starts another program than mantlet"}},
		"another user":             {"{runAsUser: 0, readOnly", "{runAsUser: 1000, readOnly", []string{"error " + mantlet + ".securityContext.runAsUser: mantlet must be root"}},
		"another user, of the pod": {"{runAsUser: 0, readOnly", "{readOnly", nil},
		"capabilities":             {"add: [NET_ADMIN, NET_RAW, SETUID, SETGID]", "add: [NET_RAW, SETGID]", []string{"error " + mantlet + ".securityContext.capabilities.add: mantlet also needs NET_ADMIN, SETUID"}},
		"default capabilities":     {"capabilities: {drop: [ALL], add: [NET_ADMIN, NET_RAW, SETUID, SETGID]}", "capabilities: {add: [NET_ADMIN]}", nil},
		"no capabilities":          {", capabilities: {drop: [ALL], add: [NET_ADMIN, NET_RAW, SETUID, SETGID]}", "", []string{"warning " + mantlet + ".securityContext.capabilities.add: mantlet also needs NET_ADMIN"}},
		"no native sidecar":        {"      restartPolicy: Always\n", "", []string{"error " + mantlet + ".restartPolicy: an init container has to end"}},
		"no probes": {"      startupProbe: {exec: {command: [mantlet, probe, ready]}}\n      readinessProbe: {httpGet: {path: /readyz, port: 9901}}\n", "", []string{
			"warning " + mantlet + ".startupProbe: is missing", "warning " + mantlet + ".readinessProbe: is missing",
		}},
		"no certificates":                           {"{name: tls, mountPath: /tls-config}, {", "{", []string{"warning " + mantlet + ".volumeMounts: no volume is mounted at /tls-config"}},
		"certificates of nobody":                    {"      volumeMounts: [{name: tls, mountPath: /tls-config}]\n", "", []string{"warning " + mantlet + ".volumeMounts: no other container mounts this emptyDir"}},
		"certificates in a volume of another proxy": {"{name: tls, mountPath: /tls-config}, {", "{name: tls, mountPath: /contrast}, {", nil},
		"certificates elsewhere":                    {"      env:\n", "      env:\n        - {name: MANTLET_TLS_DIRECTORY, value: /certs}\n", []string{"warning " + mantlet + ".volumeMounts: no volume is mounted at /certs"}},
		"no runtime directory":                      {", {name: run, mountPath: /run/mantlet}", "", []string{"error " + mantlet + ".volumeMounts: mantlet cannot write to /run/mantlet"}},
		"a runtime directory on disk":               {"{name: run, emptyDir: {medium: Memory}}", "{name: run, emptyDir: {}}", []string{"warning " + mantlet + ".volumeMounts: the key would be written to the node's disk"}},
		"a shared runtime directory":                {"    - name: shop\n", "    - name: shop\n      volumeMounts: [{name: run, mountPath: /run/x}]\n", []string{"error " + mantlet + ".volumeMounts: holds the key, and container shop mounts it, too"}},
		"a directory of others":                     {"      env:\n", "      env:\n        - {name: MANTLET_RUNTIME_DIRECTORY, value: /tmp}\n", []string{"error " + mantlet + ".env[MANTLET_RUNTIME_DIRECTORY]: others use this directory"}},
		"a file by subPath": {"      volumeMounts: [{name: tls, mountPath: /tls-config}, {", "      envFrom: [{configMapRef: {name: c}}]\n      volumeMounts: [{name: c, mountPath: /c.yaml, subPath: c.yaml}, {name: tls, mountPath: /tls-config}, {", []string{
			"warning " + mantlet + ".volumeMounts: a file that is mounted with subPath never changes",
		}},
		"the node's address": {"status.podIP", "status.hostIP", []string{"error " + mantlet + ".env[MANTLET_POD_IP]: must be the field status.podIP"}},
		"a variable twice":   {"      env:\n", "      env:\n        - {name: MANTLET_STATUS_ADDRESS, value: nonsense}\n", []string{"warning " + mantlet + ".env[MANTLET_STATUS_ADDRESS]: is set more than once"}},
		"two of them":        {"  containers:\n", "  containers:\n    - {name: mantlet, securityContext: {capabilities: {drop: [ALL]}}}\n", []string{"error spec.containers[mantlet]: the pod has two containers of this name"}},
	} {
		t.Run(name, func(t *testing.T) {
			text := strings.Replace(good, c.old, c.new, 1) + "---\nkind: ConfigMap\nmetadata: {name: c}\ndata: {MANTLET_CONFIG: /c.yaml}\n"
			if !strings.Contains(good, c.old) {
				t.Fatalf("%q is not in the pod", c.old)
			}
			got := check(t, text)
			for i, line := range got {
				if i < len(c.want) && strings.HasPrefix(line, c.want[i]) {
					got[i] = c.want[i]
				}
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestKinds checks that a pod is found wherever Kubernetes has one, and that its path is told.
func TestKinds(t *testing.T) {
	const containers = "{hostNetwork: true, containers: [{name: mantlet}]}"
	for kind, c := range map[string]struct{ text, path string }{
		"Pod":         {"spec: " + containers, "spec"},
		"Deployment":  {"spec: {template: {spec: " + containers + "}}", "spec.template.spec"},
		"StatefulSet": {"spec: {template: {spec: " + containers + "}}", "spec.template.spec"},
		"DaemonSet":   {"spec: {template: {spec: " + containers + "}}", "spec.template.spec"},
		"Job":         {"spec: {template: {spec: " + containers + "}}", "spec.template.spec"},
		"CronJob":     {"spec: {jobTemplate: {spec: {template: {spec: " + containers + "}}}}", "spec.jobTemplate.spec.template.spec"},
		"PodTemplate": {"template: {spec: " + containers + "}", "template.spec"},
	} {
		text := "kind: " + kind + "\nmetadata: {name: x}\n" + c.text + "\n"
		list := "kind: List\nitems:\n  - " + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n    ") + "\n"
		for _, text := range []string{text, list} {
			m, err := manifest.Parse("x", []byte(text))
			if err != nil {
				t.Fatal(err)
			}
			all := m.Sidecars("mantlet")
			if len(all) != 1 || all[0].Object() != kind+" x" {
				t.Fatalf("%s: %d sidecars", text, len(all))
			}
			if f := all[0].Check(manifest.Settings{})[0]; f.Path != c.path+".hostNetwork" {
				t.Errorf("%s: %s, want %s", text, f.Path, c.path)
			}
		}
	}
}

// TestValues checks where variables and files come from.
func TestValues(t *testing.T) {
	text := `
kind: ConfigMap
metadata: {name: c}
data: {A: a, B: b, file: of c}
binaryData: {binary: b2YgYw==}
---
kind: ConfigMap
metadata: {name: c, namespace: other}
data: {A: other}
---
kind: Secret
metadata: {name: s}
data: {A: "YQ==", B: "Yg=="}
stringData: {B: over, file: of s}
---
kind: Pod
metadata: {name: p, namespace: own, labels: {l: of a label}, annotations: {x/a: of an annotation}}
spec:
  containers:
    - name: mantlet
      envFrom: [{configMapRef: {name: c}}, {secretRef: {name: s}, prefix: S_}, {configMapRef: {name: missing}}, {secretRef: {name: missing, optional: true}}]
      env:
        - {name: KEY, valueFrom: {configMapKeyRef: {name: c, key: B}}}
        - {name: SECRET, valueFrom: {secretKeyRef: {name: s, key: B}}}
        - {name: LABEL, valueFrom: {fieldRef: {fieldPath: "metadata.labels['l']"}}}
        - {name: ANNOTATION, valueFrom: {fieldRef: {fieldPath: "metadata.annotations['x/a']"}}}
        - {name: NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
        - {name: EXPANDED, value: "$(KEY) $$(KEY) $(NOTHING)"}
        - {name: MANTLET_CONFIG, valueFrom: {secretKeyRef: {name: s, key: missing}}}
        - {name: MANTLET_ACCESS_LOG, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: MANTLET_TLS_MIN_VERSION, valueFrom: {resourceFieldRef: {resource: limits.cpu}}}
        - {name: MANTLET_POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        - {name: OTHER, valueFrom: {secretKeyRef: {name: missing, key: x}}}
      volumeMounts:
        - {name: c, mountPath: /c}
        - {name: s, mountPath: /s}
        - {name: all, mountPath: /all}
        - {name: s, mountPath: /one, subPath: file}
  volumes:
    - {name: c, configMap: {name: c}}
    - {name: s, secret: {secretName: s, items: [{key: file, path: sub/x}]}}
    - {name: all, projected: {sources: [{secret: {name: s}}, {configMap: {name: c}}]}}
`
	m, err := manifest.Parse("x", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	s := m.Sidecars("mantlet")[0]
	environ, unknown, findings := s.Environ()
	slices.Sort(environ)
	want := []string{
		"A=a", "ANNOTATION=of an annotation", "B=b", "EXPANDED=b $(KEY) $(NOTHING)", "KEY=b", "LABEL=of a label", "NAMESPACE=own", "SECRET=over",
		"S_A=a", "S_B=over", "S_file=of s", "binary=of c", "file=of c",
	}
	if diff := cmp.Diff(want, environ); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"MANTLET_CONFIG", "MANTLET_ACCESS_LOG", "MANTLET_TLS_MIN_VERSION"}, unknown); diff != "" {
		t.Error(diff)
	}
	var reasons []string
	for _, f := range findings {
		reasons = append(reasons, fmt.Sprintf("%d %s %s", f.Origin.Line, f.Severity, f.Reason))
	}
	if diff := cmp.Diff([]string{
		`21 warning the variables of ConfigMap "missing" are not in the manifest, so they were not checked`,
		`21 warning the variables of Secret "missing" are not in the manifest, so they were not checked`,
		"29 warning its value comes from key missing of Secret s, which is not in the manifest, so it was not checked",
		"30 warning its value comes from the field metadata.name, which is not in the manifest, so it was not checked",
		"31 warning its value comes from a source, which is not in the manifest, so it was not checked",
	}, reasons); diff != "" {
		t.Error(diff)
	}
	for path, want := range map[string]string{
		"/c/file": "of c", "/c/binary": "of c", "/s/sub/x": "of s", "/s/file": "", "/all/file": "of s", "/all/binary": "of c", "/all/missing": "", "/elsewhere": "",
	} {
		if got, ok := s.File(path); string(got) != want || ok != (want != "") {
			t.Errorf("%s: %q, %t, want %q", path, got, ok, want)
		}
	}
}

// TestParseRefuses has what is no manifest, and what an operator reads then.
func TestParseRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"kind: Pod\n\tspec: {}\n":                                   "x: not valid YAML: line 2: found a tab character that violates indentation",
		"kind: Pod\nspec: {{ .Values.spec }}\n":                     "x:2: not rendered: run helm template first",
		"{{- if .Values.on }}\nkind: Pod\n{{- end }}\n":             "x: not rendered: run helm template first",
		"kind: Pod\nmetadata: {name: '{{ .Release.Name }}-x'}\n":    "x:2: not rendered: run helm template first",
		"kind: Pod\nspec: {containers: [{name: a, env: {A: b}}]}\n": "x: line 2: unexpected type: a mapping",
		"kind: Secret\nmetadata: {name: s}\ndata: {k: '*'}\n":       `x: Secret s: the value of key "k" is not base64: illegal base64 data at input byte 0`,
		"- a\n":  "x: line 1: unexpected type: a list",
		"text\n": "x: line 1: unexpected type: text `text`",
	} {
		if _, err := manifest.Parse("x", []byte(text)); err == nil || err.Error() != want {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
	for _, text := range []string{
		"kind: ConfigMap\ndata:\n  alert: '{{ .Values.x }} {{ $labels.pod }}'\n", "kind: Banner\nspec: welcome\nitems: [1, 2]\n", "", "---\n---\n", "kind: Set\nspec: {containers: [a]}\n",
		"kind: Pod\nspec: {containers: [{name: a, args: ['{{ .Labels.x }}']}]}\n",
	} {
		if _, err := manifest.Parse("x", []byte(text)); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// TestExamples checks that there is nothing to say of the pods that are shown as examples.
func TestExamples(t *testing.T) {
	for _, file := range []string{"web.yaml", "clients.yaml"} {
		text, err := os.ReadFile("../../examples/" + file)
		if err != nil {
			t.Fatal(err)
		}
		if lines := check(t, string(text)); len(lines) > 0 {
			t.Errorf("%s: %q", file, lines)
		}
	}
}

// TestNeeds checks that what a manifest has to give is what mantlet takes.
func TestNeeds(t *testing.T) {
	for _, need := range sandbox.Needs(1337) {
		old := "add: [NET_ADMIN, NET_RAW, SETUID, SETGID]"
		without := strings.Replace(old, need.Name, "CHOWN", 1)
		if lines := check(t, strings.Replace(good, old, without, 1)); len(lines) != 1 || !strings.HasSuffix(lines[0], "mantlet also needs "+need.Name) {
			t.Errorf("without %s: %q", need.Name, lines)
		}
	}
}

// FuzzParse gives a manifest any text: what is said of it has a place, and fits a line.
func FuzzParse(f *testing.F) {
	f.Add([]byte(good))
	for _, file := range []string{"web.yaml", "clients.yaml"} {
		text, err := os.ReadFile("../../examples/" + file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Add([]byte("kind: List\nitems: [{kind: Secret, data: {a: b}}, {spec: {containers: [{name: mantlet, env: [{name: A, valueFrom: {}}], envFrom: [{}]}]}}]\n"))
	f.Add([]byte("a: &a [*a]\nspec: {containers: [{name: mantlet, ports: [{}], readinessProbe: {httpGet: {}}}]}\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := manifest.Parse("x", text)
		if err != nil {
			return
		}
		for _, s := range m.Sidecars("mantlet") {
			environ, _, findings := s.Environ()
			env, _ := schema.ParseEnvironment(environ)
			_, _ = s.File(env.Process.ConfigFile)
			mesh := env.Partial()
			findings = append(findings, s.Check(manifest.Settings{Process: env.Process, Mesh: &mesh})...)
			for _, f := range append(findings, s.Check(manifest.Settings{})...) {
				if f.Origin.Source != "x" || f.Reason == "" || f.Path == "" {
					t.Errorf("%#v", f)
				}
			}
		}
	})
}
