package nft

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"iter"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"mantlet/internal/lab"
	"mantlet/internal/status"
	"mantlet/render"
	"mantlet/schema"
)

func TestMain(m *testing.M) {
	lab.Enter()
	if err := flag.Set("test.parallel", "16"); err != nil { // they wait most of the time
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// states are rulesets of every kind.
func states() map[string]render.Ruleset {
	const pass, tls, mtls = schema.ModePassthrough, schema.ModeTLS, schema.ModeMTLS
	return map[string]render.Ruleset{
		"deny all":       render.DenyAll(true),
		"deny all, bare": render.DenyAll(false),
		"only status":    render.OnlyStatus(statusPort),
		"remembered":     render.OnlyStatus(statusPort).Remembering(rules(port1(7890, pass), port1(8080, tls))),
		"status":         render.Rules(schema.Mesh{StatusPort: statusPort, Ingress: []schema.Ingress{port1(8080, tls)}}, render.Generations{}),
		"egress":         render.Rules(schema.Mesh{Egress: listening("127.137.0.1:8081", "[::1]:8082")}, render.Generations{}),
		"none":           rules(),
		"web":            rules(port1(7890, pass), port1(8080, tls)),
		"ranges": rules(port1(1, tls), ports(2, 100, pass), ports(101, 200, tls), ports(201, 300, tls), port1(1000, mtls),
			ports(8000, 8099, mtls), ports(65000, 65535, pass)),
		"last port":       rules(port1(65535, tls)),
		"all ports":       rules(ports(1, 65535, pass)),
		"other protocols": render.Rules(schema.Mesh{OtherProtocols: schema.OtherProtocolsAccept}, render.Generations{}),
		"closed": render.Rules(schema.Mesh{StatusPort: statusPort, Ingress: []schema.Ingress{port1(8080, tls), ports(9000, 9099, mtls)}}, render.Generations{}).
			Closed([]schema.Ports{{First: 1, Last: 9050}, {First: 60000, Last: 65535}}),
		// As while a new TLS minimum waits, where there is no status port.
		"all closed": rules(ports(0, 8079, mtls), port1(8080, tls), ports(8081, 65535, mtls)).
			Closed([]schema.Ports{{First: 0, Last: 8079}, {First: 8080, Last: 8080}, {First: 8081, Last: 65535}}),
		"observe":           render.Rules(schema.Mesh{Outbound: leaving(schema.OutboundObserve)}, render.Generations{}),
		"drop":              render.Rules(schema.Mesh{Outbound: leaving(schema.OutboundDrop)}, render.Generations{}),
		"drop, ingress off": render.Rules(schema.Mesh{IngressOff: true, Outbound: leaving(schema.OutboundDrop)}, render.Generations{}),
		"drop, deny all":    render.OnlyStatus(statusPort).WithOutbound(leaving(schema.OutboundDrop)).Remembering(rules(port1(7890, pass))),
		"drop, bare":        render.DenyAll(false).WithOutbound(leaving(schema.OutboundDrop)),
		"generations": render.Rules(schema.Mesh{Ingress: []schema.Ingress{port1(8080, tls), ports(9000, 9099, mtls)}}, render.Generations{
			Default: render.MaxGeneration,
			Ports:   []render.PortsGeneration{{Ports: schema.Ports{First: 9000, Last: 9000}, Generation: 1}},
		}),
		"1,500 entries": many(1500),
	}
}

// leaving allows something of either family.
func leaving(mode schema.OutboundMode) schema.Outbound {
	o := schema.Outbound{Mode: mode}
	for _, text := range []string{"10.0.0.0/8:5432", "10.1.0.0/16:5432", "192.0.2.7/32:443", "0.0.0.0/0:123", "fd00::/8:443", "2001:db8::7/128:53", "::/0:65535"} {
		i := strings.LastIndexByte(text, ':')
		var port uint16
		if _, err := fmt.Sscan(text[i+1:], &port); err != nil {
			panic(err)
		}
		o.Allow = append(o.Allow, schema.Destination{Prefix: netip.MustParsePrefix(text[:i]), Port: port})
	}
	slices.SortFunc(o.Allow, schema.Destination.Compare)
	return o
}

// listening returns egress entries that listen at these addresses.
func listening(at ...string) (all []schema.Egress) {
	for _, address := range at {
		all = append(all, schema.Egress{Listen: netip.MustParseAddrPort(address)})
	}
	return all
}

// many renders n entries, ranges among them.
func many(n uint16) render.Ruleset {
	var ingress []schema.Ingress
	for i := range n {
		mode := []schema.Mode{schema.ModePassthrough, schema.ModeTLS, schema.ModeMTLS}[i%3]
		ingress = append(ingress, ports(1000+10*i, 1000+10*i+i%2*5, mode))
	}
	return rules(ingress...)
}

func newHost(t *testing.T) *lab.Host {
	t.Helper()
	return newPlace(t).pod
}

// nft runs the real nft on the host.
func nft(t testing.TB, host *lab.Host, args ...string) string {
	t.Helper()
	out, err := host.Run("nft", args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// load puts text into the kernel with the real nft.
func load(t testing.TB, host *lab.Host, text string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "rules.nft")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	nft(t, host, "-f", file)
}

// loadRules loads a ruleset's text. In a user namespace nft has the smaller one of two socket buffers, into which some
// 1,000 elements fit: what is more is added bit by bit.
func loadRules(t testing.TB, host *lab.Host, r render.Ruleset) {
	t.Helper()
	const most = 400
	head := render.Ruleset{Timeouts: r.Timeouts, Lists: r.Lists, Accounts: r.Accounts, Chains: r.Chains}
	var rest []string
	for _, m := range r.Maps {
		n := min(len(m.Elements), most)
		head.Maps = append(head.Maps, render.Map{Name: m.Name, Elements: m.Elements[:n]})
		for chunk := range slices.Chunk(m.Elements[n:], most) {
			var elements []string
			for _, e := range chunk {
				elements = append(elements, fmt.Sprintf("%s : %s", e.Ports, e.Verdict.Text()))
			}
			rest = append(rest, fmt.Sprintf("add element inet mantlet %s { %s }", m.Name, strings.Join(elements, ", ")))
		}
	}
	load(t, host, head.Text())
	for _, text := range rest {
		load(t, host, text)
	}
}

// listing returns the table as nft prints it, without what it says of an owner.
func listing(t testing.TB, host *lab.Host) string {
	t.Helper()
	text := nft(t, host, "-s", "list", "table", "inet", render.Table)
	return owner.ReplaceAllString(text, "{\n")
}

var owner = regexp.MustCompile(`\{( # progname \S+)?\n\tflags (owner)?\n\n`)

// objects returns all of a host's rules as nft prints them in JSON, without what is not for comparison: nft's version,
// handles and the table's owner.
func objects(t testing.TB, host *lab.Host) any {
	t.Helper()
	var all struct {
		Nftables []map[string]any `json:"nftables"`
	}
	if err := json.Unmarshal([]byte(nft(t, host, "-j", "-s", "list", "ruleset")), &all); err != nil {
		t.Fatal(err)
	}
	for _, object := range all.Nftables[1:] {
		for kind, fields := range object {
			delete(fields.(map[string]any), "handle")
			if kind == "table" {
				delete(fields.(map[string]any), "flags")
			}
		}
	}
	return all.Nftables[1:]
}

func TestTextAndCompiledAgree(t *testing.T) {
	t.Parallel()
	for name, r := range states() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			text := newHost(t)
			loadRules(t, text, r)
			if diff := cmp.Diff(r.Text(), listing(t, text)); diff != "" {
				t.Errorf("nft prints the text otherwise (-text +nft):\n%s", diff)
			}
			compiled := newPlace(t)
			compiled.replace(r)
			if diff := cmp.Diff(objects(t, text), objects(t, compiled.pod)); diff != "" {
				t.Errorf("compiled differs from text (-text +compiled):\n%s", diff)
			}
			if diff := cmp.Diff(r.Text(), listing(t, compiled.pod)); diff != "" {
				t.Errorf("nft prints what was compiled otherwise (-text +compiled):\n%s", diff)
			}
		})
	}
}

