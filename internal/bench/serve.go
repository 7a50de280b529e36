package main

import (
	"context"
	"net"
	"syscall"

	"mantlet/internal/bench/load"
)

// serve answers at an address until the process is killed. Its socket is set up by control.
func serve(address string, control func(network, address string, conn syscall.RawConn) error) error {
	config := net.ListenConfig{Control: control}
	config.SetMultipathTCP(false)
	listener, err := config.Listen(context.Background(), "tcp", address)
	if err != nil {
		return err
	}
	return load.Serve(listener)
}
