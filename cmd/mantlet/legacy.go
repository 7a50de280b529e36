package main

import (
	"errors"
	"fmt"
	"strings"

	"mantlet/reconcile"
	"mantlet/reconcile/iptables"
	"mantlet/schema"
)

// tryLegacy says what iptables-legacy does to the pod's connections.
func tryLegacy(tables reconcile.Legacy, process schema.Process) finding {
	const need = "iptables-legacy"
	rules, err := tables.Read()
	path, missing := iptables.Installed()
	denies := strings.Join(rules.Denies, ", ")
	switch {
	case err != nil:
		return wanted(need, "", err, "mantlet goes on without; CAP_NET_ADMIN lets it read them")
	case denies != "" && !process.LiftDefaultDeny:
		return tried(need, "", fmt.Errorf("%s (table filter) drops what comes in over IPv4", denies),
			"set MANTLET_LIFT_DEFAULT_DENY=true, and mantlet removes it once its own rules are in force")
	case denies != "" && missing != nil:
		return tried(need, "", fmt.Errorf("%s (table filter) drops what comes in over IPv4, and mantlet cannot remove it: %w", denies, missing),
			"take the image that has iptables-legacy")
	case len(rules.Others) > 0:
		return wanted(need, "", errors.New(strings.Join(rules.Others, "; ")), "see that they let in what mantlet's rules let in")
	case denies != "":
		return tried(need, fmt.Sprintf("%s (table filter) drops what comes in over IPv4; mantlet removes it by %s once its own rules are in force", denies, path), nil, "")
	}
	return tried(need, "it has no rules for IPv4", nil, "")
}
