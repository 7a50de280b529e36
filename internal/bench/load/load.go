// Package load makes the traffic of the benchmarks: a server that echoes, sends and swallows, and its clients. Both run as
// processes of their own, so that the CPU time of each is told apart from that of the proxies between them.
//
// The first byte of a connection says what the server does with it.
package load

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Kind is a kind of traffic.
type Kind string

// The kinds of traffic.
const (
	Connect  Kind = "connect"  // dial, exchange a message, close; again and again
	Download Kind = "download" // the server sends without end
	Upload   Kind = "upload"   // the client sends without end
	Request  Kind = "request"  // messages over lasting connections, at a pace
	Flood    Kind = "flood"    // messages over lasting connections, one after the other
	Open     Kind = "open"     // connections that were used once and stay open
	Stalled  Kind = "stalled"  // connections that ask for data without end and read nothing
)

// What the first byte of a connection asks of the server.
const (
	echo    = 'e'
	send    = 's'
	swallow = 'x'
)

// messageSize is the size of a request, and of its answer.
const messageSize = 128

// Job is what a client does.
type Job struct {
	Kind    Kind          `json:"kind"`
	To      string        `json:"to"`
	Workers int           `json:"workers"` // connections at a time
	Warm    time.Duration `json:"warm"`    // before anything is counted
	For     time.Duration `json:"for"`     // zero: until the input ends
	Least   int64         `json:"least"`   // how much is counted at least, before and then; for that it takes longer, ten times at most
	Every   time.Duration `json:"every"`   // the pace of each worker's requests
}

// Result is what a client counted.
type Result struct {
	Seconds   float64 `json:"seconds"`
	Count     int64   `json:"count"` // connections, messages, or bytes
	Failed    int64   `json:"failed"`
	Error     string  `json:"error,omitempty"`     // the first one
	Latencies []int64 `json:"latencies,omitempty"` // of requests, in nanoseconds, in ascending order
}

// The lines that a client writes to its standard output, in this order, and then a Result as JSON.
const (
	Began = "began" // counting
	Ended = "ended" // counting; of Open and Stalled: all connections are there
)

// Run does a job. It writes Began, Ended and the result to out. Open and Stalled keep their connections until in ends.
func Run(job Job, in io.Reader, out io.Writer) error {
	c := &client{job: job}
	if job.Kind == Open || job.Kind == Stalled {
		return c.hold(in, out)
	}
	work := map[Kind]func() error{
		Connect: c.connect, Download: c.download, Upload: c.upload, Request: c.requests, Flood: c.requests,
	}[job.Kind]
	if work == nil {
		return fmt.Errorf("no such kind of traffic: %q", job.Kind)
	}
	var workers sync.WaitGroup
	for range job.Workers {
		workers.Go(func() {
			for !c.stop.Load() {
				if err := work(); err != nil && !c.stop.Load() {
					c.fail(err)
				}
			}
		})
	}
	// As many as it takes for every connection to find a session to resume, and all caches warm.
	for began := time.Now(); time.Since(began) < job.Warm || c.count.Load() < job.Least && time.Since(began) < 10*job.For; {
		time.Sleep(job.Warm / 10)
	}
	c.failed.Store(0)
	c.counting.Store(true)
	before, began := c.count.Load(), time.Now()
	if _, err := fmt.Fprintln(out, Began); err != nil {
		return err
	}
	if job.For == 0 { // until it is told
		_, _ = io.Copy(io.Discard, in)
	}
	for time.Sleep(job.For); c.count.Load()-before < job.Least && time.Since(began) < 10*job.For; {
		time.Sleep(job.For / 10)
	}
	c.counting.Store(false)
	result := Result{Count: c.count.Load() - before, Seconds: time.Since(began).Seconds()}
	if _, err := fmt.Fprintln(out, Ended); err != nil {
		return err
	}
	c.end()
	workers.Wait()
	result.Failed, result.Error = c.failed.Load(), c.error
	result.Latencies = slices.Sorted(slices.Values(c.latencies))
	return json.NewEncoder(out).Encode(result)
}

type client struct {
	job            Job
	stop, counting atomic.Bool
	count, failed  atomic.Int64

	mu        sync.Mutex
	error     string
	conns     []net.Conn // of workers whose connections last
	latencies []int64
}

func (c *client) fail(err error) {
	c.failed.Add(1)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.error == "" {
		c.error = err.Error()
	}
}

// end makes workers return.
func (c *client) end() {
	c.stop.Store(true)
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.conns {
		_ = conn.Close()
	}
}

