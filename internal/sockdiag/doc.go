// Package sockdiag lists and ends TCP sockets of the calling thread's network namespace, whichever process has them, by the kernel's
// sock_diag (include/uapi/linux/sock_diag.h, inet_diag.h). Ending them takes NET_ADMIN.
package sockdiag
