package schema

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Config is a mesh, and where each of its parts comes from.
type Config struct {
	Mesh Mesh

	merged layer
}

// Load reads the override file, where the environment names one and lets it say anything, and merges it over the
// environment. The error holds every problem, see Problems; see IsMissing for a file that is not there.
func (e *Environment) Load() (Config, error) {
	if !e.ReadsFile() || e.bad != nil {
		return e.base, e.bad
	}
	content, err := e.Read()
	if err != nil {
		return Config{}, err
	}
	return e.Merge(content)
}

// ReadsFile reports whether there is an override file to be read.
func (e *Environment) ReadsFile() bool {
	return e.Process.ConfigFile != "" && e.Process.Overrides != OverridesNone
}

// Read returns the content of the override file.
func (e *Environment) Read() ([]byte, error) {
	// What mantlet may read for other reasons must not be told as problems of an override file that became a link to it.
	return readFile(e.Process.ConfigFile, e.Process.TLSDirectory, e.Process.RuntimeDirectory, "/etc", "/proc", "/sys", "/dev")
}

// Digest tells environments apart that could make different meshes of one file.
func (e *Environment) Digest() (string, error) {
	text, err := json.Marshal(map[string]any{
		"mesh": e.base.Mesh, "file": e.Process.ConfigFile, "digest": e.Process.ConfigDigest, "overrides": e.Process.Overrides,
	})
	if err != nil {
		return "", fmt.Errorf("marshalling the environment: %w", err)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:]), nil
}

// Merge is Load for a content of the file that is there already.
func (e *Environment) Merge(content []byte) (Config, error) {
	if e.Process.Overrides == OverridesNone || e.bad != nil {
		return e.base, e.bad
	}
	var r report
	file := e.Process.ConfigFile
	if sum := sha256.Sum256(content); e.Process.ConfigDigest != "" && hex.EncodeToString(sum[:]) != e.Process.ConfigDigest {
		r.add(Origin{Source: file}, "", "", fmt.Sprintf("its SHA-256 is %x, but %s pins it to %s", sum, digestVariable, e.Process.ConfigDigest))
		return Config{}, r.err()
	}
	over := fromYAML(file, content, &r)
	config, err := build(&r, e.Process, append(slices.Clone(e.layers), over)...)
	if err != nil || e.Process.Overrides != OverridesTighten {
		return config, err
	}
	tighten(e.base, config, &r)
	if err := r.err(); err != nil {
		return Config{}, err
	}
	return config, nil
}

// unread is a file that can't be read: a problem with its place, and a reason that IsMissing knows.
type unread struct {
	Problem

	reason error
}

func (u unread) Unwrap() []error { return []error{u.Problem, u.reason} }

func readFile(path string, not ...string) ([]byte, error) {
	content, err := ReadFile(path, maxFile, not...)
	if perr, ok := errors.AsType[*fs.PathError](err); ok {
		err = perr.Err
	}
	if err != nil {
		return nil, unread{Problem{Origin: Origin{Source: path}, Reason: "can't be read: " + err.Error()}, err}
	}
	return content, nil
}

// ReadFile reads a file, no more of it than a byte beyond most, and nothing but a file: a pipe would never end. Where its path
// leads into a directory among not that it does not name, the error says so. All errors are of *fs.PathError.
func ReadFile(path string, most int64, not ...string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // else opening a pipe waits for its writer
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	bad := func(why string) error { return &fs.PathError{Op: "read", Path: path, Err: errors.New(why)} }
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, bad("it must be a file, and is " + kindOf(info.Mode()))
	}
	if len(not) > 0 {
		real, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
		if err != nil {
			return nil, err
		}
		for _, directory := range not {
			if within(real, directory) && !within(path, directory) {
				return nil, bad(fmt.Sprintf("it leads to %s: what is in %s is no such file", real, directory))
			}
		}
	}
	return io.ReadAll(io.LimitReader(f, most+1))
}