// modes are the two ways to keep a table.
func modes(t *testing.T, test func(t *testing.T, p *place)) {
	t.Helper()
	for name, owned := range map[string]bool{"owned": true, "not owned": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPlace(t)
			if owned {
				p.own()
			}
			test(t, p)
		})
	}
}

// isLinux reports whether the kernel is of a version or a later one.
func isLinux(t testing.TB, major, minor int) (is bool, release string) {
	t.Helper()
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	release = unix.ByteSliceToString(name.Release[:])
	var haveMajor, haveMinor int
	if _, err := fmt.Sscanf(release, "%d.%d", &haveMajor, &haveMinor); err != nil {
		t.Fatalf("kernel %q: %v", release, err)
	}
	return haveMajor > major || haveMajor == major && haveMinor >= minor, release
}

// takesLinux skips a test that needs something which kernels before a version lack.
func takesLinux(t testing.TB, major, minor int, what string) {
	t.Helper()
	if is, release := isLinux(t, major, minor); !is {
		t.Skipf("%s: from Linux %d.%d on, and this is %s", what, major, minor, release)
	}
}

// own makes the place's table owned, and skips the test on kernels that keep no owner.
func (p *place) own() {
	p.t.Helper()
	takesLinux(p.t, 6, 9, "a table that outlives its owner")
	if owned, err := p.claim(p.table); err != nil || !owned {
		p.t.Fatalf("Own returned %v, %v", owned, err)
	}
}

// claim makes the table a connection's own, on the pod.
func (p *place) claim(table *Table) (owned bool, err error) {
	err = p.pod.Do(func() (err error) {
		owned, err = table.Own()
		return err
	})
	return owned, err
}

