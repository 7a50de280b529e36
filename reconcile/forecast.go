package reconcile

import (
	"errors"
	"fmt"
	"strings"

	"mantlet/internal/peers"
	"mantlet/internal/sockdiag"
	"mantlet/internal/status"
	"mantlet/render"
	"mantlet/schema"
)

// Forecast implements status.Source.
func (d *Daemon) Forecast(text []byte) (f status.Forecast, err error) {
	mesh, err := render.UnmarshalMesh(text)
	if err != nil {
		return f, fmt.Errorf("reading the mesh: %w", err)
	}
	var have *desired
	d.locked(func() { have = d.have })
	if have == nil {
		return f, errors.New("nothing is in force")
	}
	c := &change{from: have, to: &desired{mesh: mesh}, leads: map[*peers.Peer]bool{}}
	c.raised = mesh.TLS.MinVersion.Compare(have.mesh.TLS.MinVersion) > 0
	c.routes = forbidden(have.mesh, mesh, false)
	c.known, _ = d.Proxy.Peers() // of others it is not known who is connected, as when it is done
	clients, _, err := d.Kernel.Open()
	if err != nil {
		return f, err
	}
	sockets, err := sockdiag.List()
	if err != nil {
		return f, err
	}
	f = status.Forecast{Ingress: map[uint16]map[status.EndReason]int{}, Egress: map[string]map[status.EndReason]int{}}
	for s, mark := range clients {
		if reason := c.forecast(s, mark); reason != "" {
			count(f.Ingress, s.Local.Port(), reason)
		}
	}
	for s := range sockets {
		if reason := c.endpoint(s); reason != "" {
			count(f.Egress, s.Local.String(), reason)
		}
	}
	if rules := render.RulesIn(have.place, mesh, render.Generations{}); endsOutbound(have, rules) {
		f.Outbound, err = d.Kernel.Outbound(rules.Leaves)
	}
	return f, err
}

func count[K comparable](to map[K]map[status.EndReason]int, key K, reason status.EndReason) {
	if to[key] == nil {
		to[key] = map[status.EndReason]int{}
	}
	to[key][reason]++
}

// forecast is reasonToEnd for a state that has no generations yet.
func (c *change) forecast(s sockdiag.Socket, mark render.Mark) status.EndReason {
	mesh := c.to.mesh
	is := schema.PolicyOf(mesh.Ingress, s.Local.Port()).Mode
	mode, _ := render.ModeOf(mark)
	switch {
	case mesh.IngressOff || s.Local.Port() == c.from.mesh.StatusPort || is == schema.ModePassthrough:
		return ""
	case mode != is && (mode != schema.ModeMTLS || is != schema.ModeTLS):
		return status.EndMode
	default:
		return c.client(s)
	}
}

// AddForecast adds to the steps from one mesh to another how many open connections each would end.
func AddForecast(steps []Step, from, to schema.Mesh, f status.Forecast) {
	add := func(begins string, except string, counts map[status.EndReason]int, reasons ...status.EndReason) {
		for i := range steps {
			if !strings.HasPrefix(steps[i].What, begins) || except != "" && strings.HasPrefix(steps[i].What, except) {
				continue
			}
			for _, reason := range reasons {
				steps[i].Ends += counts[reason]
			}
		}
	}
	for _, at := range schema.Parts(from.Ingress, to.Ingress) {
		for port, counts := range f.Ingress {
			if at.Contains(port) {
				add(at.String()+": ", at.String()+": alpn ", counts, status.EndMode, status.EndNotAllowed)
			}
		}
	}
	for _, e := range from.Egress {
		counts, entry := f.Egress[e.Listen.String()], "egress "+title(e)+": "
		add(entry+"removed", "", counts, status.EndEntry)
		add(entry+e.Upstream.String()+" -> ", "", counts, status.EndUpstream)
		add(entry+"server names ", "", counts, status.EndServerNames)
	}
	outbound := "outbound.allow: "
	if from.Outbound.Mode != to.Outbound.Mode {
		outbound = "outbound.mode: "
	}
	add(outbound, "", map[status.EndReason]int{status.EndOutbound: f.Outbound}, status.EndOutbound)
	for _, counts := range f.Ingress {
		add("tls.minVersion: ", "", counts, status.EndTLSVersion)
	}
	for _, counts := range f.Egress {
		add("tls.minVersion: ", "", counts, status.EndTLSVersion)
	}
}
