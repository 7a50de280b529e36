package render

import (
	"errors"
	"fmt"
	"strings"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	overloadv3 "github.com/envoyproxy/go-control-plane/envoy/config/overload/v3"
	connectionsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/resource_monitors/downstream_connections/v3"
	heapv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/resource_monitors/fixed_heap/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"mantlet/schema"
)

// Limits are what mantlet and its Envoys can have at most. A zero is no limit.
type Limits struct {
	Memory      uint64 // in bytes, of all of them together
	Sockets     bool   // the kernel's buffers of sockets count as memory, too
	Descriptors uint64 // of each Envoy
}

// Capacity is how many connections an Envoy takes at a time. It closes those that are too many as they come; those that it
// has go on.
type Capacity struct {
	Ingress uint64 // of all clients together
	By      string // what Ingress follows from: memory, descriptors or conntrack
	Egress  uint64 // of the workload at each egress entry
	Heap    uint64 // the bytes of heap from which on nothing new is taken at all; 0 for no limit
}

// What Envoy 1.40 and mantlet take, as measured.
const (
	mib = 1 << 20
	kib = 1 << 10

	// sharedMemory is there once, however many Envoys run: mantlet, and the pages of Envoy's binary.
	sharedMemory = 96 * mib
	// planMemory is what an egress entry takes of mantlet while it makes a bootstrap.
	planMemory = 90 * kib
	// An Envoy takes this without a configuration, and for each part of one.
	envoyMemory  = 16 * mib
	egressMemory = 115 * kib
	listMemory   = 40 * kib
	nameMemory   = 6 * kib
	// connectionMemory is the most that a stranger can make a connection take of Envoy, by asking for much and not reading it. With
	// other values of bufferLimit it was 394 KiB (256), 132 KiB (64) and 105 KiB (32).
	connectionMemory = 224 * kib
	// socketMemory is what the buffers of its two sockets then take of the kernel.
	socketMemory = 252 * kib

	// An Envoy has this many descriptors at least, and these for each of its threads: two listeners with two addresses, and
	// what the thread waits by. Each egress entry adds a socket for each thread.
	envoyDescriptors  = 64
	threadDescriptors = 8
	// connectionDescriptors are the two sockets of a connection.
	connectionDescriptors = 2

	// fewest is how many connections are taken however little there is: a pod whose limits are too small for Envoy itself is to
	// work while it can.
	fewest = 64
	// fewestOut is the same for each egress entry.
	fewestOut = 4

	// From these parts of its heap on, Envoy gives back what it does not use, and takes nothing new.
	shrinkFrom = 0.85
	shedFrom   = 0.95
	// overloadInterval is how often it looks at its heap. In that time strangers get no further than from the one part to the
	// other.
	overloadInterval = 250 * time.Millisecond
)

// Cost is what a mesh takes of an Envoy, beside connections.
type Cost struct {
	egress, lists, names uint64
	threads              uint64
}

// CostOf returns what a mesh takes.
func CostOf(mesh schema.Mesh) Cost {
	c := Cost{egress: uint64(len(mesh.Egress)), threads: uint64(max(1, mesh.Envoy.Concurrency))}
	seen := map[string]bool{}
	for _, in := range mesh.Ingress {
		if key := strings.Join(in.Allow, "\x00"); in.Allow != nil && !seen[key] {
			seen[key] = true
			c.lists++
			c.names += uint64(len(in.Allow))
		}
	}
	for _, e := range mesh.Egress {
		c.names += uint64(len(e.ServerNames))
	}
	return c
}

func (c Cost) memory() uint64 {
	return c.egress*egressMemory + c.lists*listMemory + c.names*nameMemory
}

func (c Cost) descriptors() uint64 {
	return envoyDescriptors + c.threads*(threadDescriptors+c.egress)
}

// Fit returns why an Envoy can't run with a mesh of that cost; nil where it can.
func (l Limits) Fit(c Cost) error {
	var errs []error
	if needs := c.descriptors() + fewest*connectionDescriptors; l.Descriptors > 0 && needs > l.Descriptors {
		errs = append(errs, fmt.Errorf("%d egress entries and %d threads (envoy.concurrency) need %d file descriptors, and Envoy can have %d: "+
			"have fewer, or raise the hard limit of open files (ulimit -Hn)", c.egress, c.threads, needs, l.Descriptors))
	}
	if needs := c.memory(); l.Memory > 0 && needs > l.Memory/2 {
		errs = append(errs, fmt.Errorf("Envoy takes some %d MiB for %d egress entries, %d lists of clients and %d names, and twice that during a hot "+
			"restart; the container's memory limit is %d MiB: raise it, or have fewer", needs/mib, c.egress, c.lists, c.names, l.Memory/mib))
	}
	return errors.Join(errs...)
}