func (p *place) check() {
	p.t.Helper()
	if err := p.table.Check(); err != nil {
		p.t.Error(err)
	}
}

func TestReplaceFromAnyStateToAnyOther(t *testing.T) {
	t.Parallel()
	all := states()
	delete(all, "1,500 entries") // more of the same
	modes(t, func(t *testing.T, p *place) {
		from := ""
		for to := range pairs(slices.Collect(maps.Keys(all))) {
			p.replace(all[to])
			if diff := cmp.Diff(inAnyOrder(all[to].Text()), inAnyOrder(listing(t, p.pod))); diff != "" {
				t.Fatalf("from %q to %q (-want +got):\n%s", from, to, diff)
			}
			p.check()
			from = to
		}
	})
}

// pairs goes from each name to each, and to itself.
func pairs(names []string) iter.Seq[string] {
	return func(yield func(string) bool) {
		for i, name := range names {
			if !yield(name) {
				return
			}
			for _, other := range names[i:] {
				if !yield(other) || !yield(name) {
					return
				}
			}
		}
	}
}

// inAnyOrder sorts the maps and sets of a listing: those that stay where rules are replaced come first.
func inAnyOrder(listing string) string {
	sections := section.FindAllString(listing, -1)
	slices.Sort(sections)
	return strings.Join(sections, "") + section.ReplaceAllString(listing, "")
}

var section = regexp.MustCompile(`(?ms)^\t(map|set) \w+ \{\n.*?^\t\}\n\n?`)

func TestReplaceLeavesForeignTablesAlone(t *testing.T) {
	t.Parallel()
	modes(t, func(t *testing.T, p *place) {
		load(t, p.pod, `
			table inet mantlet2 { chain ingress { type filter hook prerouting priority mangle; policy accept; ct mark 1 drop; }; }
			table ip mantlet { set modes { type inet_service; elements = { 80 }; }; chain ingress { tcp dport @modes accept; }; }
		`)
		foreign := func() string {
			return nft(t, p.pod, "-a", "list", "table", "inet", "mantlet2") + nft(t, p.pod, "-a", "list", "table", "ip", "mantlet")
		}
		want := foreign()
		for _, r := range states() {
			p.replace(r)
		}
		if diff := cmp.Diff(want, foreign()); diff != "" {
			t.Errorf("foreign tables changed (-before +after):\n%s", diff)
		}
	})
}

func TestReplaceThatFailsChangesNothing(t *testing.T) {
	t.Parallel()
	bad := func(chain string, rule ...render.Statement) render.Ruleset {
		r := rules()
		for i := range r.Chains {
			if r.Chains[i].Name == chain {
				r.Chains[i].Rules = append(slices.Clip(r.Chains[i].Rules), rule)
			}
		}
		return r
	}
	modes(t, func(t *testing.T, p *place) {
		p.replace(rules(port1(8080, schema.ModeTLS)))
		want := nft(t, p.pod, "-a", "-s", "list", "ruleset")
		for name, r := range map[string]render.Ruleset{
			"refused as it is added": bad("ingress", render.Verdict{Kind: render.Goto, Goto: "nowhere"}),
			"refused by the commit":  bad("ports", render.Verdict{Kind: render.Goto, Goto: "ports"}),
			"refused for its hook":   bad("egress", render.TProxy{To: netip.MustParseAddrPort("127.0.0.1:1")}),
			"not to be compiled":     bad("ingress", render.LookUp{Map: "none"}),
		} {
			if err := p.table.Replace(r); err == nil {
				t.Errorf("%s: it went well", name)
			}
			if diff := cmp.Diff(want, nft(t, p.pod, "-a", "-s", "list", "ruleset")); diff != "" {
				t.Errorf("%s: rules changed (-before +after):\n%s", name, diff)
			}
			p.check()
		}
		p.replace(render.DenyAll(true))
		if diff := cmp.Diff(render.DenyAll(true).Text(), listing(t, p.pod)); diff != "" {
			t.Errorf("after failures (-want +got):\n%s", diff)
		}
	})
}

// A transaction is one message, which must fit into the socket's buffer.
func TestReplaceWithManyEntries(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	small := rules()
	p.replace(small)
	big := many(3000)
	if err := p.table.raw.SetWriteBuffer(128 << 10); err != nil {
		t.Fatal(err)
	}
	if err := p.table.Replace(big); !errors.Is(err, unix.EMSGSIZE) || !strings.Contains(err.Error(), "net.core.wmem_max") {
		t.Errorf("Replace returned %v, want EMSGSIZE and what to do", err)
	}
	if diff := cmp.Diff(small.Text(), listing(t, p.pod)); diff != "" {
		t.Errorf("rules changed (-before +after):\n%s", diff)
	}
	p.check()

	p.table = open(t, p.pod)
	if err := p.table.Replace(big); errors.Is(err, unix.EMSGSIZE) {
		t.Log("net.core.wmem_max is too small here for the rest of the test")
		return
	} else if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(big.Text(), listing(t, p.pod)); diff != "" {
		t.Errorf("3,000 entries (-want +got):\n%s", diff)
	}
	p.check()
}

