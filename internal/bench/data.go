package main

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"time"

	"mantlet/internal/bench/load"
	"mantlet/internal/bench/measured"
	"mantlet/internal/bench/proxy"
	"mantlet/internal/lab"
)

// trial is a case of the section data: a job, and for which layouts of a path it is done.
type trial struct {
	name  string
	job   load.Job
	full  bool // full handshakes only
	none  bool // without a proxy, too
	pods  bool // peers in pods, too
	value func(proxy.Measured) []measured.Value
}

const (
	mib = 1 << 20
	gib = 1 << 30
)

func (b *bench) trials() []trial {
	var all []trial
	for _, workers := range []int{1, 16, 64} {
		for _, full := range []bool{false, true} {
			sessions := "resumed"
			if full {
				sessions = "full"
			}
			all = append(all, trial{
				name: fmt.Sprintf("Connect/workers=%d/handshakes=%s", workers, sessions),
				job:  load.Job{Kind: load.Connect, Workers: workers, Warm: b.during / 3, For: b.during * time.Duration(1+workers/64), Least: int64(20 + 4*workers)},
				full: full, none: !full, pods: workers == 16 && !full, value: connections,
			})
		}
	}
	for _, streams := range []int{1, 8} {
		for _, kind := range []load.Kind{load.Download, load.Upload} {
			all = append(all, trial{
				name: fmt.Sprintf("Bulk/streams=%d/direction=%s", streams, kind),
				job:  load.Job{Kind: kind, Workers: streams, Warm: b.during / 3, For: b.during},
				none: true, pods: streams == 1, value: bulk,
			})
		}
	}
	return append(all, trial{
		name: "Request/connections=4/rate=1000",
		job:  load.Job{Kind: load.Request, Workers: 4, Every: 4 * time.Millisecond, Warm: b.during / 3, For: 3 * b.during},
		none: true, pods: true, value: requests,
	})
}

// cpu is the CPU time of a path, divided.
func cpu(use proxy.Use, by float64, unit string) []measured.Value {
	return []measured.Value{
		{Unit: "client-cpu-sec/" + unit, Value: use.Sides[proxy.Client].Seconds() / by},
		{Unit: "server-cpu-sec/" + unit, Value: use.Sides[proxy.Server].Seconds() / by},
		{Unit: "cpu-sec/" + unit, Value: (use.Sides[proxy.Client] + use.Sides[proxy.Server]).Seconds() / by},
		{Unit: "all-cpu-sec/" + unit, Value: use.Sum().Seconds() / by},
	}
}

func connections(m proxy.Measured) []measured.Value {
	return append(cpu(m.Use, float64(m.Count), "conn"),
		measured.Value{Unit: "conn/s", Value: float64(m.Count) / m.Seconds},
		measured.Value{Unit: "failed", Value: float64(m.Failed)})
}

func bulk(m proxy.Measured) []measured.Value {
	return append(cpu(m.Use, float64(m.Count)/gib, "GiB"), measured.Value{Unit: "B/s", Value: float64(m.Count) / m.Seconds})
}

func requests(m proxy.Measured) []measured.Value {
	values := cpu(m.Use, float64(m.Count), "request")
	for _, p := range []struct {
		name string
		part float64
	}{{"p50", .5}, {"p99", .99}, {"p99.9", .999}} {
		index := min(len(m.Latencies)-1, int(p.part*float64(len(m.Latencies))))
		values = append(values, measured.Value{Unit: p.name + "-sec", Value: float64(m.Latencies[index]) / 1e9})
	}
	return values
}

// peers are the proxies beside mantlet, None included.
func (b *bench) peers() []string {
	all := []string{proxy.Envoy, proxy.HAProxy, proxy.Nginx, proxy.Stunnel, proxy.Ghostunnel, proxy.None}
	if b.subjects == nil {
		return all
	}
	return slices.DeleteFunc(all, func(name string) bool { return !slices.Contains(b.subjects, name) })
}

