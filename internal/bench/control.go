package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"mantlet/internal/bench/load"
	"mantlet/internal/bench/measured"
	"mantlet/internal/bench/meter"
	"mantlet/internal/bench/proxy"
	"mantlet/internal/lab"
)

// The subjects of the control path.
const (
	ours = proxy.Mantlet
	bare = "bare-envoy"
)

// control measures what mantlet takes to start, to change and to repair, beside what Envoy by itself takes to validate the same
// bootstrap and to get live with it.
func (b *bench) control(s *measured.Section) error {
	mesh, err := lab.NewAuthority("mesh")
	if err != nil {
		return err
	}
	if b.chosen("Restarts") {
		if err := errors.Join(b.restarts(s, mesh), b.completed(0)); err != nil {
			return err
		}
	}
	for _, entries := range []int{1, 10, 100, 1000} {
		name := fmt.Sprintf("Control/entries=%d", entries)
		if !b.chosen(name) {
			continue
		}
		fmt.Fprintf(os.Stderr, "control path, %d entries\n", entries)
		if err := b.controlled(s, mesh, name, entries); err != nil {
			return err
		}
	}
	return nil
}

// settings returns a configuration of so many ports and so many egress entries, and what is appended to it.
func settings(entries int, more string) string {
	var text strings.Builder
	text.WriteString("egress:\n")
	for n := range entries {
		fmt.Fprintf(&text, "  - {listen: \"127.1.%d.%d:8080\", upstream: \"192.0.2.%d:8080\", serverNames: [svc-%d]}\n", n/250, n%250+1, n%250+1, n)
	}
	text.WriteString("ingress:\n")
	for n := range entries {
		fmt.Fprintf(&text, "  - {port: %d, mode: tls}\n", proxy.Exempt(n))
	}
	return text.String() + more
}

// controlled measures all of it with one number of entries.
func (b *bench) controlled(s *measured.Section, mesh *lab.Authority, name string, entries int) (err error) {
	rounds := min(3, b.rounds)
	if entries >= 1000 { // minutes
		rounds = min(2, rounds)
	}
	for round := range rounds {
		directory, err := b.directory("control")
		if err != nil {
			return err
		}
		pod, err := proxy.StartPod(b.programs, directory, mesh)
		if err != nil {
			return err
		}
		c := &controlled{pod: pod, section: s, name: name, entries: entries}
		err = c.measure(round == rounds-1)
		if err := errors.Join(err, pod.Close()); err != nil {
			return err
		}
		if err := b.completed(round + 1); err != nil {
			return err
		}
	}
	return nil
}

type controlled struct {
	pod     *proxy.Pod
	section *measured.Section
	name    string
	entries int
	commits <-chan proxy.Commit
}

func (c *controlled) add(subject string, values ...measured.Value) {
	c.section.Add(c.name, subject, values...)
}

func seconds(unit string, d time.Duration) measured.Value {
	return measured.Value{Unit: unit, Value: d.Seconds()}
}

// measure starts mantlet and does everything to it once; what takes no time, often.
func (c *controlled) measure(last bool) error {
	if _, err := c.pod.Configure(settings(c.entries, "")); err != nil {
		return err
	}
	took, cpu, err := c.pod.Begin()
	if err != nil {
		return err
	}
	mantlets, _, err := c.pod.CPU()
	if err != nil {
		return err
	}
	c.add(ours, seconds("start-sec", took), seconds("start-cpu-sec", cpu), seconds("start-mantlet-cpu-sec", mantlets))
	if c.commits, err = c.pod.Commits(); err != nil {
		return err
	}
	for _, step := range []struct {
		name string
		do   func() error
	}{{"sets", c.sets}, {"hot restart", c.restart}, {"certificates", c.certificates}, {"repairs", c.repairs}} {
		if err := step.do(); err != nil {
			return fmt.Errorf("%s, %s: %w", c.name, step.name, err)
		}
	}
	return c.idle(last)
}

// committed waits for a transaction of mantlet's, or else of somebody else's.
func (c *controlled) committed(ours bool) (time.Time, error) {
	deadline := time.NewTimer(3 * time.Minute)
	defer deadline.Stop()
	for {
		select {
		case commit := <-c.commits:
			if (commit.By != "nft") == ours {
				return commit.At, nil
			}
		case <-deadline.C:
			return time.Time{}, errors.New("the rules did not change within three minutes")
		}
	}
}

// settled waits for the last transaction of a change of mantlet's: one may prepare chains that are new before another leads to them.
func (c *controlled) settled() (time.Time, error) {
	last, err := c.committed(true)
	if err != nil {
		return last, err
	}
	const quiet = 300 * time.Millisecond
	for {
		select {
		case commit := <-c.commits:
			if commit.By != "nft" {
				last = commit.At
			}
		case <-time.After(quiet):
			return last, nil
		}
	}
}

// forget takes transactions that were told of before.
func (c *controlled) forget() {
	for {
		select {
		case <-c.commits:
		default:
			return
		}
	}
}

// times returns how often something is done: less often where everything takes long.
func (c *controlled) times(most int) int {
	if c.entries >= 1000 {
		return max(1, most/5)
	}
	return most
}

