//go:build !amd64

package lab

// ofThisArchitecture returns the system calls that forbid refuses and that other architectures do not have.
func ofThisArchitecture() []uint32 { return nil }
