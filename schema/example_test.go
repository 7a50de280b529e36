package schema_test

import (
	"fmt"

	"mantlet/schema"
)

// The environment makes a port TLS for anyone, and the override file asks for certificates there.
func Example() {
	env, err := schema.ParseEnvironment([]string{"EDG_INGRESS_PROXY_CONFIG=web#8080#false"})
	if err != nil {
		fmt.Println(err)
		return
	}
	config, err := env.Merge([]byte("ingress:\n  - {port: 8080, mode: mtls, allow: [frontend]}\n"))
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, entry := range config.Mesh.Ingress {
		fmt.Println(entry.Ports, entry.Mode, entry.Allow)
	}
	// Output: 8080 mtls [frontend]
}

// Every problem is reported, with its place.
func ExampleProblems() {
	env, err := schema.ParseEnvironment([]string{"EDG_INGRESS_PROXY_CONFIG=web#80800#false"})
	if err == nil {
		_, err = env.Load()
	}
	for _, problem := range schema.Problems(err) {
		fmt.Println(problem)
	}
	// Output: EDG_INGRESS_PROXY_CONFIG entry 1: port of "web#80800#false": "80800": must be a port number from 1 to 65535
}