// sets changes the mode of the server's port, which takes a change of sets alone, back and forth. What is forbidden then is a
// plaintext connection, which ends.
func (c *controlled) sets() error {
	for range c.times(10) {
		if err := c.change(fmt.Sprintf("  - {port: %d, mode: passthrough}\n", c.pod.Port()), "", nil); err != nil {
			return err
		}
		conn, err := c.pod.Connect(true)
		if err != nil {
			return err
		}
		if err := c.change("", "sets", conn); err != nil {
			return err
		}
	}
	return nil
}

// change appends to the configuration and waits until the rules are in force. It measures that for a kind of change, if there is one,
// and how much later a connection ends, if there is one.
func (c *controlled) change(more, kind string, conn net.Conn) error {
	ended := make(chan time.Time, 1)
	if conn != nil {
		defer conn.Close()
		if err := load.Exchange(conn); err != nil {
			return err
		}
		go func() {
			_, _ = io.Copy(io.Discard, conn)
			ended <- time.Now()
		}()
	}
	c.forget()
	mantlet, envoys, err := c.pod.CPU()
	if err != nil {
		return err
	}
	began, err := c.pod.Configure(settings(c.entries, more))
	if err != nil {
		return err
	}
	at, err := c.settled()
	if err != nil || kind == "" {
		return err
	}
	nowMantlet, nowEnvoys, err := c.pod.CPU()
	if err != nil {
		return err
	}
	c.add(ours, seconds(kind+"-sec", at.Sub(began)), seconds(kind+"-mantlet-cpu-sec", nowMantlet-mantlet), seconds(kind+"-cpu-sec", nowMantlet-mantlet+nowEnvoys-envoys))
	if conn == nil {
		return nil
	}
	select {
	case when := <-ended:
		c.add(ours, seconds("ended-sec", max(0, when.Sub(at))))
		return nil
	case <-time.After(30 * time.Second):
		return errors.New("a connection that is forbidden goes on")
	}
}

// restart makes a change that takes another Envoy, and tightens, so that it does not wait; then bare Envoy's turn comes.
func (c *controlled) restart() error {
	for n := range c.times(2) {
		if err := c.change(fmt.Sprintf("  - {port: %d, mode: mtls, allow: [client, client-%d]}\n", c.pod.Port(), n), "restart", nil); err != nil {
			return err
		}
		validate, live, cpu, err := c.pod.Bare()
		if err != nil {
			return err
		}
		c.add(bare, seconds("restart-sec", validate+live), seconds("live-sec", live), seconds("live-cpu-sec", cpu))
	}
	return nil
}

func (c *controlled) certificates() error {
	for range c.times(3) {
		took, err := c.pod.Rotate()
		if err != nil {
			return err
		}
		c.add(ours, seconds("certificate-sec", took))
	}
	return nil
}

// repairs changes the rules as somebody else.
func (c *controlled) repairs() error {
	for n := range 20 {
		c.forget()
		command := fmt.Sprintf("add rule inet mantlet ingress counter comment \"bench-%d\"", n)
		if n%2 == 1 {
			command = "flush chain inet mantlet ingress"
		}
		if err := c.pod.Tamper(command); err != nil {
			return err
		}
		theirs, err := c.committed(false)
		if err != nil {
			return err
		}
		at, err := c.committed(true)
		if err != nil {
			return err
		}
		c.add(ours, seconds("repair-sec", at.Sub(theirs)))
	}
	return nil
}

// idle measures what mantlet takes while nobody comes.
func (c *controlled) idle(last bool) error {
	if last { // it takes long
		before, _, err := c.pod.CPU()
		if err != nil {
			return err
		}
		began := time.Now()
		time.Sleep(10 * time.Second)
		after, _, err := c.pod.CPU()
		if err != nil {
			return err
		}
		c.add(ours, measured.Value{Unit: "idle-%", Value: 100 * (after - before).Seconds() / time.Since(began).Seconds()})
	}
	memory, err := meter.Memory(c.pod.Sidecar.PID())
	if err != nil {
		return err
	}
	c.add(ours, measured.Value{Unit: "daemon-B", Value: float64(memory)})
	return nil
}

// restarts counts connections that fail while there are 100 hot restarts.
func (b *bench) restarts(s *measured.Section, mesh *lab.Authority) error {
	restarts := 100
	if b.rounds < 3 {
		restarts = 10
	}
	path, err := b.path(mesh, proxy.Options{Proxy: proxy.Mantlet, Restarts: true})
	if err != nil {
		return err
	}
	m, err := path.RunUntil(load.Job{Kind: load.Connect, Workers: 4, Warm: 200 * time.Millisecond}, func() error {
		return path.Restart(restarts)
	})
	if err := errors.Join(err, path.Close()); err != nil {
		return err
	}
	s.Add("Restarts", ours, measured.Value{Unit: "restarts", Value: float64(restarts)},
		measured.Value{Unit: "connections", Value: float64(m.Count)}, measured.Value{Unit: "failed", Value: float64(m.Failed)})
	info, err := os.Stat(b.programs.Mantlet)
	if err != nil {
		return err
	}
	s.Add("Binary", ours, measured.Value{Unit: "B", Value: float64(info.Size())})
	return nil
}
