package sandbox

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// forbidDumps has a process that stops for the calling thread call prctl(PR_SET_DUMPABLE, 0), and puts its registers back.
func forbidDumps(pid int) error {
	at, err := systemCall(pid)
	if err != nil {
		return err
	}
	var before unix.PtraceRegs
	if err := unix.PtraceGetRegs(pid, &before); err != nil {
		return os.NewSyscallError("ptrace", err)
	}
	call := before
	call.Rip, call.Rax, call.Rdi, call.Rsi = at, unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 0
	call.Orig_rax = ^uint64(0) // -1: it is in no system call that could be made again
	if err := unix.PtraceSetRegs(pid, &call); err != nil {
		return os.NewSyscallError("ptrace", err)
	}
	err = os.NewSyscallError("ptrace", unix.PtraceSingleStep(pid))
	if err == nil {
		err = awaitTrap(pid)
	}
	if err == nil {
		err = os.NewSyscallError("ptrace", unix.PtraceGetRegs(pid, &call))
	}
	if result := int64(call.Rax); err == nil && result != 0 {
		err = os.NewSyscallError("prctl", unix.Errno(-result))
	}
	return errors.Join(err, os.NewSyscallError("ptrace", unix.PtraceSetRegs(pid, &before)))
}

// systemCall returns where a process has the instruction that makes a system call: in the vDSO, which the kernel maps into each.
func systemCall(pid int) (uint64, error) {
	const (
		vdso = 33      // AT_SYSINFO_EHDR
		size = 2 << 12 // of the vDSO, or of its beginning
	)
	auxiliary, err := os.ReadFile(fmt.Sprintf("/proc/%d/auxv", pid))
	if err != nil {
		return 0, err
	}
	for ; len(auxiliary) >= 16; auxiliary = auxiliary[16:] {
		if binary.NativeEndian.Uint64(auxiliary) != vdso {
			continue
		}
		at, code := binary.NativeEndian.Uint64(auxiliary[8:]), make([]byte, size)
		n, err := unix.PtracePeekData(pid, uintptr(at), code)
		if i := bytes.Index(code[:n], []byte{0x0f, 0x05}); i >= 0 {
			return at + uint64(i), nil
		}
		if err != nil {
			return 0, os.NewSyscallError("ptrace", err)
		}
	}
	return 0, errors.New("the process has no vDSO with a system call")
}
