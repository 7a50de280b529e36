package lab

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Hang mounts a file system on a directory whose server never answers: whoever looks for a file there waits, as with a network
// file system that has lost its server, until resume is called; then they get an error, and the directory is as before. The
// error is fs.ErrNotExist or fs.ErrPermission where the machine has no /dev/fuse for its users.
func Hang(directory string) (resume func() error, err error) {
	device, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0) // that nobody reads from is all that it takes
	if err != nil {
		return nil, err
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", device.Fd())
	if err := unix.Mount("hang", directory, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		_ = device.Close()
		return nil, fmt.Errorf("mounting a file system on %s: %w", directory, err)
	}
	return func() error {
		err := device.Close()
		if unmountErr := unix.Unmount(directory, unix.MNT_DETACH); err == nil && unmountErr != nil {
			err = fmt.Errorf("unmounting %s: %w", directory, unmountErr)
		}
		return err
	}, nil
}