// Where the kernel's acknowledgements are lost, what the kernel has decides.
func TestReplaceWithoutAcknowledgements(t *testing.T) {
	t.Parallel()
	modes(t, func(t *testing.T, p *place) {
		p.replace(render.DenyAll(true))
		if err := p.table.raw.SetReadBuffer(1); err != nil { // the kernel's least: a few messages
			t.Fatal(err)
		}
		for _, want := range []render.Ruleset{rules(port1(8080, schema.ModeTLS)), many(300), rules()} {
			p.replace(want)
			if diff := cmp.Diff(want.Text(), listing(t, p.pod)); diff != "" {
				t.Fatalf("(-want +got):\n%s", diff)
			}
			p.check()
		}
	})
}

// What Check compares with must never be somebody else's work.
func TestReplaceWhileOthersFlush(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	want := rules()
	for range 30 {
		flushed := make(chan error, 1)
		go func() {
			_, err := p.pod.Run("nft", "flush ruleset")
			flushed <- err
		}()
		for done := false; !done; {
			p.replace(want)
			select {
			case err := <-flushed:
				if err != nil {
					t.Fatal(err)
				}
				done = true
			default:
			}
		}
		intact := strings.Contains(nft(t, p.pod, "-s", "list", "ruleset"), want.Text())
		if err := p.table.Check(); (err == nil) != intact {
			t.Fatalf("Check returned %v; that the table is intact is %v", err, intact)
		}
	}
}

// Between any two rulesets that keep it out, plaintext stays out, streams and datagrams; and Check, called all the while, sees no
// half of a change.
func TestReplaceLeavesNoGap(t *testing.T) {
	t.Parallel()
	modes(t, func(t *testing.T, p *place) {
		all := []render.Ruleset{
			render.DenyAll(true), rules(port1(8080, schema.ModeTLS)), render.DenyAll(false),
			rules(port1(80, schema.ModePassthrough), port1(8080, schema.ModeTLS)),
		}
		p.replace(all[0])
		siege := p.besiege(9000, 8080)
		ctx, cancel := context.WithCancel(t.Context())
		var checking sync.WaitGroup
		checking.Go(func() {
			for ctx.Err() == nil {
				p.check()
			}
		})
		for range 12 {
			for _, r := range all {
				p.replace(r)
			}
		}
		cancel()
		checking.Wait()
		siege()
	})
	// Nobody owns the table, and two keep it.
	t.Run("two", func(t *testing.T) {
		t.Parallel()
		p := newPlace(t)
		both := map[*Table]render.Ruleset{p.table: rules(port1(8080, schema.ModeTLS)), open(t, p.pod): rules(port1(8080, schema.ModeMTLS))}
		p.replace(both[p.table])
		siege := p.besiege(9000, 8080)
		var replacing sync.WaitGroup
		for table, r := range both {
			replacing.Go(func() {
				for range 20 {
					if err := table.Replace(r); err != nil && !errors.Is(err, errBusy) {
						t.Error(err)
					}
				}
			})
		}
		replacing.Wait()
		siege()
	})
}

// besiege speaks plaintext to ports, by streams and by a datagram in each millisecond, until the function that it returns is called: that
// judges whether anything came through.
func (p *place) besiege(ports ...uint16) func() {
	p.t.Helper()
	ctx, cancel := context.WithCancel(p.t.Context())
	var sending sync.WaitGroup
	var sent atomic.Int64
	var workloads []*lab.Workload
	var targets []netip.AddrPort
	for _, port := range ports {
		address := fmt.Sprintf(":%d", port)
		workloads = append(workloads, p.serve(lab.Service{Address: address, Banner: "hello"}), p.serve(lab.Service{Network: "udp", Address: address}))
		targets = append(targets, p.addr(0, port), p.addr(1, port))
	}
	for _, target := range targets {
		sending.Go(func() {
			next := time.NewTicker(time.Millisecond) // a single processor would do nothing else otherwise
			defer next.Stop()
			for ctx.Err() == nil {
				<-next.C
				conn, err := p.outside.Dial(ctx, "udp", target.String()) // each time another connection to conntrack
				if err != nil {
					continue
				}
				if _, err := io.WriteString(conn, lab.Marker); err == nil {
					sent.Add(1)
				}
				_ = conn.Close()
			}
		})
	}
	prober := p.outside.Probe(targets...)
	return func() {
		p.t.Helper()
		cancel()
		sending.Wait()
		if total := prober.Stop().Total(); total.Attempts == 0 || total.Answered > 0 || sent.Load() == 0 {
			p.t.Errorf("the prober saw %+v, beside %d datagrams", total, sent.Load())
		}
		for _, w := range workloads {
			if got := w.Connections(); len(got) > 0 {
				p.t.Errorf("the workload saw %+v", got)
			}
		}
	}
}

