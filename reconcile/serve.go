package reconcile

import (
	"context"
	"sync"

	"mantlet/internal/rundir"
	"mantlet/internal/status"
)

// Serve answers at the status socket, and at the status address if there is one, until ctx ends. Beside that it serves the gate's
// socket and keeps the ready file.
func (d *Daemon) Serve(ctx context.Context) error {
	process := d.Environment.Process
	listener, err := status.Listen(rundir.Directory(process.RuntimeDirectory).StatusSocket())
	if err != nil {
		return err
	}
	server := status.Server{Source: d, Follow: d.Follow, Log: d.Log}
	var others sync.WaitGroup
	if process.StatusAddress != "" {
		others.Go(func() {
			server.ServeAddress(ctx, process.StatusAddress, func() string { return d.Processes.At(process.StatusListen()) })
		})
	}
	others.Go(func() { d.serveGate(ctx) })
	if process.ReadyFile != "" {
		others.Go(func() { d.keepReadyFile(ctx) })
	}
	defer others.Wait()
	return server.Serve(ctx, listener)
}
