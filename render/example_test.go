package render_test

import (
	"fmt"
	"strings"

	"mantlet/render"
	"mantlet/schema"
)

// The rules of a pod with one passthrough port.
func ExampleRender() {
	env, err := schema.ParseEnvironment([]string{"EDG_INGRESS_PROXY_CONFIG=metrics#7890#true"})
	if err != nil {
		fmt.Println(err)
		return
	}
	state, err := render.Render(env.Base().Mesh, render.Place{RuntimeDirectory: "/run/mantlet"})
	if err != nil {
		fmt.Println(err)
		return
	}
	for line := range strings.Lines(state.Ruleset.Text()) {
		if strings.Contains(line, "7890") {
			fmt.Print(strings.TrimLeft(line, "\t"))
		}
	}
	// Output:
	// elements = { 7890 : goto passthrough_in }
	// elements = { 7890 : goto passthrough_out }
}

// What a change does to the rules, in words.
func ExampleDiff() {
	rules := func(text string) render.Ruleset {
		env, err := schema.ParseEnvironment([]string{"MANTLET_CONFIG_INLINE=" + text})
		if err != nil {
			panic(err)
		}
		return render.Rules(env.Base().Mesh, render.Generations{})
	}
	want, have := rules("ingress: [{port: 7890, mode: passthrough}]"), rules("ingress: [{port: 8080, mode: passthrough}]")
	for _, line := range render.Diff(want, have) {
		fmt.Println(line)
	}
	// Output:
	// map modes: `7890 : goto passthrough_in` missing
	// map modes: `8080 : goto passthrough_in` not wanted
	// map answers: `7890 : goto passthrough_out` missing
	// map answers: `8080 : goto passthrough_out` not wanted
}