func TestOwnedTableIsNobodyElses(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	p.own()
	want := rules(port1(8080, schema.ModeTLS))
	p.replace(want)
	for _, command := range []string{
		"add rule inet mantlet ingress accept",
		"insert rule inet mantlet mtls_in accept",
		"delete element inet mantlet modes { 8080 }",
		"add table inet mantlet { flags dormant; }",
		"flush table inet mantlet",
		"delete table inet mantlet",
	} {
		if _, err := p.pod.Run("nft", command); err == nil {
			t.Errorf("nft %s went well", command)
		}
	}
	nft(t, p.pod, "flush ruleset") // passes it by
	if diff := cmp.Diff(want.Text(), listing(t, p.pod)); diff != "" {
		t.Errorf("the table changed (-want +got):\n%s", diff)
	}
	p.check()
}

func TestOwnedTableOutlivesItsOwner(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	p.own()
	want := rules(port1(8080, schema.ModeTLS))
	p.replace(want)

	second := open(t, p.pod)
	if owned, err := p.claim(second); owned || !errors.Is(err, ErrOwned) {
		t.Errorf("a second Own returned %v, %v", owned, err)
	}
	for what, err := range map[string]error{
		"Replace": second.Replace(rules()), "DenyAll": second.DenyAll(render.Ruleset{}),
	} {
		if !errors.Is(err, ErrOwned) {
			t.Errorf("%s of another process returned %v", what, err)
		}
	}
	p.check()

	if err := p.table.Close(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want.Text(), listing(t, p.pod)); diff != "" {
		t.Errorf("without its owner, the table is (-want +got):\n%s", diff)
	}
	if owned, err := p.claim(second); !owned || err != nil {
		t.Errorf("Own of the next one returned %v, %v", owned, err)
	}
	if diff := cmp.Diff(want.Text(), listing(t, p.pod)); diff != "" {
		t.Errorf("adopted, the table is (-want +got):\n%s", diff)
	}
	p.table = second
	p.replace(rules())
	p.check()
	nft(t, p.pod, "flush ruleset")
	p.check()
}

func TestTableThatWasThereBefore(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	load(t, p.pod, `table inet mantlet {
		set s { type ipv4_addr . inet_service; elements = { 192.0.2.1 . 80 }; }
		counter c { }
		chain ingress { type filter hook input priority filter; policy accept; ip saddr . tcp dport @s counter name c jump other; }
		chain other { accept; }
	}`)
	if owned, err := p.claim(p.table); owned || err != nil {
		t.Errorf("Own returned %v, %v", owned, err)
	}
	want := rules()
	p.replace(want)
	if diff := cmp.Diff(want.Text(), listing(t, p.pod)); diff != "" {
		t.Errorf("the table is (-want +got):\n%s", diff)
	}
	p.check()
}

func TestMissingCapabilityIsNamed(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	p.replace(render.DenyAll(true))
	tried := map[string]error{}
	if err := p.pod.Do(func() error {
		// Capabilities are a thread's, and this one ends with the function.
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var sets [2]unix.CapUserData
		if err := unix.Capget(&header, &sets[0]); err != nil {
			return err
		}
		sets[0].Effective &^= 1 << unix.CAP_NET_ADMIN
		if err := unix.Capset(&header, &sets[0]); err != nil {
			return err
		}
		table, err := Open()
		if err != nil {
			return err
		}
		_, tried["Own"] = table.Own()
		_, tried["Read"] = table.Read()
		_, tried["Mend"] = table.Repair()
		_, tried["Undermining"] = table.Conflicts()
		tried["DenyAll"], tried["Replace"] = table.DenyAll(render.Ruleset{}), table.Replace(rules())
		_, tried["Try"] = table.Try()
		_, tried["CanOwn"] = table.CanOwn()
		return table.Close()
	}); err != nil {
		t.Fatal(err)
	}
	for what, err := range tried {
		if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
			t.Errorf("%s returned %v", what, err)
		}
	}
	p.check()
}

