package rundir_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"mantlet/internal/rundir"
)

// TestLeftovers: whatever may be left in Envoy's part of the directory is matched, and what the next Envoy is to find is not.
func TestLeftovers(t *testing.T) {
	directory := rundir.Directory(t.TempDir())
	e := directory.Envoy()
	if err := os.Mkdir(string(e), 0o700); err != nil {
		t.Fatal(err)
	}
	left := []string{
		e.AdminSocket(7), e.TrialSocket("trial-client", 7), e.TrialSocket("trial-server", 7), e.Bootstrap(7), e.Preflight(),
		e.ParentSocket(120), e.ChildSocket(121),
		filepath.Join(string(e), ".preflight.pb4711"), filepath.Join(string(directory), ".last-good.json4711"),
	}
	stay := []string{
		e.Secret("identity"), e.DiscoverySocket(), directory.StatusSocket(), directory.LastGoodConfig(), directory.LastGoodCertificates(), directory.Ready(),
	}
	for _, file := range slices.Concat(left, stay) {
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	matched := match(t, e.Leftovers())
	for _, file := range left {
		if !slices.Contains(matched, file) {
			t.Errorf("%s is left", file)
		}
	}
	if len(matched) != len(left) {
		t.Errorf("%q are matched, want %q", matched, left)
	}
	if got, want := match(t, e.OfEpoch(7)), left[:4]; !same(got, want) {
		t.Errorf("of the epoch are %q, want %q", got, want)
	}
	if got, want := match(t, e.OfBase(12)), left[5:7]; !same(got, want) {
		t.Errorf("of the base are %q, want %q", got, want)
	}
	if got := match(t, e.Secrets()); !same(got, stay[:1]) {
		t.Errorf("secrets are %q", got)
	}
	for _, file := range []string{directory.StatusSocket(), directory.LastGoodConfig(), directory.LastGoodCertificates(), directory.Ready(), directory.IptablesLock(), string(e), ".last-good.json4711"} {
		if !rundir.IsOwn(filepath.Base(file)) {
			t.Errorf("%s is nobody's", file)
		}
	}
	if rundir.IsOwn("database") {
		t.Error("another's file is mantlet's own")
	}
}

// TestAdminSockets: the newest epoch comes first, as a number.
func TestAdminSockets(t *testing.T) {
	e := rundir.Envoy(t.TempDir())
	for _, file := range []string{e.AdminSocket(9), e.AdminSocket(10), filepath.Join(string(e), "admin-x.sock"), e.AdminSocket(0)} {
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := e.AdminSockets()
	if want := []string{e.AdminSocket(10), e.AdminSocket(9), e.AdminSocket(0), filepath.Join(string(e), "admin-x.sock")}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
}

func match(t *testing.T, patterns []string) (all []string) {
	t.Helper()
	for _, pattern := range patterns {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, files...)
	}
	return all
}

func same(a, b []string) bool {
	return slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b)))
}
