package schema

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
)

// Config is a mesh, and where each of its parts comes from.
type Config struct {
	Mesh Mesh

	merged      layer
	link        string    // see Content
	overlapping []Ingress // that are not in Mesh, since they overlap others of it, and that is reported
	ingressOff  string    // see Process
	envoyIsRoot bool      // see Process.EnvoyUID
}

// Load reads the override file, where the environment names one and lets it say anything, and merges it over the
// environment. The error holds every problem of both, see Problems; see IsMissing for a file that is not there.
func (e *Environment) Load() (Config, error) {
	if !e.ReadsFile() {
		return e.base, e.bad
	}
	content, err := e.Read()
	switch {
	case err == nil:
		return e.MergeContent(content)
	case e.bad == nil:
		return Config{}, err
	case IsMissing(err): // the daemon waits for it
		return Config{}, e.bad
	}
	r := report{problems: slices.Concat(e.problems, Problems(err))}
	return Config{}, r.err()
}

// ReadsFile reports whether there is an override file to be read.
func (e *Environment) ReadsFile() bool {
	return e.Process.ConfigFile != "" && e.Process.Overrides != OverridesNone
}

// Read returns the content of the override file.
func (e *Environment) Read() (Content, error) {
	// An override file that became a link must not reveal what mantlet may read for other purposes.
	return readFile(e.Process.ConfigFile, e.Process.TLS.Directory, e.Process.RuntimeDirectory, "/etc", "/proc", "/sys", "/dev")
}

// Digest tells environments apart that could make different meshes of one file.
func (e *Environment) Digest() (string, error) {
	text, err := json.Marshal(map[string]any{
		"mesh": e.base.Mesh, "ingressOff": e.base.Mesh.IngressOff, "file": e.Process.ConfigFile, "digest": e.Process.ConfigDigest, "overrides": e.Process.Overrides,
	})
	if err != nil {
		return "", fmt.Errorf("marshalling the environment: %w", err)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:]), nil
}

// Merge is Load for a text of the override file.
func (e *Environment) Merge(text []byte) (Config, error) { return e.MergeContent(Content{Text: text}) }

// MergeContent is Load for a content that Read returned.
func (e *Environment) MergeContent(content Content) (Config, error) {
	if e.Process.Overrides == OverridesNone || e.bad != nil && !e.ReadsFile() {
		return e.base, e.bad
	}
	r := report{problems: slices.Clone(e.problems)}
	config, err := e.mergeFile(content, &r)
	if err != nil {
		return Config{}, err
	}
	// The environment's own problems are found again where its layers are merged again.
	found := slices.DeleteFunc(r.problems[len(e.problems):], func(p Problem) bool { return slices.Contains(e.problems, p) })
	if content.Link != "" {
		found = withhold(found, content.Link)
	}
	r.problems = append(slices.Clone(e.problems), found...)
	if err := r.err(); err != nil {
		return Config{}, err
	}
	config.link = content.Link
	return config, nil
}

// mergeFile merges the override file as far as it is right, and reports what is not. The error is of koanf.
func (e *Environment) mergeFile(content Content, r *report) (Config, error) {
	file := e.Process.ConfigFile
	if sum := sha256.Sum256(content.Text); e.Process.ConfigDigest != "" && hex.EncodeToString(sum[:]) != e.Process.ConfigDigest {
		r.add(Origin{Source: file}, "", "", fmt.Sprintf("its SHA-256 is %x, but %s pins it to %s", sum, digestVariable, e.Process.ConfigDigest))
		return Config{}, nil
	}
	over := fromYAML(file, content.Text, r)
	config, err := build(r, e.Process, append(slices.Clone(e.layers), over)...)
	if err == nil && e.Process.Overrides == OverridesTighten {
		e.tighten(config, r)
	}
	return config, err
}

// IsMissing reports whether an error of Load says that the override file is not there.
func IsMissing(err error) bool { return errors.Is(err, os.ErrNotExist) }