func TestCheckNamesWhatDiffers(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	want := rules(port1(7890, schema.ModePassthrough), port1(8080, schema.ModeTLS))
	// tproxy returns a command that gives another port to the first tproxy rule of a chain.
	tproxy := func(chain string) string {
		for line := range strings.Lines(nft(t, p.pod, "-a", "-s", "list", "chain", "inet", "mantlet", chain)) {
			rule, handle, _ := strings.Cut(strings.TrimSpace(line), " # handle ")
			if other := strings.Replace(rule, ":15006", ":15007", 1); other != rule {
				return fmt.Sprintf("replace rule inet mantlet %s handle %s %s", chain, handle, other)
			}
		}
		t.Fatalf("no tproxy rule in chain %s", chain)
		return ""
	}
	const (
		syn   = "tcp flags syn / fin,syn,rst,ack meta nfproto ipv4 meta l4proto tcp"
		taken = `socket wildcard 0 ct timeout set "tcp_timeouts" ct mark set ct mark & 0xf01fffff | 0x00100000 accept`
	)
	marked := func(mark render.Mark, op string) string {
		return fmt.Sprintf("ct mark & 0x0ff00000 %s 0x%08x", op, uint32(mark))
	}
	for _, test := range []struct {
		change func() string
		names  string
	}{
		{func() string { return "delete element inet mantlet modes { 7890 }" }, "map modes: `7890 : goto passthrough_in` missing"},
		{
			func() string { return "add element inet mantlet answers { 1 : goto passthrough_out }" },
			"map answers: `1 : goto passthrough_out` not wanted",
		},
		{func() string { return "add element inet mantlet modes { 9000-9099 : accept }" }, "map modes: `9000-9099 : accept` not wanted"},
		{
			func() string { return tproxy("mtls_in") },
			"chain mtls_in rule 3: have `" + syn + " tproxy ip to 127.0.0.1:15007 " + taken + "`, want `" + syn + " tproxy ip to 127.0.0.1:15006 " + taken + "`",
		},
		{func() string { return "insert rule inet mantlet ingress accept" }, "chain ingress rule 1: `accept` not wanted"},
		{
			func() string { return "insert rule inet mantlet ingress tcp dport 22 jump mtls_in" },
			"chain ingress rule 1: `tcp dport 22 jump mtls_in` not wanted",
		},
		{
			func() string { return "flush chain inet mantlet passthrough_in" },
			"chain passthrough_in rule 1: `meta l4proto tcp " + marked(render.MarkOutbound, "==") + " counter reject with tcp reset` missing; " +
				"chain passthrough_in rule 2: `meta l4proto tcp " + marked(render.MarkOwn, "==") + " counter reject with tcp reset` missing; " +
				"chain passthrough_in rule 3: `" + marked(render.MarkInside, "==") + " counter drop` missing; " +
				"chain passthrough_in rule 4: `tcp flags syn / fin,syn,rst,ack ct timeout set \"tcp_timeouts\"` missing; " +
				"chain passthrough_in rule 5: `" + render.SetMark{Mark: render.MarkPassthrough}.Text() + " accept` missing",
		},
		{
			func() string { return "chain inet mantlet ingress { policy accept; }" },
			"chain ingress: have `type filter hook prerouting priority mangle; policy accept;`, want `type filter hook prerouting priority mangle; policy drop;`",
		},
		{
			func() string { return "add chain inet mantlet own { type filter hook prerouting priority -300; }" },
			"chain own (type filter hook prerouting priority -300; policy accept;): not wanted",
		},
		{func() string { return "add chain inet mantlet own" }, "chain own: not wanted"},
		{func() string { return "add set inet mantlet own { type inet_service; }" }, "set own: not wanted"},
		{func() string { return "add counter inet mantlet own" }, "object own: not wanted"},
		{func() string { return "add table inet mantlet { flags dormant; }" }, "table flag dormant, which switches every rule off: not wanted"},
		{func() string { return "delete table inet mantlet" }, "the table inet mantlet is not there, or empty"},
		{func() string { return "flush ruleset" }, "the table inet mantlet is not there, or empty"},
	} {
		p.replace(want)
		p.check()
		change := test.change()
		nft(t, p.pod, change)
		err := p.table.Check()
		if err == nil || !strings.HasSuffix(err.Error(), " from outside: "+test.names) {
			t.Errorf("after %q, Check returned\n\t%v\nwant that it names\n\t%s", change, err, test.names)
		}
		found, err := p.table.Repair()
		if err != nil || strings.Join(found, "; ") != test.names {
			t.Errorf("after %q, Mend returned %q, %v", change, found, err)
		}
		p.check()
	}
	p.replace(want)
	if diff := cmp.Diff(want.Text(), listing(t, p.pod)); diff != "" {
		t.Errorf("mended, the table is (-want +got):\n%s", diff)
	}
}

func TestCheckDisregardsTraffic(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	p.replace(rules())
	before := nft(t, p.pod, "list", "ruleset")
	prober := p.outside.Probe(p.addr(0, 9000), p.addr(1, 9000))
	until(t, "counters move", func() bool { return nft(t, p.pod, "list", "ruleset") != before })
	p.check()
	load(t, p.pod, "table inet other { chain c { type filter hook input priority 0; counter; }; }")
	p.check()
	prober.Stop()
}