// Capacity returns how many connections an Envoy takes that runs with a mesh of that cost.
//
// The memory has room for an Envoy all of whose clients are strangers that stopped reading and, beside it, for the Envoy of a
// hot restart with a third as many. Strangers outside get no more than three quarters of the descriptors, so that the workload
// can go out whatever they do.
func (l Limits) Capacity(c Cost) Capacity {
	all := Capacity{Ingress: maxConnections, By: "conntrack", Egress: maxConnections}
	if l.Descriptors > 0 {
		connections := less(l.Descriptors, c.descriptors()) / connectionDescriptors
		all.lower("descriptors", connections*3/4)
		all.Egress = min(all.Egress, max(fewestOut, connections/4/max(1, c.egress)))
	}
	if l.Memory > 0 {
		connection := uint64(connectionMemory)
		if l.Sockets {
			connection += socketMemory
		}
		room, base := less(l.Memory, sharedMemory+c.egress*planMemory), envoyMemory+c.memory()
		all.lower("memory", less(room, 2*base)*3/4/connection)
		all.Heap = max(less(room, base), base+fewest*connectionMemory)
	}
	all.Ingress = max(fewest, all.Ingress)
	return all
}

func (c *Capacity) lower(by string, ingress uint64) {
	if ingress < c.Ingress {
		c.Ingress, c.By = ingress, by
	}
}

// less subtracts what is there to subtract from.
func less(a, b uint64) uint64 { return a - min(a, b) }

// Limit makes a bootstrap keep to a capacity. That is no part of the desired state, nor of its digest: other limits are no
// reason for another Envoy.
func Limit(b *bootstrapv3.Bootstrap, capacity Capacity) error {
	r := &renderer{}
	monitor := func(name string, config *overloadv3.ResourceMonitor_TypedConfig) {
		b.OverloadManager.ResourceMonitors = append(b.OverloadManager.ResourceMonitors, &overloadv3.ResourceMonitor{Name: name, ConfigType: config})
	}
	b.OverloadManager = &overloadv3.OverloadManager{}
	monitor("envoy.resource_monitors.global_downstream_max_connections", &overloadv3.ResourceMonitor_TypedConfig{
		TypedConfig: r.pack(&connectionsv3.DownstreamConnectionsConfig{MaxActiveDownstreamConnections: int64(capacity.Ingress)}),
	})
	if capacity.Heap > 0 {
		const heap = "envoy.resource_monitors.fixed_heap"
		monitor(heap, &overloadv3.ResourceMonitor_TypedConfig{TypedConfig: r.pack(&heapv3.FixedHeapConfig{MaxHeapSizeBytes: capacity.Heap})})
		from := func(part float64) []*overloadv3.Trigger {
			return []*overloadv3.Trigger{{Name: heap, TriggerOneof: &overloadv3.Trigger_Threshold{Threshold: &overloadv3.ThresholdTrigger{Value: part}}}}
		}
		b.OverloadManager.RefreshInterval = durationpb.New(overloadInterval)
		b.OverloadManager.Actions = []*overloadv3.OverloadAction{{Name: "envoy.overload_actions.shrink_heap", Triggers: from(shrinkFrom)}}
		b.OverloadManager.LoadshedPoints = []*overloadv3.LoadShedPoint{{Name: "envoy.load_shed_points.tcp_listener_accept", Triggers: from(shedFrom)}}
	}
	limits := map[string]*structpb.Value{}
	for _, l := range b.StaticResources.Listeners {
		if l.IgnoreGlobalConnLimit {
			limits["envoy.resource_limits.listener."+l.Name+".connection_limit"] = structpb.NewNumberValue(float64(capacity.Egress))
		}
	}
	b.LayeredRuntime = nil
	if len(limits) > 0 {
		b.LayeredRuntime = &bootstrapv3.LayeredRuntime{Layers: []*bootstrapv3.RuntimeLayer{{
			Name:           "limits",
			LayerSpecifier: &bootstrapv3.RuntimeLayer_StaticLayer{StaticLayer: &structpb.Struct{Fields: limits}},
		}}}
	}
	return r.err
}
