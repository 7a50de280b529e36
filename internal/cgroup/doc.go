// Package cgroup tells what memory the kernel lets this process have, and when it took more.
//
// Files and formats: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of the kernel.
package cgroup