// TestCountersOnlyGrow: what the rules counted is not lost with them, and connections are counted while they are open.
func TestCountersOnlyGrow(t *testing.T) {
	t.Parallel()
	try(t, "counters", rules(port1(9000, schema.ModePassthrough)), true, func(x *trial) bool {
		refused := func() map[string]uint64 {
			all, err := x.table.Refused()
			if err != nil {
				x.t.Fatal(err)
			}
			return all
		}
		grows := func(reason string, than uint64, port uint16) {
			x.t.Helper()
			if !x.happens(func() bool { _, _ = x.dial(x.target(port), patience); return refused()[reason] > than }) {
				x.t.Fatalf("%s is %d, want more than %d", reason, refused()[reason], than)
			}
		}
		x.replace(render.DenyAll(true))
		grows("not_in_force", 0, 9000)
		x.apply()
		if refused()["not_in_force"] == 0 {
			x.t.Error("what deny-all counted is gone with it")
		}
		for range 3 {
			before := refused()
			grows("envoy_not_listening", before["envoy_not_listening"], 9090)
			after := refused()
			x.replace(rules())
			x.apply()
			for reason, n := range refused() {
				if n < after[reason] {
					x.t.Errorf("%s fell from %d to %d", reason, after[reason], n)
				}
			}
		}
		x.serve(lab.Service{Address: ":9000"})
		conn, err := x.dial(x.target(9000), limit)
		if err != nil || !x.passes(conn, conn) {
			x.t.Fatal(err)
		}
		var open []status.Inbound
		var entries, most int
		count := func() error {
			return x.pod.Do(func() (err error) {
				open, entries, most, err = x.table.Inbound()
				return err
			})
		}
		if err := count(); err != nil || entries == 0 || most < entries || !slices.Contains(open, status.Inbound{Port: 9000, Mode: schema.ModePassthrough, Open: 1}) {
			x.t.Errorf("%+v, %d of %d entries, %v", open, entries, most, err)
		}
		_ = conn.Close()
		return x.happens(func() bool { return count() == nil && len(open) == 0 })
	})
}

// TestMissingOptions: the kernel's trials name what it refuses and nothing else, and whoever makes them disturbs nobody.
func TestMissingOptions(t *testing.T) {
	t.Parallel()
	modes(t, func(t *testing.T, p *place) {
		if err := p.table.DenyAll(render.Ruleset{}); err != nil {
			t.Fatal(err)
		}
		second := open(t, p.pod)
		for _, table := range []*Table{p.table, second} {
			keeps, release := isLinux(t, 6, 9)
			if owned, err := table.CanOwn(); owned != keeps || err != nil {
				t.Errorf("CanOwn returned %v, %v on Linux %s", owned, err, release)
			}
			if err := table.missing(); err != nil {
				t.Errorf("the tests' kernel: %v", err)
			}
			table.needs = append(needs(),
				need{options: "CONFIG_REFUSED", rule: render.Rule{render.Verdict{Kind: render.Goto, Goto: "nowhere"}}},
				need{options: "CONFIG_UNKNOWN", rule: render.Rule{render.LookUp{Map: "none"}}},
			)
			trials, err := table.Try()
			for _, trial := range trials {
				if lacks := trial.Err != nil; lacks != (trial.Options == "CONFIG_REFUSED" || trial.Options == "CONFIG_UNKNOWN") {
					t.Errorf("%s: %v", trial.Options, trial.Err)
				}
			}
			if err != nil || len(trials) != len(table.needs) {
				t.Errorf("Try returned %v, %v", trials, err)
			}
		}
		refused := rules()
		refused.Chains[0].Rules = append(refused.Chains[0].Rules, render.Rule{render.Verdict{Kind: render.Goto, Goto: "nowhere"}})
		err := p.table.Replace(refused)
		if err == nil || !strings.Contains(err.Error(), "lacks CONFIG_REFUSED") || strings.Contains(err.Error(), "NFT_") {
			t.Errorf("Replace returned %v, want that it names what the kernel refuses and nothing else", err)
		}
		if text := err.Error(); !strings.HasPrefix(text, "replacing the table inet mantlet: the kernel lacks CONFIG_REFUSED, tried with ") ||
			strings.Count(text, "CONFIG_REFUSED") != 1 || strings.Count(text, "no such file or directory") != 1 {
			t.Errorf("Replace returned %v, want what lacks, once each", err)
		}
		if diff := cmp.Diff(render.DenyAll(true).Text(), listing(t, p.pod)); diff != "" {
			t.Errorf("a trial left something behind (-want +got):\n%s", diff)
		}
		if tables := nft(t, p.pod, "list", "tables"); strings.Contains(tables, trialTable) {
			t.Errorf("a trial left a table behind:\n%s", tables)
		}
		p.check()
		p.table.needs = needs()
		p.replace(rules())
	})
}

