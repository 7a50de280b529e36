// Package sandbox takes from mantlet and from Envoy what they do not need: capabilities, the user, and files by Landlock.
//
// The kernel knows threads, not processes: user, capabilities and Landlock's rules are each thread's own, and a child has
// those of the thread that forked it. So one OS thread of mantlet becomes Envoy's user, and every Envoy is its child; the
// other threads stay root, with NET_ADMIN. Nothing has to cross from one user to the other after that: no capability for
// it is left, and Envoy gets SIGKILL from a thread of its own user when mantlet ends.
package sandbox
