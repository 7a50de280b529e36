package dns

import (
	"testing"

	"go.uber.org/goleak"

	"mantlet/lab"
)

func TestMain(m *testing.M) {
	lab.Enter()
	goleak.VerifyTestMain(m)
}
