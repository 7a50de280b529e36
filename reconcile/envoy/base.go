package envoy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"

	"golang.org/x/sys/unix"
)

// base is what epochs of one Envoy share: a number that names their shared memory and sockets.
type base struct {
	id     uint32
	used   bool
	spoilt bool // its shared memory is of no use: no further epoch can start
}

// bases is how many numbers each network namespace has in turn; Envoy multiplies them by ten within 32 bits.
const (
	bases    = 2
	baseBits = 27
)

// next chooses the number for an epoch 0. It is made from that of the network namespace, of which there is one mantlet
// each: Envoys whose /dev/shm is one must not meet. Where Envoys of a spoilt base still run, it is another one.
func (b *base) next() error {
	var stat unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &stat); err != nil {
		return fmt.Errorf("looking up the network namespace: %w", err)
	}
	id := uint32(stat.Ino % (1 << baseBits))
	if b.used && b.spoilt && b.id == id {
		id += 1 << baseBits
	}
	*b = base{id: id, used: true}
	return nil
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

// unstick clears the flag that an epoch which died before it was live leaves behind; while it is set, every later epoch
// is refused. The process that set it must have been reaped. Where the memory is not as it should be, the base is spoilt.
func (b *base) unstick(log *slog.Logger) {
	if err := clearInitializing(b.path()); err != nil {
		log.Error("the flag of an Envoy that did not get live can't be cleared", "error", err)
		b.spoilt = true
	}
}

func clearInitializing(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
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
			path, sharedVersion, n, word(0), word(versionOffset))
	}
	_, err = f.WriteAt(binary.NativeEndian.AppendUint64(nil, word(flagsOffset)&^flagsInitializing), flagsOffset)
	return err
}

func (b *base) remove() error {
	if !b.used {
		return nil
	}
	if err := os.Remove(b.path()); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