// dial connects by plain TCP, where Go's default is MPTCP.
func (c *client) dial() (net.Conn, error) {
	dialer := net.Dialer{Timeout: 10 * time.Second}
	dialer.SetMultipathTCP(false)
	return dialer.Dial("tcp", c.job.To)
}

// lasting connects for as long as the job takes.
func (c *client) lasting() (net.Conn, error) {
	conn, err := c.dial()
	if err == nil {
		c.mu.Lock()
		c.conns = append(c.conns, conn)
		c.mu.Unlock()
	}
	return conn, err
}

func message() []byte {
	m := make([]byte, messageSize)
	m[0] = echo
	return m
}

// Exchange sends a message and waits for its echo.
func Exchange(conn net.Conn) error { return exchange(conn, message()) }

func exchange(conn net.Conn, m []byte) error {
	if _, err := conn.Write(m); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, m)
	return err
}

func (c *client) connect() error {
	conn, err := c.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := errors.Join(conn.SetDeadline(time.Now().Add(10*time.Second)), exchange(conn, message())); err != nil {
		return err
	}
	c.count.Add(1)
	return nil
}

const chunk = 256 << 10

func (c *client) download() error {
	conn, err := c.lasting()
	if err != nil {
		return err
	}
	if _, err := conn.Write([]byte{send}); err != nil {
		return err
	}
	buffer := make([]byte, chunk)
	for {
		n, err := conn.Read(buffer)
		c.count.Add(int64(n))
		if err != nil {
			return err
		}
	}
}

func (c *client) upload() error {
	conn, err := c.lasting()
	if err != nil {
		return err
	}
	buffer := make([]byte, chunk)
	buffer[0] = swallow
	for {
		n, err := conn.Write(buffer)
		c.count.Add(int64(n))
		if err != nil {
			return err
		}
	}
}

func (c *client) requests() error {
	conn, err := c.lasting()
	if err != nil {
		return err
	}
	var pace <-chan time.Time
	if c.job.Kind == Request {
		tick := time.NewTicker(c.job.Every)
		defer tick.Stop()
		pace = tick.C
	}
	m := message()
	for !c.stop.Load() {
		if pace != nil {
			<-pace
		}
		began := time.Now()
		if err := exchange(conn, m); err != nil {
			return err
		}
		took := time.Since(began)
		c.count.Add(1)
		if c.job.Kind == Request && c.counting.Load() {
			c.mu.Lock()
			c.latencies = append(c.latencies, int64(took))
			c.mu.Unlock()
		}
	}
	return nil
}

// hold opens the connections, 16 at a time, and keeps them.
func (c *client) hold(in io.Reader, out io.Writer) error {
	began := time.Now()
	if _, err := fmt.Fprintln(out, Began); err != nil {
		return err
	}
	slots := make(chan struct{}, 16)
	var opening sync.WaitGroup
	for range c.job.Workers {
		slots <- struct{}{}
		opening.Go(func() {
			defer func() { <-slots }()
			conn, err := c.lasting()
			switch {
			case err != nil:
			case c.job.Kind == Open:
				err = exchange(conn, message())
			default:
				_, err = conn.Write([]byte{send})
			}
			if err != nil {
				c.fail(err)
				return
			}
			c.count.Add(1)
		})
	}
	opening.Wait()
	if _, err := fmt.Fprintln(out, Ended); err != nil {
		return err
	}
	_, _ = io.Copy(io.Discard, in)
	c.end()
	return json.NewEncoder(out).Encode(Result{
		Seconds: time.Since(began).Seconds(), Count: c.count.Load(), Failed: c.failed.Load(), Error: c.error,
	})
}

// Serve answers the connections of a listener until it is closed.
func Serve(listener net.Listener) error {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		go answer(conn)
	}
}

func answer(conn net.Conn) {
	defer conn.Close()
	reader := bufio.NewReaderSize(conn, messageSize)
	first, err := reader.Peek(1)
	if err != nil {
		return
	}
	switch first[0] {
	case echo:
		m := make([]byte, messageSize)
		for {
			if _, err := io.ReadFull(reader, m); err != nil {
				return
			}
			if _, err := conn.Write(m); err != nil {
				return
			}
		}
	case send:
		buffer := make([]byte, chunk)
		for {
			if _, err := conn.Write(buffer); err != nil {
				return
			}
		}
	case swallow:
		buffer := make([]byte, chunk)
		for {
			if _, err := conn.Read(buffer); err != nil {
				return
			}
		}
	}
}
