// Package lab is a laboratory on the real kernel: everything that mantlet does to packets, processes and certificates can be
// done and seen here, by root or by an ordinary user, on a laptop or in CI, and nothing of it is left behind.
//
//	func TestMain(m *testing.M) {
//		lab.Enter() // from here on: root, in namespaces of its own
//		goleak.VerifyTestMain(m)
//	}
//
// [Enter] puts the whole program into fresh namespaces. A [Network] is a bridge with hosts on it, each [Host] a network namespace
// with one IPv4 and one IPv6 address. An [Authority] issues certificates in the shape that production has. A [Workload] is what is
// to be protected, and a [Prober] is the adversary that speaks plaintext to it.
//
// The lab asks for user namespaces and for nothing else, and it never skips: where they are missing the program ends with
// status 2 and says how to get them.
package lab
