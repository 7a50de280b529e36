//go:build !amd64

package sandbox

import "errors"

func forbidDumps(int) error { return errors.New("mantlet can't do that on this processor") }
