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
	os.Exit(m.Run())
}