// within reports whether a path is a directory's, or what a link in the place of the directory leads to.
func within(path, directory string) bool {
	if real, err := filepath.EvalSymlinks(directory); err == nil && strings.HasPrefix(path, real+"/") {
		return true
	}
	return strings.HasPrefix(path, filepath.Clean(directory)+"/")
}

func kindOf(mode os.FileMode) string {
	switch mode.Type() {
	case fs.ModeDir:
		return "a directory"
	case fs.ModeNamedPipe:
		return "a pipe"
	default:
		return "something else"
	}
}

// build merges layers into a mesh and reports what only shows once they are together, and beside what the process is.
func build(r *report, process Process, layers ...layer) (Config, error) {
	merged, err := merge(layers...)
	if err != nil {
		return Config{}, err
	}
	c := Config{merged: merged}
	text := func(path string) string { return merged.scalar(path).text }
	c.Mesh = Mesh{
		Ingress: c.ingress(r),
		Egress:  c.egress(r),
		Probes:  c.probes(r),
		TLS:     TLS{MinVersion: TLSVersion(text("tls.minVersion"))},
		Envoy: Envoy{
			Concurrency:        number(text("envoy.concurrency")),
			DrainTime:          duration(text("envoy.drainTime")),
			ParentShutdownTime: duration(text("envoy.parentShutdownTime")),
			LogLevel:           EnvoyLogLevel(text("envoy.logLevel")),
		},
		OtherProtocols: OtherProtocols(text("otherProtocols")),
		AccessLog:      AccessLog(text("accessLog")),
		StatusPort:     process.StatusPort(),
	}
	timings(merged, r)
	process.checkStatus(c, r)
	if err := r.err(); err != nil {
		return Config{}, err
	}
	return c, nil
}

// timings reports times that do not go together, at the one that is no default.
func timings(merged layer, r *report) {
	const longer, shorter = "envoy.parentShutdownTime", "envoy.drainTime"
	long, short := merged.scalar(longer), merged.scalar(shorter)
	switch {
	case duration(long.text) > duration(short.text) || r.within("envoy"):
	case long.overrode == nil:
		r.add(short.origin, shorter, short.text, fmt.Sprintf("must be less than %s, which is %s (%s)", longer, long.text, long.origin))
	default:
		r.add(long.origin, longer, long.text, fmt.Sprintf("must be more than %s, which is %s (%s)", shorter, short.text, short.origin))
	}
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
	all := c.merged.entries("ingress")
	list := slices.Grow([]Ingress(nil), len(all))
	for _, e := range all {
		if e.removed() {
			continue
		}
		in := Ingress{Name: e.text("name"), Ports: ports(e.key), Mode: Mode(e.text("mode")), Allow: sorted(e.list("allow"))}
		if in.Mode == "" {
			in.Mode = ModeMTLS
		}
		if in.Allow != nil && !e.wrong {
			in.checkAllow(e, r)
		}
		list = append(list, in)
	}
	slices.SortFunc(list, func(a, b Ingress) int { return a.Ports.compare(b.Ports) })
	widest := 0 // the entry before that ends last
	for i := 1; i < len(list); i++ {
		if list[i].Ports.First <= list[widest].Ports.Last {
			a, b := all[list[widest].Ports.String()], all[list[i].Ports.String()]
			if a.origin.compare(b.origin) > 0 {
				a, b = b, a
			}
			r.add(b.origin, "ingress["+b.key+"]", "", fmt.Sprintf("overlaps %s (%s); ranges must be the same or apart", a.key, a.origin))
		}
		if list[i].Ports.Last > list[widest].Ports.Last {
			widest = i
		}
	}
	return list
}

