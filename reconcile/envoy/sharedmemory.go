package envoy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// base is what the epochs of one Envoy share: the base ID (--base-id), which names their shared memory and sockets.
type base struct {
	id      uint32
	blocked error // why no further epoch can start; nil if one can
}

// baseBits is how many bits of the base ID come from the network namespace. Envoy multiplies the ID by ten within 32 bits.
const baseBits = 27

// newBase chooses the base ID for an epoch 0. It is made from the inode number of the network namespace, in which there is one mantlet at
// most: Envoys of several pods that share a /dev/shm must not collide. While Envoys with that ID still run, it is another one.
func newBase(running []*Process) (*base, error) {
	var stat unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &stat); err != nil {
		return nil, fmt.Errorf("looking up the network namespace: %w", err)
	}
	id := uint32(stat.Ino % (1 << baseBits))
	if slices.ContainsFunc(running, func(p *Process) bool { return p.base.id == id }) {
		id += 1 << baseBits
	}
	return &base{id: id}, nil
}

// The shared memory of hot restart version 11 (source/server/hot_restart_impl.h): two 64-bit words with its size and
// version, two mutexes, and a word of flags.
const (
	sharedSize        = 104
	sharedVersion     = 11
	versionOffset     = 8
	flagsOffset       = 96
	flagsInitializing = 1
)

func (b *base) path() string { return fmt.Sprintf("/dev/shm/envoy_shared_memory_%d", b.id*10) }

// clearInitializing clears the flag that an epoch sets while it starts, and leaves behind if it dies before it is live. Every later epoch
// is refused while the flag is set. The process that set it must have been reaped.
func (b *base) clearInitializing() error {
	f, err := os.OpenFile(b.path(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	memory := make([]byte, sharedSize+1)
	n, err := f.ReadAt(memory, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	word := func(offset int) uint64 { return binary.NativeEndian.Uint64(memory[offset:]) }
	if n != sharedSize || word(0) != sharedSize || word(versionOffset) != sharedVersion {
		return fmt.Errorf("%s is not Envoy's shared memory of version %d: %d bytes, says size %d and version %d",
			b.path(), sharedVersion, n, word(0), word(versionOffset))
	}
	_, err = f.WriteAt(binary.NativeEndian.AppendUint64(nil, word(flagsOffset)&^flagsInitializing), flagsOffset)
	return err
}

// remove removes the shared memory. No Process of the base may be running.
func (b *base) remove() error {
	if err := os.Remove(b.path()); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
