package e2e

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"os/exec"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// get returns the body that a pod gets in a role at an address.
func get(t *testing.T, from corev1.Pod, role, address string) (string, error) {
	t.Helper()
	return output(client(t, from, "get", role, url(role, address)))
}

func url(role, address string) string {
	if role == "plaintext" {
		return "http://" + address
	}
	return "https://" + address
}

// report is what the workload's load and intrude print.
type report struct {
	Tries    int
	Answers  map[string]int // by pod
	Failures map[string]int // by reason
	Slowest  time.Duration  // of those answered
}

func (r report) failed() (n int) {
	for _, count := range r.Failures {
		n += count
	}
	return n
}

// traffic is what the workload's load, intrude or flood does.
type traffic struct {
	t             *testing.T
	cmd           *exec.Cmd
	in            io.Closer
	out, problems bytes.Buffer
}

// begin starts load, intrude or flood in a pod.
func begin(t *testing.T, from corev1.Pod, args ...string) *traffic {
	t.Helper()
	r := &traffic{t: t, cmd: client(t, from, args...)}
	r.cmd.Stdout, r.cmd.Stderr = &r.out, &r.problems
	in, err := r.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.in = in
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = in.Close() })
	return r
}

// close ends it.
func (r *traffic) close() {
	r.t.Helper()
	_ = r.in.Close()
	if err := r.cmd.Wait(); err != nil {
		r.t.Fatalf("%v: %v: %s", r.cmd.Args, err, &r.problems)
	}
}

// stop ends load or intrude and returns what came of it.
func (r *traffic) stop() report {
	r.t.Helper()
	r.close()
	var came report
	if err := json.Unmarshal(r.out.Bytes(), &came); err != nil {
		r.t.Fatalf("%v: %v: %s", r.cmd.Args, err, &r.out)
	}
	return came
}

// siege is what the port of mutual TLS of a pod has to stand: an intruder who speaks plaintext, and a member's load.
type siege struct {
	t             *testing.T
	address       string
	outsider      corev1.Pod
	intruder, own *traffic
}

// besiege begins a siege of the one pod of "web".
func (n namespace) besiege() siege {
	n.t.Helper()
	pod, outsider := n.pod("web"), n.pod("outside")
	// The intruder finds plaintext where there is some.
	if r := begin(n.t, outsider, "intrude", net.JoinHostPort(pod.Status.PodIP, "7890")).stop(); r.Answers[pod.Name] == 0 {
		n.t.Fatalf("the intruder gets no answer where everybody is let in: %+v", r)
	}
	address := net.JoinHostPort(pod.Status.PodIP, "9000")
	return siege{
		n.t, address, outsider,
		begin(n.t, outsider, "intrude", address),
		begin(n.t, outsider, "load", "member", url("member", address)),
	}
}

// answered waits for a member's request that is answered.
func (s siege) answered() {
	s.t.Helper()
	eventually(s.t, "an answer for a member", func() bool {
		_, err := get(s.t, s.outsider, "member", s.address)
		return err == nil
	})
}

// raise ends the siege. Nobody was let in who is not a member, and no more than lost requests of members failed.
func (s siege) raise(lost int) {
	s.t.Helper()
	if r := s.intruder.stop(); len(r.Answers) > 0 || r.Tries == 0 {
		s.t.Errorf("the workload answered in plaintext: %+v", r)
	}
	r := s.own.stop()
	s.t.Logf("members' requests: %+v", r)
	if r.failed() > lost || len(r.Answers) == 0 {
		s.t.Errorf("%d of %d requests failed, want at most %d", r.failed(), r.Tries, lost)
	}
}
