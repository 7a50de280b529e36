package main

import (
	"errors"
	"fmt"
	"os"

	"mantlet/internal/bench/load"
	"mantlet/internal/bench/measured"
	"mantlet/internal/bench/proxy"
	"mantlet/internal/lab"
)

// layout is one that rules are measured in.
type layout struct {
	name    string // of its cases
	subject string
	rules   proxy.Rules
}

func ruleLayouts() []layout {
	var all []layout
	for _, entries := range []int{1, 100, 1000} {
		for _, kind := range []string{proxy.None, proxy.Mantlet, proxy.IPTables} {
			all = append(all, layout{fmt.Sprintf("Rules/entries=%d", entries), kind, proxy.Rules{Kind: kind, Entries: entries}})
		}
	}
	for _, kind := range []string{proxy.None, proxy.Mantlet} {
		all = append(all, layout{"Rules/leg=inside", kind, proxy.Rules{Kind: kind, Entries: 1, Inside: true}})
	}
	return all
}

// rules measures what rules cost, with a client and a server and nothing else: in the CPU time of both, since the kernel does in the
// sender's name what it does for a packet.
func (b *bench) rules(s *measured.Section) (err error) {
	mesh, err := lab.NewAuthority("mesh")
	if err != nil {
		return err
	}
	paths := map[layout]*proxy.Path{}
	defer func() {
		for _, path := range paths {
			err = errors.Join(err, path.Close())
		}
	}()
	for _, l := range ruleLayouts() {
		if !b.chosen(l.name) {
			continue
		}
		directory, err := b.directory("rules")
		if err != nil {
			return err
		}
		path, err := proxy.StartRules(b.programs, directory, mesh, l.rules)
		if err != nil {
			return err
		}
		paths[l] = path
	}
	for round := range 2 * b.rounds { // short ones: what is compared differs by little
		fmt.Fprintf(os.Stderr, "rules, round %d of %d\n", round+1, 2*b.rounds)
		all := ruleLayouts()
		for i := range all {
			l := all[(i+round*5)%len(all)] // each round begins with another one
			if paths[l] == nil {
				continue
			}
			connect, err := paths[l].Run(load.Job{Kind: load.Connect, Workers: 8, Warm: b.during / 6, For: b.during / 2})
			if err != nil {
				return err
			}
			flood, err := paths[l].Run(load.Job{Kind: load.Flood, Workers: 8, Warm: b.during / 6, For: b.during / 2})
			if err != nil {
				return err
			}
			s.Add(l.name, l.subject,
				measured.Value{Unit: "cpu-sec/conn", Value: connect.Use.Sum().Seconds() / float64(connect.Count)},
				measured.Value{Unit: "cpu-sec/exchange", Value: flood.Use.Sum().Seconds() / float64(flood.Count)})
		}
	}
	return b.conntrack(s, mesh)
}

// conntrack measures for how long connections take up entries of conntrack's table, and so how many new ones a second it has room
// for. Each entry tells how long it will be kept if nothing comes any more.
func (b *bench) conntrack(s *measured.Section, mesh *lab.Authority) error {
	const name = "Conntrack"
	if !b.chosen(name) {
		return nil
	}
	measure := func(subject string, start func(directory string) (*proxy.Path, error)) (err error) {
		directory, err := b.directory("conntrack")
		if err != nil {
			return err
		}
		path, err := start(directory)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, path.Close()) }()
		if _, err := path.Run(load.Job{Kind: load.Connect, Workers: 4, For: b.during}); err != nil {
			return err
		}
		held, room, err := path.Conntrack()
		held *= 2 // a connection from outside, and one inside
		s.Add(name, subject, measured.Value{Unit: "entry-sec/conn", Value: held}, measured.Value{Unit: "conn/s", Value: room / held})
		return err
	}
	return errors.Join(measure(proxy.Mantlet, func(directory string) (*proxy.Path, error) {
		return proxy.Start(b.programs, directory, mesh, proxy.Options{Proxy: proxy.Mantlet})
	}), measure("kernel", func(directory string) (*proxy.Path, error) {
		return proxy.StartRules(b.programs, directory, mesh, proxy.Rules{Kind: proxy.IPTables, Entries: 1})
	}))
}
