package reconcile

import (
	"encoding/json"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"mantlet/render"
	"mantlet/schema"
)

// drawFile draws an override file from few values, so that two files have much in common. About half of its fields are those of another file, if there is one.
func drawFile(t *rapid.T, like map[string]any) map[string]any {
	file := map[string]any{}
	set := func(into map[string]any, name string, values ...any) { // nil is for a field that is not there
		if v := rapid.SampledFrom(values).Draw(t, name); v != nil {
			into[name] = v
		}
	}
	sans, protocols := []any{nil, []string{"a"}, []string{"a", "b"}}, []any{nil, []string{"h2"}, []string{"h2", "http/1.1"}}
	for _, name := range []string{"ingress", "egress", "probes", "tls", "envoy", "otherProtocols", "accessLog", "outbound", "maxConnectionAge"} {
		if like != nil && rapid.Bool().Draw(t, "keep "+name) {
			if v, ok := like[name]; ok {
				file[name] = v
			}
			continue
		}
		switch name {
		case "ingress":
			all := []any{}
			for _, port := range []any{8080, "8081-8085", 9000} {
				if rapid.Bool().Draw(t, "no entry") {
					continue
				}
				in := map[string]any{"port": port}
				set(in, "mode", "mtls", "tls", "passthrough")
				set(in, "name", nil, "web")
				if in["mode"] == "mtls" {
					set(in, "allow", sans...)
				}
				if in["mode"] != "passthrough" {
					set(in, "alpn", protocols...)
				}
				all = append(all, in)
			}
			file[name] = all
		case "egress":
			all := []any{}
			for _, listen := range []string{"127.137.0.1:8081", "[::1]:8082"} {
				if rapid.Bool().Draw(t, "no entry") {
					continue
				}
				e := map[string]any{"listen": listen}
				set(e, "name", nil, "billing")
				set(e, "upstream", "billing-svc:8080", "192.0.2.7:8080")
				set(e, "serverNames", sans...)
				set(e, "alpn", protocols...)
				all = append(all, e)
			}
			file[name] = all
		case "probes":
			set(file, name, nil, []any{map[string]any{"name": "live", "http": "8080/healthz"}}, []any{map[string]any{"name": "live", "tcp": 8080}})
		case "tls":
			set(file, name, nil, map[string]any{"minVersion": "1.3"})
		case "envoy":
			settings := map[string]any{}
			set(settings, "concurrency", nil, 3)
			set(settings, "drainTime", nil, "20s")
			set(settings, "parentShutdownTime", nil, "5m")
			set(settings, "logLevel", nil, "debug")
			file[name] = settings
		case "otherProtocols":
			set(file, name, nil, "accept")
		case "accessLog":
			set(file, name, nil, "all", "none")
		case "sourceAddress":
			set(file, name, nil, "client")
		case "outbound":
			set(file, name, nil, map[string]any{"mode": "observe"}, map[string]any{"mode": "drop", "allow": []string{"dns", "192.0.2.7:53"}})
		case "maxConnectionAge":
			set(file, name, nil, "24h")
		}
	}
	return file
}

// TestNeedsAreWhatDigestsDecide compares random meshes. Digests and rules decide what mantlet does, and steps are what it says that it does:
// it starts another Envoy exactly where a step needs a hot restart, and does nothing at all where there is no step.
func TestNeedsAreWhatDigestsDecide(t *testing.T) {
	mesh := func(t *rapid.T, file map[string]any, off bool) schema.Mesh {
		var variables []string
		if off { // then the file has nothing to say of what comes in
			variables = []string{"CONTRAST_INGRESS_PROXY_CONFIG=DISABLED"}
			delete(file, "ingress")
			delete(file, "otherProtocols")
			delete(file, "sourceAddress")
		}
		env, err := schema.ParseEnvironment(variables)
		if err != nil {
			t.Fatal(err)
		}
		text, err := json.Marshal(file)
		if err != nil {
			t.Fatal(err)
		}
		config, err := env.Merge(text)
		if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		return config.Mesh
	}
	rapid.Check(t, func(t *rapid.T) {
		first := drawFile(t, nil)
		second := drawFile(t, first)
		mostly := rapid.SampledFrom([]bool{false, false, false, true})
		from, to := mesh(t, first, mostly.Draw(t, "off")), mesh(t, second, mostly.Draw(t, "off"))
		was, err := render.Render(from, render.Place{RuntimeDirectory: "/run/mantlet"})
		if err != nil {
			t.Fatal(err)
		}
		is, err := render.Render(to, render.Place{RuntimeDirectory: "/run/mantlet"})
		if err != nil {
			t.Fatal(err)
		}
		steps := Compare(from, to)
		restart := slices.ContainsFunc(steps, func(s Step) bool { return s.Need == HotRestart })
		if restarts := was.Digest != is.Digest; restart != restarts {
			t.Errorf("another Envoy is started: %v, and the steps are %v", restarts, steps)
		}
		differs := was.Digest != is.Digest || was.Ruleset.Text() != is.Ruleset.Text() || !slices.Equal(from.Probes, to.Probes)
		if differs && len(steps) == 0 {
			t.Error("something is done, and there is no step")
		}
	})
}
