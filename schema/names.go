package schema

import (
	"maps"
	"regexp"
	"slices"
	"strings"
)

// ownPrefix starts the names that are mantlet's alone: one that is not known is a misspelling.
const ownPrefix = "MANTLET_"

// serviceLink matches what Kubernetes sets in every pod of a namespace that has a Service named mantlet or mantlet-….
var serviceLink = regexp.MustCompile(`_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$`)

// checkNames reports variables that mantlet does not know and that only it can be meant by. Such a variable would be
// ignored, and what it says with it.
func (p *parser) checkNames(variables map[string]processVariable) {
	known := slices.Sorted(maps.Keys(variables))
	for _, f := range fields {
		known = append(known, f.variable)
	}
	known = append(known, inlineVariable)
	slices.Sort(known)
	entries := []string{ingressVariable, egressVariable, ingressVariableNew, egressVariableNew, adminVariable, adminVariableNew}
	for name, value := range p.values {
		if slices.Contains(known, name) || slices.Contains(entries, name) {
			continue
		}
		near := meant(name, known, entries)
		isOwn := strings.HasPrefix(name, ownPrefix)
		if near == "" && !isOwn || serviceLink.MatchString(name) {
			continue
		}
		reason := "mantlet has no such variable"
		if near != "" {
			reason += "; did you mean " + near + "?"
		} else {
			reason += "; known variables: " + ownPrefix + "… " + strings.ReplaceAll(strings.Join(known, ", "), ownPrefix, "")
		}
		p.report.add(Origin{Source: name}, "", value, reason)
	}
}

// How many edits lead from a known name to one that was likely meant for mantlet. All but the first word is words that
// others use too: MY_INGRESS_PROXY_CONFIG, which is somebody else's, is three edits from EDG_INGRESS_PROXY_CONFIG. So more
// edits than one count only behind a first word that is right.
const (
	editsAnywhere = 1
	editsOfRest   = 3
)

// meant returns the known name that a name most likely stands for; nothing if it is likely somebody else's.
func meant(name string, known, entries []string) string {
	name = normal(name)
	best, least := "", editsOfRest+1
	for _, k := range slices.Concat(entries, known) {
		first, rest, _ := strings.Cut(k, "_")
		most := editsAnywhere
		if strings.HasPrefix(name, first+"_") {
			most = editsOfRest
		}
		// INGRESS_PROXY, whatever follows, is mantlet's.
		if stem, isEntries := strings.CutSuffix(rest, "_CONFIG"); isEntries && strings.HasPrefix(name, first+"_"+stem) && least > editsOfRest {
			best = k
		}
		if abs(len(name)-len(k)) > most {
			continue // so that thousands of variables take no time
		}
		if edits := distance(name, k); edits <= most && edits < least {
			best, least = k, edits
		}
	}
	word, isOwn := strings.CutPrefix(name, ownPrefix)
	if best != "" || !isOwn {
		return best
	}
	if i := slices.IndexFunc(entries, func(k string) bool { return distance(word, strings.TrimPrefix(k, "EDG_")) <= editsOfRest }); i >= 0 {
		return entries[i]
	}
	words := make([]string, len(known))
	for i, k := range known {
		words[i] = strings.TrimPrefix(k, ownPrefix)
	}
	if near := nearest(word, words); near != "" {
		return ownPrefix + near
	}
	return ""
}

func abs(n int) int { return max(n, -n) }

// normal writes a name with the characters that names of variables have. Case counts.
func normal(name string) string {
	return strings.Trim(strings.Map(func(r rune) rune {
		if strings.ContainsRune(alphabet, r) {
			return r
		}
		return '_'
	}, name), "_")
}