// TestDistinct: however often the kernel says the same, it is told once, and what kind of error it is stays.
func TestDistinct(t *testing.T) {
	t.Parallel()
	missing := fmt.Errorf("lacks this: %w", unix.ENOENT)
	err := distinct(fmt.Errorf("one: %w", errors.Join(missing, fmt.Errorf("two: %w", errors.Join(missing, unix.EINVAL)), unix.EINVAL, missing)))
	if want := "lacks this: no such file or directory\ninvalid argument"; err.Error() != want || !errors.Is(err, unix.EINVAL) || !errors.Is(err, unix.ENOENT) {
		t.Errorf("%v, want %s", err, want)
	}
	if err := distinct(fmt.Errorf("one: %w", unix.EPERM)); err.Error() != "one: operation not permitted" || !errors.Is(err, unix.EPERM) {
		t.Error(err)
	}
	if err := distinct(nil); err != nil {
		t.Error(err)
	}
}

// hear returns the next note of a Watch.
func (p *place) hear(notes <-chan string) string {
	p.t.Helper()
	select {
	case who := <-notes:
		return who
	case <-time.After(limit):
		p.t.Fatal("no note came")
		return ""
	}
}

func TestWatchNamesWhoChangedTheRules(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	p.replace(rules())
	ctx, cancel := context.WithCancel(t.Context())
	notes := p.table.Watch(ctx)
	defer func() { // it ends with its context
		cancel()
		for range notes {
		}
	}()
	p.replace(render.DenyAll(true))
	nft(t, p.pod, "add table inet other")
	if who := p.hear(notes); who != "" { // and nothing of the Table's own change
		t.Errorf("a change to another table is %q's", who)
	}
	for _, change := range []string{
		"add table inet mantlet { flags dormant; }", "insert rule inet mantlet ingress accept", "add set inet mantlet s { type mark; }",
		"add element inet mantlet s { 1 }", "flush chain inet mantlet ingress", "delete table inet mantlet", "add table inet mantlet", "flush ruleset",
	} {
		nft(t, p.pod, change)
		if who := p.hear(notes); who != "nft" {
			t.Errorf("after %q the note is %q", change, who)
		}
	}
	// What nobody took yet is one note, with the names of all.
	m := monitor{notes: make(chan string, 1)}
	for _, who := range []string{"", "a", "", "b", "a"} {
		m.note(who)
	}
	if who := <-m.notes; who != "a, b" {
		t.Errorf("the notes are %q", who)
	}
}

// faulty is a subscription that ends with an error.
type faulty struct {
	subscription

	err error
}

func (f *faulty) Receive() ([]netlink.Message, error) {
	if f.err == nil {
		return f.subscription.Receive()
	}
	if errors.Is(f.err, unix.ENOBUFS) { // a transaction is lost
		const end = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWGEN
		for over := false; !over; {
			messages, err := f.subscription.Receive()
			if err != nil {
				return nil, err
			}
			over = slices.ContainsFunc(messages, func(m netlink.Message) bool { return m.Header.Type == end })
		}
	}
	err := f.err
	f.err = nil
	return nil, err
}

// TestWatchGoesOn: after an error of any kind, of the subscription itself too, there are notes again; and one that tells that
// something may have been missed.
func TestWatchGoesOn(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	p.replace(rules())
	errs := []error{unix.EIO, unix.EMFILE, unix.ENOMEM, unix.ENOBUFS}
	dial := p.table.subscribe
	p.table.subscribe = func() (subscription, error) {
		if len(errs) == 0 {
			return dial()
		}
		err := errs[0]
		errs = errs[1:]
		if errors.Is(err, unix.EMFILE) {
			return nil, err
		}
		conn, failed := dial()
		return &faulty{conn, err}, failed
	}
	notes := p.table.Watch(t.Context())
	for range 3 { // each time that it subscribes anew
		if who := p.hear(notes); who != "" {
			t.Errorf("the note is %q", who)
		}
	}
	nft(t, p.pod, "add table inet mantlet { flags dormant; }")
	if who := p.hear(notes); who != "" {
		t.Errorf("a note that was lost is %q's", who)
	}
	nft(t, p.pod, "flush chain inet mantlet ingress")
	if who := p.hear(notes); who != "nft" {
		t.Errorf("the note is %q", who)
	}
}

// TestWatchOverflows: a process that changes more than the socket's buffer holds is noticed all the same.
func TestWatchOverflows(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	p.replace(rules())
	held := make(chan struct{})
	dial := p.table.subscribe
	p.table.subscribe = func() (subscription, error) {
		conn, err := dial()
		if err == nil {
			err = conn.(*netlink.Conn).SetReadBuffer(1)
		}
		return &slow{conn, held}, err
	}
	notes := p.table.Watch(t.Context())
	loadRules(t, p.pod, many(300))
	close(held)
	p.hear(notes)
	if found, err := p.table.Repair(); err != nil || len(found) < 300 {
		t.Errorf("Mend found %d differences: %v", len(found), err)
	}
}

// slow is a subscription that is not read until held is closed.
type slow struct {
	subscription

	held chan struct{}
}

func (s *slow) Receive() ([]netlink.Message, error) {
	<-s.held
	return s.subscription.Receive()
}
