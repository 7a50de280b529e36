package rundir

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Directory is the path of a runtime directory. mantlet alone gets into it.
type Directory string

// The names of its files. A file that is being replaced has a dot before its name, and digits after it.
const (
	statusSocket         = "mantlet.sock"
	ready                = "ready"
	iptablesLock         = "xtables.lock"
	lastGood             = "last-good"
	lastGoodConfig       = lastGood + ".json"
	lastGoodCertificates = lastGood + "-certificates.json"
	envoy                = "envoy"
)

// StatusSocket is where a running mantlet answers HTTP.
func (d Directory) StatusSocket() string { return d.file(statusSocket) }

// Ready is a name that is there exactly while the sidecar is ready. The ready file that a user names leads to it.
func (d Directory) Ready() string { return d.file(ready) }

// IptablesLock is the lock of iptables-legacy.
func (d Directory) IptablesLock() string { return d.file(iptablesLock) }

// LastGoodConfig keeps the last good override file for a mantlet after this one.
func (d Directory) LastGoodConfig() string { return d.file(lastGoodConfig) }

// LastGoodCertificates keeps the last certificates that Envoy accepted for a mantlet after this one.
func (d Directory) LastGoodCertificates() string { return d.file(lastGoodCertificates) }

// Envoy is the part of the directory that Envoy gets into.
func (d Directory) Envoy() Envoy { return Envoy(d.file(envoy)) }

func (d Directory) file(name string) string { return filepath.Join(string(d), name) }

// IsOwn reports whether a name in a runtime directory is one that mantlet may have put there, or a file system has by itself.
func IsOwn(name string) bool {
	return slices.Contains([]string{envoy, statusSocket, ready, iptablesLock, "lost+found"}, name) ||
		strings.HasPrefix(strings.TrimPrefix(name, "."), lastGood)
}

// Envoy is the path of the part of a runtime directory that mantlet and Envoy get into, two users.
type Envoy string

// The names of its files, where they are needed to find files.
const (
	adminSocket = "admin-%d.sock"
	hotRestart  = "epoch"
	bootstrap   = "bootstrap-%d.json"
	preflight   = "preflight" + Binary
	trialSocket = "%s-%d.sock" // of a listener, whose name begins with trial-
)

// AdminSocket is where the Envoy of an epoch answers as its admin interface does.
func (e Envoy) AdminSocket(epoch int) string { return e.file(fmt.Sprintf(adminSocket, epoch)) }

// AdminSockets returns the admin sockets that there are, that of the newest epoch first.
func (e Envoy) AdminSockets() ([]string, error) {
	sockets, err := filepath.Glob(e.file(all(adminSocket)))
	if err != nil {
		return nil, fmt.Errorf("looking for admin sockets: %w", err)
	}
	epochs := map[string]int{} // -1 for what is no epoch's
	before, after, _ := strings.Cut(adminSocket, "%d")
	for _, socket := range sockets {
		epoch, err := strconv.Atoi(strings.TrimSuffix(strings.TrimPrefix(filepath.Base(socket), before), after))
		if err != nil {
			epoch = -1
		}
		epochs[socket] = epoch
	}
	slices.SortFunc(sockets, func(a, b string) int { return epochs[b] - epochs[a] })
	return sockets, nil
}

// DiscoverySocket is where mantlet tells Envoys the addresses of upstreams.
func (e Envoy) DiscoverySocket() string { return e.file("discovery.sock") }

// TrialSocket is where a listener of an epoch's trial of certificates listens.
func (e Envoy) TrialSocket(listener string, epoch int) string {
	return e.file(fmt.Sprintf(trialSocket, listener, epoch))
}

// SecretFile is the name of the file that holds a secret which Envoy reads.
func SecretFile(secret string) string { return "sds-" + secret + ".json" }

// Secret holds a secret that Envoy reads.
func (e Envoy) Secret(secret string) string { return e.file(SecretFile(secret)) }

// Bootstrap is what an epoch was started with.
func (e Envoy) Bootstrap(epoch int) string { return e.file(fmt.Sprintf(bootstrap, epoch)) }

// Binary is the extension of a file that Envoy reads as protobuf's binary form (loadFromFile in source/common/protobuf/utility.cc).
const Binary = ".pb"

// Preflight is a bootstrap that Envoy is to validate. It is binary: nobody else reads it, and both writing and reading it as JSON take
// several times as long.
func (e Envoy) Preflight() string { return e.file(preflight) }

// HotRestart is the prefix of the sockets over which Envoys speak to each other (--socket-path). They are files: abstract ones could be
// spoken to by every container of the pod.
func (e Envoy) HotRestart() string { return e.file(hotRestart) }

// ParentSocket is where an Envoy listens for what its successor asks and tells, by Envoy's number of it: ten times the base ID, and
// the epoch modulo 3 (source/server/hot_restarting_base.cc).
func (e Envoy) ParentSocket(number int) string {
	return fmt.Sprintf("%s_parent_%d", e.HotRestart(), number)
}

// ChildSocket is where the successor of an Envoy gets its answers, by the successor's number.
func (e Envoy) ChildSocket(number int) string {
	return fmt.Sprintf("%s_child_%d", e.HotRestart(), number)
}

// OfBase returns patterns that match all sockets of hot restarts with a base ID.
func (e Envoy) OfBase(id uint32) []string {
	return []string{fmt.Sprintf("%s_*_%d[0-2]", e.HotRestart(), id)}
}

// OfEpoch returns patterns that match the files of an epoch that has ended.
func (e Envoy) OfEpoch(epoch int) []string {
	return []string{e.file(fmt.Sprintf("*-%d.sock", epoch)), e.Bootstrap(epoch)}
}

// Secrets returns patterns that match the secrets.
func (e Envoy) Secrets() []string { return []string{e.Secret("*")} }

// Leftovers returns patterns that match what Envoys, and a mantlet that was killed while it wrote, leave: in this part of the directory,
// and half-written files in mantlet's own.
func (e Envoy) Leftovers() (patterns []string) {
	for _, name := range []string{hotRestart + "_*", all(adminSocket), "trial-" + all(trialSocket), all(bootstrap), preflight, ".*.json*", ".*" + Binary + "*", "../.*.json*"} {
		patterns = append(patterns, e.file(name))
	}
	return patterns
}

func (e Envoy) file(name string) string { return filepath.Join(string(e), name) }

// all returns a pattern that matches all names of a format.
func all(format string) string { return strings.NewReplacer("%d", "*", "%s", "*").Replace(format) }
