// Package inject adds mantlet's sidecar to the pods of Kubernetes manifests, and takes it away again.
//
// It edits text. What it does not add or replace stays as it was, byte for byte; what it adds stands between comments that also hold
// the lines which it replaces. So Remove needs nothing but the text, and Inject first removes what an earlier one added.
package inject

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"mantlet/internal/manifest"
	"mantlet/schema"
)

// Source is a stream of manifests.
type Source struct {
	Name string // places in it are named by it
	Text []byte
}

// Result is what becomes of a source.
type Result struct {
	Text []byte
	// Refused are the problems of the objects that are not in the text, since their pods would not be safe.
	Refused []Finding
	// Warnings are of objects that are in it.
	Warnings []Finding
}

// Finding is a problem or a warning, and the object that it is of, as "Deployment web".
type Finding struct {
	schema.Problem

	Object string
}

// Injector adds sidecars.
type Injector struct {
	Options Options
	// Runs returns why the arguments of a mantlet do not make it run as a sidecar.
	Runs func(arguments []string) error
	// Known are manifests whose ConfigMaps hold the override files of the pods.
	Known []*manifest.Manifest
}

// Inject adds the sidecar to each pod of a source: of the kinds of apps/v1 and batch/v1, Pods and PodTemplates, also within Lists. A
// pod that has a mantlet already, written by hand, stays as it is. What an earlier Inject added is replaced. The error says that
// the source is no manifest.
func (in Injector) Inject(source Source) (Result, error) {
	return in.each(source, func(d *document, out *Result) (string, error) {
		original, err := d.restored()
		if err != nil {
			return "", err
		}
		return in.document(original, out)
	})
}

// Remove takes away what Inject added. What is written by hand stays.
func (in Injector) Remove(source Source) (Result, error) {
	return in.each(source, func(d *document, _ *Result) (string, error) {
		original, err := d.restored()
		if err != nil {
			return "", err
		}
		return original.text, nil
	})
}

func (in Injector) each(source Source, do func(*document, *Result) (string, error)) (Result, error) {
	documents, err := split(source.Name, source.Text)
	if err != nil {
		return Result{}, err
	}
	var out Result
	for _, d := range documents {
		text, err := d.text, error(nil)
		if len(subjects(d.root, "")) > 0 {
			text, err = do(d, &out)
		}
		if refusal := (refusal{}); errors.As(err, &refusal) {
			out.Refused = append(out.Refused, refusal...)
			continue
		}
		if err != nil {
			return Result{}, err
		}
		out.Text = append(out.Text, text...)
	}
	return out, nil
}

// refusal is why an object's pods get no sidecar.
type refusal []Finding

func (r refusal) Error() string { return fmt.Sprintf("%d problems", len(r)) }

// restored returns the document without what inject added.
func (d *document) restored() (*document, error) {
	lines, err := unmark(d.lines, d.root)
	if bad := (damaged{}); errors.As(err, &bad) {
		return nil, fmt.Errorf("%s:%d: %w", d.source, d.first+bad.line, err)
	}
	text := strings.Join(lines, "")
	if text == d.text {
		return d, nil
	}
	return newDocument(d.source, d.first, text)
}

// document returns the text of a document with sidecars. It was restored.
func (in Injector) document(d *document, out *Result) (string, error) {
	var edits []edit
	var refused refusal
	var done []*plan
	for _, s := range subjects(d.root, "") {
		p, err := in.plan(d, s, out)
		if bad := (refusal{}); errors.As(err, &bad) {
			refused = append(refused, bad...)
			continue
		}
		if p != nil {
			edits = append(edits, p.edits()...)
			done = append(done, p)
		}
	}
	if len(refused) > 0 {
		return "", refused
	}
	if len(done) == 0 {
		return d.text, nil
	}
	if isJSON([]byte(d.text)) {
		return "", done[0].refuse(d.root, "%v", errJSON)
	}
	lines, origins := d.apply(edits)
	text := strings.Join(lines, "")
	after, err := newDocument(d.source, d.first, text)
	if err != nil {
		return "", done[0].refuse(d.root, "its layout is one that inject cannot edit (%v); write the pod in block style", err)
	}
	before, err := after.restored()
	if err != nil || before.text != d.text {
		return "", done[0].refuse(d.root, "its layout is one that inject cannot edit; write the pod in block style")
	}
	return text, in.judge(d, text, origins, done, out)
}

// plan is what a pod is given.
type plan struct {
	settings

	document *document
	subject  subject
	tls      certificates
	mesh     schema.Mesh // as far as it is known
	probes   []schema.Probe
	changes  []edit // of containers
}

func (p *plan) refuse(at *yaml.Node, format string, args ...any) refusal {
	return refusal{p.document.finding(p.subject, at, fmt.Sprintf(format, args...))}
}

func (d *document) finding(s subject, at *yaml.Node, reason string) Finding {
	origin := schema.Origin{Source: d.source}
	if at != nil {
		origin.Line, origin.Column = d.first+at.Line, at.Column
	}
	return Finding{schema.Problem{Origin: origin, Path: s.path, Reason: reason}, s.object}
}