// layouts returns the paths of a case.
func (b *bench) layouts(t trial) []proxy.Options {
	all := []proxy.Options{{Proxy: proxy.Mantlet, NoResume: t.full}}
	if t.pods && !b.withoutPods && t.job.Kind == load.Connect {
		all = append(all, proxy.Options{Proxy: proxy.Envoy, Pods: true, Sessions: true},
			proxy.Options{Proxy: proxy.Envoy, Pods: true, Sessions: true, Unverified: true})
	}
	for _, name := range b.peers() {
		switch {
		case name == proxy.None && !t.none:
		case name == proxy.Ghostunnel && t.job.Kind == load.Connect && !t.full: // it resumes no sessions
		default:
			all = append(all, proxy.Options{Proxy: name, NoResume: t.full && name != proxy.None})
		}
		if t.pods && !b.withoutPods && slices.Contains([]string{proxy.Envoy, proxy.HAProxy, proxy.Nginx}, name) {
			all = append(all, proxy.Options{Proxy: name, Pods: true})
		}
	}
	return all
}

// data measures the cases of the data path whose names match. All paths are there from the beginning, and idle while it is not their turn.
func (b *bench) data(s *measured.Section, names string) (err error) {
	mesh, err := lab.NewAuthority("mesh")
	if err != nil {
		return err
	}
	paths := map[proxy.Options]*proxy.Path{}
	defer func() {
		for _, path := range paths {
			err = errors.Join(err, path.Close())
		}
	}()
	trials := slices.DeleteFunc(b.trials(), func(t trial) bool {
		return !b.chosen(t.name) || !regexp.MustCompile(names).MatchString(t.name)
	})
	for _, t := range trials {
		for _, options := range b.layouts(t) {
			if paths[options] == nil {
				if paths[options], err = b.path(mesh, options); err != nil {
					delete(paths, options)
					return err
				}
			}
		}
	}
	for round := range b.rounds {
		fmt.Fprintf(os.Stderr, "data path, round %d of %d\n", round+1, b.rounds)
		for _, t := range trials {
			layouts := b.layouts(t)
			for i := range layouts { // each round begins with another one
				options := layouts[(i+round)%len(layouts)]
				m, err := paths[options].Run(t.job)
				if err != nil {
					return err
				}
				s.Add(t.name, options.Name(), t.value(m)...)
			}
		}
		if err := b.completed(round + 1); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) path(mesh *lab.Authority, options proxy.Options) (*proxy.Path, error) {
	directory, err := b.directory(options.Name())
	if err != nil {
		return nil, err
	}
	return proxy.Start(b.programs, directory, mesh, options)
}

// memory measures what paths that did nothing yet take of memory, each kind of connections on a path of its own.
func (b *bench) memory(s *measured.Section) error {
	const connections = 1000
	mesh, err := lab.NewAuthority("mesh")
	if err != nil {
		return err
	}
	for _, job := range []load.Job{
		{Kind: load.Open, Workers: connections},
		{Kind: load.Stalled, Workers: connections},
	} {
		name := fmt.Sprintf("Memory/connections=%d/%s", connections, job.Kind)
		if !b.chosen(name) {
			continue
		}
		for range min(2, b.rounds) {
			for _, peer := range append([]string{proxy.Mantlet}, b.peers()...) {
				if peer == proxy.None {
					continue
				}
				if err := b.hold(s, mesh, name, job, peer); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (b *bench) hold(s *measured.Section, mesh *lab.Authority, name string, job load.Job, peer string) error {
	path, err := b.path(mesh, proxy.Options{Proxy: peer})
	if err != nil {
		return err
	}
	before, held, result, err := path.Hold(job)
	if err == nil && result.Failed > 0 {
		err = fmt.Errorf("%s: %s: %d of %d connections failed: %s", peer, job.Kind, result.Failed, job.Workers, result.Error)
	}
	if err := errors.Join(err, path.Close()); err != nil {
		return err
	}
	s.Add(name, peer,
		measured.Value{Unit: "client-idle-B", Value: float64(before[proxy.Client])},
		measured.Value{Unit: "server-idle-B", Value: float64(before[proxy.Server])},
		measured.Value{Unit: "client-held-B", Value: float64(held[proxy.Client] - before[proxy.Client])},
		measured.Value{Unit: "server-held-B", Value: float64(held[proxy.Server] - before[proxy.Server])},
		measured.Value{Unit: "held-B", Value: float64(held[proxy.Client] + held[proxy.Server])})
	return nil
}
