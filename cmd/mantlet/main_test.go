package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"runtime"
	"runtime/pprof"
	"syscall"
	"testing"

	"mantlet/internal/lab"
)

// asHolder makes the test binary listen at an address, and do nothing else.
const asHolder = "RUN_AS_HOLDER"

// asMantlet makes the test binary be mantlet, so that what runs on the lab's hosts is what was compiled for the test.
const asMantlet = "RUN_AS_MANTLET"

func TestMain(m *testing.M) {
	if text := os.Getenv(intruder); text != "" {
		var to target
		if err := json.Unmarshal([]byte(text), &to); err != nil {
			panic(err)
		}
		if err := json.NewEncoder(os.Stdout).Encode(to.intrude()); err != nil {
			panic(err)
		}
		os.Exit(0)
	}
	if text := os.Getenv(spyVariable); text != "" {
		if err := spy(text); err != nil {
			panic(err)
		}
		os.Exit(0)
	}
	if address := os.Getenv(asHolder); address != "" {
		listener, err := net.Listen("tcp", address)
		for err == nil {
			_, err = listener.Accept()
		}
		panic(err)
	}
	if os.Getenv(asMantlet) != "" {
		tellGoroutines()
		main()
	}
	if os.Getenv(outsideVariable) == "" {
		all, err := tryOutside()
		text, failed := json.Marshal(all)
		if err = errors.Join(err, failed, os.Setenv(outsideVariable, string(text))); err != nil {
			panic(err)
		}
	}
	lab.Enter()
	if err := lab.Resolver(); err != nil { // names are those of /etc/hosts
		panic(err)
	}
	os.Exit(m.Run())
}

// tellGoroutines makes mantlet write, at a SIGUSR1, how many goroutines it has; and where they are, if they are many.
func tellGoroutines() {
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGUSR1)
	go func() {
		for range asked {
			n := runtime.NumGoroutine()
			fmt.Fprintf(os.Stderr, "goroutines: %d\n", n)
			if many := 60; n > many {
				_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
			}
		}
	}()
}
