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
		if bad := (refusal{}); errors.As(err, &bad) {
			out.Refused = append(out.Refused, bad...)
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
	say := &report{document: d}
	var edits []edit
	var done []*plan
	for _, s := range subjects(d.root, "") {
		say.subject = s
		if p := in.plan(s, say); p != nil {
			edits = append(edits, p.edits()...)
			done = append(done, p)
		}
	}
	if len(done) == 0 && len(say.refused) == 0 {
		out.Warnings = append(out.Warnings, say.warnings...)
		return d.text, nil
	}
	text := ""
	if len(say.refused) == 0 {
		text = in.edited(d, edits, done, say)
	}
	if len(say.refused) > 0 {
		return "", say.all()
	}
	out.Warnings = append(out.Warnings, say.warnings...)
	return text, nil
}

// edited returns the text of a document with edits, if it is what it should be then.
func (in Injector) edited(d *document, edits []edit, done []*plan, say *report) string {
	say.subject = done[0].subject
	if d.isJSON() {
		say.refuse(d.root, "", "%v", errJSON)
		return ""
	}
	lines, origins := d.apply(edits)
	text := strings.Join(lines, "")
	const layout = "its layout is one that inject cannot edit; write the pod in block style, without anchors"
	after, err := newDocument(d.source, d.first, text)
	if err != nil {
		say.refuse(d.root, "", layout)
		return ""
	}
	if before, err := after.restored(); err != nil || before.text != d.text {
		say.refuse(d.root, "", layout)
		return ""
	}
	m, err := manifest.Parse(d.source, []byte(text))
	if err != nil {
		say.refuse(d.root, "", "%v", err)
		return ""
	}
	m.Refer(in.Known...)
	sidecars := m.Sidecars(sidecarName)
	for _, p := range done {
		say.subject = p.subject
		i := slices.IndexFunc(sidecars, func(s manifest.Sidecar) bool { return s.Object() == p.subject.object })
		if i < 0 {
			say.refuse(p.subject.spec, "", layout)
			continue
		}
		in.judge(sidecars[i], origins, say)
		sidecars = slices.Delete(slices.Clone(sidecars), i, i+1)
	}
	return text
}

// report is what there is to say of a document's pods.
type report struct {
	document *document
	subject  subject // that it goes on with

	refused, warnings []Finding
}

func (r *report) finding(at *yaml.Node, path, format string, args ...any) Finding {
	origin := schema.Origin{Source: r.document.source}
	if at != nil {
		origin.Line, origin.Column = r.document.first+at.Line, at.Column
	}
	return Finding{schema.Problem{Origin: origin, Path: strings.TrimSuffix(r.subject.path+"."+path, "."), Reason: fmt.Sprintf(format, args...)}, r.subject.object}
}

// refuse adds why the document is left out. path is that from the pod's spec.
func (r *report) refuse(at *yaml.Node, path, format string, args ...any) {
	r.refused = append(r.refused, r.finding(at, path, format, args...))
}

func (r *report) warn(at *yaml.Node, path, format string, args ...any) {
	r.warnings = append(r.warnings, r.finding(at, path, format, args...))
}

// all returns why the document is left out: for its other pods, that they are in one List with one that is not safe.
func (r *report) all() refusal {
	bad := map[string]bool{}
	for _, f := range r.refused {
		bad[f.Object] = true
	}
	for _, s := range subjects(r.document.root, "") {
		if r.subject = s; !bad[s.object] {
			r.refuse(s.spec, "", "is in one List with %s, which is refused", r.refused[0].Object)
		}
	}
	return refusal(r.refused)
}

// plan is what a pod is given.
type plan struct {
	settings

	document *document
	subject  subject
	tls      certificates
	mesh     schema.Mesh // as far as it is known
	isOff    bool        // mantlet leaves alone whatever comes in
	probes   []schema.Probe
	changes  []edit // of containers
}

// plan returns what a pod is given; nil where it is given nothing, or what was said of it is that it is refused.
func (in Injector) plan(s subject, say *report) *plan {
	refused := len(say.refused)
	isRefused := func() bool { return len(say.refused) > refused }
	p := &plan{document: say.document, subject: s}
	var isOut bool
	var notes, wrong []string
	p.settings, isOut, notes, wrong = s.resolve(in.Options)
	for _, reason := range wrong {
		say.refuse(s.spec, "", "%s", reason)
	}
	if isOut || isRefused() {
		return nil
	}
	for _, list := range []string{"initContainers", "containers"} {
		for _, c := range s.containers(list) {
			if text(c, "name") == sidecarName {
				say.warn(c, list+"["+sidecarName+"]", "was not added by inject, or its marks are lost: the pod stays as it is")
				return nil
			}
		}
	}
	for _, note := range notes {
		say.warn(s.spec, "", "%s", note)
	}
	p.tls = s.certificates(p.tlsSecret)
	for _, problem := range p.load(in, say) {
		if source := p.sources[problem.Origin.Source]; source != "" {
			problem.Origin.Source = source
		}
		say.refused = append(say.refused, Finding{problem, s.object})
	}
	if isRefused() {
		return nil
	}
	p.takeOver(say)
	if p.gate {
		p.wrap(say)
	}
	for _, name := range []string{tlsVolume, runtimeVolume, memoryVolume, configVolume, gateVolume} {
		for _, v := range items(s.spec, "volumes") {
			if text(v, "name") == name {
				say.refuse(v, "volumes["+name+"]", "has a name that is inject's; rename it")
			}
		}
	}
	if isRefused() {
		return nil
	}
	return p
}

// load finds out the mesh of the settings, and returns what is wrong with them.
func (p *plan) load(in Injector, say *report) []schema.Problem {
	env, err := schema.ParseEnvironment(p.environ())
	if err != nil {
		return schema.Problems(err)
	}
	p.mesh, p.isOff = env.Base().Mesh, env.Process.IngressOff != ""
	if p.configMap == "" {
		return nil
	}
	for _, m := range in.Known {
		content, known := m.Lookup("ConfigMap", p.configMap, p.subject.namespace, p.key)
		if !known {
			continue
		}
		config, err := env.Merge([]byte(content))
		if err != nil {
			return schema.Problems(err)
		}
		p.mesh = config.Mesh
		return nil
	}
	say.warn(p.subject.spec, "", "key %s of ConfigMap %s is not in the manifests, so it was not checked", p.key, p.configMap)
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
	if at(spec, "volumes") != nil { // new items of a list come before a new key at the same place
		init, volumes = volumes, init
	}
	return slices.Concat(init, volumes, p.changes)
}

// judge looks at a pod as it is with its sidecar. origins are the lines that those of the result are of, counted from 0.
func (in Injector) judge(s manifest.Sidecar, origins []int, say *report) {
	for _, f := range in.check(s) {
		if line := f.Origin.Line; line > 0 && line <= len(origins) {
			f.Origin.Line = say.document.first + origins[line-1] + 1
		}
		if f.Severity == manifest.Error {
			say.refused = append(say.refused, Finding{f.Problem, say.subject.object})
		} else {
			say.warnings = append(say.warnings, Finding{f.Problem, say.subject.object})
		}
	}
}

// check returns what there is to say of a sidecar.
func (in Injector) check(s manifest.Sidecar) []manifest.Finding {
	c := s.Configuration()
	return append(c.Findings, s.Check(manifest.Settings{Process: c.Process, Mesh: &c.Mesh, IsPartial: c.IsPartial, Runs: in.Runs})...)
}