func (in Ingress) checkAllow(e *entry, r *report) {
	s := e.fields["allow"]
	switch {
	case in.Mode != ModeMTLS:
		r.add(s.origin, "ingress["+e.key+"].allow", s.value(), fmt.Sprintf(
			"needs mode mtls, and the mode is %s (%s): without client certificates there is nobody to tell apart",
			in.Mode, e.fields["mode"].origin))
	case int(in.Ports.Last)-int(in.Ports.First) >= maxAllowRange:
		r.add(s.origin, "ingress["+e.key+"].allow", s.value(), fmt.Sprintf(
			"a range with allow has at most %d ports; split it", maxAllowRange))
	}
}

func (c Config) egress(r *report) []Egress {
	all := c.merged.entries("egress")
	own := listeners{}
	for key, e := range all {
		if !e.removed() {
			listen := netip.MustParseAddrPort(key)
			own[listen.Port()] = append(own[listen.Port()], listen)
		}
	}
	list := slices.Grow([]Egress(nil), len(all))
	for _, e := range all {
		if e.removed() {
			continue
		}
		out := Egress{
			Name:        e.text("name"),
			Listen:      netip.MustParseAddrPort(e.key),
			ServerNames: e.list("serverNames"),
		}
		switch text := e.text("upstream"); {
		case e.wrong:
		case text == "":
			r.add(e.origin, "egress["+e.key+"].upstream", "", "is missing: a new entry needs it")
		default:
			host, port, _ := cutPort(text)
			out.Upstream = Upstream{Host: host, Port: uint16(number(port))}
			if to := own.loop(out); to != "" {
				r.add(e.fields["upstream"].origin, "egress["+e.key+"].upstream", text,
					fmt.Sprintf("is %s: connections would go round in a circle", to))
			}
		}
		list = append(list, out)
	}
	slices.SortFunc(list, func(a, b Egress) int { return a.Listen.Compare(b.Listen) })
	return list
}

func (c Config) probes(r *report) []Probe {
	var list []Probe
	for _, e := range c.merged.entries("probes") {
		if e.removed() {
			continue
		}
		p := Probe{Name: e.key}
		for _, kind := range probeKinds {
			if text := e.text(kind); text != "" {
				p.Kind = ProbeKind(kind)
				p.Port, p.Target, _ = cutTarget(text)
			}
		}
		if p.Kind == ProbeGRPC {
			p.Target = strings.TrimPrefix(p.Target, "/")
		}
		if p.Kind == "" && !e.wrong {
			r.add(e.origin, "probes["+e.key+"]", "", "needs one of http, tcp and grpc, as http: 8080/healthz")
		}
		list = append(list, p)
	}
	slices.SortFunc(list, func(a, b Probe) int { return strings.Compare(a.Name, b.Name) })
	return list
}

// listeners are the listen addresses of a mesh's egress entries by their ports.
type listeners map[uint16][]netip.AddrPort

// loop returns which of Envoy's own listeners an entry's upstream is, if it is one. By a name of loopback it may be.
func (l listeners) loop(from Egress) string {
	u := from.Upstream
	addr, isAddress := u.Addr()
	host := strings.ToLower(strings.TrimSuffix(u.Host, "."))
	isLoopback := isAddress && addr.IsLoopback() || host == "localhost" || strings.HasSuffix(host, ".localhost")
	if !isLoopback {
		return ""
	}
	if u.Port == IngressMTLSPort || u.Port == IngressTLSPort {
		return "mantlet's own listener"
	}
	for _, listen := range slices.SortedFunc(slices.Values(l[u.Port]), netip.AddrPort.Compare) {
		switch {
		case isAddress && listen.Addr() != addr:
		case isAddress && listen == from.Listen:
			return "the entry's own listen address"
		default:
			return "the listen address of egress[" + listen.String() + "]"
		}
	}
	return ""
}

func sorted(list []string) []string {
	if list == nil {
		return nil
	}
	return slices.Sorted(slices.Values(list))
}

// IsMissing reports whether an error of Load says that the override file is not there.
func IsMissing(err error) bool { return errors.Is(err, os.ErrNotExist) }
