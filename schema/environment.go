package schema

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Variables of the environment that hold the entries. Each has an older and a newer spelling that mean the same.
const (
	ingressVariable    = "EDG_INGRESS_PROXY_CONFIG"
	egressVariable     = "EDG_EGRESS_PROXY_CONFIG"
	ingressVariableNew = "CONTRAST_INGRESS_PROXY_CONFIG"
	egressVariableNew  = "CONTRAST_EGRESS_PROXY_CONFIG"
)

// ownPrefix starts the names that are mantlet's alone: one that is not known is a misspelling.
const ownPrefix = "MANTLET_"

// Config is all that the environment says.
type Config struct {
	Mesh    Mesh
	Process Process
}

// Load reads the environment, given as os.Environ gives it. A variable that is unset and one that is empty are the same:
// the default. The error holds every problem, see Problems; the Config beside it is of no use.
func Load(environ []string) (Config, error) {
	env := environment{values: map[string]string{}}
	for _, e := range environ {
		name, value, _ := strings.Cut(e, "=")
		env.values[name] = value
	}
	c := Config{Mesh: Default(), Process: defaultProcess()}
	scalars := scalars(&c)
	env.unknown(slices.Sorted(maps.Keys(scalars)))
	for _, name := range slices.Sorted(maps.Keys(scalars)) {
		if value := env.values[name]; value != "" {
			if reason := scalars[name](value); reason != "" {
				env.report.add(Problem{Where: name, Value: value, Reason: reason})
			}
		}
	}
	env.timings(c.Mesh.Envoy)
	c.Mesh.Ingress = env.ingress()
	c.Mesh.Egress = env.egress()
	return c, env.report.err()
}

// environment is a source being read, and what was wrong with it so far.
type environment struct {
	values map[string]string
	report report
}

// unknown reports names that only mantlet could mean and that it does not know.
func (e *environment) unknown(known []string) {
	for _, name := range slices.Sorted(maps.Keys(e.values)) {
		if !strings.HasPrefix(name, ownPrefix) || slices.Contains(known, name) {
			continue
		}
		reason := "mantlet has no such variable"
		if near := nearest(name, known); near != "" {
			reason += "; did you mean " + near + "?"
		}
		e.report.add(Problem{Where: name, Value: e.values[name], Reason: reason})
	}
}

func (e *environment) timings(envoy Envoy) {
	if envoy.ParentShutdownTime <= envoy.DrainTime {
		e.report.add(Problem{
			Where: parentShutdownVariable, Value: envoy.ParentShutdownTime.String(),
			Reason: fmt.Sprintf("must be more than the drain time (%s, %s)", drainTimeVariable, envoy.DrainTime),
		})
	}
}

// spelled returns the value of a variable that has two spellings, and the name of the one that holds it.
func (e *environment) spelled(name, newer string) (value, where string) {
	old, renamed := e.values[name], e.values[newer]
	switch {
	case renamed == "":
		return old, name
	case old == "":
		return renamed, newer
	case old != renamed:
		e.report.add(Problem{
			Where: newer, Value: renamed,
			Reason: fmt.Sprintf("%s is set too, to something else (%s); set one of them, or both to the same", name, quote(old)),
		})
	}
	return renamed, newer
}

// entry is one of the entries of a variable, cut into its fields.
type entry struct {
	where  string
	place  string // "entry 2 (web#8080#false)"
	fields []string
}

// problem describes what is wrong with one field.
func (n entry) problem(field, value, reason string) Problem {
	return Problem{Where: n.where, Path: n.place + ": " + field, Value: value, Reason: reason}
}

// entries splits a variable at its ##. Entries that are empty are left out, but count.
func (e *environment) entries(value, where, form string) []entry {
	var all []entry
	for i, text := range strings.Split(value, "##") {
		if text == "" {
			continue
		}
		n := entry{where: where, place: fmt.Sprintf("entry %d (%s)", i+1, quote(text)), fields: strings.Split(text, "#")}
		if len(n.fields) != 3 {
			e.report.add(Problem{
				Where: where, Path: fmt.Sprintf("entry %d", i+1), Value: text,
				Reason: fmt.Sprintf("has %d fields between # and must have 3: %s", len(n.fields), form),
			})
			continue
		}
		all = append(all, n)
	}
	return all
}

