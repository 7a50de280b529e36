package schema

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Config is a mesh, and where each of its parts comes from.
type Config struct {
	Mesh Mesh

	merged layer
}

// Load reads the override file, where the environment names one and lets it say anything, and merges it over the
// environment. The error holds every problem, see Problems; it is os.ErrNotExist where the file is not there.
func (e *Environment) Load() (Config, error) {
	if e.Process.ConfigFile == "" || e.Process.Overrides == OverridesNone {
		return e.base, nil
	}
	content, err := readFile(e.Process.ConfigFile)
	if err != nil {
		return Config{}, err
	}
	return e.Merge(content)
}

// Merge is Load for a content of the file that is there already.
func (e *Environment) Merge(content []byte) (Config, error) {
	var r report
	file := e.Process.ConfigFile
	if sum := sha256.Sum256(content); e.Process.ConfigDigest != "" && hex.EncodeToString(sum[:]) != e.Process.ConfigDigest {
		r.add(Origin{Source: file}, "", "", fmt.Sprintf("its SHA-256 is %x, but %s pins it to %s", sum, digestVariable, e.Process.ConfigDigest))
		return Config{}, r.err()
	}
	over := fromYAML(file, content, &r)
	if len(r.problems) > 0 {
		return Config{}, r.err()
	}
	config, err := build(&r, append(slices.Clone(e.layers), over)...)
	if err != nil || e.Process.Overrides != OverridesTighten {
		return config, err
	}
	tighten(e.base, config, &r)
	return config, r.err()
}

// readFile reads no more than a file may hold, and no more than a file: a pipe would never end.
func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path) // before it is opened: opening a pipe waits for its writer
	if err != nil {
		return nil, fmt.Errorf("reading the override file: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, Problem{Origin: Origin{Source: path}, Reason: "must be a file, and is " + kindOf(info.Mode())}
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading the override file: %w", err)
	}
	defer func() { _ = f.Close() }()
	content, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("reading the override file: %w", err)
	}
	return content, nil
}

func kindOf(mode os.FileMode) string {
	if mode.IsDir() {
		return "a directory"
	}
	return "something else: " + mode.Type().String()
}

// build merges layers into a mesh and reports what only shows once they are together.
func build(r *report, layers ...layer) (Config, error) {
	merged, err := merge(layers...)
	if err != nil {
		return Config{}, err
	}
	c := Config{merged: merged}
	text := func(path string) string { return merged.scalar(path).text }
	c.Mesh = Mesh{
		Ingress: c.ingress(r),
		Egress:  c.egress(r),
		TLS:     TLS{MinVersion: TLSVersion(text("tls.minVersion"))},
		Envoy: Envoy{
			Concurrency:        number(text("envoy.concurrency")),
			DrainTime:          duration(text("envoy.drainTime")),
			ParentShutdownTime: duration(text("envoy.parentShutdownTime")),
			LogLevel:           EnvoyLogLevel(text("envoy.logLevel")),
		},
		OtherProtocols: OtherProtocols(text("otherProtocols")),
		AccessLog:      AccessLog(text("accessLog")),
	}
	if longer, shorter := merged.scalar("envoy.parentShutdownTime"), merged.scalar("envoy.drainTime"); c.Mesh.Envoy.ParentShutdownTime <= c.Mesh.Envoy.DrainTime {
		r.add(laterOf(longer, shorter), "envoy.parentShutdownTime", longer.text,
			fmt.Sprintf("must be more than envoy.drainTime, which is %s (%s)", shorter.text, shorter.origin))
	}
	return c, r.err()
}

// laterOf returns the place that a reader would mend: the one that is no default.
func laterOf(a, b *setting) Origin {
	if a.overrode == nil {
		return b.origin
	}
	return a.origin
}

// number, duration and ports read canonical texts, which their parsers made.
func number(text string) int {
	n, err := strconv.Atoi(text)
	return must(n, err)
}

func duration(text string) time.Duration {
	d, err := time.ParseDuration(text)
	return must(d, err)
}

func ports(text string) Ports {
	first, last, isRange := strings.Cut(text, "-")
	p := Ports{First: uint16(number(first))}
	p.Last = p.First
	if isRange {
		p.Last = uint16(number(last))
	}
	return p
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// maxAllowRange bounds a range with allow: Envoy needs a filter chain for each of its ports.
const maxAllowRange = 256

func (c Config) ingress(r *report) []Ingress {
	all := c.entries("ingress")
	var list []Ingress
	for _, e := range all {
		in := Ingress{Name: e.text("name"), Ports: ports(e.key), Mode: Mode(e.text("mode")), Allow: sorted(e.list("allow"))}
		if in.Mode == "" {
			in.Mode = ModeMTLS
		}
		path := "ingress[" + e.key + "].allow"
		if s := e.fields["allow"]; s != nil {
			switch {
			case in.Mode != ModeMTLS:
				r.add(s.origin, path, s.value(), fmt.Sprintf("needs mode mtls, and the mode is %s (%s): without client certificates there is nobody to tell apart",
					in.Mode, e.fields["mode"].origin))
			case int(in.Ports.Last)-int(in.Ports.First) >= maxAllowRange:
				r.add(s.origin, path, s.value(), fmt.Sprintf("a range with allow has at most %d ports", maxAllowRange))
			}
		}
		list = append(list, in)
	}
	slices.SortFunc(list, func(a, b Ingress) int { return int(a.Ports.First) - int(b.Ports.First) })
	for i := 1; i < len(list); i++ {
		if a, b := list[i-1], list[i]; b.Ports.First <= a.Ports.Last {
			first, second := all[a.Ports.String()].origin(), all[b.Ports.String()].origin()
			path := "ingress[" + b.Ports.String() + "]"
			if first.compare(second) > 0 {
				first, second, path = second, first, "ingress["+a.Ports.String()+"]"
				a, b = b, a
			}
			r.add(second, path, "", fmt.Sprintf("overlaps %s (%s); ranges must be the same or apart", a.Ports, first))
		}
	}
	return list
}

func (c Config) egress(r *report) []Egress {
	var list []Egress
	for _, e := range c.entries("egress") {
		out := Egress{
			Name:        e.text("name"),
			Listen:      netip.MustParseAddrPort(e.key),
			ServerNames: e.list("serverNames"),
		}
		switch text := e.text("upstream"); {
		case text == "":
			r.add(e.origin(), "egress["+e.key+"].upstream", "", "is missing: a new entry needs it")
		case text == e.key:
			r.add(e.fields["upstream"].origin, "egress["+e.key+"].upstream", text,
				"is the entry's own listen address: connections would go round in a circle")
		default:
			host, port, _ := cutPort(text)
			out.Upstream = Upstream{Host: host, Port: uint16(number(port))}
		}
		list = append(list, out)
	}
	slices.SortFunc(list, func(a, b Egress) int { return a.Listen.Compare(b.Listen) })
	return list
}

// entries returns those of a list that no source removed.
func (c Config) entries(list string) entries {
	left := entries{}
	for key, e := range c.merged.entries(list) {
		if !e.removed() {
			left[key] = e
		}
	}
	return left
}

func sorted(list []string) []string {
	if list == nil {
		return nil
	}
	return slices.Sorted(slices.Values(list))
}

// IsMissing reports whether an error of Load says that the override file is not there.
func IsMissing(err error) bool { return errors.Is(err, os.ErrNotExist) }
