package main

import (
	"os"
	"testing"

	"mantlet/lab"
)

// asMantlet makes the test binary be mantlet, so that what runs on the lab's hosts is what was compiled for the test.
const asMantlet = "RUN_AS_MANTLET"

func TestMain(m *testing.M) {
	if os.Getenv(asMantlet) != "" {
		main()
	}
	lab.Enter()
	if err := lab.Resolver(); err != nil { // names are those of /etc/hosts
		panic(err)
	}
	os.Exit(m.Run())
}