func (e *environment) ingress() []Ingress {
	value, where := e.spelled(ingressVariable, ingressVariableNew)
	var list placed[Ingress]
	for _, n := range e.entries(value, where, "name#port#disableTLS") {
		in := Ingress{Name: n.fields[0]}
		port, reason := parsePort(n.fields[1])
		if reason == "" {
			reason = reserved(port)
		}
		if reason != "" {
			e.report.add(n.problem("port", n.fields[1], reason))
		}
		in.Ports = Ports{First: port, Last: port}
		switch n.fields[2] {
		case "false":
			in.Mode = ModeTLS
		case "true":
			in.Mode = ModePassthrough
		default:
			e.report.add(n.problem("disableTLS", n.fields[2], `must be "true" (not wrapped at all) or "false" (TLS without client certificates)`))
			continue
		}
		if reason == "" {
			list.add(&e.report, n, in)
		}
	}
	return list.sorted()
}

func (e *environment) egress() []Egress {
	value, where := e.spelled(egressVariable, egressVariableNew)
	var list placed[Egress]
	for _, n := range e.entries(value, where, "name#listen-ip:listen-port#host-or-ip:port") {
		listen, listenReason := parseListen(n.fields[1])
		if listenReason != "" {
			e.report.add(n.problem("listen address", n.fields[1], listenReason))
		}
		upstream, upstreamReason := parseUpstream(n.fields[2])
		if upstreamReason == "" && upstream.String() == listen.String() {
			upstreamReason = "is the entry's own listen address: connections would go round in a circle"
		}
		if upstreamReason != "" {
			e.report.add(n.problem("upstream", n.fields[2], upstreamReason))
		}
		if listenReason == "" && upstreamReason == "" {
			list.add(&e.report, n, Egress{Name: n.fields[0], Listen: listen, Upstream: upstream})
		}
	}
	return list.sorted()
}

// keyed is an element of a list that merges by key, not by position.
type keyed[T any] interface {
	key() string
	compare(T) int
	// means reports whether both say the same; names do not count.
	means(T) bool
	path() string
}

func (i Ingress) key() string               { return i.Ports.String() }
func (i Ingress) compare(other Ingress) int { return int(i.Ports.First) - int(other.Ports.First) }
func (i Ingress) means(other Ingress) bool  { return i.Mode == other.Mode }
func (i Ingress) path() string              { return "ingress[" + i.key() + "]" }
func (e Egress) key() string                { return e.Listen.String() }
func (e Egress) compare(other Egress) int   { return e.Listen.Compare(other.Listen) }
func (e Egress) means(other Egress) bool    { return e.Upstream == other.Upstream }
func (e Egress) path() string               { return "egress[" + e.key() + "]" }

// placed collects the entries of one source and remembers where each stood.
type placed[T keyed[T]] struct {
	list   []T
	places map[string]struct {
		index int
		place string
	}
}

// add appends v, unless an entry of the same key is there: the same meaning twice is fine, another one is a problem.
func (p *placed[T]) add(r *report, n entry, v T) {
	if first, ok := p.places[v.key()]; ok {
		if !v.means(p.list[first.index]) {
			r.add(Problem{
				Where: n.where, Path: v.path(), Value: strings.Join(n.fields, "#"),
				Reason: fmt.Sprintf("says something else than %s; leave one of them", first.place),
			})
		}
		return
	}
	if p.places == nil {
		p.places = map[string]struct {
			index int
			place string
		}{}
	}
	p.places[v.key()] = struct {
		index int
		place string
	}{len(p.list), n.place}
	p.list = append(p.list, v)
}

func (p *placed[T]) sorted() []T {
	slices.SortFunc(p.list, T.compare)
	return p.list
}
