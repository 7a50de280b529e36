package schema

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
)

// MarshalJSON returns the mesh in the form of the override file. Given as such a file, it makes the same mesh again, unless
// a name holds what YAML does not: control characters, or bytes that are no UTF-8.
func (m Mesh) MarshalJSON() ([]byte, error) {
	f := fileForm{
		TLS: &tlsForm{MinVersion: m.TLS.MinVersion},
		Envoy: &envoyForm{
			Concurrency:        threadsText(strconv.Itoa(m.Envoy.Concurrency)),
			DrainTime:          durationText(m.Envoy.DrainTime.String()),
			ParentShutdownTime: durationText(m.Envoy.ParentShutdownTime.String()),
			LogLevel:           m.Envoy.LogLevel,
		},
		OtherProtocols:   m.OtherProtocols,
		AccessLog:        m.AccessLog,
		SourceAddress:    m.SourceAddress,
		Outbound:         &outboundForm{Mode: m.Outbound.Mode, Allow: texts[allowText](m.Outbound.List())},
		MaxConnectionAge: ageText(noAge),
	}
	if m.MaxConnectionAge > 0 {
		f.MaxConnectionAge = ageText(m.MaxConnectionAge.String())
	}
	for _, in := range m.Ingress {
		f.Ingress = append(f.Ingress, ingressForm{
			Port: portsText(in.Ports.String()), Name: nameText(in.Name), Mode: in.Mode, Allow: texts[sanText](in.Allow),
			ALPN: texts[alpnText](in.ALPN),
		})
	}
	for _, e := range m.Egress {
		f.Egress = append(f.Egress, egressForm{
			Listen: listenText(e.Listen.String()), Name: nameText(e.Name),
			Upstream: upstreamText(e.Upstream.String()), ServerNames: texts[serverNameText](e.ServerNames),
			ALPN: texts[alpnText](e.ALPN),
		})
	}
	for _, p := range m.Probes {
		form := probeForm{Name: probeName(p.Name)}
		switch p.Kind {
		case ProbeHTTP:
			form.HTTP = httpProbeText(p.String())
		case ProbeTCP:
			form.TCP = portText(p.String())
		case ProbeGRPC:
			form.GRPC = grpcProbeText(p.String())
		}
		f.Probes = append(f.Probes, form)
	}
	return json.Marshal(f)
}

// MarshalJSON writes the number that the override file has there.
func (t threadsText) MarshalJSON() ([]byte, error) { return []byte(t), nil }

func texts[T ~string](list []string) []T {
	var all []T
	for _, text := range list {
		all = append(all, T(text))
	}
	return all
}

// Warnings returns what is valid but may not be meant.
func (c Config) Warnings() []Problem {
	var all []Problem
	if c.ingressOff != "" {
		all = append(all, Problem{
			Origin: Origin{Source: c.ingressOff},
			Reason: "is " + ingressDisabled + ": whoever reaches the pod reaches the workload, in plaintext, at every port",
		})
	}
	for _, e := range c.Mesh.Egress {
		if e.ServerNames == nil {
			key := e.Listen.String()
			all = append(all, Problem{
				Origin: c.merged.entries("egress")[key].origin,
				Path:   "egress[" + key + "].serverNames",
				Reason: fmt.Sprintf("is not set: whoever answers as %s is accepted, any workload of the mesh", e.Upstream),
			})
		}
	}
	all = append(all, c.outboundWarnings()...)
	if c.link == "" {
		return all
	}
	for i := range all {
		all[i] = Problem{Origin: all[i].Origin, Reason: "there is a warning, which is withheld, " + withheld(c.link)}
	}
	return slices.Compact(all)
}
