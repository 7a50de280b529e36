package envoy

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"os"
	"os/exec"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"

	"mantlet/internal/bind"
	"mantlet/internal/sandbox"
	"mantlet/render"
)

// preflight has Envoy validate a bootstrap before a new epoch starts: a failure after that costs the old epoch its admin interface.
func (r *Runner) preflight(ctx context.Context, state render.State) error {
	config := r.directory().Preflight()
	if err := r.write(config, state.Bootstrap); err != nil {
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
