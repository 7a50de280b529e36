package lab

import "golang.org/x/sys/unix"

// ofThisArchitecture returns the system calls that forbid refuses and that other architectures do not have.
func ofThisArchitecture() []uint32 { return []uint32{unix.SYS_IOPERM, unix.SYS_IOPL} }
