package envoy

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"mantlet/internal/bind"
	"mantlet/internal/sandbox"
	"mantlet/render"
)

// preflight has Envoy validate a bootstrap before a new epoch starts: a failure after that costs the old epoch its admin interface. What the
// epoch that serves has in its own bootstrap is left out, since it was live with it: of 1,000 entries validation takes two seconds. Where
// that does not succeed, or parts may contradict each other, all of it is validated, which gives the error.
func (r *Runner) preflight(ctx context.Context, state render.State, proven parts) error {
	if isDistinct(state.Bootstrap) && r.validate(ctx, state, without(state.Bootstrap, proven)) == nil {
		return nil
	}
	return r.validate(ctx, state, state.Bootstrap)
}

// isDistinct reports whether clusters and listeners have names of their own, and listeners addresses.
func isDistinct(b *bootstrapv3.Bootstrap) bool {
	seen := map[string]bool{}
	var all []string
	for _, c := range b.GetStaticResources().GetClusters() {
		all = append(all, "cluster "+c.GetName())
	}
	for _, l := range listenersOf(b) {
		all = append(all, "listener "+l.name)
		for _, at := range l.addresses {
			all = append(all, "address "+at.String())
		}
	}
	for _, one := range all {
		if seen[one] {
			return false
		}
		seen[one] = true
	}
	return true
}

// parts are the listeners and clusters of a bootstrap, by digest.
type parts map[[sha256.Size]byte]bool

func digest(part proto.Message) (sum [sha256.Size]byte, ok bool) {
	text, err := proto.MarshalOptions{Deterministic: true}.Marshal(part)
	return sha256.Sum256(text), err == nil
}

func partsOf(b *bootstrapv3.Bootstrap) parts {
	all := parts{}
	for _, l := range b.GetStaticResources().GetListeners() {
		all.add(l)
	}
	for _, c := range b.GetStaticResources().GetClusters() {
		all.add(c)
	}
	return all
}

func (p parts) add(part proto.Message) {
	if sum, ok := digest(part); ok {
		p[sum] = true
	}
}

func (p parts) has(part proto.Message) bool {
	sum, ok := digest(part)
	return ok && p[sum]
}

// without returns a bootstrap without some parts. It shares the rest with the whole one.
func without(b *bootstrapv3.Bootstrap, proven parts) *bootstrapv3.Bootstrap {
	rest := &bootstrapv3.Bootstrap{}
	b.ProtoReflect().Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		rest.ProtoReflect().Set(field, value)
		return true
	})
	static := b.GetStaticResources()
	rest.StaticResources = &bootstrapv3.Bootstrap_StaticResources{
		Listeners: unproven(static.GetListeners(), proven), Clusters: unproven(static.GetClusters(), proven), Secrets: static.GetSecrets(),
	}
	return rest
}

func unproven[P proto.Message](all []P, proven parts) []P {
	return slices.DeleteFunc(slices.Clone(all), func(p P) bool { return proven.has(p) })
}

// validate has Envoy validate a bootstrap of a state, or a part of it.
func (r *Runner) validate(ctx context.Context, state render.State, b *bootstrapv3.Bootstrap) error {
	config := r.directory().Preflight()
	if err := r.write(config, b); err != nil {
		return err
	}
	defer func() { _ = os.Remove(config) }()
	ctx, cancel := context.WithTimeout(ctx, r.limit(state))
	defer cancel()
	var said bytes.Buffer
	cmd := exec.CommandContext(ctx, r.Path, "--mode", "validate", "--config-path", config, "--log-level", "error")
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.WaitDelay = time.Second // for a script whose child holds the pipe
	cmd.Cancel = func() error { return r.spawner.do(cmd.Process.Kill) }
	err := r.spawner.do(cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return fmt.Errorf("Envoy does not accept the bootstrap: %w: %s", cmp.Or(ctx.Err(), err), &said)
	}
	return nil
}

// tryBinds returns why an Envoy could not listen at all addresses of a bootstrap.
func (r *Runner) tryBinds(b *bootstrapv3.Bootstrap) error {
	return r.spawner.do(func() error {
		if _, err := sandbox.AmbientCapabilities(ports(listenersOf(b))); err != nil {
			return err
		}
		return bind.Try(r.Processes, render.ListenAddresses(b)...)
	})
}

// ports returns the ports of listeners.
func ports(listeners []listener) (ports []uint32) {
	for _, l := range listeners {
		for _, at := range l.addresses {
			ports = append(ports, uint32(at.Port()))
		}
	}
	return ports
}