// plan returns what a pod is given; nil where it is given nothing. The error is a refusal.
func (in Injector) plan(d *document, s subject, out *Result) (*plan, error) {
	warn := func(at *yaml.Node, reason string) { out.Warnings = append(out.Warnings, d.finding(s, at, reason)) }
	p := &plan{document: d, subject: s}
	var isOut bool
	var notes, wrong []string
	p.settings, isOut, notes, wrong = s.resolve(in.Options)
	if isOut && len(wrong) == 0 {
		return nil, nil
	}
	for _, list := range []string{"initContainers", "containers"} {
		for _, c := range s.containers(list) {
			if text(c, "name") == sidecarName {
				warn(c, "has a container "+sidecarName+" that inject did not add, or whose marks are lost: the pod stays as it is")
				return nil, nil
			}
		}
	}
	for _, note := range notes {
		warn(s.spec, note)
	}
	var refused refusal
	refuse := func(at *yaml.Node, format string, args ...any) {
		refused = append(refused, p.refuse(at, format, args...)...)
	}
	for _, reason := range wrong {
		refuse(s.spec, "%s", reason)
	}
	if len(refused) > 0 {
		return nil, refused
	}
	p.tls = s.certificates(p.tlsSecret)
	problems := p.load(in)
	for _, problem := range problems {
		if source := p.sources[problem.Origin.Source]; source != "" {
			problem.Origin.Source = source
		}
		refused = append(refused, Finding{problem, s.object})
	}
	if len(refused) > 0 {
		return nil, refused
	}
	p.takeOver(refuse, warn)
	if p.gate {
		p.wrap(refuse)
	}
	for _, name := range []string{tlsVolume, runtimeVolume, memoryVolume, configVolume, gateVolume} {
		for _, v := range items(s.spec, "volumes") {
			if text(v, "name") == name {
				refuse(v, "has a volume %s, which is a name of inject's; rename it", name)
			}
		}
	}
	if len(refused) > 0 {
		return nil, refused
	}
	return p, nil
}

// load finds out the mesh of the settings, and returns what is wrong with them.
func (p *plan) load(in Injector) []schema.Problem {
	env, err := schema.ParseEnvironment(p.environ())
	if err != nil {
		return schema.Problems(err)
	}
	p.mesh = env.Base().Mesh
	for _, m := range in.Known {
		content, known := m.Lookup("ConfigMap", p.configMap, p.subject.namespace, p.key)
		if p.configMap == "" || !known {
			continue
		}
		config, err := env.Merge([]byte(content))
		if err != nil {
			return schema.Problems(err)
		}
		p.mesh = config.Mesh
	}
	return nil
}

// edits returns what makes the pod have the sidecar.
func (p *plan) edits() []edit {
	spec, d := p.subject.spec, p.document
	place := 0
	if len(spec.Content) > 0 && !isFlow(spec) {
		k, _ := find(spec, "containers")
		if k == nil {
			k = spec.Content[0]
		}
		place = d.aboveComments(d.starts[k.Line-1])
	}
	init := d.addItems(spec, "initContainers", p.initContainers(), p.tls.after, place)
	volumes := d.addItems(spec, "volumes", p.volumes(), len(items(spec, "volumes")), place)
	return slices.Concat(init, volumes, p.changes)
}

// judge looks at the pods as they are with their sidecars. The error is a refusal.
func (in Injector) judge(d *document, text string, origins []int, done []*plan, out *Result) error {
	m, err := manifest.Parse(d.source, []byte(text))
	if err != nil {
		return refusal{d.finding(done[0].subject, d.root, err.Error())}
	}
	m.Refer(in.Known...)
	sidecars := m.Sidecars(sidecarName)
	var refused refusal
	for _, p := range done {
		i := slices.IndexFunc(sidecars, func(s manifest.Sidecar) bool { return s.Object() == p.subject.object })
		if i < 0 {
			refused = append(refused, p.refuse(d.root, "its layout is one that inject cannot edit; write the pod in block style")...)
			continue
		}
		sidecar := sidecars[i]
		sidecars = slices.Delete(slices.Clone(sidecars), i, i+1)
		for _, f := range in.check(sidecar) {
			if line := f.Origin.Line; line > 0 && line <= len(origins) {
				f.Origin.Line = d.first + origins[line-1] + 1
			}
			if f.Severity == manifest.Error {
				refused = append(refused, Finding{f.Problem, p.subject.object})
			} else {
				out.Warnings = append(out.Warnings, Finding{f.Problem, p.subject.object})
			}
		}
	}
	if len(refused) > 0 {
		return refused
	}
	return nil
}

// check returns what there is to say of a sidecar.
func (in Injector) check(s manifest.Sidecar) []manifest.Finding {
	environ, unknown, findings := s.Environ()
	env, err := schema.ParseEnvironment(environ)
	config := env.Base()
	isPartial := len(unknown) > 0
	if env.ReadsFile() {
		content, known := s.File(env.Process.ConfigFile)
		if known && err == nil {
			config, err = env.Merge(content)
		}
		isPartial = isPartial || !known
	}
	for _, problem := range schema.Problems(err) {
		findings = append(findings, manifest.Finding{Problem: problem, Severity: manifest.Error})
	}
	mesh := config.Mesh
	if err != nil {
		mesh, isPartial = env.Partial(), true
	}
	return append(findings, s.Check(manifest.Settings{Process: env.Process, Mesh: &mesh, IsPartial: isPartial, Runs: in.Runs})...)
}
