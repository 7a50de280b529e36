package dns

import (
	"testing"

	"go.uber.org/goleak"

	"mantlet/internal/lab"
)

func TestMain(m *testing.M) {
	lab.Enter()
	goleak.VerifyTestMain(m)
}
